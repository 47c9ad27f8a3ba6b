//! Clipping by the norm of all gradients.

use std::sync::Arc;

use smallvec::smallvec;

use crate::backend::call::{Call, Reduction};
use crate::backend::common_device;
use crate::comm::Comm;
use crate::expr::{Function, Program, Reduce};
use crate::ops::pointwise::map;
use crate::ops::reduce::run_reduce;
use crate::shape::Layout;
use crate::{DType, Device, Error, Gradients, Later, Result, Tensor};

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

/// Sums of what a program gives, taken over one group of tensors at a time: each has a place of its own, so totals do not depend on
/// their order.
#[derive(Debug)]
pub(super) struct PlacedSums {
    /// `[outputs, places]`
    sums: Tensor,
    program: Arc<Program>,
}

impl PlacedSums {
    /// Places for `count` groups, all zero: f64, or f32 on a device that has no f64.
    pub fn new(program: Arc<Program>, count: usize, device: &Device) -> Result<Self> {
        let dtype = if device.backend().has_f64() { DType::F64 } else { DType::F32 };
        Ok(Self { sums: Tensor::zeros(&[program.outputs.len(), count], dtype, device)?, program })
    }

    /// Sets a place to the sums over tensors of one shape.
    pub fn add(&self, place: usize, inputs: &[&Tensor], scalars: &[f64]) -> Result<()> {
        let [outputs, count] = *self.sums.dims() else { return Ok(()) };
        if place >= count {
            return Err(Error::argument("sums", format!("a place below {count}"), place));
        }
        if inputs.iter().any(|input| input.numel() == 0) {
            return Ok(());
        }
        let axes = inputs.first().map_or(0, |input| input.rank());
        let place =
            |i: usize| Layout { dims: smallvec![1; axes], strides: smallvec![0; axes], offset: i * count + place };
        let places: Vec<Tensor> = (0..outputs).map(|i| self.sums.view(place(i))).collect();
        let outputs: Vec<&Tensor> = places.iter().collect();
        Reduction { program: &self.program, kind: Reduce::Sum, inputs, scalars, outputs: &outputs }.run()
    }

    /// The sums of all places for each output. The host waits for them.
    pub fn totals(&self) -> Result<Vec<f64>> {
        let count = self.sums.dims()[1].max(1);
        Ok(self.sums.to_vec::<f64>()?.chunks(count).map(|places| places.iter().sum()).collect())
    }
}

/// Sums of squares of gradients, taken one gradient at a time: each has a place of its own, so the norm does not depend on
/// their order.
#[derive(Debug)]
pub struct SquareSums(PlacedSums);

impl SquareSums {
    /// Places for `count` gradients, all zero: f64, or f32 on a device that has no f64.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(count: usize, device: &Device) -> Result<Self> {
        let square = Program::of(&Function::build(|[g]| [g.square()]));
        PlacedSums::new(square, count, device).map(Self)
    }

    /// Sets a place to the sum of a gradient's squares.
    ///
    /// # Errors
    /// When there is no such place or the device fails.
    pub fn add(&self, place: usize, gradient: &Tensor) -> Result<()> {
        self.0.add(place, &[gradient], &[])
    }

    /// Adds the places of all ranks: where each rank has set its own, all have all then.
    ///
    /// # Errors
    /// When a rank fails.
    pub(super) fn all_reduce(&self, comm: &dyn Comm) -> Result<()> {
        comm.all_reduce(&self.0.sums)
    }

    /// The sum of each place, for later: nothing waits for them yet.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read_later(&self) -> Result<Later> {
        self.0.sums.read_later()
    }

    /// The L2 norm of all gradients together, without axes.
    ///
    /// # Errors
    /// When the device fails.
    pub fn norm(&self) -> Result<Tensor> {
        let (sums, dtype) = (&self.0.sums, self.0.sums.dtype());
        let identity = Function::build(|[s]| [s]);
        let total =
            run_reduce(&identity, Reduce::Sum, &[sums], sums.dims(), &[0, 1], &[dtype])?.remove(0).reshape(&[])?;
        map(dtype, [&total], |[t]| t.sqrt())
    }
}

/// The norm of all gradients and the coefficient that brings it down to `max_norm`. The optimiser multiplies with it in
/// its own pass. Nothing is read back.
///
/// # Errors
/// When there is no gradient, or they lie on several devices.
pub fn clip_grad_norm(gradients: &Gradients, max_norm: Option<f64>) -> Result<Clipping> {
    clip_scaled(gradients, max_norm, None)
}

/// The same from gradients of a loss that was multiplied with `scale` (without axes): the norm is that of the unscaled
/// gradients, and the coefficient takes the scale off too.
pub(super) fn clip_scaled(gradients: &Gradients, max_norm: Option<f64>, scale: Option<&Tensor>) -> Result<Clipping> {
    let all: Vec<&Tensor> = gradients.iter().map(|(_, gradient)| gradient).collect();
    let device = common_device("clip_grad_norm", &all)?;
    let dtype = if all.iter().any(|g| g.dtype() == DType::F64) { DType::F64 } else { DType::F32 };
    let sums = SquareSums::new(all.len(), device)?;
    all.iter().enumerate().try_for_each(|(place, gradient)| sums.add(place, gradient))?;
    clip_sums(&sums, dtype, max_norm, scale)
}

/// The same from the sums of all gradients, whose dtype is f64 or another.
pub(super) fn clip_sums(
    sums: &SquareSums,
    dtype: DType,
    max_norm: Option<f64>,
    scale: Option<&Tensor>,
) -> Result<Clipping> {
    let unscaled = |x: Tensor| match scale {
        Some(scale) => map(x.dtype(), [&x, scale], |[x, scale]| x / scale),
        None => Ok(x),
    };
    let norm = unscaled(sums.norm()?)?;
    let coefficient = match max_norm {
        Some(max) => map(dtype, [&norm], |[n]| n.select_lt(f64::INFINITY, (max / (n + 1e-6)).minimum(1.0), f64::NAN))?,
        None => map(dtype, [&norm], |[n]| n.select_lt(f64::INFINITY, 1.0, f64::NAN))?,
    };
    Ok(Clipping { norm, coefficient: unscaled(coefficient)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tape;

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
        // As if these were gradients of 0.75 and 1 of a loss that was multiplied with 4.
        let scale = Tensor::full(&[], 4.0, DType::F32, &Device::cpu())?;
        let clipping = clip_scaled(&gradients, Some(0.5), Some(&scale))?;
        assert_eq!(clipping.norm.item()?, 1.25);
        assert!((clipping.coefficient.item()? * 4.0 - 0.5 / 1.25).abs() < 1e-6);
        for value in [f32::NAN, f32::INFINITY] {
            let bad = Tensor::from_slice(&[value], &[1], &Device::cpu())?;
            gradients.insert(tape.leaf(&bad).var().unwrap(), bad);
            let (norm, coefficient) = read(&gradients, None)?;
            assert!(coefficient.is_nan() && matches!(Clipping::finite(norm), Err(Error::NonFinite { .. })));
        }
        Ok(())
    }
}
