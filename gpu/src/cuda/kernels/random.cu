// Random numbers: Philox4x32-10 (Salmon et al.), a thread for each block of four; bits, uniform or normal.
#include "tile.cuh"

struct Random {
    void *out;
    unsigned long long seed, counter;
    unsigned count;
};

__device__ __forceinline__ uint4 philox(const Random &r, unsigned long long counter) {
    unsigned a = counter, b = counter >> 32, c = 0, d = 0, k = r.seed, l = r.seed >> 32;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned p = a * 0xd2511f53u, ph = __umulhi(a, 0xd2511f53u);
        const unsigned q = c * 0xcd9e8d57u, qh = __umulhi(c, 0xcd9e8d57u);
        a = qh ^ b ^ k, b = q, c = ph ^ d ^ l, d = p;
        k += 0x9e3779b9u;
        l += 0xbb67ae85u;
    }
    return make_uint4(a, b, c, d);
}

__device__ __forceinline__ float unit(unsigned bits) { return (bits >> 8) * (1.0f / 16777216.0f); }

// The first uniform is moved off zero by half a step, so that its logarithm is finite (Box and Muller).
__device__ __forceinline__ float2 normals(unsigned a, unsigned b) {
    const float radius = sqrtf(-2.0f * logf(unit(a) + 0.5f / 16777216.0f));
    float sine, cosine;
    sincospif(2.0f * unit(b), &sine, &cosine);
    return make_float2(radius * cosine, radius * sine);
}

template <class T> __device__ __forceinline__ void write4(const Random &r, unsigned i, T x, T y, T z, T w) {
    T *out = (T *)r.out + 4 * (size_t)i;
    const unsigned left = r.count - 4 * i;
    out[0] = x;
    if (left > 1) out[1] = y;
    if (left > 2) out[2] = z;
    if (left > 3) out[3] = w;
}

#define RANDOM(NAME)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) random_##NAME(const __grid_constant__ Random r) {               \
        const unsigned i = blockIdx.x * 256 + threadIdx.x;                                                            \
        if (4 * (size_t)i >= r.count) return;                                                                         \
        const uint4 b = philox(r, r.counter + i);                                                                     \
        NAME(r, i, b);                                                                                                \
    }
__device__ __forceinline__ void bits(const Random &r, unsigned i, uint4 b) { write4(r, i, b.x, b.y, b.z, b.w); }
__device__ __forceinline__ void uniform(const Random &r, unsigned i, uint4 b) {
    write4(r, i, unit(b.x), unit(b.y), unit(b.z), unit(b.w));
}
__device__ __forceinline__ void normal(const Random &r, unsigned i, uint4 b) {
    const float2 first = normals(b.x, b.y), second = normals(b.z, b.w);
    write4(r, i, first.x, first.y, second.x, second.y);
}
RANDOM(bits)
RANDOM(uniform)
RANDOM(normal)
