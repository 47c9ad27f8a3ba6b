// Matrix products: out[m, n] (+)= a[m, k] b[k, n] + bias[n], for a batch of up to three axes.
//
// bf16 and f16: tiles through shared memory by cp.async in four stages, products by mma.sync, sums in f32.
// f32, where no TYPE is given: the same tiles with fused multiply-adds; no TF32.
#include "tile.cuh"

struct Gemm {
    const void *a, *b, *bias;
    void *out;
    int m, n, k;
    int batch[3];
    long long a_batch[3], b_batch[3], out_batch[3];
    // f32 uses both strides of an operand; the others only the one that is not 1.
    long long a_row, a_col, b_row, b_col, out_row, out_col;
    // Whether rows begin at multiples of 16 bytes; for the result also that it is of 16 bits without gaps.
    int a_aligned, b_aligned, out_aligned, accumulate, out_f32;
};

struct Offsets { long long a, b, out; };

__device__ __forceinline__ Offsets batch_offsets(const Gemm &g, int z) {
    int z2 = z % g.batch[2], rest = z / g.batch[2];
    int z1 = rest % g.batch[1], z0 = rest / g.batch[1];
    return {z0 * g.a_batch[0] + z1 * g.a_batch[1] + z2 * g.a_batch[2],
            z0 * g.b_batch[0] + z1 * g.b_batch[1] + z2 * g.b_batch[2],
            z0 * g.out_batch[0] + z1 * g.out_batch[1] + z2 * g.out_batch[2]};
}

// The tile of a block.
template <int BM, int BN> __device__ __forceinline__ void place(const Gemm &g, int &m0, int &n0) {
    const int rows = (g.m + BM - 1) / BM, cols = (g.n + BN - 1) / BN, tile = tile_of_block(rows, cols, blockIdx.x);
    m0 = tile / cols * BM;
    n0 = tile % cols * BN;
}

// Adds the bias, and what was there before, to eight neighbours of a row, and writes them.
template <class T>
__device__ __forceinline__ void write8(const Gemm &g, long long offset, int row, int col, const float *v) {
    if (row >= g.m) return;
    const T *bias = (const T *)g.bias;
    const long long at = offset + row * g.out_row + col * g.out_col;
    if (g.out_aligned && !g.accumulate && col + 8 <= g.n) {
        float w[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) w[j] = v[j] + (bias ? widen(bias[col + j]) : 0);
        *(uint4 *)((T *)g.out + at) =
            make_uint4(pack<T>(w[0], w[1]), pack<T>(w[2], w[3]), pack<T>(w[4], w[5]), pack<T>(w[6], w[7]));
        return;
    }
#pragma unroll 1
    for (int j = 0; j < 8 && col + j < g.n; ++j) {
        const float x = v[j] + (bias ? widen(bias[col + j]) : 0);
        if (g.out_f32) {
            float *o = (float *)g.out + at + j * g.out_col;
            *o = g.accumulate ? *o + x : x;
        } else {
            T *o = (T *)g.out + at + j * g.out_col;
            narrow(g.accumulate ? widen(*o) + x : x, *o);
        }
    }
}

// A_FLIPPED: m is the axis of a without gaps, else k. B_FLIPPED: k is that of b, else n.
template <class T, int BM, int BN, int WARPS_M, int WARPS_N, bool A_FLIPPED, bool B_FLIPPED>
__device__ __forceinline__ void gemm_half(const Gemm &g) {
    constexpr int BK = 32, STAGES = 4, THREADS = 32 * WARPS_M * WARPS_N;
    constexpr int TM = BM / WARPS_M / 16, TN = BN / WARPS_N / 16;
    using A = Tile<A_FLIPPED ? BM : BK>;
    using B = Tile<B_FLIPPED ? BK : BN>;
    extern __shared__ __align__(128) unsigned char memory[];
    const uint32_t base = shared_address(memory);
    constexpr uint32_t A_BYTES = BM * BK * 2, STAGE = (BM + BN) * BK * 2;

    int m0, n0;
    place<BM, BN>(g, m0, n0);
    const Offsets offset = batch_offsets(g, blockIdx.y);
    const T *a = (const T *)g.a + offset.a + (A_FLIPPED ? m0 : m0 * g.a_row);
    const T *b = (const T *)g.b + offset.b + (B_FLIPPED ? n0 * g.b_col : n0);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int wm = warp % WARPS_M * (TM * 16), wn = warp / WARPS_M * (TN * 16);

    const int steps = (g.k + BK - 1) / BK;
    auto fetch = [&](int step) {
        if (step < steps) {
            const int k0 = step * BK, left = g.k - k0;
            const A ta{base + step % STAGES * STAGE};
            const B tb{base + step % STAGES * STAGE + A_BYTES};
            if (A_FLIPPED)
                ta.load(a + k0 * g.a_col, g.a_col, left, g.m - m0, g.a_aligned, BK, THREADS);
            else
                ta.load(a + k0, g.a_row, g.m - m0, left, g.a_aligned, BM, THREADS);
            if (B_FLIPPED)
                tb.load(b + k0, g.b_col, g.n - n0, left, g.b_aligned, BN, THREADS);
            else
                tb.load(b + k0 * g.b_row, g.b_row, left, g.n - n0, g.b_aligned, BK, THREADS);
        }
        commit();
    };

    float acc[TM][2 * TN][4];
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < 2 * TN; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) acc[i][j][r] = 0;

#pragma unroll 1
    for (int s = 0; s < STAGES - 1; ++s) fetch(s);
    for (int step = 0; step < steps; ++step) {
        wait<STAGES - 2>();
        __syncthreads();
        fetch(step + STAGES - 1);
        const A ta{base + step % STAGES * STAGE};
        const B tb{base + step % STAGES * STAGE + A_BYTES};
#pragma unroll
        for (int k = 0; k < BK; k += 16) {
            uint32_t ra[TM][4], rb[TN][4];
#pragma unroll
            for (int i = 0; i < TM; ++i) ta.template left<A_FLIPPED>(wm + 16 * i, k, ra[i]);
#pragma unroll
            for (int j = 0; j < TN; ++j) tb.template right<B_FLIPPED>(k, wn + 16 * j, rb[j]);
#pragma unroll
            for (int i = 0; i < TM; ++i)
#pragma unroll
                for (int j = 0; j < TN; ++j) {
                    mma<T>(acc[i][2 * j], ra[i], rb[j][0], rb[j][1]);
                    mma<T>(acc[i][2 * j + 1], ra[i], rb[j][2], rb[j][3]);
                }
        }
    }
    wait<0>();

    // Sixteen rows of a warp at a time go through shared memory, so that they are written in runs of eight.
    const int WIDTH = slab_width(TN * 16);
    float *slab = (float *)memory + warp * 16 * WIDTH;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TM; ++i) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 2 * TN; ++j) {
            float *to = slab + result_row(lane, 0) * WIDTH + 8 * j + result_col(lane, 0);
            *(float2 *)to = make_float2(acc[i][j][0], acc[i][j][1]);
            *(float2 *)(to + 8 * WIDTH) = make_float2(acc[i][j][2], acc[i][j][3]);
        }
        __syncwarp();
#pragma unroll 1
        for (int c = lane; c < 32 * TN; c += 32) {
            const int row = c / (2 * TN), col = c % (2 * TN) * 8;
            write8<T>(g, offset.out, m0 + wm + 16 * i + row, n0 + wn + col, slab + row * WIDTH + col);
        }
    }
}

#ifdef TYPE
#define HALF(NAME, BM, BN, WM, WN, AF, BF)                                                                            \
    extern "C" __global__ void __launch_bounds__(32 * WM * WN) gemm_##NAME(const __grid_constant__ Gemm g) {          \
        gemm_half<TYPE, BM, BN, WM, WN, AF, BF>(g);                                                                   \
    }
HALF(large_nn, 128, 128, 2, 4, false, false)
HALF(large_nt, 128, 128, 2, 4, false, true)
HALF(large_tn, 128, 128, 2, 4, true, false)
HALF(small_nn, 64, 64, 2, 2, false, false)
HALF(small_nt, 64, 64, 2, 2, false, true)
HALF(small_tn, 64, 64, 2, 2, true, false)
#else

// 16 x 16 threads with TM x TN results each, any strides.
template <int TM, int TN> __device__ __forceinline__ void gemm_float(const Gemm &g) {
    constexpr int BM = 16 * TM, BN = 16 * TN, BK = 16;
    __shared__ float as[BK][BM + 4], bs[BK][BN + 4];
    int m0, n0;
    place<BM, BN>(g, m0, n0);
    const Offsets offset = batch_offsets(g, blockIdx.y);
    const float *a = (const float *)g.a + offset.a, *b = (const float *)g.b + offset.b;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float acc[TM][TN];
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TN; ++j) acc[i][j] = 0;
    for (int k0 = 0; k0 < g.k; k0 += BK) {
        // Neighbouring threads read neighbouring elements of whichever axis has no gaps.
#pragma unroll
        for (int r = 0; r < TM; ++r) {
            const int i = threadIdx.x + 256 * r;
            const int m = g.a_col == 1 ? i / BK : i % BM, k = g.a_col == 1 ? i % BK : i / BM;
            as[k][m] = m0 + m < g.m && k0 + k < g.k ? a[(m0 + m) * g.a_row + (k0 + k) * g.a_col] : 0;
        }
#pragma unroll
        for (int r = 0; r < TN; ++r) {
            const int i = threadIdx.x + 256 * r;
            const int n = g.b_row == 1 ? i / BK : i % BN, k = g.b_row == 1 ? i % BK : i / BN;
            bs[k][n] = n0 + n < g.n && k0 + k < g.k ? b[(k0 + k) * g.b_row + (n0 + n) * g.b_col] : 0;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < BK; ++k) {
            float x[TM], y[TN];
#pragma unroll
            for (int i = 0; i < TM; ++i) x[i] = as[k][ty * TM + i];
#pragma unroll
            for (int j = 0; j < TN; ++j) y[j] = bs[k][tx * TN + j];
#pragma unroll
            for (int i = 0; i < TM; ++i)
#pragma unroll
                for (int j = 0; j < TN; ++j) acc[i][j] = fmaf(x[i], y[j], acc[i][j]);
        }
        __syncthreads();
    }
    float *out = (float *)g.out + offset.out;
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TN; ++j) {
            const int row = m0 + ty * TM + i, col = n0 + tx * TN + j;
            if (row >= g.m || col >= g.n) continue;
            float v = acc[i][j];
            if (g.bias) v += ((const float *)g.bias)[col];
            float *o = out + row * g.out_row + col * g.out_col;
            *o = g.accumulate ? *o + v : v;
        }
}

extern "C" __global__ void __launch_bounds__(256) gemm_large(const __grid_constant__ Gemm g) { gemm_float<8, 8>(g); }
extern "C" __global__ void __launch_bounds__(256) gemm_small(const __grid_constant__ Gemm g) { gemm_float<2, 2>(g); }
#endif
