//! The vectors of WebAssembly outside a browser. Its runtimes compile once, as wasmtime does, and simply: a word goes to all lanes by way of a
//! general register, and all loads of a block come before its arithmetic, so that more than a word of k in one would not fit into the
//! registers. So words of A come four in a load, each goes to all lanes by a shuffle, and a block ends with each word of k. V8, which
//! Chromium has, makes fast code of [`Lanes4`] and slower code of this.

use std::arch::wasm32::{
    f32x4_add, f32x4_mul, f32x4_splat, i32x4_shuffle, v128, v128_load, v128_load32_splat, v128_store,
};

use super::{Lanes4, Simd, Tile};

pub(super) struct Simd128;

/// The first `n` of four words at `p`.
///
/// Safety: those can be read.
#[inline(always)]
unsafe fn words(p: *const f32, n: usize) -> v128 {
    // SAFETY: the caller's promise.
    unsafe { if n < 4 { Simd128::load_some(p, n) } else { Simd128::load(p) } }
}

/// The word `i` of four in every lane.
#[inline(always)]
fn spread(words: v128, i: usize) -> v128 {
    match i {
        0 => i32x4_shuffle::<0, 0, 0, 0>(words, words),
        1 => i32x4_shuffle::<1, 1, 1, 1>(words, words),
        2 => i32x4_shuffle::<2, 2, 2, 2>(words, words),
        _ => i32x4_shuffle::<3, 3, 3, 3>(words, words),
    }
}

impl Simd for Simd128 {
    type V = v128;
    const LANES: usize = 4;
    const AHEAD: usize = 0;
    #[inline(always)]
    fn zero() -> v128 {
        f32x4_splat(0.0)
    }
    #[inline(always)]
    unsafe fn word(p: *const f32) -> v128 {
        // SAFETY: the caller's pointer is valid for a float.
        unsafe { v128_load32_splat(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> v128 {
        // SAFETY: the caller's pointer is valid for four floats; no alignment is asked.
        unsafe { v128_load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: v128) {
        // SAFETY: as in `load`.
        unsafe { v128_store(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn load_some(p: *const f32, n: usize) -> v128 {
        // SAFETY: the caller's pointer is valid for `n` floats.
        unsafe { Self::load(Lanes4::load_some(p, n).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn store_some(p: *mut f32, v: v128, n: usize) {
        let mut lanes = [0f32; 4];
        // SAFETY: as in `load_some`.
        unsafe {
            Self::store(lanes.as_mut_ptr(), v);
            Lanes4::store_some(p, lanes, n);
        }
    }
    #[inline(always)]
    fn add(a: v128, b: v128) -> v128 {
        f32x4_add(a, b)
    }
    #[inline(always)]
    fn multiply_add(a: v128, b: v128, c: v128) -> v128 {
        f32x4_add(f32x4_mul(a, b), c)
    }
    #[inline(always)]
    fn prefetch(_: *const f32) {}

    #[inline(always)]
    unsafe fn sums<const MR: usize, const NV: usize, const ROW: bool>(t: &Tile) -> [[v128; NV]; MR] {
        let mut acc = [[Self::zero(); NV]; MR];
        let (mut k, mut b) = (0, t.b);
        // SAFETY: the caller's promise.
        let mut step = |a: [v128; MR]| unsafe {
            let bv: [v128; NV] = std::array::from_fn(|v| Self::load(b.add(v * Self::LANES)));
            for (acc, a) in acc.iter_mut().zip(a) {
                for (acc, b) in acc.iter_mut().zip(bv) {
                    *acc = Self::multiply_add(a, b, *acc);
                }
            }
            b = b.add(t.b_stride);
        };
        // SAFETY: the caller's promise; of each row, or of the column, only words that there are.
        unsafe {
            'k: while k < t.k {
                if ROW {
                    let rows: [v128; MR] = std::array::from_fn(|i| words(t.a.add(i * t.a_stride + k), t.k - k));
                    for j in 0..4 {
                        if k == t.k {
                            break 'k;
                        }
                        step(rows.map(|row| spread(row, j)));
                        k += 1;
                    }
                } else {
                    let column = words(t.a.add(k * t.a_stride), MR);
                    step(std::array::from_fn(|i| spread(column, i)));
                    k += 1;
                }
            }
        }
        acc
    }
}
