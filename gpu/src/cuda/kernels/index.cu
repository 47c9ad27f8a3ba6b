// Moving elements: strided and transposing copies, rows by index.
#include "tile.cuh"

struct Copy {
    const void *from;
    void *to;
    unsigned count;
    unsigned dims[6];
    long long source[6], target[6];
};

template <class U> __device__ __forceinline__ void copy(const Copy &c) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= c.count) return;
    long long from = 0, to = 0;
#pragma unroll
    for (int axis = 5; axis >= 0; --axis) {
        unsigned rest = i / c.dims[axis], at = i - rest * c.dims[axis];
        from += at * c.source[axis];
        to += at * c.target[axis];
        i = rest;
    }
    ((U *)c.to)[to] = ((const U *)c.from)[from];
}

// Rows and columns are the last two axes; the source has no gaps along rows, the target none along columns.
template <class U> __device__ __forceinline__ void transpose(const Copy &c) {
    __shared__ U tile[32][33];
    long long from = 0, to = 0;
    unsigned z = blockIdx.z;
#pragma unroll
    for (int axis = 3; axis >= 0; --axis) {
        unsigned rest = z / c.dims[axis], at = z - rest * c.dims[axis];
        from += at * c.source[axis];
        to += at * c.target[axis];
        z = rest;
    }
    const U *source = (const U *)c.from + from;
    U *target = (U *)c.to + to;
    const unsigned row0 = blockIdx.y * 32, col0 = blockIdx.x * 32, x = threadIdx.x % 32, y = threadIdx.x / 32;
    for (unsigned j = y; j < 32; j += 8)
        if (row0 + x < c.dims[4] && col0 + j < c.dims[5]) tile[j][x] = source[row0 + x + (col0 + j) * c.source[5]];
    __syncthreads();
    for (unsigned j = y; j < 32; j += 8)
        if (row0 + j < c.dims[4] && col0 + x < c.dims[5]) target[(row0 + j) * c.target[4] + col0 + x] = tile[x][j];
}

struct Rows {
    const void *from;
    const unsigned *index;
    void *to;
    unsigned *fault;
    unsigned count, width, rows;
};

// An index past the end writes zeros, and itself plus one to the fault word.
template <class U> __device__ __forceinline__ void gather(const Rows &r) {
    const unsigned at = r.index[blockIdx.x];
    const bool fits = at < r.rows;
    if (!fits && threadIdx.x == 0) *r.fault = at + 1;
    U zero = {};
    for (unsigned c = threadIdx.x; c < r.width; c += blockDim.x)
        ((U *)r.to)[(size_t)blockIdx.x * r.width + c] = fits ? ((const U *)r.from)[(size_t)at * r.width + c] : zero;
}

__device__ __forceinline__ unsigned plus(unsigned a, unsigned b) { return a + b; }
template <class T> __device__ __forceinline__ T plus(T a, T b) {
    T sum;
    narrow(widen(a) + widen(b), sum);
    return sum;
}

// One thread adds all rows of a column, in their order: the same bits each time.
template <class T> __device__ __forceinline__ void scatter_add(const Rows &r) {
    const unsigned c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= r.width) return;
    for (unsigned i = 0; i < r.count; ++i) {
        const unsigned at = r.index[i];
        if (at < r.rows) {
            T *to = (T *)r.to + (size_t)at * r.width + c;
            *to = plus(*to, ((const T *)r.from)[(size_t)i * r.width + c]);
        } else {
            *r.fault = at + 1;
        }
    }
}

#define MOVE(U, BYTES)                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) copy_##BYTES(const __grid_constant__ Copy c) { copy<U>(c); }    \
    extern "C" __global__ void __launch_bounds__(256) gather_##BYTES(const __grid_constant__ Rows r) { gather<U>(r); }
MOVE(unsigned short, 2)
MOVE(unsigned, 4)
MOVE(uint2, 8)
MOVE(uint4, 16)
extern "C" __global__ void __launch_bounds__(256) transpose_2(const __grid_constant__ Copy c) { transpose<unsigned short>(c); }
extern "C" __global__ void __launch_bounds__(256) transpose_4(const __grid_constant__ Copy c) { transpose<unsigned>(c); }

#define SCATTER(T, NAME)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) scatter_add_##NAME(const __grid_constant__ Rows r) { scatter_add<T>(r); }
SCATTER(float, f32)
SCATTER(bf16, bf16)
SCATTER(f16, f16)
SCATTER(unsigned, u32)
