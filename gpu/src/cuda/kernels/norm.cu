// LayerNorm and RMSNorm over the last axis, forward and backward: with weight and bias, with a modulation, or with a rotation
// after it. TYPE is that of the rows.
//
// LANES threads have a row, each a run of V neighbouring numbers of each of its PARTS at a time, and read it again from the
// cache for each pass over it. What a composition would write between its operations is rounded here as well. Statistics and
// sums are f32, in an order that depends on shapes alone.
#include "tile.cuh"

typedef TYPE T;
constexpr int THREADS = 128;

// Rows of an operand, of f32 where it is wide, else of T.
struct Rows {
    void *p;
    long long strides[3];
    int wide;
};

struct Norm {
    // The scale and the shift of a modulation are weight and bias.
    Rows x, grad, y, weight, bias, cos, sin, weight_grad, bias_grad;
    float *mean, *deviation;
    // Sums of the gradients of bias and weight, or of the weight alone, over a block's rows; none where each row has its own.
    float *parts;
    int lead[3], width;
    // Rows that share a gradient, those of a block, blocks for them, and kinds of sums.
    int rows, size, pieces, sums;
    // Whether all rows and their parts begin at multiples of 16 bytes and are whole eights; whether the mean is taken off.
    int aligned, centred;
    float eps;
};

// A row's place on the leading axes.
struct Place {
    int i[3];
    __device__ __forceinline__ Place(const Norm &a, int row)
        : i{row / a.lead[2] / a.lead[1], row / a.lead[2] % a.lead[1], row % a.lead[2]} {}
    __device__ __forceinline__ long long in(const Rows &r) const {
        return i[0] * r.strides[0] + i[1] * r.strides[1] + i[2] * r.strides[2];
    }
};

__device__ __forceinline__ float rounded(float v) {
    T to;
    narrow(v, to);
    return widen(to);
}

// V numbers from column `c` on: eight at once, or one by one, and zero for what lies past `width`.
template <int V, class E> __device__ __forceinline__ void read_run(const E *p, int c, int width, float *v) {
    if constexpr (V == 8) {
        union { uint4 words[sizeof(E) / 2]; E values[8]; } u;
#pragma unroll
        for (int j = 0; j < (int)sizeof(E) / 2; ++j) u.words[j] = ((const uint4 *)(p + c))[j];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = widen(u.values[j]);
    } else {
#pragma unroll
        for (int j = 0; j < V; ++j) v[j] = c + j < width ? widen(p[c + j]) : 0;
    }
}

template <int V, class E> __device__ __forceinline__ void write_run(E *p, int c, int width, const float *v) {
    if constexpr (V == 8) {
        union { uint4 words[sizeof(E) / 2]; E values[8]; } u;
#pragma unroll
        for (int j = 0; j < 8; ++j) narrow(v[j], u.values[j]);
#pragma unroll
        for (int j = 0; j < (int)sizeof(E) / 2; ++j) ((uint4 *)(p + c))[j] = u.words[j];
    } else {
#pragma unroll
        for (int j = 0; j < V; ++j)
            if (c + j < width) narrow(v[j], p[c + j]);
    }
}

// Numbers from column `c` on of each part of a row of an operand of T, `n` wide.
template <int V, int PARTS>
__device__ __forceinline__ void read(const Norm &a, const Rows &r, const Place &at, int c, int n, float *v) {
#pragma unroll
    for (int p = 0; p < PARTS; ++p) read_run<V>((const T *)r.p + at.in(r) + p * n, c, n, v + V * p);
}

// The same of an operand that may be wide.
template <int V, int PARTS>
__device__ __forceinline__ void read_vector(const Norm &a, const Rows &r, const Place &at, int c, int n, float *v) {
    if (sizeof(T) < 4 && !r.wide) return read<V, PARTS>(a, r, at, c, n, v);
#pragma unroll
    for (int p = 0; p < PARTS; ++p) read_run<V>((const float *)r.p + at.in(r) + p * n, c, n, v + V * p);
}

template <int V, int PARTS>
__device__ __forceinline__ void write(const Norm &a, const Rows &r, const Place &at, int c, int n, const float *v) {
#pragma unroll
    for (int p = 0; p < PARTS; ++p) write_run<V>((T *)r.p + at.in(r) + p * n, c, n, v + V * p);
}

template <int V>
__device__ __forceinline__ void write_vector(const Norm &a, const Rows &r, const Place &at, int c, int n, const float *v) {
    if (sizeof(T) < 4 && !r.wide) return write<V, 1>(a, r, at, c, n, v);
    write_run<V>((float *)r.p + at.in(r), c, n, v);
}

// Adds V numbers to a thread's own sums in shared memory.
template <int V> __device__ __forceinline__ void add(float *sums, int i, const float *v) {
    constexpr int N = V < 4 ? V : 4;
    struct __align__(4 * N) Vector { float v[N]; };
#pragma unroll
    for (int first = 0; first < V; first += N) {
        Vector &at = *(Vector *)(sums + sum_slot(V, i, threadIdx.x, first));
        Vector sum = at;
#pragma unroll
        for (int j = 0; j < N; ++j) sum.v[j] += v[first + j];
        at = sum;
    }
}

// What follows a norm has: what makes `v`, normed, the result; and what makes the gradient `g` of the result that of the
// normed `x`, and adds to sums or writes the gradients of its vectors the first time that it is asked.

// y = x weight + bias
struct Affine {
    static constexpr int LANES = THREADS, PARTS = 1, SUMS = 0;
    template <int V>
    static __device__ __forceinline__ void finish(const Norm &a, const Place &at, int c, int n, float *v) {
        float w[V];
        if (a.weight.p) {
            read_vector<V, 1>(a, a.weight, at, c, n, w);
#pragma unroll
            for (int j = 0; j < V; ++j) v[j] *= w[j];
        }
        if (a.bias.p) {
            read_vector<V, 1>(a, a.bias, at, c, n, w);
#pragma unroll
            for (int j = 0; j < V; ++j) v[j] += w[j];
        }
    }
    template <int V, bool FIRST>
    static __device__ __forceinline__ void undo(const Norm &a, const Place &at, int c, int n, const float *, float *g, int, int,
                                                float *) {
        float w[V];
        if (!a.weight.p) return;
        read_vector<V, 1>(a, a.weight, at, c, n, w);
#pragma unroll
        for (int j = 0; j < V; ++j) g[j] *= w[j];
    }
};

// y = x (1 + scale) + shift
struct Modulated {
    static constexpr int LANES = THREADS, PARTS = 1, SUMS = 2;
    template <int V>
    static __device__ __forceinline__ void finish(const Norm &a, const Place &at, int c, int n, float *v) {
        float scale[V], shift[V];
        read_vector<V, 1>(a, a.weight, at, c, n, scale);
        read_vector<V, 1>(a, a.bias, at, c, n, shift);
#pragma unroll
        for (int j = 0; j < V; ++j) v[j] = rounded(v[j]) * (1 + scale[j]) + shift[j];
    }
    template <int V, bool FIRST>
    static __device__ __forceinline__ void undo(const Norm &a, const Place &at, int c, int n, const float *x, float *g, int k,
                                                int chunks, float *sums) {
        float w[V];
        if (FIRST) {
#pragma unroll
            for (int j = 0; j < V; ++j) w[j] = g[j] * rounded(x[j]);
            if (a.parts) {
                add<V>(sums, k, g);
                add<V>(sums, chunks + k, w);
            } else {
                write_vector<V>(a, a.bias_grad, at, c, n, g);
                write_vector<V>(a, a.weight_grad, at, c, n, w);
            }
        }
        read_vector<V, 1>(a, a.weight, at, c, n, w);
#pragma unroll
        for (int j = 0; j < V; ++j) g[j] = rounded(g[j] * (1 + w[j]));
    }
};

// y = rotated(x weight): pairs are neighbours, or lie in the two halves of a row, which are its parts then.
template <int PARTS_> struct Rotated {
    static constexpr int LANES = 8, PARTS = PARTS_, SUMS = 1;
    // Rotates by the angles, or back by them, and rounds.
    template <int V, bool BACK>
    static __device__ __forceinline__ void rotate(const Norm &a, const Place &at, int c, int n, float *v) {
        constexpr int N = V * PARTS;
        float cos[N], sin[N];
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            read_run<V>((const float *)a.cos.p + at.in(a.cos) + p * n, c, n, cos + V * p);
            read_run<V>((const float *)a.sin.p + at.in(a.sin) + p * n, c, n, sin + V * p);
        }
#pragma unroll
        for (int pair = 0; pair < N / 2; ++pair) {
            const int i = PARTS == 1 ? 2 * pair : pair, j = PARTS == 1 ? i + 1 : i + V;
            const float first = v[i], second = v[j];
            v[i] = rounded(first * cos[i] + second * (BACK ? sin[j] : -sin[i]));
            v[j] = rounded(second * cos[j] + first * (BACK ? -sin[i] : sin[j]));
        }
    }
    template <int V>
    static __device__ __forceinline__ void finish(const Norm &a, const Place &at, int c, int n, float *v) {
        constexpr int N = V * PARTS;
        float w[N];
        read_vector<V, PARTS>(a, a.weight, at, c, n, w);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = rounded(v[j] * w[j]);
        rotate<V, false>(a, at, c, n, v);
    }
    template <int V, bool FIRST>
    static __device__ __forceinline__ void undo(const Norm &a, const Place &at, int c, int n, const float *x, float *g, int k,
                                                int chunks, float *sums) {
        constexpr int N = V * PARTS;
        float w[N];
        rotate<V, true>(a, at, c, n, g);
        if (FIRST) {
#pragma unroll
            for (int j = 0; j < N; ++j) w[j] = g[j] * x[j];
#pragma unroll
            for (int p = 0; p < PARTS; ++p) add<V>(sums, p * chunks + k, w + V * p);
        }
        read_vector<V, PARTS>(a, a.weight, at, c, n, w);
#pragma unroll
        for (int j = 0; j < N; ++j) g[j] *= w[j];
    }
};

// The sum over the threads of a row; each of them gets it.
template <int LANES> __device__ __forceinline__ float row_sum(float v) {
    if constexpr (LANES == THREADS) {
        return block_sum(v);
    } else {
#pragma unroll
        for (int s = LANES / 2; s > 0; s /= 2) v += __shfl_xor_sync(~0u, v, s);
        return v;
    }
}

template <class After, int V> __device__ __forceinline__ void forward(const Norm &a) {
    constexpr int LANES = After::LANES, PARTS = After::PARTS, N = V * PARTS;
    const int row = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES, first = threadIdx.x % LANES * V;
    const Place at(a, row);
    // A row past the last one has no numbers: its threads go along.
    const int n = row < a.rows ? a.width / PARTS : 0;
    float v[N], mean = 0, sum = 0;
    if (a.centred) {
#pragma unroll 1
        for (int c = first; c < n; c += V * LANES) {
            read<V, PARTS>(a, a.x, at, c, n, v);
#pragma unroll
            for (int j = 0; j < N; ++j) sum += v[j];
        }
        mean = row_sum<LANES>(sum) / a.width;
        sum = 0;
    }
#pragma unroll 1
    for (int c = first; c < n; c += V * LANES) {
        read<V, PARTS>(a, a.x, at, c, n, v);
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (c + j % V < n) sum += (v[j] - mean) * (v[j] - mean);
    }
    const float scale = 1.0f / sqrtf(row_sum<LANES>(sum) / a.width + a.eps);
#pragma unroll 1
    for (int c = first; c < n; c += V * LANES) {
        read<V, PARTS>(a, a.x, at, c, n, v);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = (v[j] - mean) * scale;
        After::template finish<V>(a, at, c, n, v);
        write<V, PARTS>(a, a.y, at, c, n, v);
    }
    if (first == 0 && n > 0) {
        a.deviation[row] = scale;
        if (a.centred) a.mean[row] = mean;
    }
}

// dx = s (g - mean(g) - x^ mean(g x^)), x^ = (x - m) s, g the gradient of x^; RMSNorm has no middle term. A block has some
// rows of those that share a gradient.
template <class After, int V> __device__ __forceinline__ void backward(const Norm &a) {
    constexpr int LANES = After::LANES, PARTS = After::PARTS, SUMS = After::SUMS, N = V * PARTS, GROUPS = THREADS / LANES;
    extern __shared__ __align__(16) float sums[];
    const int group = threadIdx.x / LANES, first = threadIdx.x % LANES * V;
    const int width = a.width / PARTS, chunks = (width + V * LANES - 1) / (V * LANES);
    const int start = blockIdx.x % a.pieces * a.size, shared = blockIdx.x / a.pieces * a.rows;
    const int end = shared + (start + a.size < a.rows ? start + a.size : a.rows);
    if (SUMS > 0 && a.parts) {
        for (int i = threadIdx.x; i < V * SUMS * PARTS * chunks * THREADS; i += THREADS) sums[i] = 0;
        __syncthreads();
    }
    for (int row = shared + start + group; row - group < end; row += GROUPS) {
        const Place at(a, row);
        const int n = row < end ? width : 0;
        const float mean = n > 0 && a.centred ? a.mean[row] : 0, scale = n > 0 ? a.deviation[row] : 0;
        float v[N], g[N], sum = 0, dot = 0;
#pragma unroll 1
        for (int c = first, k = 0; c < n; c += V * LANES, ++k) {
            read<V, PARTS>(a, a.x, at, c, n, v);
            read<V, PARTS>(a, a.grad, at, c, n, g);
#pragma unroll
            for (int j = 0; j < N; ++j) v[j] = (v[j] - mean) * scale;
            After::template undo<V, true>(a, at, c, n, v, g, k, chunks, sums);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                sum += g[j];
                dot += g[j] * v[j];
            }
        }
        sum = a.centred ? row_sum<LANES>(sum) / a.width : 0;
        dot = row_sum<LANES>(dot) / a.width;
#pragma unroll 1
        for (int c = first, k = 0; c < n; c += V * LANES, ++k) {
            read<V, PARTS>(a, a.x, at, c, n, v);
            read<V, PARTS>(a, a.grad, at, c, n, g);
#pragma unroll
            for (int j = 0; j < N; ++j) v[j] = (v[j] - mean) * scale;
            After::template undo<V, false>(a, at, c, n, v, g, k, chunks, sums);
#pragma unroll
            for (int j = 0; j < N; ++j) v[j] = scale * (g[j] - sum - v[j] * dot);
            write<V, PARTS>(a, a.y, at, c, n, v);
        }
    }
    if (SUMS == 0 || !a.parts) return;
    __syncthreads();
    for (int i = threadIdx.x; i < SUMS * a.width; i += THREADS) {
        float sum = 0;
        for (int g = 0; g < GROUPS; ++g) sum += sums[sum_place(V, LANES, width, g, i)];
        a.parts[(long long)blockIdx.x * SUMS * a.width + i] = sum;
    }
}

#define KERNEL(NAME, WAY, AFTER)                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ Norm a) {   \
        if (a.aligned)                                                                             \
            WAY<AFTER, 8>(a);                                                                   \
        else                                                                                       \
            WAY<AFTER, 2>(a);                                                                  \
    }
#define NORM(NAME, AFTER) KERNEL(NAME##_forward, forward, AFTER) KERNEL(NAME##_backward, backward, AFTER)
NORM(norm, Affine)
NORM(modulated_norm, Modulated)
NORM(norm_rope_interleaved, Rotated<1>)
NORM(norm_rope_split, Rotated<2>)

// Adds the sums of blocks: 32 columns and 32 runs of blocks, then the runs.
extern "C" __global__ void __launch_bounds__(1024) norm_sums(const __grid_constant__ Norm a) {
    __shared__ float runs[32 * 33];
    const int width = a.sums * a.width, tiles = (width + 31) / 32, shared = blockIdx.x / tiles;
    const int first = blockIdx.x % tiles * 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float *parts = a.parts + (long long)shared * a.pieces * width + first + lane;
    float sum = 0;
    if (first + lane < width)
        for (int piece = warp; piece < a.pieces; piece += 32) sum += parts[(long long)piece * width];
    runs[run_place(warp, lane)] = sum;
    __syncthreads();
    sum = row_sum<32>(runs[run_place(lane, warp)]);
    const int i = first + warp, c = i % a.width;
    if (lane > 0 || i >= width) return;
    const Rows &to = i / a.width + 1 < a.sums ? a.bias_grad : a.weight_grad;
    const long long at = Place(a, shared * a.rows).in(to) + c;
    if (sizeof(T) == 4 || to.wide)
        ((float *)to.p)[at] = sum;
    else
        narrow(sum, ((T *)to.p)[at]);
}
