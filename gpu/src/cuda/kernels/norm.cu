// LayerNorm and RMSNorm over the last axis, forward and the gradient of x: a block of 128 threads for each row.
//
// Statistics and sums are f32. A row is read again from the cache for each pass over it.
#include "tile.cuh"

struct Norm {
    const void *x, *weight, *bias, *grad;
    void *y;
    float *mean, *scale;
    int width;
    int lead[3];
    long long x_strides[3], grad_strides[3], y_strides[3];
    // 0: f32, 1: bf16, 2: f16
    int weight_type, bias_type;
    int aligned, centred;
    float eps;
};

__device__ __forceinline__ long long row_offset(const int *lead, const long long *strides) {
    int row = blockIdx.x;
    int i2 = row % lead[2], rest = row / lead[2];
    return (rest / lead[1]) * strides[0] + (rest % lead[1]) * strides[1] + i2 * strides[2];
}

// Eight numbers from column `c` on; what lies past `width` is zero.
template <class T> __device__ __forceinline__ void read8(const T *p, int c, int width, bool aligned, float *v) {
    if (aligned && c + 8 <= width) {
        if (sizeof(T) == 4) {
            *(float4 *)v = *(const float4 *)(p + c);
            *(float4 *)(v + 4) = *(const float4 *)(p + c + 4);
        } else {
            union { uint4 words; T values[8]; } u;
            u.words = *(const uint4 *)(p + c);
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] = widen(u.values[j]);
        }
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = c + j < width ? widen(p[c + j]) : 0;
    }
}

template <class T> __device__ __forceinline__ void write8(T *p, int c, int width, bool aligned, const float *v) {
    if (aligned && c + 8 <= width) {
        union { uint4 words[sizeof(T) / 2]; T values[8]; } u;
#pragma unroll
        for (int j = 0; j < 8; ++j) narrow(v[j], u.values[j]);
#pragma unroll
        for (int j = 0; j < (int)sizeof(T) / 2; ++j) ((uint4 *)(p + c))[j] = u.words[j];
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (c + j < width) narrow(v[j], p[c + j]);
    }
}

__device__ __forceinline__ float vector_at(const void *p, int type, int i) {
    return type == 0 ? ((const float *)p)[i] : type == 1 ? widen(((const bf16 *)p)[i]) : widen(((const f16 *)p)[i]);
}

template <class T> __device__ __forceinline__ void forward(const Norm &a) {
    const T *x = (const T *)a.x + row_offset(a.lead, a.x_strides);
    T *y = (T *)a.y + row_offset(a.lead, a.y_strides);
    const int n = a.width, step = blockDim.x * 8, first = threadIdx.x * 8;
    const bool aligned = a.aligned;
    float v[8], mean = 0;
    if (a.centred) {
        float sum = 0;
        for (int c = first; c < n; c += step) {
            read8(x, c, n, aligned, v);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += v[j];
        }
        mean = block_sum(sum) / n;
    }
    float sum = 0;
    for (int c = first; c < n; c += step) {
        read8(x, c, n, aligned, v);
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (c + j < n) sum += (v[j] - mean) * (v[j] - mean);
    }
    const float scale = 1.0f / sqrtf(block_sum(sum) / n + a.eps);
    for (int c = first; c < n; c += step) {
        read8(x, c, n, aligned, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            v[j] = (v[j] - mean) * scale;
            if (a.weight && c + j < n) v[j] *= vector_at(a.weight, a.weight_type, c + j);
            if (a.bias && c + j < n) v[j] += vector_at(a.bias, a.bias_type, c + j);
        }
        write8(y, c, n, aligned, v);
    }
    if (threadIdx.x == 0) {
        a.scale[blockIdx.x] = scale;
        if (a.centred) a.mean[blockIdx.x] = mean;
    }
}

// dx = s (gw - mean(gw) - x^ mean(gw x^)), x^ = (x - m) s; RMSNorm has no middle term.
template <class T> __device__ __forceinline__ void backward(const Norm &a) {
    const T *x = (const T *)a.x + row_offset(a.lead, a.x_strides);
    const T *g = (const T *)a.grad + row_offset(a.lead, a.grad_strides);
    T *dx = (T *)a.y + row_offset(a.lead, a.y_strides);
    const int n = a.width, step = blockDim.x * 8, first = threadIdx.x * 8;
    const bool aligned = a.aligned;
    const float mean = a.centred ? a.mean[blockIdx.x] : 0, scale = a.scale[blockIdx.x];
    float v[8], w[8], sum = 0, dot = 0;
    for (int c = first; c < n; c += step) {
        read8(x, c, n, aligned, v);
        read8(g, c, n, aligned, w);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (a.weight && c + j < n) w[j] *= vector_at(a.weight, a.weight_type, c + j);
            sum += w[j];
            dot += w[j] * (v[j] - mean) * scale;
        }
    }
    sum = a.centred ? block_sum(sum) / n : 0;
    dot = block_sum(dot) / n;
    for (int c = first; c < n; c += step) {
        read8(x, c, n, aligned, v);
        read8(g, c, n, aligned, w);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (a.weight && c + j < n) w[j] *= vector_at(a.weight, a.weight_type, c + j);
            v[j] = scale * (w[j] - sum - (v[j] - mean) * scale * dot);
        }
        write8(dx, c, n, aligned, v);
    }
}

#define NORM(T, NAME)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) norm_forward_##NAME(const __grid_constant__ Norm a) { forward<T>(a); } \
    extern "C" __global__ void __launch_bounds__(128) norm_backward_##NAME(const __grid_constant__ Norm a) { backward<T>(a); }
NORM(float, f32)
NORM(bf16, bf16)
NORM(f16, f16)
