//! diffusers' `AutoencoderKLLTX2Video`: the autoencoder of LTX-2's pictures. Its statistics of latents are in the weight file.

use flowtape_engine::nn::{Conv, Init, LayerNorm, Param, ParamBuilder, Params};
use flowtape_engine::ops::{ConvAxis, Padding, pointwise_to, rms_norm};
use flowtape_engine::{Result as EngineResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::rows::{conv_rows, in_rows, over_rows};
use super::tiling::{self, FrameTiling, Spare, Tiling};
use super::video::{FIRST, LAST, Slow, channel_means, packed, patches, unpacked, unpatched};
use super::{Autoencoder, Posterior, check_pixels};
use crate::config::{Config, check_layers, check_sizes, config_json, truth};
use crate::{Error, Result};

/// Added to the mean of squares.
const EPS: f64 = 1e-8;

/// One flag for all stages, or one for each.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Flags {
    /// The same for all.
    All(bool),
    /// Each by itself.
    Each(Vec<bool>),
}

impl Flags {
    fn get(&self, i: usize) -> bool {
        match self {
            Self::All(flag) => *flag,
            Self::Each(flags) => flags.get(i).copied().unwrap_or(false),
        }
    }

    fn any(&self) -> bool {
        match self {
            Self::All(flag) => *flag,
            Self::Each(flags) => flags.contains(&true),
        }
    }

    /// Whether there are flags for so many stages.
    fn fits(&self, count: usize) -> bool {
        !matches!(self, Self::Each(flags) if flags.len() != count)
    }
}

/// Which axes a stage makes smaller or larger.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scaling {
    /// Height and width.
    Spatial,
    /// Time.
    Temporal,
    /// All.
    Spatiotemporal,
}

impl Scaling {
    fn factors(self) -> [usize; 3] {
        match self {
            Self::Spatial => [1, 2, 2],
            Self::Temporal => [2, 1, 1],
            Self::Spatiotemporal => [2, 2, 2],
        }
    }
}

/// What lies beyond the sides of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PaddingMode {
    /// Zeros.
    Zeros,
    /// The frame, mirrored.
    Reflect,
    /// The last value.
    Replicate,
}

impl From<PaddingMode> for Padding {
    fn from(mode: PaddingMode) -> Self {
        match mode {
            PaddingMode::Zeros => Self::Zeros,
            PaddingMode::Reflect => Self::Reflect,
            PaddingMode::Replicate => Self::Replicate,
        }
    }
}

/// `config.json`, with diffusers' defaults (those of LTX-2.0, but for `decoder_causal`).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AutoencoderKLLTX2VideoConfig {
    /// Channels of a frame.
    pub in_channels: usize,
    /// Channels of a decoded frame.
    pub out_channels: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels of each of the encoder's stages.
    pub block_out_channels: Vec<usize>,
    /// Kinds of the encoder's stages: `LTX2VideoDownBlock3D` alone is known.
    pub down_block_types: Vec<String>,
    /// Channels of each of the decoder's stages, the last one first.
    pub decoder_block_out_channels: Vec<usize>,
    /// Residual blocks of the encoder's stages and its middle.
    pub layers_per_block: Vec<usize>,
    /// Residual blocks of the decoder's stages and its middle, the last one first.
    pub decoder_layers_per_block: Vec<usize>,
    /// Whether each of the encoder's stages makes clips smaller.
    pub spatio_temporal_scaling: Flags,
    /// The same of the decoder, the last one first.
    pub decoder_spatio_temporal_scaling: Flags,
    /// Whether noise is added: unknown.
    pub decoder_inject_noise: Flags,
    /// Along which axes.
    pub downsample_type: Vec<Scaling>,
    /// The same of the decoder, the first one first.
    pub upsample_type: Vec<Scaling>,
    /// Whether repetitions stand beside the decoder's unfolding, the last one first.
    pub upsample_residual: Flags,
    /// By what the decoder's stages divide their channels, the last one first.
    pub upsample_factor: Vec<usize>,
    /// Whether the decoder sees a time: unknown.
    #[serde(deserialize_with = "truth")]
    pub timestep_conditioning: bool,
    /// Side of a patch that becomes channels.
    pub patch_size: usize,
    /// Frames of a patch: 1.
    pub patch_size_t: usize,
    /// Added to variances.
    pub resnet_norm_eps: f64,
    /// Factor of the latents.
    pub scaling_factor: f64,
    /// Whether the encoder sees no later frame.
    #[serde(deserialize_with = "truth")]
    pub encoder_causal: bool,
    /// The same of the decoder.
    #[serde(deserialize_with = "truth")]
    pub decoder_causal: bool,
    /// What lies beyond the sides, for the encoder.
    pub encoder_spatial_padding_mode: PaddingMode,
    /// The same of the decoder.
    pub decoder_spatial_padding_mode: PaddingMode,
    /// Pixels of a latent's side.
    pub spatial_compression_ratio: Option<usize>,
    /// Frames of a latent.
    pub temporal_compression_ratio: Option<usize>,
}

impl Default for AutoencoderKLLTX2VideoConfig {
    fn default() -> Self {
        use Scaling::{Spatial, Spatiotemporal, Temporal};
        Self {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 128,
            block_out_channels: vec![256, 512, 1024, 2048],
            down_block_types: vec!["LTX2VideoDownBlock3D".into(); 4],
            decoder_block_out_channels: vec![256, 512, 1024],
            layers_per_block: vec![4, 6, 6, 2, 2],
            decoder_layers_per_block: vec![5; 4],
            spatio_temporal_scaling: Flags::Each(vec![true; 4]),
            decoder_spatio_temporal_scaling: Flags::Each(vec![true; 3]),
            decoder_inject_noise: Flags::Each(vec![false; 4]),
            downsample_type: vec![Spatial, Temporal, Spatiotemporal, Spatiotemporal],
            upsample_type: vec![Spatiotemporal; 3],
            upsample_residual: Flags::Each(vec![true; 3]),
            upsample_factor: vec![2; 3],
            timestep_conditioning: false,
            patch_size: 4,
            patch_size_t: 1,
            resnet_norm_eps: 1e-6,
            scaling_factor: 1.0,
            encoder_causal: true,
            decoder_causal: true,
            encoder_spatial_padding_mode: PaddingMode::Zeros,
            decoder_spatial_padding_mode: PaddingMode::Reflect,
            spatial_compression_ratio: None,
            temporal_compression_ratio: None,
        }
    }
}

impl Config for AutoencoderKLLTX2VideoConfig {
    const CLASS: &'static str = "AutoencoderKLLTX2Video";

    fn check(&self) -> Result<()> {
        let (down, up) = (self.block_out_channels.len(), self.decoder_block_out_channels.len());
        check_sizes([
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("latent_channels", self.latent_channels),
            ("block_out_channels", down),
            ("decoder_block_out_channels", up),
            ("patch_size", self.patch_size),
        ])?;
        check_layers(1, [("block_out_channels", down), ("decoder_block_out_channels", up)])?;
        for channels in self.block_out_channels.iter().chain(&self.decoder_block_out_channels) {
            check_sizes([("block_out_channels", *channels)])?;
        }
        for layers in self.layers_per_block.iter().chain(&self.decoder_layers_per_block) {
            check_layers(0, [("layers_per_block", *layers)])?;
        }
        let counted = |key, fits: bool, count: usize, got: String| {
            if fits { Ok(()) } else { Err(Error::config(key, format!("{count} of them, as the stages"), got)) }
        };
        let list = |key, got: usize, count: usize| counted(key, got == count, count, got.to_string());
        let flags = |key, flags: &Flags, count: usize| counted(key, flags.fits(count), count, format!("{flags:?}"));
        list("down_block_types", self.down_block_types.len(), down)?;
        list("layers_per_block", self.layers_per_block.len(), down + 1)?;
        list("downsample_type", self.downsample_type.len(), down)?;
        list("decoder_layers_per_block", self.decoder_layers_per_block.len(), up + 1)?;
        list("upsample_type", self.upsample_type.len(), up)?;
        list("upsample_factor", self.upsample_factor.len(), up)?;
        flags("spatio_temporal_scaling", &self.spatio_temporal_scaling, down)?;
        flags("decoder_spatio_temporal_scaling", &self.decoder_spatio_temporal_scaling, up)?;
        flags("upsample_residual", &self.upsample_residual, up)?;
        if let Some(kind) = self.down_block_types.iter().find(|kind| *kind != "LTX2VideoDownBlock3D") {
            return Err(Error::config("down_block_types", "LTX2VideoDownBlock3D", kind));
        }
        if self.timestep_conditioning || self.decoder_inject_noise.any() || self.patch_size_t != 1 {
            let expected = "no timestep_conditioning, no decoder_inject_noise, and patch_size_t 1";
            return Err(Error::config("timestep_conditioning", expected, self.timestep_conditioning));
        }
        if let Some(factor) = self.upsample_factor.iter().find(|factor| !matches!(factor, 1 | 2 | 4 | 8)) {
            return Err(Error::config("upsample_factor", "1, 2, 4 or 8", factor));
        }
        Ok(())
    }
}

impl AutoencoderKLLTX2VideoConfig {
    /// Stages that make clips smaller, as diffusers counts them.
    fn scalings(&self) -> u32 {
        (0..self.block_out_channels.len()).filter(|i| self.spatio_temporal_scaling.get(*i)).count() as u32
    }

    fn space_ratio(&self) -> usize {
        self.spatial_compression_ratio.unwrap_or(self.patch_size << self.scalings().min(16))
    }

    fn time_ratio(&self) -> usize {
        self.temporal_compression_ratio.unwrap_or(1 << self.scalings().min(16))
    }
}

/// How the convolutions of a network walk.
#[derive(Clone, Copy, Debug)]
struct Walk {
    causal: bool,
    padding: PaddingMode,
}

impl Walk {
    fn conv(self, params: &ParamBuilder, inputs: usize, outputs: usize) -> EngineResult<Conv> {
        let time = if self.causal { ConvAxis::causal(3) } else { ConvAxis::same(3) };
        let side = (3, ConvAxis::same(3).with_padding(self.padding.into()));
        let time = (3, time.with_padding(Padding::Replicate));
        Conv::new(&params.sub("conv"), inputs, outputs, &[time, side, side])
    }
}

/// Each place's channels to a mean square of 1, then SiLU.
fn norm_silu(x: &Tensor) -> EngineResult<Tensor> {
    rms_norm(&x.permute(&LAST)?, None, EPS)?.permute(&FIRST)?.silu()
}

/// Norm, SiLU and convolution.
fn norm_conv(conv: &Conv, x: &Tensor) -> EngineResult<Tensor> {
    in_rows(x, 1, |rows| conv_rows(conv, x, rows, norm_silu))
}

/// Norm, SiLU and convolution, twice, beside a shortcut.
#[derive(Debug)]
struct ResnetBlock {
    conv1: Conv,
    conv2: Conv,
    shortcut: Option<(LayerNorm, Conv)>,
}

impl ResnetBlock {
    fn new(params: &ParamBuilder, inputs: usize, outputs: usize, eps: f64, walk: Walk) -> EngineResult<Self> {
        let shortcut = || {
            let norm = LayerNorm::new(&params.sub("norm3"), inputs, eps, true)?;
            let point = [(1, ConvAxis::default()); 3];
            Ok((norm, Conv::new(&params.sub("conv_shortcut"), inputs, outputs, &point)?))
        };
        Ok(Self {
            conv1: walk.conv(&params.sub("conv1"), inputs, outputs)?,
            conv2: walk.conv(&params.sub("conv2"), outputs, outputs)?,
            shortcut: (inputs != outputs).then(shortcut).transpose()?,
        })
    }

    fn forward(&self, x: Tensor) -> EngineResult<Tensor> {
        let h = norm_conv(&self.conv1, &x)?;
        over_rows(x, |x, rows| {
            let h = conv_rows(&self.conv2, &h, rows, norm_silu)?;
            match &self.shortcut {
                Some((norm, conv)) => conv.forward(&norm.forward(&x.permute(&LAST)?)?.permute(&FIRST)?)?.add(&h),
                None => x.add(&h),
            }
        })
    }
}

fn resnets(
    params: &ParamBuilder,
    channels: usize,
    count: usize,
    eps: f64,
    walk: Walk,
) -> EngineResult<Vec<ResnetBlock>> {
    let resnet = |i: usize| ResnetBlock::new(&params.sub("resnets").sub(i), channels, channels, eps, walk);
    (0..count).map(resnet).collect()
}

fn run(resnets: &[ResnetBlock], mut x: Tensor) -> EngineResult<Tensor> {
    for resnet in resnets {
        x = resnet.forward(x)?;
    }
    Ok(x)
}

/// Folds neighbours into channels, beside means of them.
#[derive(Debug)]
struct Downsampler {
    conv: Conv,
    outputs: usize,
    factors: [usize; 3],
}

impl Downsampler {
    fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        let mut x = x.clone();
        // The first frame fills up its block.
        if self.factors[0] > 1 {
            x = Tensor::cat(&[&x.narrow(2, 0, self.factors[0] - 1)?, &x], 2)?;
        }
        let means = channel_means(&packed(&x, self.factors, Slow::Channel)?, self.outputs)?;
        packed(&self.conv.forward(&x)?, self.factors, Slow::Channel)?.add(&means)
    }
}

/// Unfolds channels into neighbours, maybe beside repetitions of them.
#[derive(Debug)]
struct Upsampler {
    conv: Conv,
    factors: [usize; 3],
    /// How often all channels follow each other beside it.
    repeats: Option<usize>,
}

impl Upsampler {
    fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        let unfolded = |x: &Tensor| {
            let x = unpacked(x, self.factors, Slow::Channel)?;
            let skipped = self.factors[0] - 1;
            x.narrow(2, skipped, x.dims()[2] - skipped)
        };
        let h = unfolded(&self.conv.forward(x)?)?;
        let Some(repeats) = self.repeats else { return Ok(h) };
        let residual = unfolded(x)?;
        h.add(&Tensor::cat(&vec![&residual; repeats], 1)?)
    }
}

#[derive(Debug)]
struct Encoder {
    patch: usize,
    conv_in: Conv,
    down_blocks: Vec<(Vec<ResnetBlock>, Option<Downsampler>)>,
    mid_block: Vec<ResnetBlock>,
    conv_out: Conv,
    latents: usize,
}

impl Encoder {
    fn new(params: &ParamBuilder, config: &AutoencoderKLLTX2VideoConfig) -> EngineResult<Self> {
        let walk = Walk { causal: config.encoder_causal, padding: config.encoder_spatial_padding_mode };
        let (eps, latents) = (config.resnet_norm_eps, config.latent_channels);
        let mut inputs = latents;
        let mut down_blocks = Vec::new();
        for (i, outputs) in config.block_out_channels.iter().copied().enumerate() {
            let params = params.sub("down_blocks").sub(i);
            let resnets = resnets(&params, inputs, config.layers_per_block[i], eps, walk)?;
            let down = || {
                let factors = config.downsample_type[i].factors();
                let folded = outputs / factors.iter().product::<usize>();
                let conv = walk.conv(&params.sub("downsamplers.0.conv"), inputs, folded)?;
                Ok(Downsampler { conv, outputs, factors })
            };
            let down = config.spatio_temporal_scaling.get(i).then(down).transpose()?;
            down_blocks.push((resnets, down));
            inputs = outputs;
        }
        let pixels = config.in_channels * config.patch_size * config.patch_size;
        let middle = config.layers_per_block[config.block_out_channels.len()];
        Ok(Self {
            patch: config.patch_size,
            conv_in: walk.conv(&params.sub("conv_in"), pixels, latents)?,
            down_blocks,
            mid_block: resnets(&params.sub("mid_block"), inputs, middle, eps, walk)?,
            conv_out: walk.conv(&params.sub("conv_out"), inputs, latents + 1)?,
            latents,
        })
    }

    fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        let mut x = self.conv_in.forward(&patches(x, self.patch)?)?;
        for (resnets, down) in &self.down_blocks {
            x = run(resnets, x)?;
            if let Some(down) = down {
                x = down.forward(&x)?;
            }
        }
        x = run(&self.mid_block, x)?;
        x = norm_conv(&self.conv_out, &x)?;
        // One logarithm of a variance is that of all channels.
        let logvar = x.narrow(1, self.latents, 1)?;
        Tensor::cat(&[&[&x][..], &vec![&logvar; self.latents - 1]].concat(), 1)
    }
}

#[derive(Debug)]
struct Up {
    conv_in: Option<ResnetBlock>,
    upsampler: Option<Upsampler>,
    resnets: Vec<ResnetBlock>,
}

#[derive(Debug)]
struct Decoder {
    patch: usize,
    conv_in: Conv,
    mid_block: Vec<ResnetBlock>,
    up_blocks: Vec<Up>,
    conv_out: Conv,
}

impl Decoder {
    fn new(params: &ParamBuilder, config: &AutoencoderKLLTX2VideoConfig) -> EngineResult<Self> {
        let walk = Walk { causal: config.decoder_causal, padding: config.decoder_spatial_padding_mode };
        let (eps, stages) = (config.resnet_norm_eps, config.decoder_block_out_channels.len());
        // The configuration lists stages, but for `upsample_type`, the last one first.
        let reversed = |i: usize| stages - 1 - i;
        let first = config.decoder_block_out_channels[stages - 1];
        let mut channels = first;
        let mut up_blocks = Vec::new();
        for i in 0..stages {
            let params = params.sub("up_blocks").sub(i);
            let factor = config.upsample_factor[reversed(i)];
            let (inputs, outputs) = (channels / factor, config.decoder_block_out_channels[reversed(i)] / factor);
            let conv_in = || ResnetBlock::new(&params.sub("conv_in"), inputs, outputs, eps, walk);
            let up = || {
                let factors = config.upsample_type[i].factors();
                let (from, places) = (outputs * factor, factors.iter().product::<usize>());
                let conv = walk.conv(&params.sub("upsamplers.0.conv"), from, from * places / factor)?;
                let repeats = config.upsample_residual.get(reversed(i)).then_some(places / factor);
                Ok(Upsampler { conv, factors, repeats })
            };
            up_blocks.push(Up {
                conv_in: (inputs != outputs).then(conv_in).transpose()?,
                upsampler: config.decoder_spatio_temporal_scaling.get(reversed(i)).then(up).transpose()?,
                resnets: resnets(&params, outputs, config.decoder_layers_per_block[reversed(i)], eps, walk)?,
            });
            channels = outputs;
        }
        let pixels = config.out_channels * config.patch_size * config.patch_size;
        Ok(Self {
            patch: config.patch_size,
            conv_in: walk.conv(&params.sub("conv_in"), config.latent_channels, first)?,
            mid_block: resnets(&params.sub("mid_block"), first, config.decoder_layers_per_block[stages], eps, walk)?,
            up_blocks,
            conv_out: walk.conv(&params.sub("conv_out"), channels, pixels)?,
        })
    }

    fn forward(&self, z: &Tensor) -> EngineResult<Tensor> {
        let mut x = run(&self.mid_block, self.conv_in.forward(z)?)?;
        for up in &self.up_blocks {
            if let Some(conv_in) = &up.conv_in {
                x = conv_in.forward(x)?;
            }
            if let Some(upsampler) = &up.upsampler {
                x = upsampler.forward(&x)?;
            }
            x = run(&up.resnets, x)?;
        }
        unpatched(&norm_conv(&self.conv_out, &x)?, self.patch)
    }
}

/// The autoencoder.
#[derive(Debug)]
pub struct AutoencoderKLLTX2Video {
    config: AutoencoderKLLTX2VideoConfig,
    params: Params,
    encoder: Encoder,
    decoder: Decoder,
    latents_mean: Param,
    latents_std: Param,
    tiling: Option<Tiling>,
    frame_tiling: Option<FrameTiling>,
}

impl AutoencoderKLLTX2Video {
    /// From its configuration.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: AutoencoderKLLTX2VideoConfig, params: &ParamBuilder) -> Result<Self> {
        let encoder = Encoder::new(&params.sub("encoder"), &config)?;
        let decoder = Decoder::new(&params.sub("decoder"), &config)?;
        let latents_mean = params.get("latents_mean", &[config.latent_channels], Init::Zeros)?;
        let latents_std = params.get("latents_std", &[config.latent_channels], Init::Ones)?;
        Ok(Self {
            encoder,
            decoder,
            latents_mean,
            latents_std,
            params: params.params(),
            config,
            tiling: None,
            frame_tiling: None,
        })
    }

    /// Moments of a clip, or of a part of it.
    fn moments(&self, x: &Tensor) -> Result<Tensor> {
        let ratio = self.config.space_ratio();
        let tiles = self.tiling.map(|tiling| tiling.tiles(ratio)).transpose()?;
        match tiles.filter(|tiles| tiling::exceeds(x, &tiles.pixels)) {
            Some(tiles) => {
                let moments = tiling::run(x, &tiles.pixels, |x| Ok(self.encoder.forward(x)?))?;
                tiling::cut(&moments, [3, 4].map(|axis| x.dims()[axis] / ratio))
            }
            None => Ok(self.encoder.forward(x)?),
        }
    }

    /// Pixels of latents, or of a part of them.
    fn frames(&self, z: &Tensor) -> Result<Tensor> {
        let ratio = self.config.space_ratio();
        let tiles = self.tiling.map(|tiling| tiling.tiles(ratio)).transpose()?;
        match tiles.filter(|tiles| tiling::exceeds(z, &tiles.latents)) {
            Some(tiles) => {
                let x = tiling::run(z, &tiles.latents, |z| Ok(self.decoder.forward(z)?))?;
                tiling::cut(&x, [3, 4].map(|axis| z.dims()[axis] * ratio))
            }
            None => Ok(self.decoder.forward(z)?),
        }
    }

    fn statistics(&self) -> EngineResult<[Tensor; 2]> {
        let column = |param: &Param| param.value()?.reshape(&[param.numel(), 1, 1, 1]);
        Ok([column(&self.latents_mean)?, column(&self.latents_std)?])
    }
}

impl Autoencoder for AutoencoderKLLTX2Video {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> Value {
        config_json(&self.config)
    }

    fn encode(&self, pixels: &Tensor) -> Result<Posterior> {
        let (ratio, time) = (self.config.space_ratio(), self.config.time_ratio());
        check_pixels(pixels, 5, self.config.in_channels, ratio)?;
        if pixels.dims()[2] % time != 1 % time {
            let expected = format!("a multiple of {time} frames and one more");
            return Err(flowtape_engine::Error::shape("encode", expected, pixels.dims()).into());
        }
        let parts = self.frame_tiling.map(|tiling| tiling.tiles(time)).transpose()?.map(|[parts, _]| parts);
        Posterior::of(&match parts.filter(|parts| pixels.dims()[2] > parts.size) {
            Some(parts) => tiling::run_frames(pixels, &parts, Spare::First, |x| self.moments(x))?,
            None => self.moments(pixels)?,
        })
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let parts = self.frame_tiling.map(|tiling| tiling.tiles(self.config.time_ratio())).transpose()?;
        match parts.map(|[_, parts]| parts).filter(|parts| latents.dims().get(2).is_some_and(|n| *n > parts.size)) {
            // As in the reference the frames of parts behind the first stand one later than they are.
            Some(parts) => tiling::run_frames(latents, &parts, Spare::Last, |z| self.frames(z)),
            None => self.frames(latents),
        }
    }

    fn normalise(&self, latents: &Tensor) -> Result<Tensor> {
        let ([mean, std], scale) = (self.statistics()?, self.config.scaling_factor);
        Ok(pointwise_to(latents.dtype(), [latents, &mean, &std], |[z, m, s]| (z - m) * scale / s)?)
    }

    fn denormalise(&self, latents: &Tensor) -> Result<Tensor> {
        let ([mean, std], scale) = (self.statistics()?, self.config.scaling_factor);
        Ok(pointwise_to(latents.dtype(), [latents, &mean, &std], |[z, m, s]| z * s / scale + m)?)
    }

    fn has_frames(&self) -> bool {
        true
    }

    fn latent_dims(&self, pixels: &[usize]) -> Vec<usize> {
        let (ratio, time) = (self.config.space_ratio(), self.config.time_ratio());
        match pixels {
            [lead @ .., _, frames, height, width] => {
                let frames = 1 + (frames.max(&1) - 1) / time;
                [lead, &[self.config.latent_channels, frames, height / ratio, width / ratio]].concat()
            }
            _ => pixels.to_vec(),
        }
    }

    fn set_tiling(&mut self, tiling: Option<Tiling>) -> Result<()> {
        tiling.map(|tiling| tiling.tiles(self.config.space_ratio())).transpose()?;
        self.tiling = tiling;
        Ok(())
    }

    fn set_frame_tiling(&mut self, tiling: Option<FrameTiling>) -> Result<()> {
        tiling.map(|tiling| tiling.tiles(self.config.time_ratio())).transpose()?;
        self.frame_tiling = tiling;
        Ok(())
    }
}
