//! What the autoencoders of clips share. Clips are `[B, C, T, H, W]`, their channels innermost in memory.

use flowtape_engine::nn::{Init, Param, ParamBuilder};
use flowtape_engine::ops::rms_norm;
use flowtape_engine::{Result, Tensor};

use super::check_pixels;

/// The axes of a clip with its channels last.
pub(super) const LAST: [usize; 5] = [0, 2, 3, 4, 1];
/// The way back.
pub(super) const FIRST: [usize; 5] = [0, 4, 1, 2, 3];

/// `x / max(||x||, 1e-12) sqrt(C) gamma`, over the channels of each place.
#[derive(Debug)]
pub(super) struct RmsNorm {
    gamma: Param,
    axes: usize,
}

impl RmsNorm {
    pub(super) fn new(params: &ParamBuilder, channels: usize, axes: usize) -> Result<Self> {
        let dims = [&[channels][..], &vec![1; axes]].concat();
        Ok(Self { gamma: params.get("gamma", &dims, Init::Ones)?, axes })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let channels = x.dims()[1];
        let gamma = self.gamma.value()?.reshape(&[channels])?;
        let last: Vec<usize> = [0].into_iter().chain(2..self.axes + 2).chain([1]).collect();
        let first: Vec<usize> = [0, self.axes + 1].into_iter().chain(1..self.axes + 1).collect();
        // The least norm, as what is added to the mean of squares.
        let y = rms_norm(&x.permute(&last)?, Some(&gamma), 1e-24 / channels as f64)?;
        y.permute(&first)
    }

    pub(super) fn silu(&self, x: &Tensor) -> Result<Tensor> {
        self.forward(x)?.silu()
    }
}

/// Which is slow where blocks of places are channels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Slow {
    /// The place in a block.
    Place,
    /// The channel.
    Channel,
}

/// Blocks of neighbours in time, height and width as channels.
pub(super) fn packed(x: &Tensor, factors: [usize; 3], slow: Slow) -> Result<Tensor> {
    let [time, down, right] = factors;
    let x = x.permute(&LAST)?;
    let &[batch, frames, height, width, channels] = x.dims() else { return Ok(x) };
    let grid = [batch, frames / time, height / down, width / right];
    let parts = x.reshape(&[batch, grid[1], time, grid[2], down, grid[3], right, channels])?;
    let parts = match slow {
        Slow::Place => parts.permute(&[0, 1, 3, 5, 2, 4, 6, 7])?,
        Slow::Channel => parts.permute(&[0, 1, 3, 5, 7, 2, 4, 6])?,
    };
    parts.reshape(&[&grid[..], &[time * down * right * channels]].concat())?.permute(&FIRST)
}

/// The other way.
pub(super) fn unpacked(x: &Tensor, factors: [usize; 3], slow: Slow) -> Result<Tensor> {
    let [time, down, right] = factors;
    let x = x.permute(&LAST)?;
    let &[batch, frames, height, width, channels] = x.dims() else { return Ok(x) };
    let grid = [batch, frames, height, width];
    let channels = channels / (time * down * right);
    let parts = match slow {
        Slow::Place => {
            let parts = x.reshape(&[&grid[..], &[time, down, right, channels]].concat())?;
            parts.permute(&[0, 1, 4, 2, 5, 3, 6, 7])?
        }
        Slow::Channel => {
            let parts = x.reshape(&[&grid[..], &[channels, time, down, right]].concat())?;
            parts.permute(&[0, 1, 5, 2, 6, 3, 7, 4])?
        }
    };
    parts.reshape(&[batch, frames * time, height * down, width * right, channels])?.permute(&FIRST)
}

/// Patches of frames as channels: the channel slow, then the horizontal place in a patch, then the vertical one.
pub(super) fn patches(x: &Tensor, side: usize) -> Result<Tensor> {
    packed(&x.transpose(3, 4)?, [1, side, side], Slow::Channel)?.transpose(3, 4)
}

/// The other way.
pub(super) fn unpatched(x: &Tensor, side: usize) -> Result<Tensor> {
    unpacked(&x.transpose(3, 4)?, [1, side, side], Slow::Channel)?.transpose(3, 4)
}

/// Checks that pixels have so many channels, frames that are one and a multiple of `time`, and whole latents.
pub(super) fn check_clip(pixels: &Tensor, channels: usize, time: usize, ratio: usize) -> crate::Result<()> {
    check_pixels(pixels, 5, channels, ratio)?;
    if pixels.dims()[2] % time != 1 % time {
        let expected = format!("a multiple of {time} frames and one more");
        return Err(flowtape_engine::Error::shape("encode", expected, pixels.dims()).into());
    }
    Ok(())
}

/// Sizes of latents for pixels of these sizes, with or without the axis of samples: one of the first frame, and one of `time` others.
pub(super) fn latent_dims(pixels: &[usize], channels: usize, time: usize, ratio: usize) -> Vec<usize> {
    match pixels {
        [lead @ .., _, frames, height, width] => {
            let frames = 1 + (frames.max(&1) - 1) / time;
            [lead, &[channels, frames, height / ratio, width / ratio]].concat()
        }
        _ => pixels.to_vec(),
    }
}

/// A number for each channel, beside latents `[B, C, F, h, w]`.
pub(super) fn statistic(latents: &Tensor, values: &[f64]) -> Result<Tensor> {
    let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
    Tensor::from_vec(values, &[latents.dims()[1], 1, 1, 1], latents.device())
}

/// Each channel `count` times, one after the other.
pub(super) fn repeated(x: &Tensor, count: usize) -> Result<Tensor> {
    let x = x.permute(&LAST)?;
    let dims = x.dims().to_vec();
    let wide = x.unsqueeze(5)?.expand(&[&dims[..], &[count]].concat())?;
    wide.reshape(&[&dims[..4], &[dims[4] * count]].concat())?.permute(&FIRST)
}

/// Means over runs of channels, so that `channels` are left.
pub(super) fn channel_means(x: &Tensor, channels: usize) -> Result<Tensor> {
    let x = x.permute(&LAST)?;
    let dims = x.dims().to_vec();
    let groups = x.reshape(&[&dims[..4], &[channels, dims[4] / channels]].concat())?;
    groups.mean(&[5], false)?.permute(&FIRST)
}
