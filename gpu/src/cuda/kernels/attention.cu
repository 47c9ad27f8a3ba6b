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
            const uint32_t p[4] = {pack<T>(s[2 * k][0], s[2 * k][1]), pack<T>(s[2 * k][2], s[2 * k][3]),
                                   pack<T>(s[2 * k + 1][0], s[2 * k + 1][1]), pack<T>(s[2 * k + 1][2], s[2 * k + 1][3])};
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

// The gradients of sixteen keys and values for each warp, over all queries. For DP 256 a block makes 128 columns of
// them, blockIdx.z says which: all would not fit the registers.
template <class T, int DP> __device__ __forceinline__ void backward_keys(const Attention &a) {
    constexpr int BQ = STEP<DP>, OUT = DP > 128 ? 128 : DP;
    extern __shared__ __align__(128) unsigned char memory[];
    const uint32_t base = shared_address(memory);
    constexpr uint32_t KV_BYTES = ROWS * DP * 2, Q_BYTES = BQ * DP * 2;
    float *rows = (float *)(memory + 2 * KV_BYTES + 4 * Q_BYTES);
    const Tile<DP> tk{base}, tv{base + KV_BYTES};
    const int b = blockIdx.y / a.heads, h = blockIdx.y % a.heads, k0 = blockIdx.x * ROWS, d0 = blockIdx.z * OUT;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int steps = (a.queries + BQ - 1) / BQ;

    auto fetch = [&](int step) {
        if (step < steps) {
            const int q0 = step * BQ;
            const Tile<DP> tq{base + 2 * KV_BYTES + step % 2 * 2 * Q_BYTES}, tg{tq.base + Q_BYTES};
            tq.load(head<const T>(a.q, a.q_s, b, h, q0), a.q_s[2], a.queries - q0, a.depth, a.q_aligned, BQ, THREADS);
            tg.load(head<const T>(a.grad, a.grad_s, b, h, q0), a.grad_s[2], a.queries - q0, a.width, a.grad_aligned,
                    BQ, THREADS);
        }
        commit();
    };
    tk.load(head<const T>(a.k, a.k_s, b, h, k0), a.k_s[2], a.keys - k0, a.depth, a.k_aligned, ROWS, THREADS);
    tv.load(head<const T>(a.v, a.v_s, b, h, k0), a.v_s[2], a.keys - k0, a.width, a.v_aligned, ROWS, THREADS);
    fetch(0);

    float dk[OUT / 8][4], dv[OUT / 8][4];
#pragma unroll
    for (int j = 0; j < OUT / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) dk[j][r] = dv[j][r] = 0;

    for (int step = 0; step < steps; ++step) {
        fetch(step + 1);
        // A row past the end, or without keys, has probabilities of zero.
        for (int i = threadIdx.x; i < BQ; i += THREADS) {
            const int q = step * BQ + i;
            const bool there = q < a.queries;
            const long long at = (long long)blockIdx.y * a.queries + q;
            const float lse = there ? a.lse[at] : -INFINITY;
            rows[i] = lse == -INFINITY ? INFINITY : lse * LOG2_E;
            rows[BQ + i] = there ? a.delta[at] : 0;
        }
        wait<1>();
        __syncthreads();
        const Tile<DP> tq{base + 2 * KV_BYTES + step % 2 * 2 * Q_BYTES}, tg{tq.base + Q_BYTES};
        float p[BQ / 8][4], ds[BQ / 8][4];
#pragma unroll
        for (int j = 0; j < BQ / 8; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) p[j][r] = ds[j][r] = 0;
#pragma unroll 2
        for (int d = 0; d < DP; d += 16) {
            uint32_t rk[4], rv[4], rq[4], rg[4];
            tk.template left<false>(16 * warp, d, rk);
            tv.template left<false>(16 * warp, d, rv);
#pragma unroll
            for (int j = 0; j < BQ / 16; ++j) {
                tq.template right<true>(d, 16 * j, rq);
                mma<T>(p[2 * j], rk, rq[0], rq[1]);
                mma<T>(p[2 * j + 1], rk, rq[2], rq[3]);
                tg.template right<true>(d, 16 * j, rg);
                mma<T>(ds[2 * j], rv, rg[0], rg[1]);
                mma<T>(ds[2 * j + 1], rv, rg[2], rg[3]);
            }
        }
#pragma unroll
        for (int j = 0; j < BQ / 8; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int i = 8 * j + result_col(lane, r), q = step * BQ + i;
                const int key = k0 + 16 * warp + result_row(lane, r);
                float v = p[j][r] * (a.scale * LOG2_E);
                if (a.mask && key < a.keys && q < a.queries)
                    v += LOG2_E * a.mask[b * a.mask_s[0] + h * a.mask_s[1] + q * a.mask_s[2] + key * a.mask_s[3]];
                v = exp2_approx(v - rows[i]);
                p[j][r] = v;
                ds[j][r] = v * (ds[j][r] - rows[BQ + i]);
            }
#pragma unroll
        for (int k = 0; k < BQ / 16; ++k) {
            const uint32_t rp[4] = {pack<T>(p[2 * k][0], p[2 * k][1]), pack<T>(p[2 * k][2], p[2 * k][3]),
                                    pack<T>(p[2 * k + 1][0], p[2 * k + 1][1]), pack<T>(p[2 * k + 1][2], p[2 * k + 1][3])};
            const uint32_t rs[4] = {pack<T>(ds[2 * k][0], ds[2 * k][1]), pack<T>(ds[2 * k][2], ds[2 * k][3]),
                                    pack<T>(ds[2 * k + 1][0], ds[2 * k + 1][1]), pack<T>(ds[2 * k + 1][2], ds[2 * k + 1][3])};
#pragma unroll
            for (int j = 0; j < OUT / 16; ++j) {
                uint32_t rg[4], rq[4];
                tg.template right<false>(16 * k, d0 + 16 * j, rg);
                mma<T>(dv[2 * j], rp, rg[0], rg[1]);
                mma<T>(dv[2 * j + 1], rp, rg[2], rg[3]);
                tq.template right<false>(16 * k, d0 + 16 * j, rq);
                mma<T>(dk[2 * j], rs, rq[0], rq[1]);
                mma<T>(dk[2 * j + 1], rs, rq[2], rq[3]);
            }
        }
        __syncthreads();
    }
    wait<0>();
    const int first = k0 + 16 * warp;
    write_rows<T, OUT>(memory, head<T>(a.dk, a.dk_s, b, h, first) + d0, a.dk_s[2], a.keys - first, a.depth - d0,
                       a.out_aligned, dk, a.scale, a.scale);
    write_rows<T, OUT>(memory, head<T>(a.dv, a.dv_s, b, h, first) + d0, a.dv_s[2], a.keys - first, a.width - d0,
                       a.out_aligned, dv, 1, 1);
}

// The gradient of sixteen queries for each warp, over all keys.
template <class T, int DP> __device__ __forceinline__ void backward_queries(const Attention &a) {
    constexpr int BK = STEP<DP>;
    extern __shared__ __align__(128) unsigned char memory[];
    const uint32_t base = shared_address(memory);
    constexpr uint32_t Q_BYTES = ROWS * DP * 2, KV_BYTES = BK * DP * 2;
    const Tile<DP> tq{base}, tg{base + Q_BYTES};
    const int b = blockIdx.y / a.heads, h = blockIdx.y % a.heads, q0 = blockIdx.x * ROWS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int steps = (a.keys + BK - 1) / BK;

    auto fetch = [&](int step) {
        if (step < steps) {
            const int k0 = step * BK;
            const Tile<DP> tk{base + 2 * Q_BYTES + step % 2 * 2 * KV_BYTES}, tv{tk.base + KV_BYTES};
            tk.load(head<const T>(a.k, a.k_s, b, h, k0), a.k_s[2], a.keys - k0, a.depth, a.k_aligned, BK, THREADS);
            tv.load(head<const T>(a.v, a.v_s, b, h, k0), a.v_s[2], a.keys - k0, a.width, a.v_aligned, BK, THREADS);
        }
        commit();
    };
    tq.load(head<const T>(a.q, a.q_s, b, h, q0), a.q_s[2], a.queries - q0, a.depth, a.q_aligned, ROWS, THREADS);
    tg.load(head<const T>(a.grad, a.grad_s, b, h, q0), a.grad_s[2], a.queries - q0, a.width, a.grad_aligned, ROWS,
            THREADS);
    fetch(0);

    float lse[2], delta[2], dq[DP / 8][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int q = q0 + 16 * warp + lane / 4 + 8 * half;
        const bool there = q < a.queries;
        const long long at = (long long)blockIdx.y * a.queries + q;
        const float l = there ? a.lse[at] : -INFINITY;
        lse[half] = l == -INFINITY ? INFINITY : l * LOG2_E;
        delta[half] = there ? a.delta[at] : 0;
    }
#pragma unroll
    for (int j = 0; j < DP / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) dq[j][r] = 0;

    for (int step = 0; step < steps; ++step) {
        fetch(step + 1);
        wait<1>();
        __syncthreads();
        const Tile<DP> tk{base + 2 * Q_BYTES + step % 2 * 2 * KV_BYTES}, tv{tk.base + KV_BYTES};
        float p[BK / 8][4], ds[BK / 8][4];
#pragma unroll
        for (int j = 0; j < BK / 8; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) p[j][r] = ds[j][r] = 0;
#pragma unroll 2
        for (int d = 0; d < DP; d += 16) {
            uint32_t rk[4], rv[4], rq[4], rg[4];
            tq.template left<false>(16 * warp, d, rq);
            tg.template left<false>(16 * warp, d, rg);
#pragma unroll
            for (int j = 0; j < BK / 16; ++j) {
                tk.template right<true>(d, 16 * j, rk);
                mma<T>(p[2 * j], rq, rk[0], rk[1]);
                mma<T>(p[2 * j + 1], rq, rk[2], rk[3]);
                tv.template right<true>(d, 16 * j, rv);
                mma<T>(ds[2 * j], rg, rv[0], rv[1]);
                mma<T>(ds[2 * j + 1], rg, rv[2], rv[3]);
            }
        }
#pragma unroll
        for (int j = 0; j < BK / 8; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int key = step * BK + 8 * j + result_col(lane, r);
                const int q = q0 + 16 * warp + result_row(lane, r);
                float v = p[j][r] * (a.scale * LOG2_E);
                if (a.mask && key < a.keys && q < a.queries)
                    v += LOG2_E * a.mask[b * a.mask_s[0] + h * a.mask_s[1] + q * a.mask_s[2] + key * a.mask_s[3]];
                v = key < a.keys ? exp2_approx(v - lse[r / 2]) : 0;
                ds[j][r] = v * (ds[j][r] - delta[r / 2]);
            }
#pragma unroll
        for (int k = 0; k < BK / 16; ++k) {
            const uint32_t rs[4] = {pack<T>(ds[2 * k][0], ds[2 * k][1]), pack<T>(ds[2 * k][2], ds[2 * k][3]),
                                    pack<T>(ds[2 * k + 1][0], ds[2 * k + 1][1]), pack<T>(ds[2 * k + 1][2], ds[2 * k + 1][3])};
#pragma unroll
            for (int j = 0; j < DP / 16; ++j) {
                uint32_t rk[4];
                tk.template right<false>(16 * k, 16 * j, rk);
                mma<T>(dq[2 * j], rs, rk[0], rk[1]);
                mma<T>(dq[2 * j + 1], rs, rk[2], rk[3]);
            }
        }
        __syncthreads();
    }
    wait<0>();
    const int first = q0 + 16 * warp;
    write_rows<T, DP>(memory, head<T>(a.dq, a.dq_s, b, h, first), a.dq_s[2], a.queries - first, a.depth, a.out_aligned,
                      dq, a.scale, a.scale);
}

KERNEL(attention_forward, (forward<TYPE, DEPTH>))
KERNEL(attention_delta, delta<TYPE>)
KERNEL(attention_keys, (backward_keys<TYPE, DEPTH>))
KERNEL(attention_queries, (backward_queries<TYPE, DEPTH>))
