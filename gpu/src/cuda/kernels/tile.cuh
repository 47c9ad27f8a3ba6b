// What the kernels share: element types, tiles in shared memory, and the matrix instructions of sm_80.
#pragma once
#include <stdint.h>

#include "layout.h"

struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ __forceinline__ void narrow(float v, float &to) { to = v; }
__device__ __forceinline__ void narrow(float v, bf16 &to) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(v)); }
__device__ __forceinline__ void narrow(float v, f16 &to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(v)); }

// Two numbers in one register, the first in the low half.
template <class T> __device__ __forceinline__ uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <> __device__ __forceinline__ uint32_t pack<f16>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Copies 16 bytes to shared memory without waiting; those past `bytes` become zero.
__device__ __forceinline__ void copy_async(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ __forceinline__ void store_shared(uint32_t to, unsigned short v) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(v) : "memory");
}

// d += a b, of 16x16 and 16x8.
template <class T> __device__ __forceinline__ void mma(float *d, const uint32_t *a, uint32_t b0, uint32_t b1);
#define MMA(TYPE, NAME)                                                                                               \
    template <> __device__ __forceinline__ void mma<TYPE>(float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {    \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                           \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                           \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                 \
    }
MMA(bf16, "bf16")
MMA(f16, "f16")

template <bool TRANS> __device__ __forceinline__ void load_matrices(uint32_t at, uint32_t *r) {
    if (TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// A tile of 16-bit elements in shared memory: rows of COLS, in chunks of 16 bytes.
template <int COLS> struct Tile {
    static constexpr int CHUNKS = COLS / 8;
    uint32_t base;

    __device__ __forceinline__ uint32_t at(int row, int chunk) const { return base + tile_offset(COLS, row, chunk); }

    // Fills `count` rows from memory; what lies outside `rows` x `cols` is zero. Aligned means that each row begins at
    // a multiple of 16 bytes.
    template <class T>
    __device__ __forceinline__ void load(const T *from, long long stride, int rows, int cols, bool aligned, int count,
                                         int threads) const {
        for (int i = threadIdx.x; i < count * CHUNKS; i += threads) {
            int row = i / CHUNKS, chunk = i % CHUNKS;
            int left = row < rows ? cols - chunk * 8 : 0;
            left = left < 0 ? 0 : left > 8 ? 8 : left;
            const T *p = left > 0 ? from + row * stride + chunk * 8 : from;
            if (aligned) {
                copy_async(at(row, chunk), p, 2 * left);
            } else {
                const uint32_t to = at(row, chunk);
#pragma unroll 1
                for (int j = 0; j < 8; ++j) store_shared(to + 2 * j, j < left ? p[j].bits : (unsigned short)0);
            }
        }
    }

    // The left operand of a product at (m, k), 16x16. Rows of the tile are m, or k if FLIPPED.
    template <bool FLIPPED> __device__ __forceinline__ void left(int m, int k, uint32_t *r) const {
        const int lane = threadIdx.x % 32;
        load_matrices<FLIPPED>(at(left_row(FLIPPED, m, k, lane), left_chunk(FLIPPED, m, k, lane)), r);
    }

    // The right operand at (k, n), 16x16: registers 0 and 1 are those of the first eight columns. Rows of the tile are
    // k, or n if FLIPPED.
    template <bool FLIPPED> __device__ __forceinline__ void right(int k, int n, uint32_t *r) const {
        const int lane = threadIdx.x % 32;
        load_matrices<!FLIPPED>(at(right_row(FLIPPED, k, n, lane), right_chunk(FLIPPED, k, n, lane)), r);
    }
};

// The sum over a block of up to 1024 threads, in a fixed order; all threads get it.
__device__ __forceinline__ float block_sum(float v) {
    __shared__ float parts[32];
    for (int s = 16; s > 0; s /= 2) v += __shfl_xor_sync(~0u, v, s);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < (int)blockDim.x / 32; ++i) sum += parts[i];
    return sum;
}
