//! LayerNorm and the modulation after it in one pass (adaptive layer normalisation; Peebles and Xie, DiT).

use crate::backend::call::{has_dims, has_dtype, is_float};
use crate::backend::{FusedCall, Ran, common_device, operands, run_fused};
use crate::expr::{Function, Reduce};
use crate::gradcheck::{Case, Sample};
use crate::ops::norm::{NormBackward, NormForward, is_like, is_statistic, layer_norm, statistic};
use crate::ops::pointwise::{map, pointwise_to, reduced_axes, run_pointwise};
use crate::ops::reduce::run_reduce;
use crate::tape::{Forward, InputGradients, Op, Saved, apply_one};
use crate::{Error, Result, Tensor};

/// `y = layer_norm(x) (1 + scale) + shift`, rounded to the dtype of x in between.
#[derive(Clone, Copy, Debug)]
pub struct ModulatedNormForward<'a> {
    /// `[B, L, d]`, floats.
    pub x: &'a Tensor,
    /// `[B, 1, d]` or `[B, L, d]`, floats.
    pub shift: &'a Tensor,
    /// As the shift.
    pub scale: &'a Tensor,
    /// Added to the variance.
    pub eps: f64,
    /// Like x.
    pub y: &'a Tensor,
    /// `[B, L, 1]`, f32 (f64 for f64), row-major without gaps.
    pub mean: &'a Tensor,
    /// The reciprocal of the standard deviation, like the mean.
    pub rstd: &'a Tensor,
}

/// The gradients of x, shift and scale.
#[derive(Clone, Copy, Debug)]
pub struct ModulatedNormBackward<'a> {
    /// As forward.
    pub x: &'a Tensor,
    /// As forward.
    pub scale: &'a Tensor,
    /// What forward gave.
    pub mean: &'a Tensor,
    /// What forward gave.
    pub rstd: &'a Tensor,
    /// The gradient of y, like x.
    pub grad: &'a Tensor,
    /// The gradient of x, like x.
    pub dx: &'a Tensor,
    /// The gradient of the shift, of the scale's sizes.
    pub d_shift: &'a Tensor,
    /// The gradient of the scale, like the scale.
    pub d_scale: &'a Tensor,
}

/// What both directions have.
fn fits(op: &'static str, x: &Tensor, scale: &Tensor, statistics: [&Tensor; 2]) -> Result<()> {
    let &[b, l, d] = x.dims() else {
        return Err(Error::shape(op, "x [B, L, d]", x.dims()));
    };
    if scale.dims() != [b, 1, d] {
        has_dims(op, "shift and scale [B, 1, d] or", scale, &[b, l, d])?;
    }
    is_float(op, "x", x)?;
    is_float(op, "scale", scale)?;
    statistics.iter().try_for_each(|t| is_statistic(op, t, x))
}

impl<'a> FusedCall<'a> for ModulatedNormForward<'a> {
    const NAME: &'static str = "modulated norm";

    fn inputs(&self) -> [Option<&'a Tensor>; 8] {
        operands([Some(self.x), Some(self.shift), Some(self.scale)])
    }

    fn outputs(&self) -> [Option<&'a Tensor>; 4] {
        operands([Some(self.y), Some(self.mean), Some(self.rstd)])
    }

    fn fits(&self) -> Result<()> {
        fits(Self::NAME, self.x, self.scale, [self.mean, self.rstd])?;
        is_float(Self::NAME, "shift", self.shift)?;
        has_dims(Self::NAME, "shift", self.shift, self.scale.dims())?;
        is_like(Self::NAME, "y", self.y, self.x)
    }
}

impl<'a> FusedCall<'a> for ModulatedNormBackward<'a> {
    const NAME: &'static str = "modulated norm backward";

    fn inputs(&self) -> [Option<&'a Tensor>; 8] {
        operands([Some(self.x), Some(self.scale), Some(self.mean), Some(self.rstd), Some(self.grad)])
    }

    fn outputs(&self) -> [Option<&'a Tensor>; 4] {
        operands([Some(self.dx), Some(self.d_shift), Some(self.d_scale)])
    }

    fn fits(&self) -> Result<()> {
        fits(Self::NAME, self.x, self.scale, [self.mean, self.rstd])?;
        is_like(Self::NAME, "grad", self.grad, self.x)?;
        is_like(Self::NAME, "dx", self.dx, self.x)?;
        is_float(Self::NAME, "a shift's gradient", self.d_shift)?;
        has_dims(Self::NAME, "a shift's gradient", self.d_shift, self.scale.dims())?;
        has_dims(Self::NAME, "a scale's gradient", self.d_scale, self.scale.dims())?;
        has_dtype(Self::NAME, "a scale's gradient", self.d_scale, self.scale.dtype())
    }
}

impl ModulatedNormForward<'_> {
    /// The composition: the norm, then the modulation.
    fn compose(&self) -> Result<()> {
        let Self { x, shift, scale, eps, y, mean, rstd } = *self;
        let normed = Tensor::empty_like(x, x.dims(), x.dtype())?;
        NormForward { x, weight: None, bias: None, eps, y: &normed, mean: Some(mean), rstd }.run_or_compose()?;
        let function = Function::build(|[x, shift, scale]| [x * (scale + 1.0) + shift]);
        run_pointwise(&function, &[&normed, shift, scale], &[], &[y])
    }
}

impl ModulatedNormBackward<'_> {
    /// The composition, backwards: the gradients of the modulation, then that of the norm.
    fn compose(&self) -> Result<()> {
        let Self { x, scale, mean, rstd, grad, dx, d_shift, d_scale } = *self;
        let normed = map(x.dtype(), [x, mean, rstd], |[x, m, s]| (x - m) * s)?;
        let axes = reduced_axes(scale.dims(), x.dims());
        let function = Function::build(|[x, g]| [g, g * x]);
        if axes.is_empty() {
            run_pointwise(&function, &[&normed, grad], &[], &[d_shift, d_scale])?;
        } else {
            let dtypes = [d_shift.dtype(), d_scale.dtype()];
            let sums = run_reduce(&function, Reduce::Sum, &[&normed, grad], x.dims(), &axes, &dtypes)?;
            d_shift.copy_from(&sums[0])?;
            d_scale.copy_from(&sums[1])?;
        }
        let weighted = map(x.dtype(), [grad, scale], |[g, scale]| g * (scale + 1.0))?;
        NormBackward { x, weight: None, mean: Some(mean), rstd, grad: &weighted, dx }.run_or_compose()
    }
}

/// Inputs x, shift and scale.
#[derive(Debug)]
struct ModulatedNorm {
    eps: f64,
}

impl Op for ModulatedNorm {
    fn name(&self) -> &'static str {
        "modulated_layer_norm"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let (x, shift, scale) = (&inputs[0], &inputs[1], &inputs[2]);
        let (y, mean, rstd) = (Tensor::empty_like(x, x.dims(), x.dtype())?, statistic(x)?, statistic(x)?);
        let norm = ModulatedNormForward { x, shift, scale, eps: self.eps, y: &y, mean: &mean, rstd: &rstd };
        if run_fused(norm)? == Ran::Declined {
            norm.compose()?;
        }
        let kept = [("x", x), ("mean", &mean), ("rstd", &rstd), ("scale", scale)];
        kept.into_iter().for_each(|(name, tensor)| cx.save(name, tensor));
        cx.save_shape("shift", shift);
        Ok(vec![y])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let [x, mean, rstd, scale] = [saved.get("x")?, saved.get("mean")?, saved.get("rstd")?, saved.get("scale")?];
        let (shift_dims, shift_dtype) = saved.shape("shift")?;
        let grad = &grad.contiguous()?;
        let dx = Tensor::empty_like(x, x.dims(), x.dtype())?;
        let d_shift = Tensor::empty(shift_dims, shift_dtype, x.device())?;
        let d_scale = Tensor::empty(scale.dims(), scale.dtype(), x.device())?;
        let norm = ModulatedNormBackward { x, scale, mean, rstd, grad, dx: &dx, d_shift: &d_shift, d_scale: &d_scale };
        if run_fused(norm)? == Ran::Declined {
            norm.compose()?;
        }
        out.set(0, dx);
        out.set(1, d_shift);
        out.set(2, d_scale);
        Ok(())
    }
}

/// `layer_norm(x) (1 + scale) + shift` in the dtype of x `[B, L, d]`; shift and scale `[B, 1, d]`, or one per token
/// `[B, L, d]`. The norm has no weight or bias of its own.
///
/// # Errors
/// When the shapes do not fit.
pub fn modulated_layer_norm(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    common_device("modulated_layer_norm", &[x, shift, scale])?;
    let fits = |t: &Tensor| x.rank() == 3 && t.layout().expand(x.dims()).is_ok();
    if !fits(shift) || !fits(scale) {
        let got = (x.dims(), shift.dims(), scale.dims());
        return Err(Error::shape("modulated_layer_norm", "x [B, L, d], shift and scale [B, 1, d] or [B, L, d]", got));
    }
    let one = [x.dims()[0], 1, x.dims()[2]];
    if shift.dims() == scale.dims() && [&one, x.dims()].contains(&scale.dims()) {
        return apply_one(ModulatedNorm { eps }, &[x, shift, scale]);
    }
    modulate(&layer_norm(x, None, None, eps)?, shift, scale)
}

/// `x (1 + scale) + shift` in the dtype of x; shift and scale broadcast to it.
///
/// # Errors
/// When the shapes do not fit.
pub fn modulate(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    pointwise_to(x.dtype(), [x, shift, scale], |[x, shift, scale]| x * (scale + 1.0) + shift)
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[Case {
    name: "modulated_layer_norm",
    make: |draw| {
        let [b, l, d] = [draw.size(1, 3), draw.size(1, 40), draw.size(3, 40)];
        let vectors = if draw.size(0, 1) == 0 { [b, 1, d] } else { [b, l, d] };
        let inputs = vec![draw.standard(&[b, l, d])?, draw.standard(&vectors)?, draw.standard(&vectors)?];
        // A large epsilon keeps the gradient smooth where a drawn row is nearly constant.
        Sample::new(inputs, |xs| modulated_layer_norm(&xs[0], &xs[1], &xs[2], 0.1))
    },
}];
