//! AdamW's update of one parameter: one pass over memory.

use half::{bf16, f16};

use super::View;
use super::eval::Stored;
use super::isa::{Isa, Work, dispatch};
use super::math::Real;
use super::team::{spread, threads};
use crate::DType;
use crate::backend::AdamWScalars;
use crate::shape::Layout;

/// Elements that a thread has in its first cache at once.
const BLOCK: usize = 1024;
/// Elements of one task at least.
const GRAIN: usize = 8 * 1024;

/// Updates `parameter`, `exp_avg` and `exp_avg_sq` in place; `rounded` gets the new parameter in its own dtype. Arithmetic is
/// in f32. `false`, and nothing is done, where a view has gaps or another order, or the dtypes are others: parameter and
/// moments have one, gradient and rounded parameter another, of f32, bf16 and f16; if they differ, the first is f32.
///
/// # Safety
/// The views have one shape and lie in memory that nobody else uses meanwhile; none overlaps another.
pub(super) unsafe fn adamw(
    isa: Isa,
    scalars: &AdamWScalars,
    parameter: &View<'_>,
    gradient: &View<'_>,
    exp_avg: &View<'_>,
    exp_avg_sq: &View<'_>,
    rounded: Option<&View<'_>>,
) -> bool {
    let dense = |v: &View<'_>| Layout { dims: v.dims.to_vec(), strides: v.strides.to_vec(), offset: 0 }.is_contiguous();
    let (kept, narrow) = (parameter.dtype, gradient.dtype);
    let known = matches!(narrow, DType::F32 | DType::BF16 | DType::F16)
        && (kept == narrow || kept == DType::F32)
        && exp_avg.dtype == kept
        && exp_avg_sq.dtype == kept
        && rounded.is_none_or(|v| v.dtype == narrow);
    if !known || ![parameter, gradient, exp_avg, exp_avg_sq].into_iter().chain(rounded).all(dense) {
        return false;
    }
    let n: usize = parameter.dims.iter().product();
    let blocks = n.div_ceil(BLOCK);
    let tasks = (n / GRAIN).clamp(1, 4 * threads());
    let update = |task: usize| {
        let [from, to] = [task, task + 1].map(|t| (t * blocks / tasks * BLOCK).min(n));
        dispatch(isa, Update { scalars, parameter, gradient, exp_avg, exp_avg_sq, rounded, from, to });
    };
    if tasks == 1 {
        update(0)
    } else {
        spread(tasks, update)
    }
    true
}

/// Elements `from..to` of one parameter.
struct Update<'a> {
    scalars: &'a AdamWScalars,
    parameter: &'a View<'a>,
    gradient: &'a View<'a>,
    exp_avg: &'a View<'a>,
    exp_avg_sq: &'a View<'a>,
    rounded: Option<&'a View<'a>>,
    from: usize,
    to: usize,
}

impl Work for Update<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        // SAFETY: the elements lie in the views, and other tasks have others.
        unsafe {
            match (self.parameter.dtype, self.gradient.dtype) {
                (DType::BF16, _) => self.update::<bf16, bf16, FMA>(),
                (DType::F16, _) => self.update::<f16, f16, FMA>(),
                (_, DType::BF16) => self.update::<f32, bf16, FMA>(),
                (_, DType::F16) => self.update::<f32, f16, FMA>(),
                _ => self.update::<f32, f32, FMA>(),
            }
        }
    }
}

impl Update<'_> {
    /// Where parameter and moments are `S`, and the gradient and the rounded parameter `G`.
    #[inline(always)]
    unsafe fn update<S: Stored, G: Stored, const FMA: bool>(&self) {
        for at in (self.from..self.to).step_by(BLOCK) {
            let n = BLOCK.min(self.to - at);
            // SAFETY: the caller's promise; the views do not overlap.
            unsafe {
                let kept = |v: &View<'_>| std::slice::from_raw_parts_mut(v.ptr.cast::<S>().add(at), n);
                let p = kept(self.parameter);
                let g = std::slice::from_raw_parts(self.gradient.ptr.cast::<G>().add(at), n);
                update::<S, G, FMA>(self.scalars, p, g, kept(self.exp_avg), kept(self.exp_avg_sq));
                if let Some(rounded) = self.rounded {
                    let rounded = std::slice::from_raw_parts_mut(rounded.ptr.cast::<G>().add(at), n);
                    rounded.iter_mut().zip(p).for_each(|(r, p)| *r = G::of_f32(p.to_f32()));
                }
            }
        }
    }
}

/// One loop of simple operations, from memory to memory: so it becomes SIMD, and the machine divides one vector while it
/// rounds another.
#[inline(always)]
fn update<S: Stored, G: Stored, const FMA: bool>(
    scalars: &AdamWScalars,
    p: &mut [S],
    g: &[G],
    m: &mut [S],
    v: &mut [S],
) {
    let AdamWScalars { clip, decay, beta2, step_size, root2, eps, rest1, rest2 } = *scalars;
    let [clip, decay, beta2, step_size, eps, rest1, rest2] =
        [clip, decay, beta2, step_size, eps, rest1, rest2].map(|s| s as f32);
    let root2 = (1.0 / root2) as f32;
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = g.to_f32() * clip;
        let mean = Real::mul_add::<FMA>(g - m.to_f32(), rest1, m.to_f32());
        let square = Real::mul_add::<FMA>(g * g, rest2, v.to_f32() * beta2);
        let step = mean / Real::mul_add::<FMA>(square.sqrt(), root2, eps);
        *p = S::of_f32(Real::mul_add::<FMA>(-step_size, step, p.to_f32() * decay));
        *m = S::of_f32(mean);
        *v = S::of_f32(square);
    }
}
