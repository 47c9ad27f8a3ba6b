// Attention in f32: the algorithm of attention.cu with fused multiply-adds; no TF32.
//
// Compiled for each DEPTH. A block has ROWS rows of one operand (queries; for the gradients of k and v keys) and takes as many
// of the other at a time. Eight neighbouring threads share rows: scores, then columns of the results.
#include "attention.cuh"

template <int DP> constexpr int ROWS = DP <= 128 ? 32 : 16;

// ROWS rows of DP floats in shared memory.
template <int DP> struct Rows {
    float *base;
    __device__ __forceinline__ float *at(int row, int col) const { return base + row * float_width(DP) + col; }

    // What lies outside `rows` x `cols` is zero.
    __device__ __forceinline__ void load(const float *from, long long stride, int rows, int cols, bool aligned) const {
        for (int i = threadIdx.x; i < ROWS<DP> * (DP / 4); i += THREADS) {
            const int row = i / (DP / 4), col = i % (DP / 4) * 4;
            float4 v = make_float4(0, 0, 0, 0);
            if (row < rows) {
                const float *p = from + row * stride + col;
                if (aligned && col + 4 <= cols) {
                    v = *(const float4 *)p;
                } else {
                    if (col < cols) v.x = p[0];
                    if (col + 1 < cols) v.y = p[1];
                    if (col + 2 < cols) v.z = p[2];
                    if (col + 3 < cols) v.w = p[3];
                }
            }
            *(float4 *)at(row, col) = v;
        }
    }
};

template <int DP> constexpr int TILE = ROWS<DP> * (DP + 4);

// Rows and columns of a thread: MINE rows of its own from `row` on, OTHERS rows of the other operand, eight apart.
template <int DP> struct Place {
    static constexpr int MINE = ROWS<DP> / 16, OTHERS = ROWS<DP> / 8;
    int row, lane;
    __device__ __forceinline__ Place() : row(threadIdx.x / 8 * MINE), lane(threadIdx.x % 8) {}
};

// Products of a thread's rows with the others.
template <int DP>
__device__ __forceinline__ void scores(const Place<DP> &at, const Rows<DP> &mine, const Rows<DP> &others,
                                       float (*s)[Place<DP>::OTHERS]) {
#pragma unroll
    for (int i = 0; i < at.MINE; ++i)
#pragma unroll
        for (int j = 0; j < at.OTHERS; ++j) s[i][j] = 0;
#pragma unroll 4
    for (int d = 0; d < DP; d += 4) {
        float4 x[at.MINE], y[at.OTHERS];
#pragma unroll
        for (int i = 0; i < at.MINE; ++i) x[i] = *(const float4 *)mine.at(at.row + i, d);
#pragma unroll
        for (int j = 0; j < at.OTHERS; ++j) y[j] = *(const float4 *)others.at(at.lane + 8 * j, d);
#pragma unroll
        for (int i = 0; i < at.MINE; ++i)
#pragma unroll
            for (int j = 0; j < at.OTHERS; ++j)
                s[i][j] = fmaf(x[i].x, y[j].x, fmaf(x[i].y, y[j].y, fmaf(x[i].z, y[j].z, fmaf(x[i].w, y[j].w, s[i][j]))));
    }
}

// Adds the products of a thread's rows of `p` (ROWS columns, in shared memory) with its columns of the others.
template <int DP>
__device__ __forceinline__ void accumulate(const Place<DP> &at, const float *p, const Rows<DP> &others,
                                           float (*acc)[DP / 32][4]) {
#pragma unroll 2
    for (int k = 0; k < ROWS<DP>; ++k) {
        float weight[at.MINE];
#pragma unroll
        for (int i = 0; i < at.MINE; ++i) weight[i] = p[(at.row + i) * weights_width(ROWS<DP>) + k];
#pragma unroll
        for (int j = 0; j < DP / 32; ++j) {
            const float4 v = *(const float4 *)others.at(k, 4 * at.lane + 32 * j);
#pragma unroll
            for (int i = 0; i < at.MINE; ++i) {
                acc[i][j][0] = fmaf(weight[i], v.x, acc[i][j][0]);
                acc[i][j][1] = fmaf(weight[i], v.y, acc[i][j][1]);
                acc[i][j][2] = fmaf(weight[i], v.z, acc[i][j][2]);
                acc[i][j][3] = fmaf(weight[i], v.w, acc[i][j][3]);
            }
        }
    }
}

template <int DP>
__device__ __forceinline__ void write(const Place<DP> &at, float *to, long long stride, int rows, int cols, bool aligned,
                                      float (*acc)[DP / 32][4], const float *factor) {
#pragma unroll
    for (int i = 0; i < at.MINE; ++i) {
        if (at.row + i >= rows) continue;
#pragma unroll
        for (int j = 0; j < DP / 32; ++j) {
            const int col = 4 * at.lane + 32 * j;
            float *out = to + (at.row + i) * stride + col;
            const float *v = acc[i][j], f = factor[i];
            if (aligned && col + 4 <= cols) {
                *(float4 *)out = make_float4(v[0] * f, v[1] * f, v[2] * f, v[3] * f);
            } else {
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    if (col + c < cols) out[c] = v[c] * f;
            }
        }
    }
}

// e to the power of x, of which the product with log2(e) is kept to twice the bits: a large score is as exact as a small one.
__device__ __forceinline__ float exponential(float x) {
    const float t = x * LOG2_E, rest = fmaf(x, LOG2_E, -t) + x * 1.925963033500011e-8f;
    const float e = exp2_approx(t);
    return x < -104.0f ? 0 : fmaf(e * 0.6931471805599453f, rest, e);
}

__device__ __forceinline__ float masked(const Attention &a, float score, int b, int h, int q, int key) {
    float v = score * a.scale;
    if (a.mask && key < a.keys && q < a.queries)
        v += a.mask[b * a.mask_s[0] + h * a.mask_s[1] + q * a.mask_s[2] + key * a.mask_s[3]];
    return key < a.keys ? v : -INFINITY;
}

template <int DP> __device__ __forceinline__ void zero(float (*acc)[DP / 32][4]) {
#pragma unroll
    for (int i = 0; i < Place<DP>::MINE; ++i)
#pragma unroll
        for (int j = 0; j < DP / 32; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[i][j][c] = 0;
}

template <int DP> __device__ __forceinline__ void forward(const Attention &a) {
    constexpr int N = ROWS<DP>;
    extern __shared__ __align__(128) float memory[];
    const Place<DP> at;
    const Rows<DP> tq{memory}, tkv{memory + TILE<DP>};
    float *p = memory + 2 * TILE<DP>;
    const int b = blockIdx.y / a.heads, h = blockIdx.y % a.heads, q0 = blockIdx.x * N;
    tq.load(head<const float>(a.q, a.q_s, b, h, q0), a.q_s[2], a.queries - q0, a.depth, a.q_aligned);
    float acc[at.MINE][DP / 32][4], max[at.MINE], sum[at.MINE];
    zero<DP>(acc);
#pragma unroll
    for (int i = 0; i < at.MINE; ++i) max[i] = -INFINITY, sum[i] = 0;

    for (int k0 = 0; k0 < a.keys; k0 += N) {
        __syncthreads();
        tkv.load(head<const float>(a.k, a.k_s, b, h, k0), a.k_s[2], a.keys - k0, a.depth, a.k_aligned);
        __syncthreads();
        float s[at.MINE][at.OTHERS];
        scores(at, tq, tkv, s);
#pragma unroll
        for (int i = 0; i < at.MINE; ++i) {
            float m = max[i];
#pragma unroll
            for (int j = 0; j < at.OTHERS; ++j) {
                s[i][j] = masked(a, s[i][j], b, h, q0 + at.row + i, k0 + at.lane + 8 * j);
                m = fmaxf(m, s[i][j]);
            }
            for (int step = 4; step > 0; step /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, step));
            // 0 stands for the maximum of a row without keys so far.
            const float shift = m == -INFINITY ? 0 : m, decay = exponential(max[i] - shift);
            max[i] = m;
            sum[i] *= decay;
#pragma unroll
            for (int j = 0; j < DP / 32; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) acc[i][j][c] *= decay;
#pragma unroll
            for (int j = 0; j < at.OTHERS; ++j) {
                const float e = exponential(s[i][j] - shift);
                sum[i] += e;
                p[(at.row + i) * weights_width(N) + at.lane + 8 * j] = e;
            }
        }
        __syncthreads();
        tkv.load(head<const float>(a.v, a.v_s, b, h, k0), a.v_s[2], a.keys - k0, a.width, a.v_aligned);
        __syncthreads();
        accumulate(at, p, tkv, acc);
    }

    float factor[at.MINE];
#pragma unroll
    for (int i = 0; i < at.MINE; ++i) {
        float l = sum[i];
        for (int step = 4; step > 0; step /= 2) l += __shfl_xor_sync(~0u, l, step);
        factor[i] = l > 0 ? 1 / l : 0;
        const int row = q0 + at.row + i;
        if (at.lane == 0 && row < a.queries)
            a.lse[(long long)blockIdx.y * a.queries + row] = l > 0 ? max[i] + log2_approx(l) / LOG2_E : -INFINITY;
    }
    write(at, head<float>(a.out, a.o_s, b, h, q0), a.o_s[2], a.queries - q0, a.width, a.out_aligned, acc, factor);
}

// The gradients of a block's rows, over all rows of the other operand: KEYS makes those of k and v, else that of q.
template <int DP, bool KEYS> __device__ __forceinline__ void backward(const Attention &a) {
    constexpr int N = ROWS<DP>;
    extern __shared__ __align__(128) float memory[];
    const Place<DP> at;
    // q or k, and what its scores are multiplied with in the gradient: the gradient of o, or v.
    const Rows<DP> mine{memory}, mine2{memory + TILE<DP>}, others{memory + 2 * TILE<DP>}, others2{memory + 3 * TILE<DP>};
    float *ds = memory + 4 * TILE<DP>, *p = ds + N * weights_width(N);
    const int b = blockIdx.y / a.heads, h = blockIdx.y % a.heads, first = blockIdx.x * N;
    const auto load_queries = [&](int q0, const Rows<DP> &q, const Rows<DP> &grad) {
        q.load(head<const float>(a.q, a.q_s, b, h, q0), a.q_s[2], a.queries - q0, a.depth, a.q_aligned);
        grad.load(head<const float>(a.grad, a.grad_s, b, h, q0), a.grad_s[2], a.queries - q0, a.width, a.grad_aligned);
    };
    const auto load_keys = [&](int k0, const Rows<DP> &k, const Rows<DP> &v) {
        k.load(head<const float>(a.k, a.k_s, b, h, k0), a.k_s[2], a.keys - k0, a.depth, a.k_aligned);
        v.load(head<const float>(a.v, a.v_s, b, h, k0), a.v_s[2], a.keys - k0, a.width, a.v_aligned);
    };
    float acc[at.MINE][DP / 32][4], acc2[at.MINE][DP / 32][4];
    zero<DP>(acc);
    if (KEYS) zero<DP>(acc2);
    KEYS ? load_keys(first, mine, mine2) : load_queries(first, mine, mine2);

    const int count = KEYS ? a.queries : a.keys;
    for (int start = 0; start < count; start += N) {
        __syncthreads();
        KEYS ? load_queries(start, others, others2) : load_keys(start, others, others2);
        __syncthreads();
        float s[at.MINE][at.OTHERS], g[at.MINE][at.OTHERS];
        scores(at, mine, others, s);
        scores(at, mine2, others2, g);
#pragma unroll
        for (int i = 0; i < at.MINE; ++i)
#pragma unroll
            for (int j = 0; j < at.OTHERS; ++j) {
                const int own = first + at.row + i, other = start + at.lane + 8 * j;
                const int q = KEYS ? other : own, key = KEYS ? own : other;
                // A row past the end, or without keys, has probabilities of zero.
                const long long row = (long long)blockIdx.y * a.queries + q;
                const float lse = q < a.queries ? a.lse[row] : INFINITY, delta = q < a.queries ? a.delta[row] : 0;
                const float v = masked(a, s[i][j], b, h, q, key);
                const float e = q >= a.queries || lse == -INFINITY ? 0 : exponential(v - lse);
                const int to = (at.row + i) * weights_width(N) + at.lane + 8 * j;
                ds[to] = e * (g[i][j] - delta);
                if (KEYS) p[to] = e;
            }
        // Rows of ds and p are those of neighbours in the warp.
        __syncwarp();
        accumulate(at, ds, others, acc);
        if (KEYS) accumulate(at, p, others2, acc2);
    }
    float scale[at.MINE], one[at.MINE];
#pragma unroll
    for (int i = 0; i < at.MINE; ++i) scale[i] = a.scale, one[i] = 1;
    const int rows = (KEYS ? a.keys : a.queries) - first;
    if (KEYS) {
        write(at, head<float>(a.dk, a.dk_s, b, h, first), a.dk_s[2], rows, a.depth, a.out_aligned, acc, scale);
        write(at, head<float>(a.dv, a.dv_s, b, h, first), a.dv_s[2], rows, a.width, a.out_aligned, acc2, one);
    } else {
        write(at, head<float>(a.dq, a.dq_s, b, h, first), a.dq_s[2], rows, a.depth, a.out_aligned, acc, scale);
    }
}

KERNEL(attention_forward, forward<DEPTH>)
KERNEL(attention_delta, delta<float>)
KERNEL(attention_keys, (backward<DEPTH, true>))
KERNEL(attention_queries, (backward<DEPTH, false>))
