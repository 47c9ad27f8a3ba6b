//! Softmax, LayerNorm and RMSNorm over the last axis. Statistics are f32 (f64 for f64).

use crate::backend::{Fused, Ran, common_device};
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

/// LayerNorm (`centred`) or RMSNorm, with inputs x, then weight and bias where there are such.
#[derive(Debug)]
struct Norm {
    centred: bool,
    eps: f64,
    weight: bool,
    bias: bool,
}

impl Norm {
    /// Weight and bias among the inputs.
    fn affine<'a>(&self, inputs: &'a [Tensor]) -> (Option<&'a Tensor>, Option<&'a Tensor>) {
        let at_bias = 1 + usize::from(self.weight);
        (inputs.get(1).filter(|_| self.weight), inputs.get(at_bias).filter(|_| self.bias))
    }

    /// The composition: y, mean and reciprocal deviation are written by passes over the whole tensor.
    fn compose(&self, inputs: &[Tensor], y: &Tensor, mean: Option<&Tensor>, scale: &Tensor) -> Result<()> {
        let x = &inputs[0];
        let axis = x.rank() - 1;
        let (wide, n, eps) = (scale.dtype(), x.dims()[axis] as f64, self.eps);
        let (zero, one) = constants(wide, x)?;
        if let Some(mean) = mean {
            let share = Function::build(|[x]| [x / n]);
            mean.copy_from(&run_reduce(&share, Reduce::Sum, &[x], x.dims(), &[axis], &[wide])?[0])?;
        }
        let mean = mean.unwrap_or(&zero);
        let deviation = Function::build(|[x, m]| [(x - m).square() / n]);
        let variance = run_reduce(&deviation, Reduce::Sum, &[x, mean], x.dims(), &[axis], &[wide])?.remove(0);
        run_pointwise(&Function::build(|[v]| [(v + eps).rsqrt()]), &[&variance], &[], &[scale])?;
        let (weight, bias) = self.affine(inputs);
        let (weight, bias) = (weight.unwrap_or(&one), bias.unwrap_or(&zero));
        let function = Function::build(|[x, m, s, w, b]| [(x - m) * s * w + b]);
        run_pointwise(&function, &[x, mean, scale, weight, bias], &[], &[y])
    }

    /// The composition of the gradient: `dx = s (gw - mean(gw) - x̂ mean(gw x̂))`; RMSNorm has no middle term.
    fn compose_backward(&self, saved: &Statistics<'_>, grad: &Tensor, dx: &Tensor) -> Result<()> {
        let Statistics { x, mean, scale, weight } = *saved;
        let axis = x.rank() - 1;
        let (wide, n) = (scale.dtype(), x.dims()[axis] as f64);
        let (zero, one) = constants(wide, x)?;
        let (mean, weight) = (mean.unwrap_or(&zero), weight.unwrap_or(&one));
        let means = Function::build(|[x, m, s, w, g]| [g * w / n, g * w * (x - m) * s / n]);
        let inputs = [x, mean, scale, weight, grad];
        let sums = run_reduce(&means, Reduce::Sum, &inputs, x.dims(), &[axis], &[wide, wide])?;
        let centre = if self.centred { 1.0 } else { 0.0 };
        let function = Function::build(|[x, m, s, w, g, a, b]| [s * (g * w - a * centre - (x - m) * s * b)]);
        run_pointwise(&function, &[x, mean, scale, weight, grad, &sums[0], &sums[1]], &[], &[dx])
    }
}

/// What stands for a missing mean or bias, and for a missing weight.
fn constants(dtype: DType, like: &Tensor) -> Result<(Tensor, Tensor)> {
    Ok((Tensor::zeros(&[], dtype, like.device())?, Tensor::ones(&[], dtype, like.device())?))
}

/// What forward keeps.
#[derive(Clone, Copy)]
struct Statistics<'a> {
    x: &'a Tensor,
    mean: Option<&'a Tensor>,
    scale: &'a Tensor,
    weight: Option<&'a Tensor>,
}

impl Op for Norm {
    fn name(&self) -> &'static str {
        if self.centred { "layer_norm" } else { "rms_norm" }
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let x = &inputs[0];
        let mut rows = x.dims().to_vec();
        rows[x.rank() - 1] = 1;
        let statistic = || Tensor::empty(&rows, accumulator(x.dtype()), x.device());
        let y = Tensor::empty_like(x, x.dims(), x.dtype())?;
        let mean = if self.centred { Some(statistic()?) } else { None };
        let scale = statistic()?;
        let Self { centred, eps, weight, bias } = *self;
        let fused = Fused::NormForward { centred, weight, bias, eps };
        let outputs: Vec<&Tensor> = [Some(&y), mean.as_ref(), Some(&scale)].into_iter().flatten().collect();
        if x.device().backend().fused(&fused, &inputs.iter().collect::<Vec<_>>(), &outputs)? == Ran::Declined {
            self.compose(inputs, &y, mean.as_ref(), &scale)?;
        }
        let kept = [("x", Some(x)), ("rstd", Some(&scale)), ("mean", mean.as_ref()), ("weight", self.affine(inputs).0)];
        kept.into_iter().filter_map(|(name, t)| Some((name, t?))).for_each(|(name, t)| cx.save(name, t));
        Ok(vec![y])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let (x, scale) = (saved.get("x")?, saved.get("rstd")?);
        let (mean, weight) = (saved.optional("mean"), saved.optional("weight"));
        if out.needs(0) {
            let dx = Tensor::empty_like(x, x.dims(), x.dtype())?;
            let fused = Fused::NormBackward { centred: self.centred, weight: self.weight };
            let inputs: Vec<&Tensor> = [Some(x), Some(grad), Some(scale), mean, weight].into_iter().flatten().collect();
            if x.device().backend().fused(&fused, &inputs, &[&dx])? == Ran::Declined {
                self.compose_backward(&Statistics { x, mean, scale, weight }, grad, &dx)?;
            }
            out.set(0, dx);
        }
        let axis = x.rank() - 1;
        let lead: Vec<usize> = (0..axis).collect();
        if let Some(weight) = weight.filter(|_| out.needs(1)) {
            let zero = constants(scale.dtype(), x)?.0;
            let rows = Function::build(|[x, m, s, g]| [g * (x - m) * s]);
            let inputs = [x, mean.unwrap_or(&zero), scale, grad];
            let sums = run_reduce(&rows, Reduce::Sum, &inputs, x.dims(), &lead, &[weight.dtype()])?;
            out.set(1, sums[0].reshape(&x.dims()[axis..])?);
        }
        let at_bias = 1 + usize::from(self.weight);
        if self.bias && out.needs(at_bias) {
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
