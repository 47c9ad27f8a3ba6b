//! LTX-2's rotary embeddings: positions in seconds and pixels, and frequencies of its own for each head.

use std::f64::consts::PI;

use flowtape_engine::ops::{RopeLayout, rope};
use flowtape_engine::{DType, Device, Error, Result, Tensor};

use super::LTX2Config;
use crate::blocks::RopeTables;

/// Where tokens lie along one axis, in f32 as in the reference: at a frequency of 10,000 a rounding is an angle.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    /// Middles of the patches, in seconds or pixels.
    middles: Vec<f32>,
    /// Where the axis ends.
    end: f32,
}

impl Axis {
    /// `len` latents in patches of `patch`; `place` puts an edge of a patch in seconds or pixels.
    fn new(len: usize, patch: usize, end: usize, place: impl Fn(f32) -> f32) -> Self {
        let middle = |i| (place(i as f32) + place((i + patch) as f32)) / 2.0;
        Self { middles: (0..len).step_by(patch).map(middle).collect(), end: end as f32 }
    }

    /// Frames, rows and columns of a video.
    pub(super) fn video(config: &LTX2Config, [frames, height, width]: [usize; 3], fps: f32) -> [Self; 3] {
        let [t, y, x] = config.vae_scale_factors.map(|f| f as f32);
        // The first latent frame holds `causal_offset` frames, not a whole group.
        let seconds = |edge: f32| (edge * t + config.causal_offset as f32 - t).max(0.0) / fps;
        [
            Self::new(frames, config.patch_size_t, config.pos_embed_max_pos, seconds),
            Self::new(height, config.patch_size, config.base_height, |edge| edge * y),
            Self::new(width, config.patch_size, config.base_width, |edge| edge * x),
        ]
    }

    /// Latent frames of audio.
    pub(super) fn audio(config: &LTX2Config, frames: usize) -> Self {
        let (factor, offset) = (config.audio_scale_factor as f32, config.causal_offset as f32);
        let (hop, rate) = (config.audio_hop_length as f32, config.audio_sampling_rate as f32);
        let seconds = |edge: f32| (edge * factor + offset - factor).max(0.0) * hop / rate;
        Self::new(frames, config.audio_patch_size_t, config.audio_pos_embed_max_pos, seconds)
    }

    /// Places of a text.
    pub(super) fn of_places(len: usize, end: usize) -> Self {
        Self { middles: (0..len).map(|i| i as f32).collect(), end: end as f32 }
    }

    /// Number of patches.
    pub(super) fn len(&self) -> usize {
        self.middles.len()
    }

    /// The same tokens on an axis that ends elsewhere.
    pub(super) fn ending_at(&self, end: usize) -> Self {
        Self { middles: self.middles.clone(), end: end as f32 }
    }
}

/// `count` frequencies from π/2 to θ π/2, made in f64 or f32 with the steps of `torch.linspace`.
fn frequencies(count: usize, config: &LTX2Config) -> Vec<f32> {
    let round = |x: f64| if config.rope_double_precision { x } else { f64::from(x as f32) };
    let last = count.saturating_sub(1);
    let step = round(1.0 / last.max(1) as f64);
    let exponent = |i: usize| match i {
        i if i < count / 2 => round(step * i as f64),
        _ if last == 0 => 0.0,
        i => round((-step).mul_add((last - i) as f64, 1.0)),
    };
    (0..count).map(|i| (round(round(config.rope_theta.powf(exponent(i))) * round(PI)) / 2.0) as f32).collect()
}

/// Cosines and sines `[L, H, D]` for `heads` heads of together `dim` columns: each head turns its columns by other
/// angles. The tokens fill the grid of the axes, the last one fastest, with `repeat` tokens at each place.
///
/// # Errors
/// When memory runs out.
pub(super) fn tables(
    config: &LTX2Config,
    axes: &[Axis],
    repeat: usize,
    dim: usize,
    heads: usize,
    device: &Device,
) -> Result<RopeTables> {
    let (count, layout) = (dim / (2 * axes.len()), config.rope_layout());
    let frequencies = frequencies(count, config);
    let tokens = axes.iter().map(Axis::len).product::<usize>() * repeat;
    let grid: Vec<usize> = axes.iter().map(Axis::len).chain([repeat, count]).collect();
    let table = |function: fn(f64) -> f64| {
        let mut columns = Vec::new();
        for (i, axis) in axes.iter().enumerate() {
            let places = axis.middles.iter().map(|x| x / axis.end * 2.0 - 1.0);
            let values = places.flat_map(|x| frequencies.iter().map(move |f| function(f64::from(x * f)) as f32));
            let mut dims = vec![1; grid.len()];
            (dims[i], dims[axes.len() + 1]) = (axis.len(), count);
            columns.push(Tensor::from_vec(values.collect(), &dims, device)?.expand(&grid)?);
        }
        // The axes take turns within a frequency; columns that are left over come first and do not turn.
        let turning = Tensor::stack(&columns.iter().collect::<Vec<_>>(), grid.len())?;
        let turning = turning.reshape(&[tokens, count * axes.len()])?;
        let still = [tokens, dim / 2 - count * axes.len()];
        let half = Tensor::cat(&[&Tensor::full(&still, function(0.0), DType::F32, device)?, &turning], 1)?;
        match layout {
            RopeLayout::Split => {
                let half = half.reshape(&[tokens, heads, dim / 2 / heads])?;
                Tensor::cat(&[&half, &half], 2)
            }
            // Neighbours pair up without regard to heads.
            RopeLayout::Interleaved => Tensor::stack(&[&half, &half], 2)?.reshape(&[tokens, 1, dim]),
        }
    };
    Ok(RopeTables { cos: table(f64::cos)?, sin: table(f64::sin)?, layout })
}

/// Rotates x `[B, H, L, D]` by [`tables`], whose heads need not be those of x.
///
/// # Errors
/// When the shape does not fit.
pub(super) fn rotate(x: &Tensor, tables: &RopeTables) -> Result<Tensor> {
    let &[batch, heads, len, width] = x.dims() else {
        return Err(Error::shape("rope", "[B, H, L, D]", x.dims()));
    };
    let x = x.transpose(1, 2)?.reshape(&[batch, len, tables.cos.dim(1)?, tables.cos.dim(2)?])?;
    rope(&x, &tables.cos, &tables.sin, tables.layout)?.reshape(&[batch, len, heads, width])?.transpose(1, 2)
}
