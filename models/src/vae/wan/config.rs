//! The configurations of diffusers' `AutoencoderKLWan` and `AutoencoderKLQwenImage`.

use serde::{Deserialize, Serialize};

use crate::config::{Config, check_layers, check_sizes, product, truth};
use crate::{Error, Result};

/// Means of the published autoencoder's latents.
const MEAN: [f64; 16] = [
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
    -0.9497, 0.2503, -0.2921,
];
/// Their standard deviations.
const STD: [f64; 16] = [
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
    2.8251, 1.916,
];

/// `config.json` of `AutoencoderKLWan`, with diffusers' defaults (those of Wan 2.1).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AutoencoderKLWanConfig {
    /// Channels of the encoder's first stage.
    pub base_dim: usize,
    /// Channels of the decoder's last stage; `base_dim` if none.
    pub decoder_base_dim: Option<usize>,
    /// Channels of the latents.
    pub z_dim: usize,
    /// Channels of each stage, in `base_dim`.
    pub dim_mult: Vec<usize>,
    /// Residual blocks of an encoder's stage; a decoder's has one more.
    pub num_res_blocks: usize,
    /// Scales that have attention: none is known.
    pub attn_scales: Vec<f64>,
    /// Whether a stage's end halves time, too.
    pub temperal_downsample: Vec<bool>,
    /// Of training.
    pub dropout: f64,
    /// Means of the latents' channels.
    pub latents_mean: Vec<f64>,
    /// Their standard deviations.
    pub latents_std: Vec<f64>,
    /// Whether stages have shortcuts of means and repetitions (Wan 2.2).
    #[serde(deserialize_with = "truth")]
    pub is_residual: bool,
    /// Channels of a picture, or of its patches.
    pub in_channels: usize,
    /// The same of what is decoded.
    pub out_channels: usize,
    /// Side of a patch that becomes channels.
    pub patch_size: Option<usize>,
    /// Frames of a latent.
    pub scale_factor_temporal: Option<usize>,
    /// Pixels of a latent's side.
    pub scale_factor_spatial: Option<usize>,
}

impl Default for AutoencoderKLWanConfig {
    fn default() -> Self {
        Self {
            base_dim: 96,
            decoder_base_dim: None,
            z_dim: 16,
            dim_mult: vec![1, 2, 4, 4],
            num_res_blocks: 2,
            attn_scales: Vec::new(),
            temperal_downsample: vec![false, true, true],
            dropout: 0.0,
            latents_mean: MEAN.to_vec(),
            latents_std: STD.to_vec(),
            is_residual: false,
            in_channels: 3,
            out_channels: 3,
            patch_size: None,
            scale_factor_temporal: Some(4),
            scale_factor_spatial: Some(8),
        }
    }
}

impl Config for AutoencoderKLWanConfig {
    const CLASS: &'static str = "AutoencoderKLWan";

    fn check(&self) -> Result<()> {
        let stages = self.dim_mult.len();
        check_sizes([
            ("base_dim", self.base_dim),
            ("decoder_base_dim", self.decoder_dim()),
            ("z_dim", self.z_dim),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("dim_mult", stages),
            ("patch_size", self.patch()),
        ])?;
        for mult in &self.dim_mult {
            check_sizes([("dim_mult", product(&[*mult, self.base_dim.max(self.decoder_dim())]))])?;
        }
        check_layers(1, [("num_res_blocks", self.num_res_blocks), ("dim_mult", stages)])?;
        if !self.attn_scales.is_empty() {
            return Err(Error::config("attn_scales", "none", format!("{:?}", self.attn_scales)));
        }
        if self.temperal_downsample.len() + 1 != stages {
            let expected = format!("{} flags, one for the end of each stage but the last", stages - 1);
            return Err(Error::config("temperal_downsample", expected, format!("{:?}", self.temperal_downsample)));
        }
        let side = self.patch() * self.patch();
        if [self.in_channels, self.out_channels].iter().any(|channels| !channels.is_multiple_of(side)) {
            let got = (self.in_channels, self.out_channels);
            return Err(Error::config("in_channels", format!("multiples of {side}, a patch"), format!("{got:?}")));
        }
        if self.scale_factor_spatial.unwrap_or(8) != self.patch() << (stages - 1) {
            let expected = format!("{}, from the stages and patch_size", self.patch() << (stages - 1));
            return Err(Error::config("scale_factor_spatial", expected, format!("{:?}", self.scale_factor_spatial)));
        }
        if self.is_residual {
            self.check_shortcuts()?;
        }
        for (key, values) in [("latents_mean", &self.latents_mean), ("latents_std", &self.latents_std)] {
            if values.len() != self.z_dim {
                return Err(Error::config(key, format!("{} numbers (z_dim)", self.z_dim), values.len()));
            }
        }
        Ok(())
    }
}

impl AutoencoderKLWanConfig {
    /// The shortcuts of stages bring whole channels together, or repeat them: diffusers' `AvgDown3D` and `DupUp3D` assert it.
    fn check_shortcuts(&self) -> Result<()> {
        let packed = |in_time: bool| if in_time { 8 } else { 4 };
        let (mults, in_time) = (&self.dim_mult, &self.temperal_downsample);
        let inputs = [1].iter().chain(mults);
        let down = inputs.zip(mults).enumerate().map(|(i, (&x, &y))| (x, in_time.get(i).map_or(1, |t| packed(*t)), y));
        let up = mults.windows(2).zip(in_time).map(|(pair, in_time)| (pair[0], packed(*in_time), pair[1]));
        for (channels, packed, divisor) in down.chain(up) {
            if !product(&[channels, packed]).is_multiple_of(divisor) {
                let expected = format!("divisors of {packed} x {channels}, which a residual stage's shortcut folds");
                return Err(Error::config("dim_mult", expected, divisor));
            }
        }
        Ok(())
    }

    /// Channels of the decoder's last stage.
    pub(super) fn decoder_dim(&self) -> usize {
        self.decoder_base_dim.unwrap_or(self.base_dim)
    }

    /// Side of a patch, 1 where there are none.
    pub(super) fn patch(&self) -> usize {
        self.patch_size.unwrap_or(1)
    }
}

/// `config.json` of `AutoencoderKLQwenImage`, with diffusers' defaults: the network of Wan 2.1 under other names.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AutoencoderKLQwenImageConfig {
    /// As in [`AutoencoderKLWanConfig`].
    pub base_dim: usize,
    /// As there.
    pub z_dim: usize,
    /// As there.
    pub dim_mult: Vec<usize>,
    /// As there.
    pub num_res_blocks: usize,
    /// As there.
    pub attn_scales: Vec<f64>,
    /// As there.
    pub temperal_downsample: Vec<bool>,
    /// As there.
    pub dropout: f64,
    /// Channels of a picture.
    pub input_channels: usize,
    /// As there.
    pub latents_mean: Vec<f64>,
    /// As there.
    pub latents_std: Vec<f64>,
}

impl Default for AutoencoderKLQwenImageConfig {
    fn default() -> Self {
        let wan = AutoencoderKLWanConfig::default();
        Self {
            base_dim: wan.base_dim,
            z_dim: wan.z_dim,
            dim_mult: wan.dim_mult,
            num_res_blocks: wan.num_res_blocks,
            attn_scales: wan.attn_scales,
            temperal_downsample: wan.temperal_downsample,
            dropout: wan.dropout,
            input_channels: wan.in_channels,
            latents_mean: wan.latents_mean,
            latents_std: wan.latents_std,
        }
    }
}

impl AutoencoderKLQwenImageConfig {
    /// The same network by Wan's names.
    pub(super) fn as_wan(&self) -> AutoencoderKLWanConfig {
        AutoencoderKLWanConfig {
            base_dim: self.base_dim,
            z_dim: self.z_dim,
            dim_mult: self.dim_mult.clone(),
            num_res_blocks: self.num_res_blocks,
            attn_scales: self.attn_scales.clone(),
            temperal_downsample: self.temperal_downsample.clone(),
            in_channels: self.input_channels,
            out_channels: self.input_channels,
            latents_mean: self.latents_mean.clone(),
            latents_std: self.latents_std.clone(),
            scale_factor_spatial: Some(1 << self.temperal_downsample.len().min(16)),
            ..AutoencoderKLWanConfig::default()
        }
    }
}

impl Config for AutoencoderKLQwenImageConfig {
    const CLASS: &'static str = "AutoencoderKLQwenImage";

    fn check(&self) -> Result<()> {
        self.as_wan().check()
    }
}
