//! AdamW's update of one parameter: one pass over memory.

use half::{bf16, f16};

use super::View;
use super::eval::Stored;
use super::isa::{Isa, Work, dispatch};
use super::team::{spread, threads};
use crate::DType;
use crate::backend::AdamWScalars;
use crate::shape::Layout;

/// Elements that a thread has in its first cache at once.
const BLOCK: usize = 256;
/// Elements of one task at least.
const GRAIN: usize = 8 * 1024;

/// Updates `parameter`, `exp_avg` and `exp_avg_sq` in place; `rounded` gets the new parameter in its own dtype. Arithmetic is
/// in f32. `false`, and nothing is done, where a view has gaps, another order or a dtype that is not f32, bf16 or f16.
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
    let known = |v: &View<'_>| matches!(v.dtype, DType::F32 | DType::BF16 | DType::F16);
    let dense = |v: &View<'_>| {
        let layout = Layout { dims: v.dims.to_vec(), strides: v.strides.to_vec(), offset: 0 };
        known(v) && layout.is_contiguous()
    };
    if ![parameter, gradient, exp_avg, exp_avg_sq].into_iter().chain(rounded).all(dense) {
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
        let AdamWScalars { clip, decay, beta2, step_size, root2, eps, rest1, rest2 } = *self.scalars;
        let [clip, decay, beta2, step_size, eps, rest1, rest2] =
            [clip, decay, beta2, step_size, eps, rest1, rest2].map(|s| s as f32);
        let root2 = (1.0 / root2) as f32;
        let mul_add = |a: f32, b: f32, c: f32| if FMA { a.mul_add(b, c) } else { a * b + c };
        let [mut p, mut g, mut m, mut v] = [[0f32; BLOCK]; 4];
        let mut at = self.from;
        while at < self.to {
            let n = BLOCK.min(self.to - at);
            // SAFETY: the elements lie in the views, and other tasks have others.
            unsafe {
                load(self.parameter, at, &mut p[..n]);
                load(self.gradient, at, &mut g[..n]);
                load(self.exp_avg, at, &mut m[..n]);
                load(self.exp_avg_sq, at, &mut v[..n]);
            }
            // All of a block, also past its end: loops of fixed length become SIMD without a rest.
            for (((p, g), m), v) in p.iter_mut().zip(&g).zip(&mut m).zip(&mut v) {
                let g = g * clip;
                *m = mul_add(g - *m, rest1, *m);
                *v = mul_add(g * g, rest2, *v * beta2);
                let step = *m / mul_add(v.sqrt(), root2, eps);
                *p = mul_add(-step_size, step, *p * decay);
            }
            // SAFETY: as above.
            unsafe {
                store(self.parameter, at, &p[..n]);
                store(self.exp_avg, at, &m[..n]);
                store(self.exp_avg_sq, at, &v[..n]);
                if let Some(rounded) = self.rounded {
                    store(rounded, at, &p[..n]);
                }
            }
            at += n;
        }
    }
}

#[inline(always)]
unsafe fn load(view: &View<'_>, at: usize, out: &mut [f32]) {
    #[inline(always)]
    unsafe fn load_as<S: Stored>(view: &View<'_>, at: usize, out: &mut [f32]) {
        // SAFETY: the caller's promise: the elements are readable as `S`.
        let from = unsafe { std::slice::from_raw_parts(view.ptr.cast::<S>().add(at), out.len()) };
        out.iter_mut().zip(from).for_each(|(o, x)| *o = x.to_f32());
    }
    // SAFETY: the caller's promise.
    unsafe {
        match view.dtype {
            DType::BF16 => load_as::<bf16>(view, at, out),
            DType::F16 => load_as::<f16>(view, at, out),
            _ => load_as::<f32>(view, at, out),
        }
    }
}

#[inline(always)]
unsafe fn store(view: &View<'_>, at: usize, values: &[f32]) {
    #[inline(always)]
    unsafe fn store_as<S: Stored>(view: &View<'_>, at: usize, values: &[f32]) {
        // SAFETY: the caller's promise: the elements are writable as `S`, and nobody else uses them.
        let to = unsafe { std::slice::from_raw_parts_mut(view.ptr.cast::<S>().add(at), values.len()) };
        to.iter_mut().zip(values).for_each(|(t, &x)| *t = S::of_f32(x));
    }
    // SAFETY: the caller's promise.
    unsafe {
        match view.dtype {
            DType::BF16 => store_as::<bf16>(view, at, values),
            DType::F16 => store_as::<f16>(view, at, values),
            _ => store_as::<f32>(view, at, values),
        }
    }
}
