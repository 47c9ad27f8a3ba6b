//! LayerNorm and the modulation after it in one pass (adaptive layer normalisation; Peebles and Xie, DiT).

use crate::backend::{Fused, common_device, run_fused};
use crate::gradcheck::{Case, Sample};
use crate::ops::norm::layer_norm;
use crate::ops::pointwise::pointwise_to;
use crate::ops::reduce::accumulator;
use crate::tape::{Forward, InputGradients, Op, Saved, apply_one};
use crate::{Error, Result, Tensor};

/// Inputs x, shift and scale, of a backend that has a kernel for them.
#[derive(Debug)]
struct ModulatedNorm {
    eps: f64,
}

impl Op for ModulatedNorm {
    fn name(&self) -> &'static str {
        "modulated_layer_norm"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let x = &inputs[0];
        let rows = [&x.dims()[..x.rank() - 1], &[1]].concat();
        let statistic = || Tensor::empty(&rows, accumulator(x.dtype()), x.device());
        let (y, mean, deviation) = (Tensor::empty_like(x, x.dims(), x.dtype())?, statistic()?, statistic()?);
        let fused = Fused::ModulatedNormForward { eps: self.eps };
        let views: Vec<&Tensor> = inputs.iter().collect();
        run_fused(&fused, &views, &[&y, &mean, &deviation])?;
        let kept = [("x", x), ("mean", &mean), ("rstd", &deviation), ("scale", &inputs[2])];
        kept.into_iter().for_each(|(name, tensor)| cx.save(name, tensor));
        cx.save_shape("shift", &inputs[1]);
        Ok(vec![y])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let (x, mean, deviation, scale) =
            (saved.get("x")?, saved.get("mean")?, saved.get("rstd")?, saved.get("scale")?);
        let (shift_dims, shift_dtype) = saved.shape("shift")?;
        let grad = grad.contiguous()?;
        let dx = Tensor::empty_like(x, x.dims(), x.dtype())?;
        let d_shift = Tensor::empty(shift_dims, shift_dtype, x.device())?;
        let d_scale = Tensor::empty(scale.dims(), scale.dtype(), x.device())?;
        let (inputs, outputs) = ([x, &grad, mean, deviation, scale], [&dx, &d_shift, &d_scale]);
        run_fused(&Fused::ModulatedNormBackward, &inputs, &outputs)?;
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
    let device = common_device("modulated_layer_norm", &[x, shift, scale])?;
    let fits = |t: &Tensor| x.rank() == 3 && t.layout().expand(x.dims()).is_ok();
    if !fits(shift) || !fits(scale) {
        let got = (x.dims(), shift.dims(), scale.dims());
        return Err(Error::shape("modulated_layer_norm", "x [B, L, d], shift and scale [B, 1, d] or [B, L, d]", got));
    }
    let one = [x.dims()[0], 1, x.dims()[2]];
    let alike = shift.dims() == scale.dims() && [&one, x.dims()].contains(&scale.dims());
    if alike && device.backend().fuses(&Fused::ModulatedNormForward { eps }, &[x, shift, scale]) {
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
