//! diffusers' `LTX2Vocoder`: sound waves of mel spectrograms, as HiFi-GAN makes them (Kong et al. 2020).

use std::path::Path;
use std::sync::Arc;

use flowtape_engine::nn::{Conv, Init, Param, ParamBuilder, Params, Placement};
use flowtape_engine::ops::{ConvAxis, conv, pointwise};
use flowtape_engine::{DType, Device, Result as EngineResult, Tensor};
use serde::{Deserialize, Serialize};

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
    /// `leaky_relu` alone is known.
    pub act_fn: String,
    /// Its slope below zero.
    pub leaky_relu_negative_slope: f64,
    /// Unknown when set.
    #[serde(deserialize_with = "truth")]
    pub antialias: bool,
    /// Without effect without `antialias`.
    pub antialias_ratio: usize,
    /// Without effect without `antialias`.
    pub antialias_kernel_size: usize,
    /// `tanh` or none.
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
        let known = self.act_fn == "leaky_relu" && !self.antialias;
        if !known || self.final_act_fn.as_ref().is_some_and(|name| name != "tanh") {
            let expected = "leaky_relu without antialias, and tanh at the end: those of LTX-2.0";
            return Err(Error::config("act_fn", expected, &self.act_fn));
        }
        Ok(())
    }
}

/// `x` above zero, `slope x` below.
fn leaky(x: &Tensor, slope: f64) -> EngineResult<Tensor> {
    pointwise([x], |[x]| x.maximum(0.0) + x.minimum(0.0) * slope)
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
        let (batch, channels, length, kernel) = (x.dim(0)?, x.dim(1)?, x.dim(2)?, weight.dim(2)?);
        let spread = x.unsqueeze(3)?.pad(3, 0, self.factor - 1)?.reshape(&[batch, channels, length * self.factor])?;
        let spread = spread.narrow(2, 0, (length.saturating_sub(1)) * self.factor + 1)?;
        let backwards: Vec<u32> = (0..kernel as u32).rev().collect();
        let backwards = Tensor::from_vec(backwards, &[kernel], x.device())?;
        let weight = weight.index_select(2, &backwards)?.transpose(0, 1)?.contiguous()?;
        let added = kernel - 1 - (kernel - self.factor) / 2;
        conv(&spread, &weight, Some(&self.bias.value()?), &[ConvAxis::padded(added, added)], 1)
    }
}

/// Pairs of convolutions, the first of each dilated, whose results are added.
#[derive(Clone, Debug)]
struct ResBlock(Vec<[Conv; 2]>);

impl ResBlock {
    fn new(params: &ParamBuilder, channels: usize, kernel: usize, dilations: &[usize]) -> Result<Self> {
        let one = |(i, dilation): (usize, &usize)| -> Result<[Conv; 2]> {
            let make = |name: &str, dilation: usize| {
                let axis = ConvAxis { dilation, ..ConvAxis::same((kernel - 1) * dilation + 1) };
                Conv::new(&params.sub(name).sub(i), channels, channels, &[(kernel, axis)])
            };
            Ok([make("convs1", *dilation)?, make("convs2", 1)?])
        };
        Ok(Self(dilations.iter().enumerate().map(one).collect::<Result<_>>()?))
    }

    fn forward(&self, x: &Tensor, slope: f64) -> EngineResult<Tensor> {
        self.0.iter().try_fold(x.clone(), |x, [first, second]| {
            let h = first.forward(&leaky(&x, slope)?)?;
            x.add(&second.forward(&leaky(&h, slope)?)?)
        })
    }
}

/// The vocoder of LTX-2.0.
#[derive(Debug)]
pub struct LTX2Vocoder {
    config: LTX2VocoderConfig,
    params: Params,
    conv_in: Conv,
    stages: Vec<(Upsampler, Vec<ResBlock>)>,
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
                ResBlock::new(&root.sub("resnets").sub(i * per_stage + j), outputs, *kernel, dilations)
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
            stages,
            params: root.params(),
            config,
        })
    }

    /// Loads a diffusers folder, frozen.
    ///
    /// # Errors
    /// When the class is another, a file can't be read, or keys do not fit.
    pub fn load(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let config = read_config(&folder.join(CONFIG), |class| match class {
            LTX2VocoderConfig::CLASS => Ok(ConfigReader::of::<LTX2VocoderConfig>()),
            other => Err(Error::config("_class_name", LTX2VocoderConfig::CLASS, other)),
        })?;
        let weights = Arc::new(open_weights(folder)?);
        let params = ParamBuilder::with_plan(0, Placement::frozen(dtype), device).reading(weights.clone());
        let model = Self::new(read(&config)?, &params)?;
        model
            .params
            .check_keys(&weights, |_| false)
            .map_err(|error| Error::Model { model: LTX2VocoderConfig::CLASS.into(), source: Box::new(error) })?;
        Ok(model)
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
        for (upsampler, blocks) in &self.stages {
            x = upsampler.forward(&leaky(&x, self.config.leaky_relu_negative_slope)?)?;
            let mut sum: Option<Tensor> = None;
            for block in blocks {
                let out = block.forward(&x, self.config.leaky_relu_negative_slope)?;
                sum = Some(sum.map_or(Ok(out.clone()), |sum| sum.add(&out))?);
            }
            x = sum.unwrap_or(x).mul_scalar(1.0 / blocks.len().max(1) as f64)?;
        }
        let x = self.conv_out.forward(&leaky(&x, LAST_SLOPE)?)?;
        Ok(if self.config.final_act_fn.is_some() { pointwise([&x], |[x]| x.tanh())? } else { x })
    }
}
