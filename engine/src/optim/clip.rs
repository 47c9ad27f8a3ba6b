//! Clipping by the norm of all gradients.

use crate::expr::{Function, Reduce};
use crate::ops::reduce::run_reduce;
use crate::{DType, Error, Gradients, Result};

/// The norm before clipping, and what gradients are to be multiplied with.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Clipping {
    /// The L2 norm of all gradients together.
    pub norm: f64,
    /// `min(1, max_norm / (norm + 1e-6))`; 1 without a limit.
    pub coefficient: f64,
}

/// The norm of all gradients, summed in f64, and the coefficient that brings it down to `max_norm`. The optimiser
/// multiplies with it in its own pass.
///
/// # Errors
/// When the norm is not finite.
pub fn clip_grad_norm(gradients: &Gradients, max_norm: Option<f64>) -> Result<Clipping> {
    let square = Function::build(|[g]| [g.square()]);
    let mut total = 0.0;
    for (_, gradient) in gradients.iter() {
        let axes: Vec<usize> = (0..gradient.rank()).collect();
        total += run_reduce(&square, Reduce::Sum, &[gradient], gradient.dims(), &axes, &[DType::F64])?[0].item()?;
    }
    let norm = total.sqrt();
    if !norm.is_finite() {
        return Err(Error::NonFinite { op: "clip_grad_norm", what: format!("the gradients' norm ({norm})") });
    }
    let coefficient = max_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
    Ok(Clipping { norm, coefficient })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Tape, Tensor};

    #[test]
    fn the_norm_is_that_of_all_gradients_together() -> Result<()> {
        let (tape, mut gradients) = (Tape::new(), Gradients::default());
        for values in [vec![3f32], vec![0.0, 4.0]] {
            let x = Tensor::from_slice(&values, &[values.len()], &Device::cpu())?;
            gradients.insert(tape.leaf(&x).var().unwrap(), x);
        }
        let clipping = clip_grad_norm(&gradients, Some(1.0))?;
        assert_eq!(clipping, Clipping { norm: 5.0, coefficient: 1.0 / 5.000_001 });
        assert_eq!(clip_grad_norm(&gradients, Some(10.0))?.coefficient, 1.0);
        let bad = Tensor::from_slice(&[f32::NAN], &[1], &Device::cpu())?;
        gradients.insert(tape.leaf(&bad).var().unwrap(), bad);
        assert!(matches!(clip_grad_norm(&gradients, None), Err(Error::NonFinite { .. })));
        Ok(())
    }
}
