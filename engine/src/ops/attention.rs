//! Scaled dot-product attention. The score matrix is never whole in memory, forward or backward.

use crate::backend::call::{self, Call, has_dims, has_dtype, is_dense, is_float};
use crate::backend::{FusedCall, Ran, common_device, operands, run_fused};
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

/// Attention and the log-sum-exp of the scores. q, k, v and o are of one float dtype.
#[derive(Clone, Copy, Debug)]
pub struct AttentionForward<'a> {
    /// `[B, H, Lq, D]`
    pub q: &'a Tensor,
    /// `[B, H, Lk, D]`
    pub k: &'a Tensor,
    /// `[B, H, Lk, Dv]`
    pub v: &'a Tensor,
    /// Added to the scores: `[B, H, Lq, Lk]`, f32 (f64 for f64).
    pub mask: Option<&'a Tensor>,
    /// Factor of the scores.
    pub scale: f64,
    /// `[B, H, Lq, Dv]`
    pub o: &'a Tensor,
    /// `[B, H, Lq]`, f32 (f64 for f64), row-major without gaps.
    pub lse: &'a Tensor,
}

/// The gradient of attention; what has the name of an operand of [`AttentionForward`] is that, gradients are like what they
/// are of.
#[derive(Clone, Copy, Debug)]
pub struct AttentionBackward<'a> {
    /// As forward.
    pub q: &'a Tensor,
    /// As forward.
    pub k: &'a Tensor,
    /// As forward.
    pub v: &'a Tensor,
    /// As forward.
    pub mask: Option<&'a Tensor>,
    /// As forward.
    pub scale: f64,
    /// What forward gave.
    pub o: &'a Tensor,
    /// What forward gave.
    pub lse: &'a Tensor,
    /// The gradient of o.
    pub grad: &'a Tensor,
    /// The gradient of q.
    pub dq: &'a Tensor,
    /// The gradient of k.
    pub dk: &'a Tensor,
    /// The gradient of v.
    pub dv: &'a Tensor,
    /// The gradient of the mask where it is wanted: in the mask's dtype, sizes 1 where it is the same along an axis.
    pub d_mask: Option<&'a Tensor>,
}

impl<'a> FusedCall<'a> for AttentionForward<'a> {
    const NAME: &'static str = "attention";

    fn inputs(&self) -> [Option<&'a Tensor>; 8] {
        operands([Some(self.q), Some(self.k), Some(self.v), self.mask])
    }

    fn outputs(&self) -> [Option<&'a Tensor>; 4] {
        operands([Some(self.o), Some(self.lse)])
    }

    fn fits(&self) -> Result<()> {
        let Self { q, k, v, mask, o, lse, .. } = *self;
        let (&[b, h, lq, d], &[.., lk, width]) = (q.dims(), v.dims()) else {
            return Err(Error::shape(Self::NAME, "q, k and v of four axes", (q.dims(), k.dims(), v.dims())));
        };
        is_float(Self::NAME, "q", q)?;
        let like_q = [("k", k, [b, h, lk, d]), ("v", v, [b, h, lk, width]), ("o", o, [b, h, lq, width])];
        for (name, tensor, dims) in like_q {
            has_dims(Self::NAME, name, tensor, &dims)?;
            has_dtype(Self::NAME, name, tensor, q.dtype())?;
        }
        has_dims(Self::NAME, "lse", lse, &[b, h, lq])?;
        is_dense(Self::NAME, "lse", lse)?;
        if let Some(mask) = mask {
            has_dims(Self::NAME, "a mask", mask, &[b, h, lq, lk])?;
        }
        [Some(lse), mask]
            .into_iter()
            .flatten()
            .try_for_each(|t| has_dtype(Self::NAME, "lse and mask", t, accumulator(q.dtype())))
    }

    fn flops(&self) -> f64 {
        4.0 * (self.q.numel() * self.k.dims()[2]) as f64
    }
}

impl<'a> FusedCall<'a> for AttentionBackward<'a> {
    const NAME: &'static str = "attention backward";

    fn inputs(&self) -> [Option<&'a Tensor>; 8] {
        let Self { q, k, v, o, grad, lse, .. } = *self;
        operands([Some(q), Some(k), Some(v), Some(o), Some(grad), Some(lse), self.mask])
    }

    fn outputs(&self) -> [Option<&'a Tensor>; 4] {
        [Some(self.dq), Some(self.dk), Some(self.dv), self.d_mask]
    }

    fn fits(&self) -> Result<()> {
        let Self { q, k, v, mask, scale, o, lse, .. } = *self;
        AttentionForward { q, k, v, mask, scale, o, lse }.fits()?;
        for (name, gradient, of) in [("grad", self.grad, o), ("dq", self.dq, q), ("dk", self.dk, k), ("dv", self.dv, v)]
        {
            has_dims(Self::NAME, name, gradient, of.dims())?;
            has_dtype(Self::NAME, name, gradient, of.dtype())?;
        }
        let Some(gradient) = self.d_mask else { return Ok(()) };
        let Some(mask) = mask.filter(|mask| gradient.rank() == 4 && gradient.layout().expand(mask.dims()).is_ok())
        else {
            return Err(Error::shape(Self::NAME, "a mask's gradient of sizes that broadcast to it", gradient.dims()));
        };
        has_dtype(Self::NAME, "a mask's gradient", gradient, mask.dtype())
    }

    fn flops(&self) -> f64 {
        10.0 * (self.q.numel() * self.k.dims()[2]) as f64
    }
}

/// Inputs q, k, v and maybe an additive mask of four axes that broadcasts to the scores.
#[derive(Debug)]
struct Attention {
    scale: f64,
}

/// The mask of all scores, where there is a mask.
fn expanded_mask(mask: Option<&Tensor>, q: &Tensor, k: &Tensor) -> Result<Option<Tensor>> {
    let scores = [q.dims()[0], q.dims()[1], q.dims()[2], k.dims()[2]];
    mask.map(|m| Ok(m.view(m.layout().expand(&scores)?))).transpose()
}

/// `len` keys or values from `start`.
fn keys(x: &Tensor, start: usize, len: usize) -> Result<Tensor> {
    Ok(x.view(x.layout().narrow(2, start, len)?))
}

/// The part of a mask for `len` keys from `start`.
fn keys_of_mask(mask: &Tensor, start: usize, len: usize) -> Result<Tensor> {
    Ok(mask.view(mask.layout().narrow(3, start, len)?))
}

/// The same, where there is a mask.
fn mask_keys(mask: Option<&Tensor>, start: usize, len: usize) -> Result<Option<Tensor>> {
    mask.map(|m| keys_of_mask(m, start, len)).transpose()
}

/// An uninitialised tensor `[B, H, L, D]` that lies as `[B, L, H, D]`, so that joining the heads costs nothing.
fn heads_last(dims: &[usize], dtype: DType, like: &Tensor) -> Result<Tensor> {
    let out = Tensor::empty(&[dims[0], dims[2], dims[1], dims[3]], dtype, like.device())?;
    Ok(out.view(out.layout().permute(&[0, 2, 1, 3])?))
}

fn wide(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(accumulator(x.dtype()))
}

/// The scaled and masked scores of all queries with one block of keys.
fn scores(scale: f64, q: &Tensor, k: &Tensor, mask: Option<Tensor>) -> Result<Tensor> {
    let raw = product(q, &flipped(k)?, None)?;
    match mask {
        Some(mask) => map(raw.dtype(), [&raw, &mask], |[s, m]| s * scale + m),
        None => map(raw.dtype(), [&raw], |[s]| s * scale),
    }
}

impl AttentionForward<'_> {
    /// The composition: blocks of keys, with a running maximum, sum and result.
    fn compose(&self) -> Result<()> {
        let Self { mask, scale, o, lse, .. } = *self;
        let [q, k, v] = [wide(self.q)?, wide(self.k)?, wide(self.v)?];
        let (dtype, device) = (q.dtype(), q.device());
        let rows = [&q.dims()[..3], &[1]].concat();
        let mut max = Tensor::full(&rows, f64::NEG_INFINITY, dtype, device)?;
        let mut sum = Tensor::zeros(&rows, dtype, device)?;
        let mut acc = Tensor::zeros(o.dims(), dtype, device)?;
        let count = k.dims()[2];
        for start in (0..count).step_by(KEYS) {
            let len = KEYS.min(count - start);
            let s = scores(scale, &q, &keys(&k, start, len)?, mask_keys(mask, start, len)?)?;
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
}

impl AttentionBackward<'_> {
    /// The gradient by blocks of keys, from the saved log-sum-exp.
    fn compose(&self) -> Result<()> {
        let Self { mask, scale, .. } = *self;
        let [q, k, v, o, g] = [wide(self.q)?, wide(self.k)?, wide(self.v)?, wide(self.o)?, wide(self.grad)?];
        let (dtype, device) = (q.dtype(), q.device());
        let lse = self.lse.reshape(&[&q.dims()[..3], &[1]].concat())?;
        let times = Function::build(|[o, g]| [o * g]);
        let delta = run_reduce(&times, Reduce::Sum, &[&o, &g], o.dims(), &[3], &[dtype])?.remove(0);
        let dq = Tensor::zeros(q.dims(), dtype, device)?;
        let count = k.dims()[2];
        // What is the same for all keys changes no probability.
        let (d_mask, shared) =
            (self.d_mask.filter(|m| m.dims()[3] == count), self.d_mask.filter(|m| m.dims()[3] != count));
        if let Some(shared) = shared {
            shared.copy_from(&Tensor::zeros(&[], shared.dtype(), device)?.expand(shared.dims())?)?;
        }
        for start in (0..count).step_by(KEYS) {
            let len = KEYS.min(count - start);
            let (k, v) = (keys(&k, start, len)?, keys(&v, start, len)?);
            let s = scores(scale, &q, &k, mask_keys(mask, start, len)?)?;
            // A row without keys has log-sum-exp -inf; its probabilities are zero.
            let p = map(dtype, [&s, &lse], |[s, l]| (s - l.select_lt(MASKED, f64::INFINITY, l)).exp())?;
            let dp = product(&g, &flipped(&v)?, None)?;
            if let Some(d_mask) = d_mask {
                write_mask_gradient([&p, &dp, &delta], d_mask, start)?;
            }
            let ds = map(dtype, [&p, &dp, &delta], |[p, dp, d]| p * (dp - d) * scale)?;
            call::MatMul { a: &ds, b: &k, bias: None, accumulate: true, out: &dq }.run()?;
            keys(self.dk, start, len)?.copy_from(&product(&flipped(&ds)?, &q, None)?)?;
            keys(self.dv, start, len)?.copy_from(&product(&flipped(&p)?, &g, None)?)?;
        }
        self.dq.copy_from(&dq)
    }
}

/// The gradient of the scores of a block of keys from `start` on, summed where the mask is the same.
fn write_mask_gradient([p, dp, delta]: [&Tensor; 3], d_mask: &Tensor, start: usize) -> Result<()> {
    let axes: Vec<usize> = (0..3).filter(|&axis| d_mask.dims()[axis] == 1 && p.dims()[axis] != 1).collect();
    let scores = Function::build(|[p, dp, d]| [p * (dp - d)]);
    let sums = run_reduce(&scores, Reduce::Sum, &[p, dp, delta], p.dims(), &axes, &[d_mask.dtype()])?.remove(0);
    keys_of_mask(d_mask, start, p.dims()[3])?.copy_from(&sums)
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [q, k, v] = [&inputs[0], &inputs[1], &inputs[2]];
        let o = heads_last(&[&q.dims()[..3], &v.dims()[3..]].concat(), q.dtype(), q)?;
        let lse = Tensor::empty(&q.dims()[..3], accumulator(q.dtype()), q.device())?;
        let mask = expanded_mask(inputs.get(3), q, k)?;
        let attention = AttentionForward { q, k, v, mask: mask.as_ref(), scale: self.scale, o: &o, lse: &lse };
        if run_fused(attention)? == Ran::Declined {
            attention.compose()?;
        }
        for (name, tensor) in [("q", q), ("k", k), ("v", v), ("o", &o), ("lse", &lse)] {
            cx.save(name, tensor);
        }
        inputs.get(3).into_iter().for_each(|mask| cx.save("mask", mask));
        Ok(vec![o])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let [q, k, v, o, lse] = [saved.get("q")?, saved.get("k")?, saved.get("v")?, saved.get("o")?, saved.get("lse")?];
        let new = |t: &Tensor| heads_last(t.dims(), t.dtype(), t);
        let (dq, dk, dv) = (new(q)?, new(k)?, new(v)?);
        let own_mask = saved.optional("mask");
        let mask = expanded_mask(own_mask, q, k)?;
        let d_mask = own_mask.filter(|_| out.needs(3));
        let d_mask = d_mask.map(|m| Tensor::empty(m.dims(), m.dtype(), m.device())).transpose()?;
        let attention = AttentionBackward {
            q,
            k,
            v,
            mask: mask.as_ref(),
            scale: self.scale,
            o,
            lse,
            grad,
            dq: &dq,
            dk: &dk,
            dv: &dv,
            d_mask: d_mask.as_ref(),
        };
        if run_fused(attention)? == Ran::Declined {
            attention.compose()?;
        }
        let gradients = [Some(dq), Some(dk), Some(dv), d_mask].into_iter().enumerate();
        gradients.for_each(|(i, gradient)| gradient.into_iter().for_each(|gradient| out.set(i, gradient)));
        Ok(())
    }
}

/// Attention `softmax(q k^T scale + mask) v`.
///
/// q `[B, H, Lq, D]`, k `[B, H, Lk, D]`, v `[B, H, Lk, Dv]` (any strides), result `[B, H, Lq, Dv]`. `scale` is
/// `1 / sqrt(D)` where none is given. The mask broadcasts to `[B, H, Lq, Lk]`: floats are added to the scores (-inf masks
/// out), in f32 (f64 for f64), and get their gradient where they have a variable; u32 keeps where it is not 0. A fully
/// masked row gives zeros and no gradient.
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
    common_device("attention", &[Some(q), Some(k), Some(v), mask].into_iter().flatten().collect::<Vec<_>>())?;
    if let Some(other) = [k, v].into_iter().find(|t| t.dtype() != q.dtype() || !t.dtype().is_float()) {
        let expected = format!("one float dtype ({})", q.dtype());
        return Err(Error::DType { op: "attention", expected, got: other.dtype().to_string() });
    }
    let op = Attention { scale: scale.unwrap_or(1.0 / (d as f64).sqrt()) };
    let Some(mask) = mask else { return apply_one(op, &[q, k, v]) };
    let scores = [b, h, lq, lk];
    if broadcast("attention", &[mask.dims(), &scores])? != scores {
        return Err(Error::shape("attention", format!("a mask that broadcasts to {scores:?}"), mask.dims()));
    }
    let wide = accumulator(q.dtype());
    let additive = match mask.dtype() {
        DType::U32 => map(wide, [&mask.detach()], |[m]| m.select_lt(0.5, f64::NEG_INFINITY, 0.0))?,
        _ => mask.to_dtype(wide)?,
    };
    let axes = [&[1; 4][mask.rank()..], mask.dims()].concat();
    apply_one(op, &[q, k, v, &additive.reshape(&axes)?])
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[
    Case {
        name: "attention with a bias that has a gradient",
        make: |draw| {
            let [b, h, lq, lk] = [draw.size(1, 2), draw.size(1, 3), draw.size(1, 9), draw.size(2, 150)];
            let [d, dv] = [draw.size(1, 4), draw.size(1, 4)];
            let bias = [&draw.broadcast(&[b, h, lq])[..], &[lk]].concat();
            let inputs = vec![
                draw.standard(&[b, h, lq, d])?,
                draw.standard(&[b, h, lk, d])?,
                draw.standard(&[b, h, lk, dv])?,
                draw.standard(&bias)?,
            ];
            Sample::new(inputs, |xs| attention(&xs[0], &xs[1], &xs[2], Some(&xs[3]), Some(0.5)))
        },
    },
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
