// Panels of quantised matrices, dense: a thread has eight neighbours of a row. Where codes and scales lie, and what they mean:
// `quant::Parts` and `quant::Dequantise` of the engine.
#include "tile.cuh"

struct Panel {
    const unsigned char *codes;
    const signed char *blocks;
    const float *scales;
    void *out;
    unsigned long long width;
    // The first ones of the panel, and how many it has.
    unsigned row, column, rows, columns;
    // Whether each eight neighbours begin at a multiple of eight, in the matrix and in memory.
    unsigned whole;
    float table[16];
};

// What a thread has of the matrix: eight elements from `at` on in a row, of which `left` are in the panel.
struct Run {
    unsigned row;
    unsigned long long at;
    unsigned left;
};

__device__ __forceinline__ float int8(unsigned code) { return float((signed char)code); }
// 2^120 moves the exponent's bias, and makes subnormals normal.
__device__ __forceinline__ float e4m3(unsigned code) {
    const unsigned rest = code & 127;
    const float size = rest == 127 ? __uint_as_float(0x7fc00000) : __uint_as_float(rest << 20) * 0x1p120f;
    return __uint_as_float(__float_as_uint(size) | (code & 128) << 24);
}

// A byte for each element, a scale for each row.
template <float (*NUMBER)(unsigned)> struct Bytes {
    __device__ __forceinline__ static void read(const Panel &p, const float *, const Run &r, float *v) {
        const float scale = p.scales[r.row];
        if (p.whole) {
            const uint2 words = *(const uint2 *)(p.codes + r.at);
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] = NUMBER((j < 4 ? words.x : words.y) >> 8 * (j % 4) & 255) * scale;
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] = j < r.left ? NUMBER(p.codes[r.at + j]) * scale : 0.0f;
        }
    }
};

// Half a byte for each element, a scale for each block of 64.
struct Nf4 {
    // Rounded twice, as on the host, and not once.
    __device__ __forceinline__ static float scale(const Panel &p, unsigned long long block) {
        return __fadd_rn(p.scales[0], __fmul_rn(float(p.blocks[block]), p.scales[1 + block / 256]));
    }

    __device__ __forceinline__ static void read(const Panel &p, const float *table, const Run &r, float *v) {
        if (p.whole) {
            const unsigned codes = *(const unsigned *)(p.codes + r.at / 2);
            const float same = scale(p, r.at / 64);
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] = table[codes >> 4 * j & 15] * same;
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const unsigned long long i = r.at + (j < r.left ? j : 0);
                v[j] = table[p.codes[i / 2] >> i % 2 * 4 & 15] * scale(p, i / 64);
            }
        }
    }
};

__device__ __forceinline__ void write8(float *to, const float *v) {
    *(float4 *)to = make_float4(v[0], v[1], v[2], v[3]);
    *(float4 *)(to + 4) = make_float4(v[4], v[5], v[6], v[7]);
}
template <class T> __device__ __forceinline__ void write8(T *to, const float *v) {
    *(uint4 *)to = make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}

template <class T, class F> __device__ __forceinline__ void dequantise(const Panel &p) {
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = p.table[threadIdx.x];
    __syncthreads();
    const unsigned runs = (p.columns + 7) / 8, i = blockIdx.x * 256 + threadIdx.x;
    const unsigned row = i / runs, column = i % runs * 8;
    if (row >= p.rows) return;
    const Run r = {p.row + row, (p.row + row) * p.width + p.column + column, p.columns - column};
    float v[8];
    F::read(p, table, r, v);
    T *to = (T *)p.out + (size_t)row * p.columns + column;
    if (p.whole) {
        write8(to, v);
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (j < r.left) narrow(v[j], to[j]);
    }
}

#define DEQUANTISE(T, TYPE, F, FORMAT)                                                                                \
    extern "C" __global__ void __launch_bounds__(256) dequantise_##FORMAT##_##TYPE(const __grid_constant__ Panel p) { \
        dequantise<T, F>(p);                                                                                          \
    }
#define FORMATS(T, TYPE)                                                                                              \
    DEQUANTISE(T, TYPE, Bytes<int8>, int8)                                                                            \
    DEQUANTISE(T, TYPE, Bytes<e4m3>, fp8)                                                                             \
    DEQUANTISE(T, TYPE, Nf4, nf4)
FORMATS(float, f32)
FORMATS(bf16, bf16)
FORMATS(f16, f16)
