//! Group normalisation (Wu and He 2018), alone or with the SiLU that follows it in residual blocks.
//!
//! Sums over space are taken for each channel, which is fast in either order of memory, then put together for each group.

use crate::backend::common_device;
use crate::expr::{Function, Reduce};
use crate::gradcheck::{Case, Sample};
use crate::ops::pointwise::{map, run_pointwise};
use crate::ops::reduce::{accumulator, run_reduce};
use crate::tape::{Forward, InputGradients, Op, Saved, apply_one};
use crate::{Error, Result, Tensor};

/// Group normalisation with inputs x, weight and bias.
#[derive(Debug)]
struct GroupNorm {
    groups: usize,
    eps: f64,
    silu: bool,
}

/// A sum for each sample and channel of `[B, C, s..]`, as the mean over each group, repeated for its channels: `[B, C, 1..]`.
fn group_means(groups: usize, dims: &[usize], sums: Vec<Tensor>) -> Result<Vec<Tensor>> {
    let (batch, channels) = (dims[0], dims[1]);
    let count = (dims[1..].iter().product::<usize>() / groups.max(1)) as f64;
    let share = Function::build(|[x]| [x / count]);
    let mean = |sum: Tensor| -> Result<Tensor> {
        let by_group = sum.reshape(&[batch, groups, channels / groups])?;
        let mean = run_reduce(&share, Reduce::Sum, &[&by_group], by_group.dims(), &[2], &[by_group.dtype()])?.remove(0);
        mean.expand(by_group.dims())?.reshape(sum.dims())
    };
    sums.into_iter().map(mean).collect()
}

impl GroupNorm {
    /// Mean and reciprocal deviation of each channel's group, `[B, C, 1..]` in f32 (f64 for f64).
    fn statistics(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let (wide, space) = (accumulator(x.dtype()), space(x));
        let identity = Function::build(|[x]| [x]);
        let sums = run_reduce(&identity, Reduce::Sum, &[x], x.dims(), &space, &[wide])?;
        let mean = group_means(self.groups, x.dims(), sums)?.remove(0);
        let square = Function::build(|[x, m]| [(x - m).square()]);
        let sums = run_reduce(&square, Reduce::Sum, &[x, &mean], x.dims(), &space, &[wide])?;
        let variance = group_means(self.groups, x.dims(), sums)?.remove(0);
        let eps = self.eps;
        let rstd = map(wide, [&variance], |[v]| (v + eps).rsqrt())?;
        Ok((mean, rstd))
    }

    /// One multiply-add for each element: what is of a channel is put together.
    fn scale(&self, x: &Tensor, [mean, rstd, weight, bias]: [&Tensor; 4]) -> Result<ChannelScale> {
        let (weight, bias) = (column(weight, x)?, column(bias, x)?);
        let factor = map(rstd.dtype(), [rstd, &weight], |[s, w]| s * w)?;
        let offset = map(rstd.dtype(), [mean, &factor, &bias], |[m, f, b]| b - m * f)?;
        Ok(ChannelScale { factor, offset, silu: self.silu })
    }

    fn check(&self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<()> {
        let (name, channels) = (self.name(), x.dims().get(1).copied().unwrap_or(0));
        let fits = x.rank() >= 2 && self.groups > 0 && channels.is_multiple_of(self.groups);
        if !fits || weight.dims() != [channels] || bias.dims() != [channels] {
            let expected = format!("x [B, C, s..] with C a multiple of {}, weight and bias [C]", self.groups);
            return Err(Error::shape(name, expected, (x.dims(), weight.dims(), bias.dims())));
        }
        common_device(name, &[x, weight, bias])?;
        match [x, weight, bias].into_iter().find(|t| !t.dtype().is_float()) {
            Some(other) => Err(Error::DType { op: name, expected: "floats".into(), got: other.dtype().to_string() }),
            None => Ok(()),
        }
    }
}

/// A group norm of x whose statistics are known, so that parts of x can go through it one by one; maybe with the SiLU behind it.
#[derive(Debug)]
pub struct ChannelScale {
    /// Of each sample's channels, `[B, C, 1..]` in f32 (f64 for f64).
    factor: Tensor,
    offset: Tensor,
    silu: bool,
}

impl ChannelScale {
    /// That of [`group_norm`] with these arguments, or of [`group_norm_silu`]. It is not recorded.
    ///
    /// # Errors
    /// When the shapes do not fit, or one of the tensors needs a gradient.
    pub fn of(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f64, silu: bool) -> Result<Self> {
        let op = GroupNorm { groups, eps, silu };
        op.check(x, weight, bias)?;
        let constant = |name, tensor: &Tensor| tensor.constant("group_norm", name);
        let (x, weight, bias) = (constant("x", x)?, constant("weight", weight)?, constant("bias", bias)?);
        let (mean, rstd) = op.statistics(&x)?;
        op.scale(&x, [&mean, &rstd, &weight, &bias])
    }

    /// What becomes of some places of x, in the dtype of x.
    ///
    /// # Errors
    /// When these are not of so many samples and channels, or need a gradient.
    pub fn apply(&self, part: &Tensor) -> Result<Tensor> {
        let part = part.constant("group_norm", "x")?;
        if part.rank() != self.factor.rank() || part.dims()[..2] != self.factor.dims()[..2] {
            return Err(Error::shape("group_norm", format!("{:?} and places", &self.factor.dims()[..2]), part.dims()));
        }
        let y = Tensor::empty_like(&part, part.dims(), part.dtype())?;
        self.write(&part, &y)?;
        Ok(y)
    }

    fn write(&self, x: &Tensor, y: &Tensor) -> Result<()> {
        let function = match self.silu {
            true => Function::build(|[x, f, o]| [(x * f + o).silu()]),
            false => Function::build(|[x, f, o]| [x * f + o]),
        };
        run_pointwise(&function, &[x, &self.factor, &self.offset], &[], &[y])
    }
}

/// The axes beside samples and channels.
fn space(x: &Tensor) -> Vec<usize> {
    (2..x.rank()).collect()
}

/// `[C]` as `[C, 1..]`, in the statistics' dtype.
fn column(vector: &Tensor, x: &Tensor) -> Result<Tensor> {
    vector.detach().to_dtype(accumulator(x.dtype()))?.reshape(&[&[vector.numel()][..], &vec![1; x.rank() - 2]].concat())
}

impl Op for GroupNorm {
    fn name(&self) -> &'static str {
        "group_norm"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let x = &inputs[0];
        let y = Tensor::empty_like(x, x.dims(), x.dtype())?;
        if y.numel() == 0 {
            return Ok(vec![y]);
        }
        let (mean, rstd) = self.statistics(x)?;
        self.scale(x, [&mean, &rstd, &inputs[1], &inputs[2]])?.write(x, &y)?;
        let kept = [("x", x), ("mean", &mean), ("rstd", &rstd), ("weight", &inputs[1]), ("bias", &inputs[2])];
        kept.into_iter().for_each(|(name, tensor)| cx.save(name, tensor));
        Ok(vec![y])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let (x, mean, rstd) = (saved.get("x")?, saved.get("mean")?, saved.get("rstd")?);
        let (weight, bias) = (column(saved.get("weight")?, x)?, column(saved.get("bias")?, x)?);
        let wide = rstd.dtype();
        // The gradient of what goes into the SiLU.
        let grad = &match self.silu {
            true => map(wide, [x, mean, rstd, &weight, &bias, grad], |[x, m, s, w, b, g]| {
                let z = (x - m) * s * w + b;
                let sigmoid = z.sigmoid();
                g * sigmoid * (z * (1.0 - sigmoid) + 1.0)
            })?,
            false => grad.clone(),
        };
        let terms = Function::build(|[x, m, s, g]| [g, g * (x - m) * s]);
        let sums = run_reduce(&terms, Reduce::Sum, &[x, mean, rstd, grad], x.dims(), &space(x), &[wide; 2])?;
        if out.needs(0) {
            let weighted = sums.iter().map(|sum| map(wide, [sum, &weight], |[s, w]| s * w)).collect::<Result<_>>()?;
            let means = group_means(self.groups, x.dims(), weighted)?;
            let dx = Tensor::empty_like(x, x.dims(), x.dtype())?;
            let function = Function::build(|[x, m, s, w, g, a, b]| [s * (g * w - a - (x - m) * s * b)]);
            run_pointwise(&function, &[x, mean, rstd, &weight, grad, &means[0], &means[1]], &[], &[&dx])?;
            out.set(0, dx);
        }
        for (input, sum) in [(2, &sums[0]), (1, &sums[1])] {
            let dtype = saved.shape(if input == 1 { "weight" } else { "bias" })?.1;
            let identity = Function::build(|[x]| [x]);
            let total = run_reduce(&identity, Reduce::Sum, &[sum], sum.dims(), &[0], &[dtype])?;
            out.set(input, total[0].reshape(&x.dims()[1..2])?);
        }
        Ok(())
    }
}

fn normalised(x: &Tensor, weight: &Tensor, bias: &Tensor, op: GroupNorm) -> Result<Tensor> {
    op.check(x, weight, bias)?;
    apply_one(op, &[x, weight, bias])
}

/// Group normalisation: x `[B, C, s..]`, each of `groups` runs of channels to mean 0 and variance 1 over its channels and all
/// places, then times weight `[C]` plus bias `[C]`. Statistics are f32 (f64 for f64); the result has the dtype of x.
///
/// # Errors
/// When the shapes do not fit.
pub fn group_norm(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    normalised(x, weight, bias, GroupNorm { groups, eps, silu: false })
}

/// `silu(group_norm(x))` in one pass.
///
/// # Errors
/// When the shapes do not fit.
pub fn group_norm_silu(x: &Tensor, groups: usize, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    normalised(x, weight, bias, GroupNorm { groups, eps, silu: true })
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[Case {
    name: "group_norm, with and without silu",
    make: |draw| {
        // A group of one element would have no gradient but rounding.
        let (groups, width) = (draw.size(1, 3), draw.size(3, 5));
        let channels = groups * width;
        let (batch, rank) = (draw.size(1, 2), draw.size(0, 3));
        let space = draw.dims(rank);
        let x = draw.standard(&[&[batch, channels], &space[..]].concat())?;
        let silu = draw.size(0, 1) == 1;
        Sample::new(vec![x, draw.standard(&[channels])?, draw.standard(&[channels])?], move |xs| {
            // A large epsilon keeps the gradient smooth where a drawn group is nearly constant.
            let norm = if silu { group_norm_silu } else { group_norm };
            norm(&xs[0], groups, &xs[1], &xs[2], 0.5)
        })
    },
}];
