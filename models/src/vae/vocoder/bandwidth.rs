//! diffusers' `LTX2VocoderWithBWE`: the vocoder of LTX-2.3, whose sound a second one extends to a higher rate.

use flowtape_engine::nn::{Init, Param, ParamBuilder};
use flowtape_engine::ops::{ConvAxis, conv, pointwise};
use flowtape_engine::{Result as EngineResult, Tensor};
use serde::{Deserialize, Serialize};

use super::activation::{hann_resampler, upsampled};
use super::{LTX2Vocoder, LTX2VocoderConfig};
use crate::config::{Config, check_sizes, truth};
use crate::{Error, Result};

/// The least of a mel spectrogram whose logarithm is taken.
const FLOOR: f64 = 1e-5;

/// `config.json`, with diffusers' defaults (those of LTX-2.3). Keys without a prefix are the first vocoder's, those with `bwe_`
/// the second one's: [`LTX2VocoderConfig`] says what they mean.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)] // by the keys of LTX2VocoderConfig
pub struct LTX2VocoderWithBWEConfig {
    pub in_channels: usize,
    pub hidden_channels: usize,
    pub out_channels: usize,
    pub upsample_kernel_sizes: Vec<usize>,
    pub upsample_factors: Vec<usize>,
    pub resnet_kernel_sizes: Vec<usize>,
    pub resnet_dilations: Vec<Vec<usize>>,
    pub act_fn: String,
    pub leaky_relu_negative_slope: f64,
    #[serde(deserialize_with = "truth")]
    pub antialias: bool,
    pub antialias_ratio: usize,
    pub antialias_kernel_size: usize,
    pub final_act_fn: Option<String>,
    #[serde(deserialize_with = "truth")]
    pub final_bias: bool,
    pub bwe_in_channels: usize,
    pub bwe_hidden_channels: usize,
    pub bwe_out_channels: usize,
    pub bwe_upsample_kernel_sizes: Vec<usize>,
    pub bwe_upsample_factors: Vec<usize>,
    pub bwe_resnet_kernel_sizes: Vec<usize>,
    pub bwe_resnet_dilations: Vec<Vec<usize>>,
    pub bwe_act_fn: String,
    pub bwe_leaky_relu_negative_slope: f64,
    #[serde(deserialize_with = "truth")]
    pub bwe_antialias: bool,
    pub bwe_antialias_ratio: usize,
    pub bwe_antialias_kernel_size: usize,
    pub bwe_final_act_fn: Option<String>,
    #[serde(deserialize_with = "truth")]
    pub bwe_final_bias: bool,
    /// Samples of a spectrum.
    pub filter_length: usize,
    /// Samples from one spectrum to the next.
    pub hop_length: usize,
    /// Samples that a spectrum is of.
    pub window_length: usize,
    /// Bands of the spectrogram between the two.
    pub num_mel_channels: usize,
    /// Samples a second of the first vocoder.
    pub input_sampling_rate: usize,
    /// Samples a second of what comes out.
    pub output_sampling_rate: usize,
}

impl Default for LTX2VocoderWithBWEConfig {
    fn default() -> Self {
        Self {
            in_channels: 128,
            hidden_channels: 1536,
            out_channels: 2,
            upsample_kernel_sizes: vec![11, 4, 4, 4, 4, 4],
            upsample_factors: vec![5, 2, 2, 2, 2, 2],
            resnet_kernel_sizes: vec![3, 7, 11],
            resnet_dilations: vec![vec![1, 3, 5]; 3],
            act_fn: "snakebeta".into(),
            leaky_relu_negative_slope: 0.1,
            antialias: true,
            antialias_ratio: 2,
            antialias_kernel_size: 12,
            final_act_fn: None,
            final_bias: false,
            bwe_in_channels: 128,
            bwe_hidden_channels: 512,
            bwe_out_channels: 2,
            bwe_upsample_kernel_sizes: vec![12, 11, 4, 4, 4],
            bwe_upsample_factors: vec![6, 5, 2, 2, 2],
            bwe_resnet_kernel_sizes: vec![3, 7, 11],
            bwe_resnet_dilations: vec![vec![1, 3, 5]; 3],
            bwe_act_fn: "snakebeta".into(),
            bwe_leaky_relu_negative_slope: 0.1,
            bwe_antialias: true,
            bwe_antialias_ratio: 2,
            bwe_antialias_kernel_size: 12,
            bwe_final_act_fn: None,
            bwe_final_bias: false,
            filter_length: 512,
            hop_length: 80,
            window_length: 512,
            num_mel_channels: 64,
            input_sampling_rate: 16_000,
            output_sampling_rate: 48_000,
        }
    }
}

impl LTX2VocoderWithBWEConfig {
    /// The first vocoder's.
    fn vocoder(&self) -> LTX2VocoderConfig {
        LTX2VocoderConfig {
            in_channels: self.in_channels,
            hidden_channels: self.hidden_channels,
            out_channels: self.out_channels,
            upsample_kernel_sizes: self.upsample_kernel_sizes.clone(),
            upsample_factors: self.upsample_factors.clone(),
            resnet_kernel_sizes: self.resnet_kernel_sizes.clone(),
            resnet_dilations: self.resnet_dilations.clone(),
            act_fn: self.act_fn.clone(),
            leaky_relu_negative_slope: self.leaky_relu_negative_slope,
            antialias: self.antialias,
            antialias_ratio: self.antialias_ratio,
            antialias_kernel_size: self.antialias_kernel_size,
            final_act_fn: self.final_act_fn.clone(),
            final_bias: self.final_bias,
            output_sampling_rate: self.input_sampling_rate,
        }
    }

    /// The second one's.
    fn extension(&self) -> LTX2VocoderConfig {
        LTX2VocoderConfig {
            in_channels: self.bwe_in_channels,
            hidden_channels: self.bwe_hidden_channels,
            out_channels: self.bwe_out_channels,
            upsample_kernel_sizes: self.bwe_upsample_kernel_sizes.clone(),
            upsample_factors: self.bwe_upsample_factors.clone(),
            resnet_kernel_sizes: self.bwe_resnet_kernel_sizes.clone(),
            resnet_dilations: self.bwe_resnet_dilations.clone(),
            act_fn: self.bwe_act_fn.clone(),
            leaky_relu_negative_slope: self.bwe_leaky_relu_negative_slope,
            antialias: self.bwe_antialias,
            antialias_ratio: self.bwe_antialias_ratio,
            antialias_kernel_size: self.bwe_antialias_kernel_size,
            final_act_fn: self.bwe_final_act_fn.clone(),
            final_bias: self.bwe_final_bias,
            output_sampling_rate: self.output_sampling_rate,
        }
    }
}

impl Config for LTX2VocoderWithBWEConfig {
    const CLASS: &'static str = "LTX2VocoderWithBWE";

    fn check(&self) -> Result<()> {
        check_sizes([
            ("filter_length", self.filter_length),
            ("hop_length", self.hop_length),
            ("num_mel_channels", self.num_mel_channels),
            ("input_sampling_rate", self.input_sampling_rate),
        ])?;
        self.vocoder().check()?;
        self.extension().check()?;
        let mel = self.out_channels * self.num_mel_channels;
        if self.bwe_in_channels != mel {
            return Err(Error::config(
                "bwe_in_channels",
                format!("{mel}, the bands of all channels"),
                self.bwe_in_channels,
            ));
        }
        let (from, to) = (self.input_sampling_rate, self.output_sampling_rate);
        let longer: usize = self.bwe_upsample_factors.iter().product();
        if !to.is_multiple_of(from) || longer * from != self.hop_length * to {
            let expected = "a multiple of input_sampling_rate, by which the second vocoder makes hop_length longer";
            return Err(Error::config("output_sampling_rate", expected, to));
        }
        Ok(())
    }
}

/// The vocoder of LTX-2.3.
#[derive(Debug)]
pub struct LTX2VocoderWithBWE {
    config: LTX2VocoderWithBWEConfig,
    vocoder: LTX2Vocoder,
    extension: LTX2Vocoder,
    /// Cosines and sines of a windowed Fourier transform `[2 F, 1, filter_length]`, and the bands of its sizes `[M, F]`.
    basis: Param,
    bands: Param,
}

impl LTX2VocoderWithBWE {
    /// A vocoder whose parameters are the builder's.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: LTX2VocoderWithBWEConfig, root: &ParamBuilder) -> Result<Self> {
        let sizes = config.filter_length / 2 + 1;
        let mel = root.sub("mel_stft");
        Ok(Self {
            vocoder: LTX2Vocoder::new(config.vocoder(), &root.sub("vocoder"))?,
            extension: LTX2Vocoder::new(config.extension(), &root.sub("bwe_generator"))?,
            basis: mel.sub("stft_fn").get("forward_basis", &[2 * sizes, 1, config.filter_length], Init::Zeros)?,
            bands: mel.get("mel_basis", &[config.num_mel_channels, sizes], Init::Zeros)?,
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
        let low = self.vocoder.forward(log_mel)?;
        let samples = low.dim(2)?;
        // Whole hops, so that the second one's sound is as long.
        let low = low.pad(2, 0, samples.next_multiple_of(self.config.hop_length) - samples)?;
        let residual = self.extension.forward(&self.log_mel(&low)?)?;
        let ratio = self.config.output_sampling_rate / self.config.input_sampling_rate;
        let (filter, pad, start) = hann_resampler(ratio, low.device(), low.dtype())?;
        let skip = upsampled(&low, &filter, ratio, pad, start)?;
        let whole = pointwise([&residual, &skip], |[a, b]| (a + b).maximum(-1.0).minimum(1.0))?;
        Ok(whole.narrow(2, 0, samples * ratio)?)
    }

    /// Logarithms of the mel spectrogram `[B, C, T, M]` of a sound `[B, C, samples]`, each spectrum of what lies before it.
    fn log_mel(&self, sound: &Tensor) -> EngineResult<Tensor> {
        let (batch, channels, samples) = (sound.dim(0)?, sound.dim(1)?, sound.dim(2)?);
        let before = self.config.window_length.saturating_sub(self.config.hop_length);
        let axis = ConvAxis { stride: self.config.hop_length, before, ..ConvAxis::default() };
        let flat = sound.contiguous()?.reshape(&[batch * channels, 1, samples])?;
        let both = conv(&flat, &self.basis.value()?, None, &[axis], 1)?;
        let sizes = both.dim(1)? / 2;
        let (real, imaginary) = (both.narrow(1, 0, sizes)?, both.narrow(1, sizes, sizes)?);
        let size = pointwise([&real, &imaginary], |[a, b]| (a.square() + b.square()).sqrt())?;
        let mel = size.transpose(1, 2)?.contiguous()?.matmul(&self.bands.value()?.t()?)?;
        let mel = pointwise([&mel], |[m]| m.maximum(FLOOR).log())?;
        mel.reshape(&[batch, channels, mel.dim(1)?, mel.dim(2)?])
    }
}
