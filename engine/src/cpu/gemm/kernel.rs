//! The micro-kernels: a tile of C in registers, one pass over k.
//!
//! Every element is one chain of multiply-adds in the order of k, whatever the tile's height or the layout of A, so
//! how the work is cut never changes a bit of the result.

use crate::cpu::isa::Isa;

/// One call: `c[mr, nr] (+)= a[mr, k] b[k, nr] (+ bias[nr])`, all f32.
pub(crate) struct Tile {
    pub k: usize,
    pub a: *const f32,
    /// Row kernels: from row to row of A, whose k axis is dense. Column kernels: from k to k, rows are dense.
    pub a_stride: usize,
    pub b: *const f32,
    /// From k to k of B, whose columns are dense.
    pub b_stride: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    /// Adds to C instead of overwriting it.
    pub add: bool,
    /// `nr` floats, or null.
    pub bias: *const f32,
}

/// Safety: the machine has the kernel's instructions; the tile's windows are valid for the kernel's height and `nr`.
pub(crate) type Kernel = unsafe fn(&Tile);

/// The kernels of one instruction set.
pub(crate) struct Kernels {
    /// Greatest height; `row[i]` and `col[i]` have height `i + 1`.
    pub mr: usize,
    /// Width.
    pub nr: usize,
    pub row: &'static [Kernel],
    pub col: &'static [Kernel],
}

/// A vector of f32.
trait Simd {
    type V: Copy;
    const LANES: usize;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
}

/// Arrays that the compiler turns into the vectors every machine of the target has.
struct Lanes4;

impl Simd for Lanes4 {
    type V = [f32; 4];
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 4] {
        // SAFETY: the caller's pointer is valid for four floats; no alignment is asked.
        unsafe { p.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; 4]) {
        // SAFETY: as in `load`.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn mul_add(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        // Without the instruction, `mul_add` would be a call into libm.
        const FUSED: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));
        std::array::from_fn(|i| if FUSED { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] })
    }
}

/// Safety: see [`Kernel`]. Inlined into functions that have the instructions of `S`.
#[inline(always)]
unsafe fn tile<S: Simd, const MR: usize, const NV: usize, const ROW: bool>(t: &Tile) {
    // SAFETY: the caller's promise: A has MR rows of k, B k rows and C MR rows of NV vectors.
    unsafe {
        let mut acc = [[S::splat(0.0); NV]; MR];
        // One pointer for three rows: more would not fit into the general registers.
        let mut rows = [t.a; 4];
        if ROW {
            for (q, p) in rows.iter_mut().enumerate().take(MR.div_ceil(3)) {
                *p = t.a.add(3 * q * t.a_stride);
            }
        }
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.k {
            let mut bv = [S::splat(0.0); NV];
            for (v, x) in bv.iter_mut().enumerate() {
                *x = S::load(b.add(v * S::LANES));
            }
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = S::splat(if ROW { *rows[i / 3].add(i % 3 * t.a_stride) } else { *a.add(i) });
                for (acc, &b) in acc.iter_mut().zip(&bv) {
                    *acc = S::mul_add(x, b, *acc);
                }
            }
            b = b.add(t.b_stride);
            if ROW {
                for p in rows.iter_mut().take(MR.div_ceil(3)) {
                    *p = p.add(1);
                }
            } else {
                a = a.add(t.a_stride);
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            for (v, &x) in acc.iter().enumerate() {
                let c = t.c.add(i * t.c_stride + v * S::LANES);
                let mut x = x;
                if !t.bias.is_null() {
                    x = S::add(x, S::load(t.bias.add(v * S::LANES)));
                }
                if t.add {
                    x = S::add(x, S::load(c));
                }
                S::store(c, x);
            }
        }
    }
}

/// Safety: see [`Kernel`].
unsafe fn portable<const MR: usize, const ROW: bool>(t: &Tile) {
    // SAFETY: the caller's promise.
    unsafe { tile::<Lanes4, MR, 2, ROW>(t) }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Simd, Tile, tile};
    use std::arch::x86_64::*;

    macro_rules! simd {
        ($name:ident, $v:ty, $lanes:literal, $splat:ident $load:ident $store:ident $add:ident $fma:ident) => {
            struct $name;
            impl Simd for $name {
                type V = $v;
                const LANES: usize = $lanes;
                #[inline(always)]
                unsafe fn splat(x: f32) -> $v {
                    // SAFETY: inlined into functions with the instructions; pointers are the caller's promise.
                    unsafe { $splat(x) }
                }
                #[inline(always)]
                unsafe fn load(p: *const f32) -> $v {
                    // SAFETY: as above.
                    unsafe { $load(p) }
                }
                #[inline(always)]
                unsafe fn store(p: *mut f32, v: $v) {
                    // SAFETY: as above.
                    unsafe { $store(p, v) }
                }
                #[inline(always)]
                unsafe fn add(a: $v, b: $v) -> $v {
                    // SAFETY: as above.
                    unsafe { $add(a, b) }
                }
                #[inline(always)]
                unsafe fn mul_add(a: $v, b: $v, c: $v) -> $v {
                    // SAFETY: as above.
                    unsafe { $fma(a, b, c) }
                }
            }
        };
    }
    simd!(Ymm, __m256, 8, _mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps _mm256_add_ps _mm256_fmadd_ps);
    simd!(Zmm, __m512, 16, _mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps _mm512_add_ps _mm512_fmadd_ps);

    /// Safety: see [`super::Kernel`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2<const MR: usize, const ROW: bool>(t: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile::<Ymm, MR, 2, ROW>(t) }
    }

    /// Safety: see [`super::Kernel`].
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512<const MR: usize, const ROW: bool>(t: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile::<Zmm, MR, 2, ROW>(t) }
    }
}

macro_rules! kernels {
    ($f:ident, $mr:literal x $nr:literal: $($m:literal)*) => {
        &Kernels { mr: $mr, nr: $nr, row: &[$($f::<$m, true>),*], col: &[$($f::<$m, false>),*] }
    };
}

/// The kernels of an instruction set that the machine must have.
pub(crate) fn kernels(isa: Isa) -> &'static Kernels {
    static PORTABLE: &Kernels = kernels!(portable, 4 x 8: 1 2 3 4);
    #[cfg(target_arch = "x86_64")]
    {
        use x86::{avx2, avx512};
        static AVX2: &Kernels = kernels!(avx2, 6 x 16: 1 2 3 4 5 6);
        static AVX512: &Kernels = kernels!(avx512, 12 x 32: 1 2 3 4 5 6 7 8 9 10 11 12);
        match isa {
            Isa::Portable => PORTABLE,
            Isa::Avx2 => AVX2,
            Isa::Avx512 => AVX512,
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = isa;
        PORTABLE
    }
}
