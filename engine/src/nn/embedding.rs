//! Embeddings of a time.

use super::{Activation, Linear, ParamBuilder};
use rayon::prelude::*;

use crate::expr::Function;
use crate::ops::pointwise::run_pointwise;
use crate::platform::math::{exp, sin_cos};
use crate::{DType, Result, Tensor};

/// Options of diffusers' `get_timestep_embedding`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct TimestepProjection {
    /// Width of the result.
    pub dim: usize,
    /// Cosines before sines.
    pub flip_sin_to_cos: bool,
    /// Taken from the number of frequencies in the exponent's divisor.
    pub downscale_freq_shift: f32,
    /// Factor of the angles.
    pub scale: f32,
}

impl TimestepProjection {
    /// Cosines first, no shift, factor 1: what the transformers use.
    pub fn new(dim: usize) -> Self {
        Self { dim, flip_sin_to_cos: true, downscale_freq_shift: 0.0, scale: 1.0 }
    }
}

/// Sinusoidal embedding of times `[N]`: f32 `[N, dim]`, an odd last column is zero. Made in f32 with the reference's
/// order of operations: at angles of 1000 every other order differs in the fifth digit. No device waits for it.
///
/// # Errors
/// When memory runs out, or the times need a gradient: there is none.
pub fn timestep_embedding(times: &Tensor, options: &TimestepProjection) -> Result<Tensor> {
    let half = options.dim / 2;
    let plain = times.constant("timestep_embedding", "times")?;
    let divisor = half as f32 - options.downscale_freq_shift;
    let frequency = |i: usize| exp(-(10_000f64.ln() as f32) * i as f32 / divisor);
    let frequencies: Vec<f32> = (0..half).map(frequency).collect();
    let device = times.device();
    if !device.backend().is_host() {
        let out = Tensor::zeros(&[times.numel(), options.dim], DType::F32, device)?;
        let frequencies = Tensor::from_slice(&frequencies, &[1, half], device)?;
        let parts = [0, half].map(|start| out.layout().narrow(1, start, half));
        let [first, second] = parts.map(|layout| layout.map(|l| out.view(l)));
        let (first, second) = (first?, second?);
        let (cos, sin) = if options.flip_sin_to_cos { (&first, &second) } else { (&second, &first) };
        let scale = f64::from(options.scale);
        let function = Function::build(|[t, f]| {
            let angle = t * f * scale;
            [angle.cos(), angle.sin()]
        });
        let times_f32 = plain.to_dtype(DType::F32)?.reshape(&[times.numel(), 1])?;
        run_pointwise(&function, &[&times_f32, &frequencies], &[], &[cos, sin])?;
        return Ok(out.on_tape_of(times));
    }
    let times_host = plain.to_vec::<f32>()?;
    let mut out = vec![0f32; times_host.len() * options.dim];
    out.par_chunks_mut(options.dim.max(1)).zip(&times_host).for_each(|(row, t)| {
        for (i, frequency) in frequencies.iter().enumerate() {
            let (sin, cos) = sin_cos(t * frequency * options.scale);
            let (first, second) = if options.flip_sin_to_cos { (cos, sin) } else { (sin, cos) };
            row[i] = first;
            row[half + i] = second;
        }
    });
    Ok(Tensor::from_vec(out, &[times_host.len(), options.dim], device)?.on_tape_of(times))
}

/// diffusers' `TimestepEmbedding` and `PixArtAlphaTextProjection`: `linear_1`, an activation, `linear_2`.
#[derive(Clone, Debug)]
pub struct TimestepEmbedding {
    linear_1: Linear,
    activation: Activation,
    linear_2: Linear,
}

impl TimestepEmbedding {
    /// `inputs` to `width`, with silu and biases.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, inputs: usize, width: usize) -> Result<Self> {
        Self::with(params, inputs, width, Activation::Silu, true)
    }

    /// With an activation that keeps the width, and with or without biases.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn with(
        params: &ParamBuilder,
        inputs: usize,
        width: usize,
        activation: Activation,
        bias: bool,
    ) -> Result<Self> {
        let linear_1 = Linear::new(&params.sub("linear_1"), inputs, width, bias)?;
        Ok(Self { linear_1, activation, linear_2: Linear::new(&params.sub("linear_2"), width, width, bias)? })
    }

    /// x `[.., inputs]` to `[.., width]`.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.linear_2.forward(&self.activation.forward(&self.linear_1.forward(x)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn an_embedding_is_cosines_then_sines_of_falling_frequencies() -> Result<()> {
        let times = Tensor::from_vec(vec![0f32, 2.0], &[2], &Device::cpu())?;
        let e = timestep_embedding(&times, &TimestepProjection::new(5))?.to_vec::<f32>()?;
        assert_eq!(e[..5], [1.0, 1.0, 0.0, 0.0, 0.0]);
        for (got, expected) in e[5..].iter().zip([2f64.cos(), 0.02f64.cos(), 2f64.sin(), 0.02f64.sin(), 0.0]) {
            assert!((f64::from(*got) - expected).abs() < 1e-6, "{got} instead of {expected}");
        }
        Ok(())
    }
}
