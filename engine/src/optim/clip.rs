//! Clipping by the norm of all gradients.

use crate::backend::common_device;
use crate::expr::{Function, Program, Reduce};
use crate::ops::pointwise::map;
use crate::ops::reduce::run_reduce;
use crate::shape::Layout;
use crate::{DType, Error, Gradients, Result, Tensor};

/// The norm before clipping, and what gradients are to be multiplied with: both stay on the device, without axes.
#[derive(Clone, Debug)]
pub struct Clipping {
    /// The L2 norm of all gradients together: f64, or f32 on a device that has no f64.
    pub norm: Tensor,
    /// `min(1, max_norm / (norm + 1e-6))`, 1 without a limit, NaN where the norm is not finite: f32, f64 for gradients in
    /// f64.
    pub coefficient: Tensor,
}

impl Clipping {
    /// The norm, once it is on the host.
    ///
    /// # Errors
    /// When it is not finite.
    pub fn finite(norm: f64) -> Result<f64> {
        if norm.is_finite() {
            return Ok(norm);
        }
        Err(Error::NonFinite { op: "clip_grad_norm", what: format!("the gradients' norm ({norm})") })
    }
}

/// The norm of all gradients and the coefficient that brings it down to `max_norm`. The optimiser multiplies with it in
/// its own pass. Nothing is read back.
///
/// # Errors
/// When there is no gradient, or they lie on several devices.
pub fn clip_grad_norm(gradients: &Gradients, max_norm: Option<f64>) -> Result<Clipping> {
    let all: Vec<&Tensor> = gradients.iter().map(|(_, gradient)| gradient).collect();
    let device = common_device("clip_grad_norm", &all)?;
    let wide = if device.backend().has_f64() { DType::F64 } else { DType::F32 };
    let dtype = if all.iter().any(|g| g.dtype() == DType::F64) { DType::F64 } else { DType::F32 };
    // Each gradient's sum has a place of its own; then they are summed.
    let sums = Tensor::zeros(&[all.len()], wide, device)?;
    let square = Program::of(&Function::build(|[g]| [g.square()]));
    for (offset, gradient) in all.iter().enumerate().filter(|(_, g)| g.numel() > 0) {
        let axes = gradient.rank();
        let place = sums.view(Layout { dims: vec![1; axes], strides: vec![0; axes], offset });
        device.backend().reduce(&square, Reduce::Sum, &[gradient], &[], &[&place])?;
    }
    let identity = Function::build(|[s]| [s]);
    let total = run_reduce(&identity, Reduce::Sum, &[&sums], sums.dims(), &[0], &[wide])?.remove(0).reshape(&[])?;
    let norm = map(wide, [&total], |[t]| t.sqrt())?;
    let coefficient = match max_norm {
        Some(max) => map(dtype, [&norm], |[n]| n.select_lt(f64::INFINITY, (max / (n + 1e-6)).minimum(1.0), f64::NAN))?,
        None => map(dtype, [&norm], |[n]| n.select_lt(f64::INFINITY, 1.0, f64::NAN))?,
    };
    Ok(Clipping { norm, coefficient })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Tape};

    #[test]
    fn the_norm_is_that_of_all_gradients_together() -> Result<()> {
        let (tape, mut gradients) = (Tape::new(), Gradients::default());
        for values in [vec![3f32], vec![0.0, 4.0]] {
            let x = Tensor::from_slice(&values, &[values.len()], &Device::cpu())?;
            gradients.insert(tape.leaf(&x).var().unwrap(), x);
        }
        let read = |gradients: &Gradients, max: Option<f64>| -> Result<(f64, f64)> {
            let clipping = clip_grad_norm(gradients, max)?;
            Ok((clipping.norm.item()?, clipping.coefficient.item()?))
        };
        assert_eq!(read(&gradients, Some(1.0))?, (5.0, f64::from((1.0f64 / 5.000_001) as f32)));
        assert_eq!((read(&gradients, Some(10.0))?.1, read(&gradients, None)?.1), (1.0, 1.0));
        for value in [f32::NAN, f32::INFINITY] {
            let bad = Tensor::from_slice(&[value], &[1], &Device::cpu())?;
            gradients.insert(tape.leaf(&bad).var().unwrap(), bad);
            let (norm, coefficient) = read(&gradients, None)?;
            assert!(coefficient.is_nan() && matches!(Clipping::finite(norm), Err(Error::NonFinite { .. })));
        }
        Ok(())
    }
}
