//! Scaled dot-product attention. The score matrix is never whole in memory, forward or backward.

use crate::backend::{Fused, Ran, common_device};
use crate::expr::{Function, Reduce};
use crate::gradcheck::{Case, Sample};
use crate::ops::matmul::{flipped, product};
use crate::ops::pointwise::{map, run_pointwise};
use crate::ops::reduce::{accumulator, run_reduce};
use crate::shape::broadcast;
use crate::tape::{Forward, InputGradients, Op, Saved, apply_one};
use crate::{DType, Error, Result, Tensor};

/// Keys of one block of the composition.
const KEYS: usize = 128;
/// Below this a score counts as masked out.
const MASKED: f64 = f32::MIN as f64;

/// Inputs q, k, v and maybe an additive mask, already of the shape of the scores.
#[derive(Debug)]
struct Attention {
    scale: f64,
    masked: bool,
}

/// `len` keys or values from `start`.
fn keys(x: &Tensor, start: usize, len: usize) -> Result<Tensor> {
    Ok(x.view(x.layout().narrow(2, start, len)?))
}

/// The mask of `len` keys from `start`, where there is a mask.
fn mask_keys(mask: Option<&Tensor>, start: usize, len: usize) -> Result<Option<Tensor>> {
    mask.map(|m| Ok(m.view(m.layout().narrow(3, start, len)?))).transpose()
}

/// An uninitialised tensor `[B, H, L, D]` that lies as `[B, L, H, D]`, so that joining the heads costs nothing.
fn heads_last(dims: &[usize], dtype: DType, like: &Tensor) -> Result<Tensor> {
    let out = Tensor::empty(&[dims[0], dims[2], dims[1], dims[3]], dtype, like.device())?;
    Ok(out.view(out.layout().permute(&[0, 2, 1, 3])?))
}

fn wide(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(accumulator(x.dtype()))
}

impl Attention {
    /// The scaled and masked scores of all queries with one block of keys.
    fn scores(&self, q: &Tensor, k: &Tensor, mask: Option<Tensor>) -> Result<Tensor> {
        let scale = self.scale;
        let raw = product(q, &flipped(k)?, None)?;
        match mask {
            Some(mask) => map(raw.dtype(), [&raw, &mask], |[s, m]| s * scale + m),
            None => map(raw.dtype(), [&raw], |[s]| s * scale),
        }
    }

    /// The composition: blocks of keys, with a running maximum, sum and result.
    fn compose(&self, inputs: &[Tensor], o: &Tensor, lse: &Tensor) -> Result<()> {
        let [q, k, v] = [wide(&inputs[0])?, wide(&inputs[1])?, wide(&inputs[2])?];
        let (dtype, device) = (q.dtype(), q.device());
        let rows = [&q.dims()[..3], &[1]].concat();
        let mut max = Tensor::full(&rows, f64::NEG_INFINITY, dtype, device)?;
        let mut sum = Tensor::zeros(&rows, dtype, device)?;
        let mut acc = Tensor::zeros(o.dims(), dtype, device)?;
        let count = k.dims()[2];
        for start in (0..count).step_by(KEYS) {
            let len = KEYS.min(count - start);
            let s = self.scores(&q, &keys(&k, start, len)?, mask_keys(inputs.get(3), start, len)?)?;
            let identity = Function::build(|[s]| [s]);
            let largest = run_reduce(&identity, Reduce::Max, &[&s], s.dims(), &[3], &[dtype])?.remove(0);
            let next = map(dtype, [&max, &largest], |[a, b]| a.maximum(b))?;
            // A row without keys so far has maximum -inf: 0 stands for it, so that no inf - inf appears.
            let p = map(dtype, [&s, &next], |[s, m]| (s - m.select_lt(MASKED, 0.0, m)).exp())?;
            let decay = map(dtype, [&max, &next], |[a, m]| (a - m.select_lt(MASKED, 0.0, m)).exp())?;
            let block = run_reduce(&identity, Reduce::Sum, &[&p], p.dims(), &[3], &[dtype])?.remove(0);
            sum = map(dtype, [&sum, &decay, &block], |[l, a, s]| l * a + s)?;
            acc = map(dtype, [&acc, &decay, &product(&p, &keys(&v, start, len)?, None)?], |[o, a, x]| o * a + x)?;
            max = next;
        }
        let divide = Function::build(|[o, l]| [l.select_lt(f64::from(f32::MIN_POSITIVE), 0.0, o / l)]);
        run_pointwise(&divide, &[&acc, &sum], &[], &[o])?;
        let join = Function::build(|[m, l]| [m.select_lt(MASKED, 0.0, m) + l.log()]);
        run_pointwise(
            &join,
            &[&max, &sum],
            &[],
            &[&lse.view(lse.layout().reshape(&rows).unwrap_or(lse.layout().clone()))],
        )
    }

    /// The gradient by blocks of keys, from the saved log-sum-exp.
    fn compose_backward(&self, saved: &Saved, grad: &Tensor, outputs: [&Tensor; 3]) -> Result<()> {
        let kept = |name| saved.get(name).and_then(wide);
        let [q, k, v, o, g] = [kept("q")?, kept("k")?, kept("v")?, kept("o")?, wide(grad)?];
        let (dtype, device) = (q.dtype(), q.device());
        let lse = saved.get("lse")?.reshape(&[&q.dims()[..3], &[1]].concat())?;
        let times = Function::build(|[o, g]| [o * g]);
        let delta = run_reduce(&times, Reduce::Sum, &[&o, &g], o.dims(), &[3], &[dtype])?.remove(0);
        let dq = Tensor::zeros(q.dims(), dtype, device)?;
        let count = k.dims()[2];
        for start in (0..count).step_by(KEYS) {
            let len = KEYS.min(count - start);
            let (k, v) = (keys(&k, start, len)?, keys(&v, start, len)?);
            let s = self.scores(&q, &k, mask_keys(saved.optional("mask"), start, len)?)?;
            // A row without keys has log-sum-exp -inf; its probabilities are zero.
            let p = map(dtype, [&s, &lse], |[s, l]| (s - l.select_lt(MASKED, f64::INFINITY, l)).exp())?;
            let dp = product(&g, &flipped(&v)?, None)?;
            let scale = self.scale;
            let ds = map(dtype, [&p, &dp, &delta], |[p, dp, d]| p * (dp - d) * scale)?;
            device.backend().matmul(&ds, &k, None, true, &dq)?;
            keys(outputs[1], start, len)?.copy_from(&product(&flipped(&ds)?, &q, None)?)?;
            keys(outputs[2], start, len)?.copy_from(&product(&flipped(&p)?, &g, None)?)?;
        }
        outputs[0].copy_from(&dq)
    }
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [q, k, v] = [&inputs[0], &inputs[1], &inputs[2]];
        let o = heads_last(&[&q.dims()[..3], &v.dims()[3..]].concat(), q.dtype(), q)?;
        let lse = Tensor::empty(&q.dims()[..3], accumulator(q.dtype()), q.device())?;
        let fused = Fused::AttentionForward { scale: self.scale, masked: self.masked };
        let views: Vec<&Tensor> = inputs.iter().collect();
        if q.device().backend().fused(&fused, &views, &[&o, &lse])? == Ran::Declined {
            self.compose(inputs, &o, &lse)?;
        }
        for (name, tensor) in [("q", q), ("k", k), ("v", v), ("o", &o), ("lse", &lse)] {
            cx.save(name, tensor);
        }
        inputs.get(3).into_iter().for_each(|mask| cx.save("mask", mask));
        Ok(vec![o])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let new = |t: &Tensor| heads_last(t.dims(), t.dtype(), t);
        let [q, k, v] = [saved.get("q")?, saved.get("k")?, saved.get("v")?];
        let (dq, dk, dv) = (new(q)?, new(k)?, new(v)?);
        let fused = Fused::AttentionBackward { scale: self.scale, masked: self.masked };
        let views = [q, k, v, saved.get("o")?, grad, saved.get("lse")?];
        let views: Vec<&Tensor> = views.into_iter().chain(saved.optional("mask")).collect();
        if grad.device().backend().fused(&fused, &views, &[&dq, &dk, &dv])? == Ran::Declined {
            self.compose_backward(saved, grad, [&dq, &dk, &dv])?;
        }
        out.set(0, dq);
        out.set(1, dk);
        out.set(2, dv);
        Ok(())
    }
}

/// Attention `softmax(q k^T scale + mask) v`.
///
/// q `[B, H, Lq, D]`, k `[B, H, Lk, D]`, v `[B, H, Lk, Dv]` (any strides), result `[B, H, Lq, Dv]`. `scale` is
/// `1 / sqrt(D)` where none is given. The mask broadcasts to `[B, H, Lq, Lk]`: f32 is added to the scores (-inf masks
/// out), u32 keeps where it is not 0. A fully masked row gives zeros and no gradient. The mask gets no gradient.
///
/// # Errors
/// When shapes, dtypes or devices do not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, scale: Option<f64>) -> Result<Tensor> {
    const FIT: &str = "q [B, H, Lq, D], k [B, H, Lk, D], v [B, H, Lk, Dv] with Lk > 0";
    let wrong = || Error::shape("attention", FIT, (q.dims(), k.dims(), v.dims()));
    let (&[b, h, lq, d], &[kb, kh, lk, kd], &[vb, vh, vl, _]) = (q.dims(), k.dims(), v.dims()) else {
        return Err(wrong());
    };
    if [kb, kh, kd] != [b, h, d] || [vb, vh, vl] != [b, h, lk] || lk == 0 || d == 0 {
        return Err(wrong());
    }
    common_device("attention", &[q, k, v])?;
    if let Some(other) = [k, v].into_iter().find(|t| t.dtype() != q.dtype() || !t.dtype().is_float()) {
        let expected = format!("one float dtype ({})", q.dtype());
        return Err(Error::DType { op: "attention", expected, got: other.dtype().to_string() });
    }
    let op = Attention { scale: scale.unwrap_or(1.0 / (d as f64).sqrt()), masked: mask.is_some() };
    let Some(mask) = mask else { return apply_one(op, &[q, k, v]) };
    let scores = [b, h, lq, lk];
    if broadcast("attention", &[mask.dims(), &scores])? != scores {
        return Err(Error::shape("attention", format!("a mask that broadcasts to {scores:?}"), mask.dims()));
    }
    let additive = match mask.dtype() {
        DType::U32 => map(DType::F32, [mask], |[m]| m.select_lt(0.5, f64::NEG_INFINITY, 0.0))?,
        DType::F32 => mask.detach(),
        _ => mask.detach().to_dtype(DType::F32)?,
    };
    let additive = additive.view(additive.layout().expand(&scores)?);
    apply_one(op, &[q, k, v, &additive])
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[
    Case {
        name: "attention",
        make: |draw| {
            let [b, h, lq, lk] = [draw.size(1, 2), draw.size(1, 3), draw.size(1, 9), draw.size(2, 9)];
            let (d, dv) = (draw.size(1, 8), draw.size(1, 8));
            let inputs =
                vec![draw.standard(&[b, h, lq, d])?, draw.standard(&[b, h, lk, d])?, draw.standard(&[b, h, lk, dv])?];
            Sample::new(inputs, |xs| attention(&xs[0], &xs[1], &xs[2], None, None))
        },
    },
    Case {
        name: "attention with masks, some rows fully masked",
        make: |draw| {
            let [b, h, l, d] = [draw.size(1, 2), draw.size(1, 2), draw.size(8, 150), draw.size(1, 4)];
            let (keep, additive) = (draw.size(0, 1) == 0, draw.number(-1.0, 1.0));
            let bits: Vec<u32> = (0..l * l).map(|i| if i < l { 0 } else { draw.size(0, 1) as u32 }).collect();
            let dims = [b, h, l, d];
            let inputs = vec![draw.standard(&dims)?, draw.standard(&dims)?, draw.standard(&dims)?];
            Sample::new(inputs, move |xs| {
                let mask = if keep {
                    Tensor::from_slice(&bits, &[1, 1, l, l], xs[0].device())?
                } else {
                    let values: Vec<f32> =
                        bits.iter().map(|&k| if k == 0 { f32::NEG_INFINITY } else { additive as f32 }).collect();
                    Tensor::from_slice(&values, &[l, l], xs[0].device())?
                };
                attention(&xs[0], &xs[1], &xs[2], Some(&mask), Some(0.5))
            })
        },
    },
];
