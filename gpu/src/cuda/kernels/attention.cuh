// What the attention kernels share.
#pragma once
#include "tile.cuh"

struct Attention {
    const void *q, *k, *v, *o, *grad;
    const float *mask;
    void *out, *dq, *dk, *dv;
    float *lse, *delta;
    int heads, queries, keys, depth, width;
    // Of batch, head and row; elements of a row have no gaps.
    long long q_s[3], k_s[3], v_s[3], o_s[3], grad_s[3], dq_s[3], dk_s[3], dv_s[3], mask_s[4];
    float scale;
    // Whether rows begin at multiples of 16 bytes; for the results all of them.
    int q_aligned, k_aligned, v_aligned, grad_aligned, out_aligned;
};

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr float LOG2_E = 1.4426950408889634f;

template <class T> __device__ __forceinline__ T *head(const void *p, const long long *s, int b, int h, int row) {
    return (T *)p + b * s[0] + h * s[1] + row * s[2];
}

// The product of o and its gradient, summed over each row: a warp for each.
template <class T> __device__ __forceinline__ void delta(const Attention &a) {
    const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= a.queries) return;
    const int b = blockIdx.y / a.heads, h = blockIdx.y % a.heads;
    const T *o = head<const T>(a.o, a.o_s, b, h, row), *g = head<const T>(a.grad, a.grad_s, b, h, row);
    float sum = 0;
    for (int c = lane; c < a.width; c += 32) sum += widen(o[c]) * widen(g[c]);
    for (int s = 16; s > 0; s /= 2) sum += __shfl_xor_sync(~0u, sum, s);
    if (lane == 0) a.delta[(long long)blockIdx.y * a.queries + row] = sum;
}

#define KERNEL(NAME, FUNCTION)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ Attention a) { FUNCTION(a); }
