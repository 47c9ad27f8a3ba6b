//! The micro-kernels: a tile of C in registers, one pass over k.
//!
//! Everything is counted in words of 32 bits: a word of k is one f32, or two neighbouring bf16 (the lower one first) of
//! which the machine adds both products at once. Every element is one chain of multiply-adds in the order of k, whatever
//! the tile's height or the layout of A, so how the work is cut never changes a bit of the result.

#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
#[cfg(all(target_os = "wasi", target_feature = "simd128"))]
mod wasm;

use crate::cpu::isa::{FUSED, Isa};

/// One call: `c[mr, live] (+)= a[mr, k] b[k, live] (+ bias[live])`. C and bias are f32.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    /// Words of k.
    pub k: usize,
    pub a: *const f32,
    /// Row kernels: from row to row of A, whose k axis is dense. Column kernels: from k to k, rows are dense.
    pub a_stride: usize,
    pub b: *const f32,
    /// From k to k of B, whose columns are dense: [`Kernels::nr`] of them can be read.
    pub b_stride: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    /// Columns that are written, at least one.
    pub live: usize,
    /// Adds to C instead of overwriting it.
    pub add: bool,
    /// `live` floats, or null.
    pub bias: *const f32,
}

/// Safety: the machine has the kernel's instructions; the tile's windows are valid for the kernel's height.
pub(crate) type Kernel = unsafe fn(&Tile);

/// The kernels of one instruction set and one kind of word.
pub(crate) struct Kernels {
    /// Greatest height; `row[i]` and `col[i]` have height `i + 1`.
    pub mr: usize,
    /// Width.
    pub nr: usize,
    /// Whether words are pairs of bf16.
    pub pairs: bool,
    pub row: &'static [Kernel],
    pub col: &'static [Kernel],
}

/// A vector of f32, and of words.
trait Simd {
    type V: Copy;
    const LANES: usize;
    /// Words of B that are asked for ahead of time; 0 where there is no such instruction.
    const AHEAD: usize;
    fn zero() -> Self::V;
    /// The word at `p` in every lane.
    unsafe fn word(p: *const f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// The first `n` lanes, `n` less than all.
    unsafe fn load_some(p: *const f32, n: usize) -> Self::V;
    unsafe fn store_some(p: *mut f32, v: Self::V, n: usize);
    fn add(a: Self::V, b: Self::V) -> Self::V;
    /// `a b + c`.
    fn multiply_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn prefetch(p: *const f32);
    /// The products' sums over k: `NV` vectors for each of `MR` rows.
    ///
    /// Safety: as for [`vectors`].
    #[inline(always)]
    unsafe fn sums<const MR: usize, const NV: usize, const ROW: bool>(t: &Tile) -> [[Self::V; NV]; MR] {
        let mut acc = [[Self::zero(); NV]; MR];
        // SAFETY: the caller's promise.
        unsafe {
            // One pointer for three rows: more would not fit into the general registers.
            let mut rows = [t.a; 4];
            if ROW {
                for (q, p) in rows.iter_mut().enumerate().take(MR.div_ceil(3)) {
                    *p = t.a.add(3 * q * t.a_stride);
                }
            }
            let (mut a, mut b) = (t.a, t.b);
            for _ in 0..t.k {
                let mut bv = [Self::zero(); NV];
                for (v, x) in bv.iter_mut().enumerate() {
                    *x = Self::load(b.add(v * Self::LANES));
                    if Self::AHEAD > 0 {
                        Self::prefetch(b.wrapping_add(Self::AHEAD * t.b_stride + v * Self::LANES));
                    }
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = Self::word(if ROW { rows[i / 3].add(i % 3 * t.a_stride) } else { a.add(i) });
                    for (acc, &b) in acc.iter_mut().zip(&bv) {
                        *acc = Self::multiply_add(x, b, *acc);
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
        }
        acc
    }
}

/// Arrays that the compiler turns into the vectors every machine of the target has.
struct Lanes4;

impl Simd for Lanes4 {
    type V = [f32; 4];
    const LANES: usize = 4;
    const AHEAD: usize = 0;
    #[inline(always)]
    fn zero() -> [f32; 4] {
        [0.0; 4]
    }
    #[inline(always)]
    unsafe fn word(p: *const f32) -> [f32; 4] {
        // SAFETY: the caller's pointer is valid for a float.
        [unsafe { p.read() }; 4]
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
    unsafe fn load_some(p: *const f32, n: usize) -> [f32; 4] {
        // SAFETY: the caller's pointer is valid for `n` floats.
        std::array::from_fn(|i| if i < n { unsafe { p.add(i).read() } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store_some(p: *mut f32, v: [f32; 4], n: usize) {
        for (i, v) in v.into_iter().enumerate().take(n) {
            // SAFETY: the caller's pointer is valid for `n` floats.
            unsafe { p.add(i).write(v) }
        }
    }
    #[inline(always)]
    fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn multiply_add(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| if FUSED { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] })
    }
    #[inline(always)]
    fn prefetch(_: *const f32) {}
}

/// A tile two vectors wide, or one where that is enough.
///
/// Safety: see [`Kernel`]. Inlined into functions that have the instructions of `S`.
#[inline(always)]
unsafe fn tile<S: Simd, const MR: usize, const ROW: bool>(t: &Tile) {
    // SAFETY: the caller's promise.
    unsafe { if t.live <= S::LANES { vectors::<S, MR, 1, ROW>(t) } else { vectors::<S, MR, 2, ROW>(t) } }
}

/// Safety: as for [`tile`]; the live columns lie in `NV` vectors.
#[inline(always)]
unsafe fn vectors<S: Simd, const MR: usize, const NV: usize, const ROW: bool>(t: &Tile) {
    // SAFETY: the caller's promise: A has MR rows of k, B k rows of NV vectors and C MR rows of `live`.
    unsafe {
        if t.add {
            for i in 0..MR {
                for v in 0..NV {
                    S::prefetch(t.c.wrapping_add(i * t.c_stride + v * S::LANES));
                }
            }
        }
        let acc = S::sums::<MR, NV, ROW>(t);
        let whole = t.live == NV * S::LANES;
        for (i, acc) in acc.iter().enumerate() {
            for (v, &x) in acc.iter().enumerate() {
                let at = v * S::LANES;
                let (c, bias) = (t.c.wrapping_add(i * t.c_stride + at), t.bias.wrapping_add(at));
                if whole {
                    let mut x = x;
                    if !t.bias.is_null() {
                        x = S::add(x, S::load(bias));
                    }
                    if t.add {
                        x = S::add(x, S::load(c));
                    }
                    S::store(c, x);
                } else if at < t.live {
                    // A whole vector here goes the same way: its mask has all lanes.
                    let n = (t.live - at).min(S::LANES);
                    let mut x = x;
                    if !t.bias.is_null() {
                        x = S::add(x, S::load_some(bias, n));
                    }
                    if t.add {
                        x = S::add(x, S::load_some(c, n));
                    }
                    S::store_some(c, x, n);
                }
            }
        }
    }
}

#[cfg(not(all(target_os = "wasi", target_feature = "simd128")))]
use Lanes4 as Portable;
#[cfg(all(target_os = "wasi", target_feature = "simd128"))]
use wasm::Simd128 as Portable;

/// Safety: see [`Kernel`].
unsafe fn portable<const MR: usize, const ROW: bool>(t: &Tile) {
    // SAFETY: the caller's promise.
    unsafe { tile::<Portable, MR, ROW>(t) }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Simd, Tile, tile};
    use std::arch::x86_64::*;

    /// The first `n` of sixteen.
    #[inline(always)]
    fn mask16(n: usize) -> __mmask16 {
        ((1u32 << n) - 1) as u16
    }

    #[inline(always)]
    fn mask8(n: usize) -> __m256i {
        const ONES_THEN_ZEROS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
        // SAFETY: eight numbers from 8 - n on; inlined into functions with the instructions.
        unsafe { _mm256_loadu_si256(ONES_THEN_ZEROS.as_ptr().add(8 - n).cast()) }
    }

    macro_rules! simd {
        ($name:ident, $v:ty, $lanes:literal, $zero:ident $load:ident $store:ident $add:ident,
         word $word:expr, some $load_some:expr, $store_some:expr, multiply_add $multiply_add:expr) => {
            struct $name;
            impl Simd for $name {
                type V = $v;
                const LANES: usize = $lanes;
                const AHEAD: usize = 8;
                #[inline(always)]
                fn zero() -> $v {
                    // SAFETY: inlined into functions with the instructions; pointers are the caller's promise.
                    unsafe { $zero() }
                }
                #[inline(always)]
                unsafe fn word(p: *const f32) -> $v {
                    // SAFETY: as above.
                    unsafe { $word(p) }
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
                unsafe fn load_some(p: *const f32, n: usize) -> $v {
                    // SAFETY: as above.
                    unsafe { $load_some(p, n) }
                }
                #[inline(always)]
                unsafe fn store_some(p: *mut f32, v: $v, n: usize) {
                    // SAFETY: as above.
                    unsafe { $store_some(p, v, n) }
                }
                #[inline(always)]
                fn add(a: $v, b: $v) -> $v {
                    // SAFETY: as above.
                    unsafe { $add(a, b) }
                }
                #[inline(always)]
                fn multiply_add(a: $v, b: $v, c: $v) -> $v {
                    // SAFETY: as above.
                    unsafe { $multiply_add(a, b, c) }
                }
                #[inline(always)]
                fn prefetch(p: *const f32) {
                    // SAFETY: a hint; no address is invalid.
                    unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) };
                }
            }
        };
    }
    simd!(Ymm, __m256, 8, _mm256_setzero_ps _mm256_loadu_ps _mm256_storeu_ps _mm256_add_ps,
        word |p: *const f32| _mm256_broadcast_ss(&*p),
        some |p, n| _mm256_maskload_ps(p, mask8(n)), |p, v, n| _mm256_maskstore_ps(p, mask8(n), v),
        multiply_add _mm256_fmadd_ps);
    simd!(Zmm, __m512, 16, _mm512_setzero_ps _mm512_loadu_ps _mm512_storeu_ps _mm512_add_ps,
        word |p: *const f32| _mm512_set1_ps(*p),
        some |p, n| _mm512_maskz_loadu_ps(mask16(n), p), |p, v, n| _mm512_mask_storeu_ps(p, mask16(n), v),
        multiply_add _mm512_fmadd_ps);
    // A word is moved as an integer: its bits are no float's.
    simd!(ZmmPairs, __m512, 16, _mm512_setzero_ps _mm512_loadu_ps _mm512_storeu_ps _mm512_add_ps,
    word |p: *const f32| _mm512_castsi512_ps(_mm512_set1_epi32(p.cast::<i32>().read_unaligned())),
    some |p, n| _mm512_maskz_loadu_ps(mask16(n), p), |p, v, n| _mm512_mask_storeu_ps(p, mask16(n), v),
    multiply_add |a, b, c| _mm512_dpbf16_ps(
        c, std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b)
    ));

    /// Safety: see [`super::Kernel`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2<const MR: usize, const ROW: bool>(t: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile::<Ymm, MR, ROW>(t) }
    }

    /// Safety: see [`super::Kernel`].
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512<const MR: usize, const ROW: bool>(t: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile::<Zmm, MR, ROW>(t) }
    }

    /// Safety: see [`super::Kernel`].
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn pairs<const MR: usize, const ROW: bool>(t: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile::<ZmmPairs, MR, ROW>(t) }
    }
}

macro_rules! kernels {
    ($f:ident, $mr:literal x $nr:literal, pairs $pairs:literal: $($m:literal)*) => {
        &Kernels { mr: $mr, nr: $nr, pairs: $pairs, row: &[$($f::<$m, true>),*], col: &[$($f::<$m, false>),*] }
    };
}

/// The kernels of an instruction set that the machine must have: for words that are pairs, where it has such, or f32.
pub(crate) fn kernels(isa: Isa, pairs: bool) -> &'static Kernels {
    static PORTABLE: &Kernels = kernels!(portable, 4 x 8, pairs false: 1 2 3 4);
    #[cfg(target_arch = "x86_64")]
    {
        use x86::{avx2, avx512, pairs as avx512bf16};
        static AVX2: &Kernels = kernels!(avx2, 6 x 16, pairs false: 1 2 3 4 5 6);
        static AVX512: &Kernels = kernels!(avx512, 12 x 32, pairs false: 1 2 3 4 5 6 7 8 9 10 11 12);
        static PAIRS: &Kernels = kernels!(avx512bf16, 12 x 32, pairs true: 1 2 3 4 5 6 7 8 9 10 11 12);
        match isa {
            Isa::Portable => PORTABLE,
            Isa::Avx2 => AVX2,
            Isa::Avx512Bf16 if pairs => PAIRS,
            Isa::Avx512 | Isa::Avx512Bf16 => AVX512,
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        use neon::{bfdot, neon};
        static NEON: &Kernels = kernels!(neon, 8 x 8, pairs false: 1 2 3 4 5 6 7 8);
        static PAIRS: &Kernels = kernels!(bfdot, 8 x 8, pairs true: 1 2 3 4 5 6 7 8);
        match isa {
            Isa::Portable => PORTABLE,
            Isa::NeonBf16 if pairs => PAIRS,
            Isa::Neon | Isa::NeonBf16 => NEON,
        }
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        let _ = (isa, pairs);
        PORTABLE
    }
}
