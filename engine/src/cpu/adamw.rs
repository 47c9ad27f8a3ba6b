//! AdamW's update of one parameter: one pass over memory.

use half::{bf16, f16};

use super::View;
use super::eval::Stored;
use super::isa::{Isa, Work, dispatch};
use super::math::Real;
use super::team::{spread, threads};
use crate::DType;

/// Elements that a thread has in its first cache at once.
const BLOCK: usize = 1024;
/// Elements of one task at least.
const GRAIN: usize = 8 * 1024;

/// Runs the program of AdamW's update: inputs a parameter, its gradient and its two moments; outputs the parameter and the
/// moments again, which are written in place, and maybe the new parameter in another dtype. Arithmetic is in f32. `false`,
/// and nothing is done, where a view has gaps or another order, an output is another place, the gradient one of those that
/// are written, or the dtypes are others:
/// parameter and moments have one of f32, bf16 and f16, the gradient any of these; a rounded parameter needs f32.
///
/// # Safety
/// The views have one shape and lie in memory that nobody else uses meanwhile; but for the outputs in place, none overlaps
/// another.
pub(super) unsafe fn adamw(isa: Isa, inputs: &[View<'_>], scalars: &[f64], outputs: &[View<'_>]) -> bool {
    let (&[parameter, gradient, exp_avg, exp_avg_sq], [kept @ .., rounded]) = (inputs, outputs) else { return false };
    let (kept, rounded) = if outputs.len() == 3 { (outputs, None) } else { (kept, Some(*rounded)) };
    let &[clip, decay, beta2, step_size, root2, eps, rest1, rest2] = scalars else { return false };
    let scalars = Scalars { clip, decay, beta2, step_size, root2, eps, rest1, rest2 };
    let narrow = |v: &View<'_>| matches!(v.dtype, DType::F32 | DType::BF16 | DType::F16);
    let in_place = [parameter, exp_avg, exp_avg_sq];
    let known = narrow(&parameter)
        && narrow(&gradient)
        && kept.len() == in_place.len()
        && !in_place.iter().any(|x| std::ptr::eq(x.ptr, gradient.ptr))
        && kept.iter().zip(&in_place).all(|(out, x)| out.is_like(x) && x.dtype == parameter.dtype)
        && rounded.is_none_or(|v| narrow(&v) && parameter.dtype == DType::F32);
    if !known || !in_place.iter().chain([&gradient]).chain(&rounded).all(View::is_contiguous) {
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

/// What the rule gives, in its order.
#[derive(Clone, Copy)]
struct Scalars {
    clip: f64,
    decay: f64,
    beta2: f64,
    step_size: f64,
    root2: f64,
    eps: f64,
    rest1: f64,
    rest2: f64,
}

/// Elements `from..to` of one parameter.
struct Update<'a> {
    scalars: Scalars,
    parameter: View<'a>,
    gradient: View<'a>,
    exp_avg: View<'a>,
    exp_avg_sq: View<'a>,
    rounded: Option<View<'a>>,
    from: usize,
    to: usize,
}

impl Work for Update<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        // SAFETY: the elements lie in the views, and other tasks have others.
        unsafe {
            match self.parameter.dtype {
                DType::BF16 => self.of_gradient::<bf16, FMA>(),
                DType::F16 => self.of_gradient::<f16, FMA>(),
                _ => self.of_gradient::<f32, FMA>(),
            }
        }
    }
}

impl Update<'_> {
    /// Where parameter and moments are `S`.
    #[inline(always)]
    unsafe fn of_gradient<S: Stored, const FMA: bool>(&self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.gradient.dtype {
                DType::BF16 => self.update::<S, bf16, FMA>(),
                DType::F16 => self.update::<S, f16, FMA>(),
                _ => self.update::<S, f32, FMA>(),
            }
        }
    }

    /// And the gradient is `G`.
    #[inline(always)]
    unsafe fn update<S: Stored, G: Stored, const FMA: bool>(&self) {
        for at in (self.from..self.to).step_by(BLOCK) {
            let n = BLOCK.min(self.to - at);
            // SAFETY: the caller's promise; the views do not overlap.
            unsafe {
                let kept = |v: &View<'_>| std::slice::from_raw_parts_mut(v.ptr.cast::<S>().add(at), n);
                let p = kept(&self.parameter);
                let g = std::slice::from_raw_parts(self.gradient.ptr.cast::<G>().add(at), n);
                update::<S, G, FMA>(&self.scalars, p, g, kept(&self.exp_avg), kept(&self.exp_avg_sq));
                match &self.rounded {
                    Some(to) if to.dtype == DType::BF16 => round::<S, bf16>(p, to, at),
                    Some(to) if to.dtype == DType::F16 => round::<S, f16>(p, to, at),
                    Some(to) => round::<S, f32>(p, to, at),
                    None => {}
                }
            }
        }
    }
}

/// Writes values to a view of `R` from an element on.
#[inline(always)]
unsafe fn round<S: Stored, R: Stored>(values: &[S], to: &View<'_>, at: usize) {
    // SAFETY: the caller's promise: so many elements are writable there.
    let to = unsafe { std::slice::from_raw_parts_mut(to.ptr.cast::<R>().add(at), values.len()) };
    to.iter_mut().zip(values).for_each(|(r, p)| *r = R::of_f32(p.to_f32()));
}

/// One loop of simple operations, from memory to memory: so it becomes SIMD, and the machine divides one vector while it
/// rounds another.
#[inline(always)]
fn update<S: Stored, G: Stored, const FMA: bool>(scalars: &Scalars, p: &mut [S], g: &[G], m: &mut [S], v: &mut [S]) {
    let Scalars { clip, decay, beta2, step_size, root2, eps, rest1, rest2 } = *scalars;
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
