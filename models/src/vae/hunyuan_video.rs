//! diffusers' `AutoencoderKLHunyuanVideo15`: the autoencoder of HunyuanVideo 1.5. A clip passes latent by latent, the first of which is
//! one frame; nothing looks ahead, so this is what the reference makes of the whole clip.

use flowtape_engine::nn::{Conv, ParamBuilder, Params};
use flowtape_engine::ops::{ConvAxis, Padding, attention};
use flowtape_engine::{Result as EngineResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::pieces::{CausalConv, Memory, ResidualBlock, Seen};
use super::tiling::{Sides, Tiling, tiled};
use super::video::{FIRST, LAST, RmsNorm, Slow, channel_means, check_clip, latent_dims, packed, repeated, unpacked};
use super::{Autoencoder, Posterior};
use crate::config::{Config, check_layers, check_sizes, config_json, truth};
use crate::{Error, Result};

/// `config.json`, with diffusers' defaults (those of HunyuanVideo 1.5).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AutoencoderKLHunyuanVideo15Config {
    /// Channels of a frame.
    pub in_channels: usize,
    /// Channels of a decoded frame.
    pub out_channels: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels of each of the encoder's stages.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of an encoder's stage; a decoder's has one more.
    pub layers_per_block: usize,
    /// Pixels of a latent's side.
    pub spatial_compression_ratio: usize,
    /// Frames of a latent.
    pub temporal_compression_ratio: usize,
    /// Whether folding leads to the next stage's channels.
    #[serde(deserialize_with = "truth")]
    pub downsample_match_channel: bool,
    /// The same of the decoder.
    #[serde(deserialize_with = "truth")]
    pub upsample_match_channel: bool,
    /// Factor of the latents.
    pub scaling_factor: f64,
}

impl Default for AutoencoderKLHunyuanVideo15Config {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 32,
            block_out_channels: vec![128, 256, 512, 1024, 1024],
            layers_per_block: 2,
            spatial_compression_ratio: 16,
            temporal_compression_ratio: 4,
            downsample_match_channel: true,
            upsample_match_channel: true,
            scaling_factor: 1.03682,
        }
    }
}

impl Config for AutoencoderKLHunyuanVideo15Config {
    const CLASS: &'static str = "AutoencoderKLHunyuanVideo15";

    fn check(&self) -> Result<()> {
        let stages = self.block_out_channels.len();
        check_sizes([
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("latent_channels", self.latent_channels),
            ("block_out_channels", stages),
        ])?;
        check_layers(1, [("layers_per_block", self.layers_per_block), ("block_out_channels", stages)])?;
        for channels in &self.block_out_channels {
            check_sizes([("block_out_channels", *channels)])?;
            // Blocks of 2 x 2 x 2 become channels.
            if channels % 8 != 0 {
                return Err(Error::config("block_out_channels", "multiples of 8", channels));
            }
        }
        let [space, time] = [self.spatial_compression_ratio, self.temporal_compression_ratio];
        let fits = space.is_power_of_two() && time.is_power_of_two() && time <= space;
        if !fits || self.space_folds() >= stages {
            let expected =
                format!("powers of 2, time's at most space's, and space's at most {}", 1u64 << (stages - 1).min(40));
            return Err(Error::config("spatial_compression_ratio", expected, format!("{space}, {time} in time")));
        }
        let last = self.block_out_channels[stages - 1];
        if !last.is_multiple_of(2 * self.latent_channels) {
            let expected = format!("a divisor of {}, half of the last block_out_channels", last / 2);
            return Err(Error::config("latent_channels", expected, self.latent_channels));
        }
        Ok(())
    }
}

impl AutoencoderKLHunyuanVideo15Config {
    /// Stages that halve the sides.
    fn space_folds(&self) -> usize {
        self.spatial_compression_ratio.ilog2() as usize
    }

    /// Stages that halve time.
    fn time_folds(&self) -> usize {
        self.temporal_compression_ratio.ilog2() as usize
    }
}

/// A convolution of three taps a side; what lies beyond the ends, and before the first frame, is the nearest value.
fn causal(params: &ParamBuilder, inputs: usize, outputs: usize) -> EngineResult<CausalConv> {
    CausalConv::new(&params.sub("conv"), inputs, outputs, [3; 3], Padding::Replicate)
}

/// Attention over all places of this frame and those before, with one head of all channels.
#[derive(Debug)]
struct AttnBlock {
    norm: RmsNorm,
    to_q: Conv,
    to_k: Conv,
    to_v: Conv,
    proj_out: Conv,
}

impl AttnBlock {
    fn new(params: &ParamBuilder, channels: usize) -> EngineResult<Self> {
        let conv = |name: &str| Conv::new(&params.sub(name), channels, channels, &[(1, ConvAxis::default()); 3]);
        Ok(Self {
            norm: RmsNorm::new(&params.sub("norm"), channels, 3)?,
            to_q: conv("to_q")?,
            to_k: conv("to_k")?,
            to_v: conv("to_v")?,
            proj_out: conv("proj_out")?,
        })
    }

    fn forward(&self, x: &Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        let h = self.norm.forward(x)?;
        let head = |conv: &Conv| conv.forward(&h)?.permute(&LAST)?.flatten(1, 3)?.unsqueeze(1);
        let q = head(&self.to_q)?;
        let mut seen = Tensor::cat(&[&head(&self.to_k)?, &head(&self.to_v)?], 1)?;
        let mut before = 0;
        if let Seen::Frames(earlier) = memory.take() {
            before = earlier.dims()[2];
            seen = Tensor::cat(&[&earlier, &seen], 2)?;
        }
        memory.put(Seen::Frames(seen.clone()));
        let &[batch, channels, frames, height, width] = x.dims() else { return Ok(h) };
        let places = height * width;
        // Frame by frame: what may be seen needs no mask.
        let frame = |i: usize| {
            let of = |which: usize| seen.narrow(1, which, 1)?.narrow(2, 0, before + (i + 1) * places);
            attention(&q.narrow(2, i * places, places)?, &of(0)?, &of(1)?, None, None)
        };
        let parts = (0..frames).map(frame).collect::<EngineResult<Vec<_>>>()?;
        let h = Tensor::cat(&parts.iter().collect::<Vec<_>>(), 2)?;
        let h = h.reshape(&[batch, frames, height, width, channels])?.permute(&FIRST)?;
        x.add(&self.proj_out.forward(&h)?)
    }
}

#[derive(Debug)]
struct MidBlock {
    resnets: [ResidualBlock; 2],
    attention: AttnBlock,
}

impl MidBlock {
    fn new(params: &ParamBuilder, channels: usize) -> EngineResult<Self> {
        let resnet = |i: usize| ResidualBlock::new(&params.sub("resnets").sub(i), channels, channels, causal);
        let attention = AttnBlock::new(&params.sub("attentions").sub(0), channels)?;
        Ok(Self { resnets: [resnet(0)?, resnet(1)?], attention })
    }

    fn forward(&self, x: Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        let x = self.resnets[0].forward(x, memory)?;
        self.resnets[1].forward(self.attention.forward(&x, memory)?, memory)
    }
}

/// Folds neighbours into channels (`in_time`: two frames, too, but for the clip's first one), beside means of them.
#[derive(Debug)]
struct Downsample {
    conv: CausalConv,
    outputs: usize,
    in_time: bool,
}

impl Downsample {
    fn new(params: &ParamBuilder, inputs: usize, outputs: usize, in_time: bool) -> EngineResult<Self> {
        let conv = causal(&params.sub("conv"), inputs, outputs / if in_time { 8 } else { 4 })?;
        Ok(Self { conv, outputs, in_time })
    }

    fn forward(&self, x: &Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        let h = self.conv.forward(x, memory)?;
        let first = self.in_time && memory.is_first();
        let factors = if self.in_time && !first { [2; 3] } else { [1, 2, 2] };
        let mut h = packed(&h, factors, Slow::Place)?;
        if first {
            h = Tensor::cat(&[&h, &h], 1)?;
        }
        h.add(&channel_means(&packed(x, factors, Slow::Place)?, self.outputs)?)
    }
}

/// Unfolds channels into neighbours (`in_time`: two frames, too, but for the clip's first one), beside repetitions of them.
#[derive(Debug)]
struct Upsample {
    conv: CausalConv,
    repeats: usize,
    in_time: bool,
}

impl Upsample {
    fn new(params: &ParamBuilder, inputs: usize, outputs: usize, in_time: bool) -> EngineResult<Self> {
        let factor = if in_time { 8 } else { 4 };
        let conv = causal(&params.sub("conv"), inputs, outputs * factor)?;
        Ok(Self { conv, repeats: outputs * factor / inputs, in_time })
    }

    fn forward(&self, x: &Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        let h = self.conv.forward(x, memory)?;
        if !self.in_time {
            let same = unpacked(&repeated(x, self.repeats)?, [1, 2, 2], Slow::Place)?;
            return unpacked(&h, [1, 2, 2], Slow::Place)?.add(&same);
        }
        let first = memory.is_first();
        let (factors, repeats) = if first { ([1, 2, 2], self.repeats / 2) } else { ([2; 3], self.repeats) };
        let mut h = unpacked(&h, factors, Slow::Place)?;
        if first {
            h = h.narrow(1, 0, h.dims()[1] / 2)?;
        }
        h.add(&repeated(&unpacked(x, factors, Slow::Place)?, repeats)?)
    }
}

fn resnets(params: &ParamBuilder, inputs: usize, outputs: usize, count: usize) -> EngineResult<Vec<ResidualBlock>> {
    let resnet = |i: usize| {
        let inputs = if i == 0 { inputs } else { outputs };
        ResidualBlock::new(&params.sub("resnets").sub(i), inputs, outputs, causal)
    };
    (0..count).map(resnet).collect()
}

#[derive(Debug)]
struct Encoder {
    conv_in: CausalConv,
    down_blocks: Vec<(Vec<ResidualBlock>, Option<Downsample>)>,
    mid_block: MidBlock,
    norm_out: RmsNorm,
    conv_out: CausalConv,
    outputs: usize,
}

impl Encoder {
    fn new(params: &ParamBuilder, config: &AutoencoderKLHunyuanVideo15Config) -> EngineResult<Self> {
        let channels = &config.block_out_channels;
        let mut down_blocks = Vec::new();
        let mut inputs = channels[0];
        for (i, outputs) in channels.iter().copied().enumerate() {
            let params = params.sub("down_blocks").sub(i);
            let resnets = resnets(&params, inputs, outputs, config.layers_per_block)?;
            inputs = outputs;
            let folds = i < config.space_folds();
            if folds && config.downsample_match_channel {
                inputs = channels[i + 1];
            }
            let in_time = i + config.time_folds() >= config.space_folds();
            let down = || Downsample::new(&params.sub("downsamplers.0"), outputs, inputs, in_time);
            down_blocks.push((resnets, folds.then(down).transpose()?));
        }
        let (last, outputs) = (channels[channels.len() - 1], 2 * config.latent_channels);
        Ok(Self {
            conv_in: causal(&params.sub("conv_in"), config.in_channels, channels[0])?,
            down_blocks,
            mid_block: MidBlock::new(&params.sub("mid_block"), last)?,
            norm_out: RmsNorm::new(&params.sub("norm_out"), last, 3)?,
            conv_out: causal(&params.sub("conv_out"), last, outputs)?,
            outputs,
        })
    }

    /// Of the frames of a latent.
    fn forward(&self, x: &Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        memory.next_piece();
        let mut x = self.conv_in.forward(x, memory)?;
        for (resnets, down) in &self.down_blocks {
            for resnet in resnets {
                x = resnet.forward(x, memory)?;
            }
            if let Some(down) = down {
                x = down.forward(&x, memory)?;
            }
        }
        x = self.mid_block.forward(x, memory)?;
        self.conv_out.of(&x, |x| self.norm_out.silu(x), memory)?.add(&channel_means(&x, self.outputs)?)
    }
}

#[derive(Debug)]
struct Decoder {
    conv_in: CausalConv,
    repeats: usize,
    mid_block: MidBlock,
    up_blocks: Vec<(Vec<ResidualBlock>, Option<Upsample>)>,
    norm_out: RmsNorm,
    conv_out: CausalConv,
}

impl Decoder {
    fn new(params: &ParamBuilder, config: &AutoencoderKLHunyuanVideo15Config) -> EngineResult<Self> {
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let mut up_blocks = Vec::new();
        let mut inputs = channels[0];
        for (i, outputs) in channels.iter().copied().enumerate() {
            let params = params.sub("up_blocks").sub(i);
            let resnets = resnets(&params, inputs, outputs, config.layers_per_block + 1)?;
            inputs = outputs;
            let unfolds = i < config.space_folds();
            if unfolds && config.upsample_match_channel {
                inputs = channels[i + 1];
            }
            let up = || Upsample::new(&params.sub("upsamplers.0"), outputs, inputs, i < config.time_folds());
            up_blocks.push((resnets, unfolds.then(up).transpose()?));
        }
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        Ok(Self {
            conv_in: causal(&params.sub("conv_in"), config.latent_channels, first)?,
            repeats: first / config.latent_channels,
            mid_block: MidBlock::new(&params.sub("mid_block"), first)?,
            up_blocks,
            norm_out: RmsNorm::new(&params.sub("norm_out"), last, 3)?,
            conv_out: causal(&params.sub("conv_out"), last, config.out_channels)?,
        })
    }

    /// Of a latent.
    fn forward(&self, z: &Tensor, memory: &mut Memory) -> EngineResult<Tensor> {
        memory.next_piece();
        let mut x = self.conv_in.forward(z, memory)?.add(&repeated(z, self.repeats)?)?;
        x = self.mid_block.forward(x, memory)?;
        for (resnets, up) in &self.up_blocks {
            for resnet in resnets {
                x = resnet.forward(x, memory)?;
            }
            if let Some(up) = up {
                x = up.forward(&x, memory)?;
            }
        }
        self.conv_out.of(&x, |x| self.norm_out.silu(x), memory)
    }
}

/// The autoencoder.
#[derive(Debug)]
pub struct AutoencoderKLHunyuanVideo15 {
    config: AutoencoderKLHunyuanVideo15Config,
    params: Params,
    encoder: Encoder,
    decoder: Decoder,
    tiles: Option<Sides>,
}

impl AutoencoderKLHunyuanVideo15 {
    /// From its configuration.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: AutoencoderKLHunyuanVideo15Config, params: &ParamBuilder) -> Result<Self> {
        let encoder = Encoder::new(&params.sub("encoder"), &config)?;
        let decoder = Decoder::new(&params.sub("decoder"), &config)?;
        Ok(Self { encoder, decoder, params: params.params(), config, tiles: None })
    }

    /// Moments of a clip, or of a tile of it.
    fn moments(&self, x: &Tensor) -> Result<Tensor> {
        let time = self.config.temporal_compression_ratio;
        let mut memory = Memory::default();
        let part = |i: usize| {
            let (start, count) = if i == 0 { (0, 1) } else { (1 + time * (i - 1), time) };
            self.encoder.forward(&x.narrow(2, start, count)?, &mut memory)
        };
        let parts = (0..1 + (x.dims()[2] - 1) / time).map(part).collect::<EngineResult<Vec<_>>>()?;
        Ok(Tensor::cat(&parts.iter().collect::<Vec<_>>(), 2)?)
    }

    /// Pixels of latents, or of a tile of them.
    fn frames(&self, z: &Tensor) -> Result<Tensor> {
        let mut memory = Memory::default();
        let part = |i: usize| self.decoder.forward(&z.narrow(2, i, 1)?, &mut memory);
        let parts = (0..z.dims()[2]).map(part).collect::<EngineResult<Vec<_>>>()?;
        Ok(Tensor::cat(&parts.iter().collect::<Vec<_>>(), 2)?)
    }
}

impl Autoencoder for AutoencoderKLHunyuanVideo15 {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> Value {
        config_json(&self.config)
    }

    fn encode(&self, pixels: &Tensor) -> Result<Posterior> {
        let (ratio, time) = (self.config.spatial_compression_ratio, self.config.temporal_compression_ratio);
        check_clip(pixels, self.config.in_channels, time, ratio)?;
        Posterior::of(&tiled(pixels, self.tiles.map(|tiles| tiles.pixels), |x| self.moments(x))?)
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        tiled(latents, self.tiles.map(|tiles| tiles.latents), |z| self.frames(z))
    }

    fn normalise(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(latents.mul_scalar(self.config.scaling_factor)?)
    }

    fn denormalise(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(flowtape_engine::ops::pointwise([latents], |[z]| z / self.config.scaling_factor)?)
    }

    fn has_frames(&self) -> bool {
        true
    }

    fn latent_dims(&self, pixels: &[usize]) -> Vec<usize> {
        let (ratio, time) = (self.config.spatial_compression_ratio, self.config.temporal_compression_ratio);
        latent_dims(pixels, self.config.latent_channels, time, ratio)
    }

    fn set_tiling(&mut self, tiling: Option<Tiling>) -> Result<()> {
        self.tiles = tiling.map(|tiling| tiling.tiles(self.config.spatial_compression_ratio)).transpose()?;
        Ok(())
    }
}
