//! The vectors of 64-bit ARM: four floats, or four pairs of bf16. Of 32 registers a tile of eight rows and two vectors leaves
//! enough for a run of A; with twelve rows the compiler moves sums to memory and back in the loop.

use std::arch::aarch64::{
    float32x4_t, vaddq_f32, vdupq_n_f32, vdupq_n_u32, vfmaq_f32, vld1q_dup_f32, vld1q_f32, vreinterpretq_f32_u32,
    vst1q_f32,
};
use std::arch::asm;

use super::{Lanes4, Simd, Tile, tile};

/// Words are f32.
struct Neon;

/// Words are pairs of bf16, whose products are added at once.
struct NeonPairs;

/// `c + a b` for the pairs of bf16 in each word of `a` and `b`.
///
/// Safety: the machine has the instruction.
#[inline(always)]
pub(crate) unsafe fn dot_pairs(a: float32x4_t, b: float32x4_t, mut c: float32x4_t) -> float32x4_t {
    // The compiler has no stable name for it.
    // SAFETY: arithmetic on registers alone.
    unsafe {
        asm!(
            ".arch_extension bf16",
            "bfdot {c:v}.4s, {a:v}.8h, {b:v}.8h",
            a = in(vreg) a,
            b = in(vreg) b,
            c = inout(vreg) c,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    c
}

macro_rules! simd {
    ($name:ident, word $word:expr, multiply_add $multiply_add:expr) => {
        impl Simd for $name {
            type V = float32x4_t;
            const LANES: usize = 4;
            const AHEAD: usize = 0;
            #[inline(always)]
            fn zero() -> float32x4_t {
                // SAFETY: every machine of the target has NEON; pointers are the caller's promise.
                unsafe { vdupq_n_f32(0.0) }
            }
            #[inline(always)]
            unsafe fn word(p: *const f32) -> float32x4_t {
                // SAFETY: as above.
                unsafe { $word(p) }
            }
            #[inline(always)]
            unsafe fn load(p: *const f32) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vld1q_f32(p) }
            }
            #[inline(always)]
            unsafe fn store(p: *mut f32, v: float32x4_t) {
                // SAFETY: as above.
                unsafe { vst1q_f32(p, v) }
            }
            #[inline(always)]
            unsafe fn load_some(p: *const f32, n: usize) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vld1q_f32(Lanes4::load_some(p, n).as_ptr()) }
            }
            #[inline(always)]
            unsafe fn store_some(p: *mut f32, v: float32x4_t, n: usize) {
                let mut lanes = [0f32; 4];
                // SAFETY: as above.
                unsafe {
                    vst1q_f32(lanes.as_mut_ptr(), v);
                    Lanes4::store_some(p, lanes, n);
                }
            }
            #[inline(always)]
            fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
                // SAFETY: as above.
                unsafe { vaddq_f32(a, b) }
            }
            #[inline(always)]
            fn multiply_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
                // SAFETY: as above; inlined into functions whose callers know of the instructions.
                unsafe { $multiply_add(a, b, c) }
            }
            #[inline(always)]
            fn prefetch(_: *const f32) {}
        }
    };
}
simd!(Neon, word vld1q_dup_f32, multiply_add |a, b, c| vfmaq_f32(c, a, b));
// A word is moved as an integer: its bits are no float's.
simd!(NeonPairs, word |p: *const f32| vreinterpretq_f32_u32(vdupq_n_u32(p.cast::<u32>().read())),
    multiply_add |a, b, c| dot_pairs(a, b, c));

/// Safety: see [`super::Kernel`].
pub(super) unsafe fn neon<const MR: usize, const ROW: bool>(t: &Tile) {
    // SAFETY: the caller's promise.
    unsafe { tile::<Neon, MR, ROW>(t) }
}

/// Safety: see [`super::Kernel`].
#[target_feature(enable = "bf16")]
pub(super) unsafe fn bfdot<const MR: usize, const ROW: bool>(t: &Tile) {
    // SAFETY: the caller's promise.
    unsafe { tile::<NeonPairs, MR, ROW>(t) }
}
