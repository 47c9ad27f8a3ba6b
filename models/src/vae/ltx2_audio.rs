//! diffusers' `AutoencoderKLLTX2Audio`: the autoencoder of LTX-2's sound. It takes logarithms of mel spectrograms `[B, C, T, M]`,
//! time before frequency, and sees no later time.

use flowtape_engine::nn::{Conv, Init, Param, ParamBuilder, Params};
use flowtape_engine::ops::{ConvAxis, pointwise_to, repeat_nearest, rms_norm};
use flowtape_engine::{Result as EngineResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tiling::Tiling;
use super::{Autoencoder, Posterior};
use crate::config::{Config, check_layers, check_sizes, config_json, product, truth};
use crate::{Error, Result};

/// Added to the mean of squares.
const EPS: f64 = 1e-6;
/// Steps of time that become a latent: the reference has no other.
const STEPS: usize = 4;

/// `config.json`, with diffusers' defaults (those of LTX-2).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AutoencoderKLLTX2AudioConfig {
    /// Channels of the first stage; also how many statistics the latents have.
    pub base_channels: usize,
    /// Channels of the decoded sound.
    pub output_channels: usize,
    /// Channels of each stage, in `base_channels`.
    pub ch_mult: Vec<usize>,
    /// Residual blocks of an encoder's stage; a decoder's has one more.
    pub num_res_blocks: usize,
    /// Sides that have attention: none is known.
    pub attn_resolutions: Option<Vec<usize>>,
    /// Channels of the sound.
    pub in_channels: usize,
    /// Of training.
    pub resolution: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// The norm: `pixel` alone is known.
    pub norm_type: String,
    /// The axis of time: `height` alone is known.
    pub causality_axis: Option<String>,
    /// Of training.
    pub dropout: f64,
    /// Whether the middle has attention: unknown.
    #[serde(deserialize_with = "truth")]
    pub mid_block_add_attention: bool,
    /// Samples a second of the waveform.
    pub sample_rate: usize,
    /// Samples of a step of time.
    pub mel_hop_length: usize,
    /// Whether time is one-sided.
    #[serde(deserialize_with = "truth")]
    pub is_causal: bool,
    /// Bands of frequency of the decoded sound.
    pub mel_bins: Option<usize>,
    /// Whether the encoder gives variances, too.
    #[serde(deserialize_with = "truth")]
    pub double_z: bool,
}

impl Default for AutoencoderKLLTX2AudioConfig {
    fn default() -> Self {
        Self {
            base_channels: 128,
            output_channels: 2,
            ch_mult: vec![1, 2, 4],
            num_res_blocks: 2,
            attn_resolutions: None,
            in_channels: 2,
            resolution: 256,
            latent_channels: 8,
            norm_type: "pixel".into(),
            causality_axis: Some("height".into()),
            dropout: 0.0,
            mid_block_add_attention: false,
            sample_rate: 16000,
            mel_hop_length: 160,
            is_causal: true,
            mel_bins: Some(64),
            double_z: true,
        }
    }
}

impl Config for AutoencoderKLLTX2AudioConfig {
    const CLASS: &'static str = "AutoencoderKLLTX2Audio";

    fn check(&self) -> Result<()> {
        check_sizes([
            ("base_channels", self.base_channels),
            ("output_channels", self.output_channels),
            ("in_channels", self.in_channels),
            ("latent_channels", self.latent_channels),
        ])?;
        check_layers(1, [("ch_mult", self.ch_mult.len()), ("num_res_blocks", self.num_res_blocks)])?;
        for mult in &self.ch_mult {
            check_sizes([("ch_mult", product(&[*mult, self.base_channels]))])?;
        }
        let known = self.norm_type == "pixel"
            && self.causality_axis.as_deref() == Some("height")
            && self.attn_resolutions.as_ref().is_none_or(Vec::is_empty)
            && !self.mid_block_add_attention
            && self.double_z;
        if !known {
            let expected = "norm_type pixel, causality_axis height, double_z, and no attention";
            return Err(Error::config("norm_type", expected, &self.norm_type));
        }
        if !self.base_channels.is_multiple_of(self.latent_channels) {
            let expected = format!("a divisor of base_channels {}", self.base_channels);
            return Err(Error::config("latent_channels", expected, self.latent_channels));
        }
        Ok(())
    }
}

/// A convolution whose taps along time are all at or before their place.
fn causal(params: &ParamBuilder, inputs: usize, outputs: usize, kernel: usize) -> EngineResult<Conv> {
    let axes = [(kernel, ConvAxis::causal(kernel)), (kernel, ConvAxis::same(kernel))];
    Conv::new(&params.sub("conv"), inputs, outputs, &axes)
}

/// Each place's channels to a mean square of 1, then SiLU.
fn norm_silu(x: &Tensor) -> EngineResult<Tensor> {
    rms_norm(&x.permute(&[0, 2, 3, 1])?, None, EPS)?.permute(&[0, 3, 1, 2])?.silu()
}

/// Norm, SiLU and convolution, twice, beside a shortcut.
#[derive(Debug)]
struct ResnetBlock {
    conv1: Conv,
    conv2: Conv,
    nin_shortcut: Option<Conv>,
}

impl ResnetBlock {
    fn new(params: &ParamBuilder, inputs: usize, outputs: usize) -> EngineResult<Self> {
        let shortcut = || causal(&params.sub("nin_shortcut"), inputs, outputs, 1);
        Ok(Self {
            conv1: causal(&params.sub("conv1"), inputs, outputs, 3)?,
            conv2: causal(&params.sub("conv2"), outputs, outputs, 3)?,
            nin_shortcut: (inputs != outputs).then(shortcut).transpose()?,
        })
    }

    fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        let h = self.conv1.forward(&norm_silu(x)?)?;
        let h = self.conv2.forward(&norm_silu(&h)?)?;
        match &self.nin_shortcut {
            Some(shortcut) => shortcut.forward(x)?.add(&h),
            None => x.add(&h),
        }
    }
}

/// Residual blocks, then half or twice the sides where there is a convolution for it.
#[derive(Debug)]
struct Stage {
    blocks: Vec<ResnetBlock>,
    resample: Option<Conv>,
}

impl Stage {
    fn new(
        params: &ParamBuilder,
        [inputs, outputs]: [usize; 2],
        count: usize,
        resample: Option<Conv>,
    ) -> EngineResult<Self> {
        let block = |i: usize| {
            let inputs = if i == 0 { inputs } else { outputs };
            ResnetBlock::new(&params.sub("block").sub(i), inputs, outputs)
        };
        Ok(Self { blocks: (0..count).map(block).collect::<EngineResult<_>>()?, resample })
    }

    fn run(&self, mut x: Tensor) -> EngineResult<Tensor> {
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        Ok(x)
    }
}

fn middle(params: &ParamBuilder, channels: usize) -> EngineResult<[ResnetBlock; 2]> {
    let block = |name: &str| ResnetBlock::new(&params.sub("mid").sub(name), channels, channels);
    Ok([block("block_1")?, block("block_2")?])
}

/// An encoder or a decoder.
#[derive(Debug)]
struct Network {
    conv_in: Conv,
    /// In the order in which they run.
    stages: Vec<Stage>,
    mid: [ResnetBlock; 2],
    conv_out: Conv,
}

impl Network {
    fn encoder(params: &ParamBuilder, config: &AutoencoderKLLTX2AudioConfig) -> EngineResult<Self> {
        let mut inputs = config.base_channels;
        let mut stages = Vec::new();
        for (i, mult) in config.ch_mult.iter().enumerate() {
            let (params, outputs) = (params.sub("down").sub(i), mult * config.base_channels);
            let axes = [ConvAxis::padded(2, 0), ConvAxis::padded(0, 1)].map(|axis| (3, axis.with_stride(2)));
            let down = || Conv::new(&params.sub("downsample.conv"), outputs, outputs, &axes);
            let down = (i + 1 < config.ch_mult.len()).then(down).transpose()?;
            stages.push(Stage::new(&params, [inputs, outputs], config.num_res_blocks, down)?);
            inputs = outputs;
        }
        Ok(Self {
            conv_in: causal(&params.sub("conv_in"), config.in_channels, config.base_channels, 3)?,
            stages,
            mid: middle(params, inputs)?,
            conv_out: causal(&params.sub("conv_out"), inputs, 2 * config.latent_channels, 3)?,
        })
    }

    fn decoder(params: &ParamBuilder, config: &AutoencoderKLLTX2AudioConfig) -> EngineResult<Self> {
        let first = config.ch_mult.iter().last().map_or(0, |mult| mult * config.base_channels);
        let mut inputs = first;
        let mut stages = Vec::new();
        for (i, mult) in config.ch_mult.iter().enumerate().rev() {
            let (params, outputs) = (params.sub("up").sub(i), mult * config.base_channels);
            let up = (i > 0).then(|| causal(&params.sub("upsample.conv"), outputs, outputs, 3)).transpose()?;
            stages.push(Stage::new(&params, [inputs, outputs], config.num_res_blocks + 1, up)?);
            inputs = outputs;
        }
        Ok(Self {
            conv_in: causal(&params.sub("conv_in"), config.latent_channels, first, 3)?,
            stages,
            mid: middle(params, first)?,
            conv_out: causal(&params.sub("conv_out"), inputs, config.output_channels, 3)?,
        })
    }

    fn middle(&self, x: &Tensor) -> EngineResult<Tensor> {
        self.mid[1].forward(&self.mid[0].forward(x)?)
    }

    fn encode(&self, x: &Tensor) -> EngineResult<Tensor> {
        let mut x = self.conv_in.forward(x)?;
        for stage in &self.stages {
            x = stage.run(x)?;
            if let Some(down) = &stage.resample {
                x = down.forward(&x)?;
            }
        }
        self.conv_out.forward(&norm_silu(&self.middle(&x)?)?)
    }

    fn decode(&self, z: &Tensor) -> EngineResult<Tensor> {
        let mut x = self.middle(&self.conv_in.forward(z)?)?;
        for stage in &self.stages {
            x = stage.run(x)?;
            if let Some(up) = &stage.resample {
                x = up.forward(&repeat_nearest(&x, &[2, 2])?)?;
                // The first step of time has no step before it.
                x = x.narrow(2, 1, x.dims()[2] - 1)?;
            }
        }
        self.conv_out.forward(&norm_silu(&x)?)
    }
}

/// The autoencoder.
#[derive(Debug)]
pub struct AutoencoderKLLTX2Audio {
    config: AutoencoderKLLTX2AudioConfig,
    params: Params,
    encoder: Network,
    decoder: Network,
    latents_mean: Param,
    latents_std: Param,
}

impl AutoencoderKLLTX2Audio {
    /// From its configuration.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: AutoencoderKLLTX2AudioConfig, params: &ParamBuilder) -> Result<Self> {
        let encoder = Network::encoder(&params.sub("encoder"), &config)?;
        let decoder = Network::decoder(&params.sub("decoder"), &config)?;
        let latents_mean = params.get("latents_mean", &[config.base_channels], Init::Zeros)?;
        let latents_std = params.get("latents_std", &[config.base_channels], Init::Ones)?;
        Ok(Self { encoder, decoder, latents_mean, latents_std, params: params.params(), config })
    }

    /// Mean and deviation of each channel and band, channels slow, beside `[B, C, L, M]`.
    fn statistics(&self) -> EngineResult<[Tensor; 2]> {
        let channels = self.config.latent_channels;
        let column = |param: &Param| param.value()?.reshape(&[channels, 1, param.numel() / channels]);
        Ok([column(&self.latents_mean)?, column(&self.latents_std)?])
    }
}

impl Autoencoder for AutoencoderKLLTX2Audio {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> Value {
        config_json(&self.config)
    }

    fn encode(&self, pixels: &Tensor) -> Result<Posterior> {
        let fits = matches!(pixels.dims(), [_, channels, time, bands] if *channels == self.config.in_channels && time * bands > 0);
        if !fits {
            let expected = format!("log-mel spectrograms [B, {}, T, M]", self.config.in_channels);
            return Err(flowtape_engine::Error::shape("encode", expected, pixels.dims()).into());
        }
        Posterior::of(&self.encoder.encode(pixels)?)
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let x = self.decoder.decode(latents)?;
        let time = (latents.dim(2)? * STEPS).saturating_sub(STEPS - 1).max(1);
        let bands = self.config.mel_bins.unwrap_or(latents.dim(3)?);
        let mut x = super::tiling::cut(&x, [time, bands])?;
        // What is missing is silence.
        for (axis, size) in [(2, time), (3, bands)] {
            let missing = size - x.dims()[axis];
            if missing > 0 {
                x = x.pad(axis, 0, missing)?;
            }
        }
        Ok(x)
    }

    fn normalise(&self, latents: &Tensor) -> Result<Tensor> {
        let [mean, std] = self.statistics()?;
        Ok(pointwise_to(latents.dtype(), [latents, &mean, &std], |[z, m, s]| (z - m) / s)?)
    }

    fn denormalise(&self, latents: &Tensor) -> Result<Tensor> {
        let [mean, std] = self.statistics()?;
        Ok(pointwise_to(latents.dtype(), [latents, &mean, &std], |[z, m, s]| z * s + m)?)
    }

    fn latent_dims(&self, pixels: &[usize]) -> Vec<usize> {
        let half = |size: &usize| size.div_ceil(2);
        let (time, bands) = match pixels {
            [.., time, bands] => (time, bands),
            _ => return pixels.to_vec(),
        };
        let folds = self.config.ch_mult.len().saturating_sub(1);
        // A band more is added behind, and two steps of time before.
        let time = (0..folds).fold(*time, |size, _| half(&size));
        let bands = (0..folds).fold(*bands, |size, _| size / 2);
        [&pixels[..pixels.len().saturating_sub(3)], &[self.config.latent_channels, time, bands]].concat()
    }

    fn set_tiling(&mut self, tiling: Option<Tiling>) -> Result<()> {
        match tiling {
            Some(tiling) => Err(Error::config("tiling", "none: sound has no tiles", format!("{tiling:?}"))),
            None => Ok(()),
        }
    }
}
