// Attention softmax(q k^T scale + mask) v by blocks of keys with a running maximum and sum (FlashAttention 2), and its
// gradient from the saved log-sum-exp. No atomics: one kernel sums the gradients of k and v over queries, another that
// of q over keys.
//
// Compiled for each TYPE and each DEPTH. DP is the larger head dim rounded up to 32, 64, 128 or 256; what lies past the head
// dim is zero in shared memory. Each of four warps has sixteen rows. Products by mma.sync; scores, softmax and sums in f32; probabilities are rounded to T
// for the second product.
#include "attention.cuh"

constexpr int ROWS = 16 * WARPS;

// Writes sixteen rows of a warp as T, through shared memory of 16 (COUNT + 8) floats, in runs of eight elements. Each
// thread holds parts of two rows: their factors are `first` and `second`.
template <class T, int COUNT>
__device__ __forceinline__ void write_rows(unsigned char *memory, T *to, long long stride, int rows, int cols,
                                           bool aligned, float (*acc)[4], float first, float second) {
    const int WIDTH = slab_width(COUNT);
    const int lane = threadIdx.x % 32;
    float *slab = (float *)memory + threadIdx.x / 32 * 16 * WIDTH;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < COUNT / 8; ++j) {
        float *at = slab + result_row(lane, 0) * WIDTH + 8 * j + result_col(lane, 0);
        *(float2 *)at = make_float2(acc[j][0] * first, acc[j][1] * first);
        *(float2 *)(at + 8 * WIDTH) = make_float2(acc[j][2] * second, acc[j][3] * second);
    }
    __syncwarp();
#pragma unroll 1
    for (int c = lane; c < 2 * COUNT; c += 32) {
        const int row = c / (COUNT / 8), col = c % (COUNT / 8) * 8;
        if (row >= rows) continue;
        const float *v = slab + row * WIDTH + col;
        T *out = to + row * stride + col;
        if (aligned && col + 8 <= cols) {
            *(uint4 *)out = make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
        } else {
#pragma unroll 1
            for (int j = 0; j < 8 && col + j < cols; ++j) narrow(v[j], out[j]);
        }
    }
}

// Two results of 16x8, side by side, as the left operand of a product.
template <class T> __device__ __forceinline__ void operand(const float (*s)[4], uint32_t *r) {
    r[0] = pack<T>(s[0][0], s[0][1]);
    r[1] = pack<T>(s[0][2], s[0][3]);
    r[2] = pack<T>(s[1][0], s[1][1]);
    r[3] = pack<T>(s[1][2], s[1][3]);
}

template <int DP> constexpr int FORWARD_KEYS = DP <= 128 ? 64 : 32;

template <class T, int DP> __device__ __forceinline__ void forward(const Attention &a) {
    constexpr int BK = FORWARD_KEYS<DP>;
    extern __shared__ __align__(128) unsigned char memory[];
    const uint32_t base = shared_address(memory);
    constexpr uint32_t Q_BYTES = ROWS * DP * 2, KV_BYTES = BK * DP * 2;
    const Tile<DP> tq{base};
    const int b = blockIdx.y / a.heads, h = blockIdx.y % a.heads, q0 = blockIdx.x * ROWS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int steps = (a.keys + BK - 1) / BK;

    auto fetch = [&](int step) {
        if (step < steps) {
            const int k0 = step * BK;
            const Tile<DP> tk{base + Q_BYTES + step % 2 * 2 * KV_BYTES}, tv{tk.base + KV_BYTES};
            tk.load(head<const T>(a.k, a.k_s, b, h, k0), a.k_s[2], a.keys - k0, a.depth, a.k_aligned, BK, THREADS);
            tv.load(head<const T>(a.v, a.v_s, b, h, k0), a.v_s[2], a.keys - k0, a.width, a.v_aligned, BK, THREADS);
        }
        commit();
    };
    tq.load(head<const T>(a.q, a.q_s, b, h, q0), a.q_s[2], a.queries - q0, a.depth, a.q_aligned, ROWS, THREADS);
    fetch(0);

    float acc[DP / 8][4], max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < DP / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) acc[j][r] = 0;

    for (int step = 0; step < steps; ++step) {
        fetch(step + 1);
        wait<1>();
        __syncthreads();
        const Tile<DP> tk{base + Q_BYTES + step % 2 * 2 * KV_BYTES}, tv{tk.base + KV_BYTES};
        float s[BK / 8][4];
#pragma unroll
        for (int j = 0; j < BK / 8; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) s[j][r] = 0;
#pragma unroll 2
        for (int d = 0; d < DP; d += 16) {
            uint32_t rq[4], rk[4];
            tq.template left<false>(16 * warp, d, rq);
#pragma unroll
            for (int j = 0; j < BK / 16; ++j) {
                tk.template right<true>(d, 16 * j, rk);
                mma<T>(s[2 * j], rq, rk[0], rk[1]);
                mma<T>(s[2 * j + 1], rq, rk[2], rk[3]);
            }
        }
        // Scores in units of log 2; keys past the end count as masked out.
        float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int j = 0; j < BK / 8; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int key = step * BK + 8 * j + result_col(lane, r), row = q0 + 16 * warp + result_row(lane, r);
                float v = s[j][r] * (a.scale * LOG2_E);
                if (a.mask && key < a.keys && row < a.queries)
                    v += LOG2_E * a.mask[b * a.mask_s[0] + h * a.mask_s[1] + row * a.mask_s[2] + key * a.mask_s[3]];
                v = key < a.keys ? v : -INFINITY;
                s[j][r] = v;
                largest[r / 2] = fmaxf(largest[r / 2], v);
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float m = largest[half];
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
            m = fmaxf(m, max[half]);
            // 0 stands for the maximum of a row without keys so far.
            const float shift = m == -INFINITY ? 0 : m, decay = exp2_approx(max[half] - shift);
            max[half] = m;
            sum[half] *= decay;
#pragma unroll
            for (int j = 0; j < DP / 8; ++j) {
                acc[j][2 * half] *= decay;
                acc[j][2 * half + 1] *= decay;
            }
#pragma unroll
            for (int j = 0; j < BK / 8; ++j)
#pragma unroll
                for (int r = 2 * half; r < 2 * half + 2; ++r) {
                    s[j][r] = exp2_approx(s[j][r] - shift);
                    sum[half] += s[j][r];
                }
        }
#pragma unroll
        for (int k = 0; k < BK / 16; ++k) {
            uint32_t p[4];
            operand<T>(s + 2 * k, p);
#pragma unroll
            for (int j = 0; j < DP / 16; ++j) {
                uint32_t rv[4];
                tv.template right<false>(16 * k, 16 * j, rv);
                mma<T>(acc[2 * j], p, rv[0], rv[1]);
                mma<T>(acc[2 * j + 1], p, rv[2], rv[3]);
            }
        }
        __syncthreads();
    }
    wait<0>();

    const int first = q0 + 16 * warp;
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float l = sum[half];
        l += __shfl_xor_sync(~0u, l, 1);
        l += __shfl_xor_sync(~0u, l, 2);
        factor[half] = l > 0 ? 1 / l : 0;
        const int row = first + lane / 4 + 8 * half;
        if (lane % 4 == 0 && row < a.queries)
            a.lse[(long long)blockIdx.y * a.queries + row] =
                l > 0 ? (max[half] + log2_approx(l)) / LOG2_E : -INFINITY;
    }
    write_rows<T, DP>(memory, head<T>(a.out, a.o_s, b, h, first), a.o_s[2], a.queries - first, a.width, a.out_aligned,
                      acc, factor[0], factor[1]);
}

// Queries, or keys, of a step of the gradient's kernels.
template <int DP> constexpr int STEP = DP <= 64 ? 64 : DP == 128 ? 32 : 16;

// The gradients of sixteen rows for each warp, over all rows of the other operand: KEYS makes those of k and v, else that of
// q. Those of k and v for DP 256 would not fit the registers: a block makes 128 columns of them, blockIdx.z says which.
template <class T, int DP, bool KEYS> __device__ __forceinline__ void backward(const Attention &a) {
    constexpr int N = STEP<DP>, OUT = KEYS && DP > 128 ? 128 : DP;
    extern __shared__ __align__(128) unsigned char memory[];
    const uint32_t base = shared_address(memory);
    constexpr uint32_t MINE = ROWS * DP * 2, OTHERS = N * DP * 2;
    float *rows = (float *)(memory + 2 * MINE + 4 * OTHERS);
    // q or k, and what its scores are multiplied with in the gradient: the gradient of o, or v.
    const Tile<DP> mine{base}, mine2{base + MINE};
    const int b = blockIdx.y / a.heads, h = blockIdx.y % a.heads, start = blockIdx.x * ROWS, d0 = KEYS ? blockIdx.z * OUT : 0;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int steps = ((KEYS ? a.queries : a.keys) + N - 1) / N;

    auto load_queries = [&](int q0, const Tile<DP> &q, const Tile<DP> &grad, int count) {
        q.load(head<const T>(a.q, a.q_s, b, h, q0), a.q_s[2], a.queries - q0, a.depth, a.q_aligned, count, THREADS);
        grad.load(head<const T>(a.grad, a.grad_s, b, h, q0), a.grad_s[2], a.queries - q0, a.width, a.grad_aligned, count,
                  THREADS);
    };
    auto load_keys = [&](int k0, const Tile<DP> &k, const Tile<DP> &v, int count) {
        k.load(head<const T>(a.k, a.k_s, b, h, k0), a.k_s[2], a.keys - k0, a.depth, a.k_aligned, count, THREADS);
        v.load(head<const T>(a.v, a.v_s, b, h, k0), a.v_s[2], a.keys - k0, a.width, a.v_aligned, count, THREADS);
    };
    auto fetch = [&](int step) {
        if (step < steps) {
            const Tile<DP> others{base + 2 * MINE + step % 2 * 2 * OTHERS}, others2{others.base + OTHERS};
            KEYS ? load_queries(step * N, others, others2, N) : load_keys(step * N, others, others2, N);
        }
        commit();
    };
    // A query past the end, or without keys, has probabilities of zero.
    auto statistics = [&](int q, float &lse, float &delta) {
        const bool there = q < a.queries;
        const long long at = (long long)blockIdx.y * a.queries + q;
        const float l = there ? a.lse[at] : -INFINITY;
        lse = l == -INFINITY ? INFINITY : l * LOG2_E;
        delta = there ? a.delta[at] : 0;
    };
    KEYS ? load_keys(start, mine, mine2, ROWS) : load_queries(start, mine, mine2, ROWS);
    fetch(0);

    float lse[2], delta[2], acc[OUT / 8][4], acc2[KEYS ? OUT / 8 : 1][4];
    if (!KEYS)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            statistics(start + 16 * warp + result_row(lane, 2 * half), lse[half], delta[half]);
#pragma unroll
    for (int j = 0; j < OUT / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            acc[j][r] = 0;
            if (KEYS) acc2[j][r] = 0;
        }

    for (int step = 0; step < steps; ++step) {
        fetch(step + 1);
        if (KEYS)
            for (int i = threadIdx.x; i < N; i += THREADS) statistics(step * N + i, rows[i], rows[N + i]);
        wait<1>();
        __syncthreads();
        const Tile<DP> others{base + 2 * MINE + step % 2 * 2 * OTHERS}, others2{others.base + OTHERS};
        float p[N / 8][4], ds[N / 8][4];
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) p[j][r] = ds[j][r] = 0;
#pragma unroll 2
        for (int d = 0; d < DP; d += 16) {
            uint32_t x[4], x2[4], y[4], y2[4];
            mine.template left<false>(16 * warp, d, x);
            mine2.template left<false>(16 * warp, d, x2);
#pragma unroll
            for (int j = 0; j < N / 16; ++j) {
                others.template right<true>(d, 16 * j, y);
                mma<T>(p[2 * j], x, y[0], y[1]);
                mma<T>(p[2 * j + 1], x, y[2], y[3]);
                others2.template right<true>(d, 16 * j, y2);
                mma<T>(ds[2 * j], x2, y2[0], y2[1]);
                mma<T>(ds[2 * j + 1], x2, y2[2], y2[3]);
            }
        }
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int i = 8 * j + result_col(lane, r), other = step * N + i;
                const int own = start + 16 * warp + result_row(lane, r);
                const int q = KEYS ? other : own, key = KEYS ? own : other;
                float v = p[j][r] * (a.scale * LOG2_E);
                if (a.mask && key < a.keys && q < a.queries)
                    v += LOG2_E * a.mask[b * a.mask_s[0] + h * a.mask_s[1] + q * a.mask_s[2] + key * a.mask_s[3]];
                v = KEYS || key < a.keys ? exp2_approx(v - (KEYS ? rows[i] : lse[r / 2])) : 0;
                p[j][r] = v;
                ds[j][r] = v * (ds[j][r] - (KEYS ? rows[N + i] : delta[r / 2]));
            }
#pragma unroll
        for (int k = 0; k < N / 16; ++k) {
            uint32_t rp[4], rs[4];
            operand<T>(p + 2 * k, rp);
            operand<T>(ds + 2 * k, rs);
#pragma unroll
            for (int j = 0; j < OUT / 16; ++j) {
                uint32_t y[4];
                if (KEYS) {
                    others2.template right<false>(16 * k, d0 + 16 * j, y);
                    mma<T>(acc2[2 * j], rp, y[0], y[1]);
                    mma<T>(acc2[2 * j + 1], rp, y[2], y[3]);
                }
                others.template right<false>(16 * k, d0 + 16 * j, y);
                mma<T>(acc[2 * j], rs, y[0], y[1]);
                mma<T>(acc[2 * j + 1], rs, y[2], y[3]);
            }
        }
        __syncthreads();
    }
    wait<0>();
    const int first = start + 16 * warp;
    if (KEYS) {
        write_rows<T, OUT>(memory, head<T>(a.dk, a.dk_s, b, h, first) + d0, a.dk_s[2], a.keys - first, a.depth - d0,
                           a.out_aligned, acc, a.scale, a.scale);
        write_rows<T, OUT>(memory, head<T>(a.dv, a.dv_s, b, h, first) + d0, a.dv_s[2], a.keys - first, a.width - d0,
                           a.out_aligned, acc2, 1, 1);
    } else {
        write_rows<T, OUT>(memory, head<T>(a.dq, a.dq_s, b, h, first), a.dq_s[2], a.queries - first, a.depth,
                           a.out_aligned, acc, a.scale, a.scale);
    }
}

KERNEL(attention_forward, (forward<TYPE, DEPTH>))
KERNEL(attention_delta, delta<TYPE>)
KERNEL(attention_keys, (backward<TYPE, DEPTH, true>))
KERNEL(attention_queries, (backward<TYPE, DEPTH, false>))
