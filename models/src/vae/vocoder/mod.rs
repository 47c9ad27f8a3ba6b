//! diffusers' `LTX2Vocoder`: sound waves of mel spectrograms, as HiFi-GAN (Kong et al. 2020) and BigVGAN make them.

mod activation;
mod bandwidth;

use std::path::Path;
use std::sync::Arc;

use flowtape_engine::nn::{Conv, Init, Param, ParamBuilder, Placement};
use flowtape_engine::ops::{ConvAxis, pointwise};
use flowtape_engine::{DType, Device, Result as EngineResult, Tensor};
use serde::{Deserialize, Serialize};

use self::activation::{Activation, Periodic, leaky, transposed};
pub use self::bandwidth::{LTX2VocoderWithBWE, LTX2VocoderWithBWEConfig};
use crate::checkpoint::{CONFIG, open_weights, read_config};
use crate::config::{Config, check_layers, check_sizes, read, truth};
use crate::registry::ConfigReader;
use crate::{Error, Result};

/// Taps of the first and the last convolution.
const ENDS: usize = 7;
/// The slope below zero before the last convolution, whatever the configuration says, as in the reference.
const LAST_SLOPE: f64 = 0.01;

/// `config.json`, with diffusers' defaults (those of LTX-2.0).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LTX2VocoderConfig {
    /// Bands of all channels together.
    pub in_channels: usize,
    /// Channels of the first stage, of which each one has half.
    pub hidden_channels: usize,
    /// Channels of the sound.
    pub out_channels: usize,
    /// Taps of each stage's upsampling.
    pub upsample_kernel_sizes: Vec<usize>,
    /// How much longer each stage makes the sound.
    pub upsample_factors: Vec<usize>,
    /// Taps of the residual blocks of a stage.
    pub resnet_kernel_sizes: Vec<usize>,
    /// Dilations of each of them.
    pub resnet_dilations: Vec<Vec<usize>>,
    /// `leaky_relu`, `snakebeta`, or `snake`.
    pub act_fn: String,
    /// The slope of `leaky_relu` below zero.
    pub leaky_relu_negative_slope: f64,
    /// Whether periodic activations run at a higher rate.
    #[serde(deserialize_with = "truth")]
    pub antialias: bool,
    /// How many times the rate that is.
    pub antialias_ratio: usize,
    /// Taps of the filters there and back.
    pub antialias_kernel_size: usize,
    /// `tanh`, `clamp` (to -1 and 1), or none.
    pub final_act_fn: Option<String>,
    /// Whether the last convolution has a bias.
    #[serde(deserialize_with = "truth")]
    pub final_bias: bool,
    /// Samples a second.
    pub output_sampling_rate: usize,
}

impl Default for LTX2VocoderConfig {
    fn default() -> Self {
        Self {
            in_channels: 128,
            hidden_channels: 1024,
            out_channels: 2,
            upsample_kernel_sizes: vec![16, 15, 8, 4, 4],
            upsample_factors: vec![6, 5, 2, 2, 2],
            resnet_kernel_sizes: vec![3, 7, 11],
            resnet_dilations: vec![vec![1, 3, 5]; 3],
            act_fn: "leaky_relu".into(),
            leaky_relu_negative_slope: 0.1,
            antialias: false,
            antialias_ratio: 2,
            antialias_kernel_size: 12,
            final_act_fn: Some("tanh".into()),
            final_bias: true,
            output_sampling_rate: 24_000,
        }
    }
}

impl Config for LTX2VocoderConfig {
    const CLASS: &'static str = "LTX2Vocoder";

    fn check(&self) -> Result<()> {
        let stages = self.upsample_factors.len();
        check_layers(1, [("upsample_factors", stages), ("resnet_kernel_sizes", self.resnet_kernel_sizes.len())])?;
        check_sizes([
            ("in_channels", self.in_channels),
            ("hidden_channels / 2^stages", self.hidden_channels.checked_shr(stages as u32).unwrap_or(0)),
            ("out_channels", self.out_channels),
        ])?;
        let fits = self
            .upsample_factors
            .iter()
            .zip(&self.upsample_kernel_sizes)
            .all(|(factor, kernel)| *factor > 0 && kernel >= factor);
        let odd = self.resnet_kernel_sizes.iter().all(|kernel| kernel % 2 == 1);
        let dilated = self.resnet_dilations.iter().flatten().all(|dilation| *dilation > 0);
        if !fits || self.upsample_kernel_sizes.len() != stages {
            let expected = "as many as upsample_factors, each at least its factor";
            return Err(Error::config("upsample_kernel_sizes", expected, &self.upsample_kernel_sizes));
        }
        if !odd || !dilated || self.resnet_dilations.len() != self.resnet_kernel_sizes.len() {
            let expected = "odd resnet_kernel_sizes, and dilations for each";
            return Err(Error::config("resnet_dilations", expected, &self.resnet_dilations));
        }
        let periodic = matches!(&self.act_fn[..], "snakebeta" | "snake");
        // The reference's leaky activations at a higher rate are others than they are called.
        if !periodic && (self.act_fn != "leaky_relu" || self.antialias) {
            return Err(Error::config("act_fn", "snakebeta, snake, or leaky_relu without antialias", &self.act_fn));
        }
        let (ratio, taps) = (self.antialias_ratio, self.antialias_kernel_size);
        if periodic && (ratio == 0 || taps < 2 * ratio) {
            return Err(Error::config("antialias_kernel_size", "at least twice antialias_ratio", taps));
        }
        if self.final_act_fn.as_ref().is_some_and(|name| !matches!(&name[..], "tanh" | "clamp")) {
            return Err(Error::config("final_act_fn", "tanh, clamp or null", &self.final_act_fn));
        }
        Ok(())
    }
}

impl LTX2VocoderConfig {
    /// An activation by its path.
    fn activation(&self, params: &ParamBuilder, channels: usize) -> Result<Activation> {
        let antialias = self.antialias.then_some((self.antialias_ratio, self.antialias_kernel_size));
        match &self.act_fn[..] {
            "leaky_relu" => Ok(Activation::Leaky(self.leaky_relu_negative_slope)),
            name => Activation::periodic(params, channels, Periodic { with_beta: name == "snakebeta", antialias }),
        }
    }

    /// That before the last convolution: a periodic one is always of the one kind.
    fn last_activation(&self, params: &ParamBuilder, channels: usize) -> Result<Activation> {
        let antialias = Some((self.antialias_ratio, self.antialias_kernel_size));
        match &self.act_fn[..] {
            "leaky_relu" => Ok(Activation::Leaky(LAST_SLOPE)),
            _ => Activation::periodic(params, channels, Periodic { with_beta: true, antialias }),
        }
    }
}

/// A transposed convolution along time: zeros between the values, then a convolution with the kernel backwards.
#[derive(Clone, Debug)]
struct Upsampler {
    /// `[in, out, k]`
    weight: Param,
    bias: Param,
    factor: usize,
}

impl Upsampler {
    fn new(params: &ParamBuilder, inputs: usize, outputs: usize, kernel: usize, factor: usize) -> Result<Self> {
        let init = Init::Uniform { bound: 1.0 / ((outputs * kernel) as f64).sqrt() };
        let weight = params.get("weight", &[inputs, outputs, kernel], init)?;
        Ok(Self { weight, bias: params.get("bias", &[outputs], init)?, factor })
    }

    fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        let weight = self.weight.value()?;
        let kernel = weight.dim(2)?;
        let added = kernel - 1 - (kernel - self.factor) / 2;
        transposed(x, &weight, Some(&self.bias.value()?), self.factor, added)
    }
}

/// Pairs of convolutions behind activations, the first of each dilated, whose results are added.
#[derive(Clone, Debug)]
struct ResBlock(Vec<[(Activation, Conv); 2]>);

impl ResBlock {
    fn new(
        params: &ParamBuilder,
        config: &LTX2VocoderConfig,
        channels: usize,
        kernel: usize,
        dilations: &[usize],
    ) -> Result<Self> {
        let one = |(i, dilation): (usize, &usize)| -> Result<[(Activation, Conv); 2]> {
            let make = |number: usize, dilation: usize| -> Result<(Activation, Conv)> {
                let axis = ConvAxis { dilation, ..ConvAxis::same((kernel - 1) * dilation + 1) };
                let path = |name: &str| params.sub(format!("{name}{number}")).sub(i);
                let conv = Conv::new(&path("convs"), channels, channels, &[(kernel, axis)])?;
                Ok((config.activation(&path("acts"), channels)?, conv))
            };
            Ok([make(1, *dilation)?, make(2, 1)?])
        };
        Ok(Self(dilations.iter().enumerate().map(one).collect::<Result<_>>()?))
    }

    fn forward(&self, x: &Tensor) -> EngineResult<Tensor> {
        self.0.iter().try_fold(x.clone(), |x, pair| {
            let h = pair.iter().try_fold(x.clone(), |h, (activation, conv)| conv.forward(&activation.forward(&h)?))?;
            x.add(&h)
        })
    }
}

/// The vocoder of LTX-2.0, and each of the two of LTX-2.3.
#[derive(Debug)]
pub struct LTX2Vocoder {
    config: LTX2VocoderConfig,
    conv_in: Conv,
    stages: Vec<(Upsampler, Vec<ResBlock>)>,
    act_out: Activation,
    conv_out: Conv,
}

impl LTX2Vocoder {
    /// A vocoder whose parameters are the builder's.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: LTX2VocoderConfig, root: &ParamBuilder) -> Result<Self> {
        let ends = ConvAxis::same(ENDS);
        let per_stage = config.resnet_kernel_sizes.len();
        let stage = |i: usize| -> Result<(Upsampler, Vec<ResBlock>)> {
            let (inputs, outputs) = (config.hidden_channels >> i, config.hidden_channels >> (i + 1));
            let (kernel, factor) = (config.upsample_kernel_sizes[i], config.upsample_factors[i]);
            let block = |(j, (kernel, dilations)): (usize, (&usize, &Vec<usize>))| {
                ResBlock::new(&root.sub("resnets").sub(i * per_stage + j), &config, outputs, *kernel, dilations)
            };
            let blocks = config.resnet_kernel_sizes.iter().zip(&config.resnet_dilations).enumerate();
            let upsampler = Upsampler::new(&root.sub("upsamplers").sub(i), inputs, outputs, kernel, factor)?;
            Ok((upsampler, blocks.map(block).collect::<Result<_>>()?))
        };
        let stages = (0..config.upsample_factors.len()).map(stage).collect::<Result<Vec<_>>>()?;
        let last = config.hidden_channels >> stages.len();
        let out = (ENDS, ends);
        Ok(Self {
            conv_in: Conv::new(&root.sub("conv_in"), config.in_channels, config.hidden_channels, &[(ENDS, ends)])?,
            conv_out: Conv::with_groups(
                &root.sub("conv_out"),
                last,
                config.out_channels,
                &[out],
                1,
                config.final_bias,
            )?,
            act_out: config.last_activation(&root.sub("act_out"), last)?,
            stages,
            config,
        })
    }

    /// Samples a second of what it makes.
    pub fn sampling_rate(&self) -> usize {
        self.config.output_sampling_rate
    }

    /// Logarithms of a mel spectrogram `[B, C, T, M]` to a waveform `[B, out_channels, samples]`.
    ///
    /// # Errors
    /// When the sizes do not fit.
    pub fn forward(&self, log_mel: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(&log_mel.transpose(2, 3)?.contiguous()?.flatten(1, 2)?)?;
        let leaking = self.config.act_fn == "leaky_relu";
        for (upsampler, blocks) in &self.stages {
            // The periodic ones are in the blocks alone.
            let h = if leaking { leaky(&x, self.config.leaky_relu_negative_slope)? } else { x };
            x = upsampler.forward(&h)?;
            let mut sum: Option<Tensor> = None;
            for block in blocks {
                let out = block.forward(&x)?;
                sum = Some(sum.map_or(Ok(out.clone()), |sum| sum.add(&out))?);
            }
            x = sum.unwrap_or(x).mul_scalar(1.0 / blocks.len().max(1) as f64)?;
        }
        let x = self.conv_out.forward(&self.act_out.forward(&x)?)?;
        Ok(match self.config.final_act_fn.as_deref() {
            Some("tanh") => pointwise([&x], |[x]| x.tanh())?,
            Some(_) => pointwise([&x], |[x]| x.maximum(-1.0).minimum(1.0))?,
            None => x,
        })
    }
}

/// A vocoder of any of the classes.
#[derive(Debug)]
pub enum Vocoder {
    /// That of LTX-2.0.
    LTX2(Box<LTX2Vocoder>),
    /// That of LTX-2.3.
    WithBWE(Box<LTX2VocoderWithBWE>),
}

impl Vocoder {
    /// Loads a diffusers folder, frozen.
    ///
    /// # Errors
    /// When the class is another, a file can't be read, or keys do not fit.
    pub fn load(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let config = read_config(&folder.join(CONFIG), |class| match class {
            LTX2VocoderConfig::CLASS => Ok(ConfigReader::of::<LTX2VocoderConfig>()),
            LTX2VocoderWithBWEConfig::CLASS => Ok(ConfigReader::of::<LTX2VocoderWithBWEConfig>()),
            other => Err(Error::config("_class_name", "LTX2Vocoder or LTX2VocoderWithBWE", other)),
        })?;
        let weights = Arc::new(open_weights(folder)?);
        let params = ParamBuilder::with_plan(0, Placement::frozen(dtype), device).reading(weights.clone());
        let (model, class) = if config["_class_name"] == LTX2VocoderConfig::CLASS {
            (Self::LTX2(Box::new(LTX2Vocoder::new(read(&config)?, &params)?)), LTX2VocoderConfig::CLASS)
        } else {
            (
                Self::WithBWE(Box::new(LTX2VocoderWithBWE::new(read(&config)?, &params)?)),
                LTX2VocoderWithBWEConfig::CLASS,
            )
        };
        // The way back from spectra is stored and never gone.
        let checked = params.params().check_keys(&weights, |name| name.ends_with("inverse_basis"));
        checked.map_err(|error| Error::Model { model: class.into(), source: Box::new(error) })?;
        Ok(model)
    }

    /// Samples a second of what it makes.
    pub fn sampling_rate(&self) -> usize {
        match self {
            Self::LTX2(vocoder) => vocoder.sampling_rate(),
            Self::WithBWE(vocoder) => vocoder.sampling_rate(),
        }
    }

    /// Logarithms of a mel spectrogram `[B, C, T, M]` to a waveform `[B, out_channels, samples]`.
    ///
    /// # Errors
    /// When the sizes do not fit.
    pub fn forward(&self, log_mel: &Tensor) -> Result<Tensor> {
        match self {
            Self::LTX2(vocoder) => vocoder.forward(log_mel),
            Self::WithBWE(vocoder) => vocoder.forward(log_mel),
        }
    }
}
