//! Softmax, LayerNorm and RMSNorm over the last axis. Statistics are f32 (f64 for f64).

use crate::backend::call::{has_dims, has_dtype, is_dense, is_float};
use crate::backend::{FusedCall, Ran, common_device, operands, run_fused};
use crate::expr::{Function, Reduce};
use crate::gradcheck::{Case, Sample};
use crate::ops::pointwise::{map, run_pointwise};
use crate::ops::reduce::{accumulator, run_reduce};
use crate::tape::{Forward, InputGradients, Op, Saved, apply_one};
use crate::{DType, Error, Result, Tensor};

#[derive(Debug)]
struct Softmax {
    axis: usize,
}

impl Op for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let (x, axes) = (&inputs[0], [self.axis]);
        let wide = accumulator(x.dtype());
        let identity = Function::build(|[x]| [x]);
        let max = run_reduce(&identity, Reduce::Max, &[x], x.dims(), &axes, &[wide])?.remove(0);
        let terms = Function::build(|[x, m]| [(x - m).exp()]);
        let sum = run_reduce(&terms, Reduce::Sum, &[x, &max], x.dims(), &axes, &[wide])?.remove(0);
        let y = map(x.dtype(), [x, &max, &sum], |[x, m, s]| (x - m).exp() / s)?;
        cx.save("y", &y);
        Ok(vec![y])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let y = saved.get("y")?;
        let product = Function::build(|[y, g]| [y * g]);
        let dot = run_reduce(&product, Reduce::Sum, &[y, grad], y.dims(), &[self.axis], &[accumulator(y.dtype())])?;
        out.set(0, map(y.dtype(), [y, grad, &dot[0]], |[y, g, d]| y * (g - d))?);
        Ok(())
    }
}

/// Softmax along `axis`.
///
/// # Errors
/// When the axis does not exist.
pub fn softmax(x: &Tensor, axis: usize) -> Result<Tensor> {
    x.axis("softmax", axis)?;
    apply_one(Softmax { axis }, &[x])
}

impl Tensor {
    /// Softmax along `axis`.
    ///
    /// # Errors
    /// When the axis does not exist.
    pub fn softmax(&self, axis: usize) -> Result<Self> {
        softmax(self, axis)
    }
}

/// LayerNorm where there is a mean to write, else RMSNorm, over the last axis.
#[derive(Clone, Copy, Debug)]
pub struct NormForward<'a> {
    /// `[.., d]`, floats.
    pub x: &'a Tensor,
    /// `[d]`, floats.
    pub weight: Option<&'a Tensor>,
    /// `[d]`, floats.
    pub bias: Option<&'a Tensor>,
    /// Added to the variance, or the mean square.
    pub eps: f64,
    /// Like x.
    pub y: &'a Tensor,
    /// `[.., 1]`, f32 (f64 for f64), row-major without gaps.
    pub mean: Option<&'a Tensor>,
    /// The reciprocal of the standard deviation, or of the root mean square, like the mean.
    pub rstd: &'a Tensor,
}

/// The gradient of a norm's input: `rstd (gw - mean(gw) - x̂ mean(gw x̂))`; RMSNorm has no middle term.
#[derive(Clone, Copy, Debug)]
pub struct NormBackward<'a> {
    /// As forward.
    pub x: &'a Tensor,
    /// As forward.
    pub weight: Option<&'a Tensor>,
    /// What forward gave.
    pub mean: Option<&'a Tensor>,
    /// What forward gave.
    pub rstd: &'a Tensor,
    /// The gradient of y, like x.
    pub grad: &'a Tensor,
    /// The gradient of x, like x.
    pub dx: &'a Tensor,
}

/// Whether an operand of `op` has the shape and dtype of x.
pub(crate) fn is_like(op: &'static str, name: &str, tensor: &Tensor, x: &Tensor) -> Result<()> {
    has_dims(op, name, tensor, x.dims())?;
    has_dtype(op, name, tensor, x.dtype())
}

/// Whether there is a statistic of `op` for each row of x.
pub(crate) fn is_statistic(op: &'static str, tensor: &Tensor, x: &Tensor) -> Result<()> {
    has_dims(op, "mean and rstd", tensor, &row_dims(x))?;
    has_dtype(op, "mean and rstd", tensor, accumulator(x.dtype()))?;
    is_dense(op, "mean and rstd", tensor)
}

/// Sizes of a statistic of each row.
fn row_dims(x: &Tensor) -> Vec<usize> {
    let mut rows = x.dims().to_vec();
    rows.last_mut().into_iter().for_each(|d| *d = 1);
    rows
}

/// A new statistic of each row, to be written.
pub(crate) fn statistic(x: &Tensor) -> Result<Tensor> {
    Tensor::empty(&row_dims(x), accumulator(x.dtype()), x.device())
}

fn affine_fits(op: &'static str, x: &Tensor, vectors: [Option<&Tensor>; 2]) -> Result<()> {
    let Some(width) = x.dims().last() else {
        return Err(Error::shape(op, "one axis or more", x.dims()));
    };
    is_float(op, "x", x)?;
    vectors.into_iter().flatten().try_for_each(|vector| {
        is_float(op, "weight and bias", vector)?;
        has_dims(op, "weight and bias", vector, &[*width])
    })
}

impl<'a> FusedCall<'a> for NormForward<'a> {
    const NAME: &'static str = "norm";

    fn inputs(&self) -> [Option<&'a Tensor>; 8] {
        operands([Some(self.x), self.weight, self.bias])
    }

    fn outputs(&self) -> [Option<&'a Tensor>; 4] {
        operands([Some(self.y), self.mean, Some(self.rstd)])
    }

    fn fits(&self) -> Result<()> {
        affine_fits(Self::NAME, self.x, [self.weight, self.bias])?;
        is_like(Self::NAME, "y", self.y, self.x)?;
        [self.mean, Some(self.rstd)].into_iter().flatten().try_for_each(|t| is_statistic(Self::NAME, t, self.x))
    }
}

impl<'a> FusedCall<'a> for NormBackward<'a> {
    const NAME: &'static str = "norm backward";

    fn inputs(&self) -> [Option<&'a Tensor>; 8] {
        operands([Some(self.x), self.weight, self.mean, Some(self.rstd), Some(self.grad)])
    }

    fn outputs(&self) -> [Option<&'a Tensor>; 4] {
        operands([Some(self.dx)])
    }

    fn fits(&self) -> Result<()> {
        affine_fits(Self::NAME, self.x, [self.weight, None])?;
        is_like(Self::NAME, "grad", self.grad, self.x)?;
        is_like(Self::NAME, "dx", self.dx, self.x)?;
        [self.mean, Some(self.rstd)].into_iter().flatten().try_for_each(|t| is_statistic(Self::NAME, t, self.x))
    }
}

impl NormForward<'_> {
    /// Runs a kernel, or the composition.
    pub(crate) fn run_or_compose(&self) -> Result<()> {
        if run_fused(*self)? == Ran::Declined { self.compose() } else { Ok(()) }
    }

    /// The composition: y, mean and reciprocal deviation are written by passes over the whole tensor.
    fn compose(&self) -> Result<()> {
        let Self { x, weight, bias, eps, y, mean, rstd } = *self;
        let axis = x.rank() - 1;
        let (wide, n) = (rstd.dtype(), x.dims()[axis] as f64);
        let (zero, one) = constants(wide, x)?;
        if let Some(mean) = mean {
            let share = Function::build(|[x]| [x / n]);
            mean.copy_from(&run_reduce(&share, Reduce::Sum, &[x], x.dims(), &[axis], &[wide])?[0])?;
        }
        let mean = mean.unwrap_or(&zero);
        let deviation = Function::build(|[x, m]| [(x - m).square() / n]);
        let variance = run_reduce(&deviation, Reduce::Sum, &[x, mean], x.dims(), &[axis], &[wide])?.remove(0);
        run_pointwise(&Function::build(|[v]| [(v + eps).rsqrt()]), &[&variance], &[], &[rstd])?;
        let (weight, bias) = (weight.unwrap_or(&one), bias.unwrap_or(&zero));
        let function = Function::build(|[x, m, s, w, b]| [(x - m) * s * w + b]);
        run_pointwise(&function, &[x, mean, rstd, weight, bias], &[], &[y])
    }
}

impl NormBackward<'_> {
    /// Runs a kernel, or the composition.
    pub(crate) fn run_or_compose(&self) -> Result<()> {
        if run_fused(*self)? == Ran::Declined { self.compose() } else { Ok(()) }
    }

    fn compose(&self) -> Result<()> {
        let Self { x, weight, mean, rstd, grad, dx } = *self;
        let axis = x.rank() - 1;
        let (wide, n) = (rstd.dtype(), x.dims()[axis] as f64);
        let (zero, one) = constants(wide, x)?;
        let centre = if mean.is_some() { 1.0 } else { 0.0 };
        let (mean, weight) = (mean.unwrap_or(&zero), weight.unwrap_or(&one));
        let means = Function::build(|[x, m, s, w, g]| [g * w / n, g * w * (x - m) * s / n]);
        let inputs = [x, mean, rstd, weight, grad];
        let sums = run_reduce(&means, Reduce::Sum, &inputs, x.dims(), &[axis], &[wide, wide])?;
        let function = Function::build(|[x, m, s, w, g, a, b]| [s * (g * w - a * centre - (x - m) * s * b)]);
        run_pointwise(&function, &[x, mean, rstd, weight, grad, &sums[0], &sums[1]], &[], &[dx])
    }

    /// The gradient of the weight `[d]`, in a dtype.
    pub(crate) fn of_weight(&self, dtype: DType) -> Result<Tensor> {
        let Self { x, mean, rstd, grad, .. } = *self;
        let axis = x.rank() - 1;
        let lead: Vec<usize> = (0..axis).collect();
        let zero = constants(rstd.dtype(), x)?.0;
        let rows = Function::build(|[x, m, s, g]| [g * (x - m) * s]);
        let inputs = [x, mean.unwrap_or(&zero), rstd, grad];
        run_reduce(&rows, Reduce::Sum, &inputs, x.dims(), &lead, &[dtype])?[0].reshape(&x.dims()[axis..])
    }
}

/// What stands for a missing mean or bias, and for a missing weight.
fn constants(dtype: DType, like: &Tensor) -> Result<(Tensor, Tensor)> {
    Ok((Tensor::zeros(&[], dtype, like.device())?, Tensor::ones(&[], dtype, like.device())?))
}

/// LayerNorm (`centred`) or RMSNorm, with inputs x, then weight and bias where there are such.
#[derive(Debug)]
struct Norm {
    centred: bool,
    eps: f64,
    weight: bool,
    bias: bool,
}

impl Op for Norm {
    fn name(&self) -> &'static str {
        if self.centred { "layer_norm" } else { "rms_norm" }
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let x = &inputs[0];
        let weight = inputs.get(1).filter(|_| self.weight);
        let bias = inputs.get(1 + usize::from(self.weight)).filter(|_| self.bias);
        let y = Tensor::empty_like(x, x.dims(), x.dtype())?;
        let mean = if self.centred { Some(statistic(x)?) } else { None };
        let rstd = statistic(x)?;
        NormForward { x, weight, bias, eps: self.eps, y: &y, mean: mean.as_ref(), rstd: &rstd }.run_or_compose()?;
        let kept = [("x", Some(x)), ("rstd", Some(&rstd)), ("mean", mean.as_ref()), ("weight", weight)];
        kept.into_iter().filter_map(|(name, t)| Some((name, t?))).for_each(|(name, t)| cx.save(name, t));
        Ok(vec![y])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let (x, rstd) = (saved.get("x")?, saved.get("rstd")?);
        let (mean, weight) = (saved.optional("mean"), saved.optional("weight"));
        let dx = Tensor::empty_like(x, x.dims(), x.dtype())?;
        let norm = NormBackward { x, weight, mean, rstd, grad, dx: &dx };
        if out.needs(0) {
            norm.run_or_compose()?;
        }
        if let Some(weight) = weight.filter(|_| out.needs(1)) {
            out.set(1, norm.of_weight(weight.dtype())?);
        }
        out.set(0, dx);
        let at_bias = 1 + usize::from(self.weight);
        if self.bias && out.needs(at_bias) {
            let axis = x.rank() - 1;
            let lead: Vec<usize> = (0..axis).collect();
            let identity = Function::build(|[g]| [g]);
            let sums = run_reduce(&identity, Reduce::Sum, &[grad], x.dims(), &lead, &[grad.dtype()])?;
            out.set(at_bias, sums[0].reshape(&x.dims()[axis..])?);
        }
        Ok(())
    }
}

fn norm(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64, centred: bool) -> Result<Tensor> {
    let op = Norm { centred, eps, weight: weight.is_some(), bias: bias.is_some() };
    let name = op.name();
    let Some(width) = x.dims().last() else {
        return Err(Error::shape(name, "one axis or more", x.dims()));
    };
    let mut inputs = vec![x];
    inputs.extend(weight);
    inputs.extend(bias);
    common_device(name, &inputs)?;
    for t in &inputs[1..] {
        if t.dims() != [*width] {
            return Err(Error::shape(name, format!("weight and bias of [{width}]"), t.dims()));
        }
    }
    apply_one(op, &inputs)
}

/// LayerNorm over the last axis: `(x - mean) / sqrt(var + eps) * weight + bias`, weight and bias `[d]` or none.
///
/// # Errors
/// When the shapes do not fit.
pub fn layer_norm(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    norm(x, weight, bias, eps, true)
}

/// RMSNorm over the last axis: `x / sqrt(mean(x^2) + eps) * weight`, weight `[d]` or none.
///
/// # Errors
/// When the shapes do not fit.
pub fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    norm(x, weight, None, eps, false)
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[
    Case {
        name: "softmax",
        make: |draw| {
            let dims = draw.dims(3);
            let axis = draw.size(0, 2);
            Sample::new(vec![draw.standard(&dims)?], move |xs| softmax(&xs[0], axis))
        },
    },
    Case {
        name: "layer_norm",
        make: |draw| {
            let dims = [draw.size(1, 4), draw.size(1, 3), draw.size(3, 9)];
            let mut inputs = vec![draw.standard(&dims)?];
            if draw.size(0, 1) == 1 {
                inputs.extend([draw.standard(&dims[2..])?, draw.standard(&dims[2..])?]);
            }
            // A large epsilon keeps the gradient smooth where a drawn row is nearly constant.
            Sample::new(inputs, |xs| layer_norm(&xs[0], xs.get(1), xs.get(2), 0.1))
        },
    },
    Case {
        name: "rms_norm",
        make: |draw| {
            let dims = [draw.size(1, 4), draw.size(1, 3), draw.size(1, 9)];
            let mut inputs = vec![draw.standard(&dims)?];
            if draw.size(0, 1) == 1 {
                inputs.push(draw.standard(&dims[2..])?);
            }
            Sample::new(inputs, |xs| rms_norm(&xs[0], xs.get(1), 0.1))
        },
    },
];
