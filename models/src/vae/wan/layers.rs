//! The layers of Wan's autoencoder.

use flowtape_engine::nn::{Conv, ParamBuilder};
use flowtape_engine::ops::{ConvAxis, Padding, attention};
use flowtape_engine::{Result as EngineResult, Tensor};

use crate::vae::blocks::{conv2d, picture, tokens};
use crate::vae::pieces::{CausalConv, Memory, REMEMBERED, ResidualBlock, Seen, remembered, tail};
use crate::vae::rows::upsampled;
use crate::vae::video::{FIRST, LAST, RmsNorm, Slow, channel_means, packed, repeated, unpacked};

/// Runs a function of pictures `[B T, C, H, W]` on the frames of `[B, C, T, H, W]`.
fn by_frame(x: &Tensor, f: impl FnOnce(&Tensor) -> EngineResult<Tensor>) -> EngineResult<Tensor> {
    let [batch, frames] = [x.dims()[0], x.dims()[2]];
    let pictures = x.permute(&LAST)?.flatten(0, 1)?.permute(&[0, 3, 1, 2])?;
    let out = f(&pictures)?.permute(&[0, 2, 3, 1])?;
    let dims = out.dims().to_vec();
    out.reshape(&[batch, frames, dims[1], dims[2], dims[3]])?.permute(&FIRST)
}

/// A convolution of three taps on each axis; zeros lie beyond the ends.
pub(super) fn causal(params: &ParamBuilder, inputs: usize, outputs: usize) -> EngineResult<CausalConv> {
    CausalConv::new(params, inputs, outputs, [3; 3], Padding::Zeros)
}

/// Attention over the places of each frame, with one head of all channels.
#[derive(Debug)]
struct AttentionBlock {
    norm: RmsNorm,
    to_qkv: Conv,
    proj: Conv,
}

impl AttentionBlock {
    pub(super) fn new(params: &ParamBuilder, channels: usize) -> EngineResult<Self> {
        let conv = |name: &str, outputs: usize| {
            Conv::new(&params.sub(name), channels, outputs, &[(1, ConvAxis::default()); 2])
        };
        Ok(Self {
            norm: RmsNorm::new(&params.sub("norm"), channels, 2)?,
            to_qkv: conv("to_qkv", 3 * channels)?,
            proj: conv("proj", channels)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        let h = by_frame(x, |x| {
            let qkv = tokens(&self.to_qkv.forward(&self.norm.forward(x)?)?)?.unsqueeze(1)?;
            let [q, k, v] = &qkv.chunk(3, 3)?[..] else { return Ok(qkv) };
            let h = attention(q, k, v, None, None)?.squeeze(1)?;
            self.proj.forward(&picture(&h, x.dims())?)
        })?;
        x.add(&h)
    }
}

#[derive(Debug)]
pub(super) struct MidBlock {
    resnets: [ResidualBlock; 2],
    attention: AttentionBlock,
}

impl MidBlock {
    pub(super) fn new(params: &ParamBuilder, channels: usize) -> EngineResult<Self> {
        let resnet = |i: usize| ResidualBlock::new(&params.sub("resnets").sub(i), channels, channels, causal);
        let attention = AttentionBlock::new(&params.sub("attentions").sub(0), channels)?;
        Ok(Self { resnets: [resnet(0)?, resnet(1)?], attention })
    }

    pub(super) fn forward(&self, x: Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        let x = self.resnets[0].forward(x, memory)?;
        self.resnets[1].forward(self.attention.forward(&x)?, memory)
    }
}

/// Half the sides, and half the frames where there is a convolution along time.
#[derive(Debug)]
pub(super) struct Downsample {
    resample: Conv,
    time_conv: Option<Conv>,
}

impl Downsample {
    pub(super) fn new(params: &ParamBuilder, channels: usize, in_time: bool) -> EngineResult<Self> {
        let side = ConvAxis::padded(0, 1).with_stride(2);
        let time = [(3, ConvAxis::default().with_stride(2)), (1, ConvAxis::default()), (1, ConvAxis::default())];
        let time_conv = || Conv::new(&params.sub("time_conv"), channels, channels, &time);
        Ok(Self {
            resample: Conv::new(&params.sub("resample.1"), channels, channels, &[(3, side); 2])?,
            time_conv: in_time.then(time_conv).transpose()?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        let x = by_frame(x, |x| self.resample.forward(x))?;
        let Some(time_conv) = &self.time_conv else { return Ok(x) };
        let y = match memory.take() {
            Seen::Frames(before) => time_conv.forward(&Tensor::cat(&[&tail(&before, 1)?, &x], 2)?)?,
            // The first frame stays as it is.
            _ => x.clone(),
        };
        memory.put(remembered(&x, 1)?);
        Ok(y)
    }
}

/// Twice the sides, and twice the frames, but for the first one, where there is a convolution along time.
#[derive(Debug)]
pub(super) struct Upsample {
    resample: Conv,
    time_conv: Option<CausalConv>,
}

impl Upsample {
    pub(super) fn new(params: &ParamBuilder, channels: usize, outputs: usize, in_time: bool) -> EngineResult<Self> {
        let kernel = [3, 1, 1];
        let time_conv = || CausalConv::new(&params.sub("time_conv"), channels, 2 * channels, kernel, Padding::Zeros);
        Ok(Self {
            resample: conv2d(&params.sub("resample.1"), channels, outputs, 3)?,
            time_conv: in_time.then(time_conv).transpose()?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        let x = match &self.time_conv {
            Some(time_conv) => Self::twice(time_conv, x, memory)?,
            None => x.clone(),
        };
        by_frame(&x, |x| upsampled(&self.resample, x))
    }

    fn twice(time_conv: &CausalConv, x: &Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        let (y, seen) = match memory.take() {
            Seen::Nothing => {
                memory.put(Seen::First);
                return Ok(x.clone());
            }
            // The first frame was not looked at, and is not remembered.
            Seen::First => (time_conv.first(x)?, x.pad(2, 1, 0)?),
            Seen::Frames(before) => time_conv.after(&before, x)?,
        };
        memory.put(remembered(&seen, REMEMBERED)?);
        // The halves of the channels are neighbours in time.
        let y = y.permute(&LAST)?;
        let &[batch, frames, height, width, both] = y.dims() else { return Ok(y) };
        let y = y.reshape(&[batch, frames, height, width, 2, both / 2])?.permute(&[0, 1, 4, 2, 3, 5])?;
        y.reshape(&[batch, 2 * frames, height, width, both / 2])?.permute(&FIRST)
    }
}

/// The shortcut of a stage that makes clips smaller: means over groups of channels and neighbours.
#[derive(Debug)]
pub(super) struct AvgDown {
    pub(super) outputs: usize,
    pub(super) factors: [usize; 2],
}

impl AvgDown {
    pub(super) fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        let [time, space] = self.factors;
        // Missing frames are zeros before the first one.
        let missing = x.dims()[2].next_multiple_of(time) - x.dims()[2];
        let x = if missing > 0 { x.pad(2, missing, 0)? } else { x.clone() };
        channel_means(&packed(&x, [time, space, space], Slow::Channel)?, self.outputs)
    }
}

/// The shortcut of a stage that makes clips larger: channels become neighbours, repeated where there are too few.
#[derive(Debug)]
pub(super) struct DupUp {
    pub(super) outputs: usize,
    pub(super) factors: [usize; 2],
}

impl DupUp {
    pub(super) fn forward(&self, x: &Tensor, first: bool) -> EngineResult<Tensor> {
        let [time, space] = self.factors;
        let repeats = self.outputs * time * space * space / x.dims()[1];
        let x = unpacked(&repeated(x, repeats)?, [time, space, space], Slow::Channel)?;
        let skipped = if first { time - 1 } else { 0 };
        x.narrow(2, skipped, x.dims()[2] - skipped)
    }
}
