//! diffusers' `AutoencoderKLFlux2`: that of FLUX.1 with more channels, whose latents are patches with statistics.

use flowtape_engine::nn::{Init, Param, ParamBuilder, Params};
use flowtape_engine::ops::{patchify, pointwise_to};
use flowtape_engine::{Result as EngineResult, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::autoencoder_kl::{Networks, check_stages};
use super::blocks::Shape;
use super::tiling::Tiling;
use super::{Autoencoder, Posterior};
use crate::config::{Config, check_sizes, config_json, truth};
use crate::{Error, Result};

/// `config.json`, with diffusers' defaults (those of FLUX.2).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AutoencoderKLFlux2Config {
    /// Channels of a picture.
    pub in_channels: usize,
    /// Channels of a decoded picture.
    pub out_channels: usize,
    /// Kinds of the encoder's stages: `DownEncoderBlock2D` alone is known.
    pub down_block_types: Vec<String>,
    /// Kinds of the decoder's stages: `UpDecoderBlock2D` alone is known.
    pub up_block_types: Vec<String>,
    /// Channels of each of the encoder's stages.
    pub block_out_channels: Vec<usize>,
    /// The same of the decoder, where they differ.
    pub decoder_block_out_channels: Option<Vec<usize>>,
    /// Residual blocks of an encoder's stage; a decoder's has one more.
    pub layers_per_block: usize,
    /// The function after norms: `silu` alone is known.
    pub act_fn: String,
    /// Channels of the latents, before they are patches.
    pub latent_channels: usize,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// Side of a tile, in pixels, where none is given.
    pub sample_size: usize,
    /// Whether f16 is too narrow for it.
    #[serde(deserialize_with = "truth")]
    pub force_upcast: bool,
    /// Whether a convolution of size 1 follows the encoder.
    #[serde(deserialize_with = "truth")]
    pub use_quant_conv: bool,
    /// Whether a convolution of size 1 stands before the decoder.
    #[serde(deserialize_with = "truth")]
    pub use_post_quant_conv: bool,
    /// Whether the middle blocks have attention.
    #[serde(deserialize_with = "truth")]
    pub mid_block_add_attention: bool,
    /// Added to the variance of latents.
    pub batch_norm_eps: f64,
    /// Of training.
    pub batch_norm_momentum: f64,
    /// Sides of a patch of latents.
    pub patch_size: [usize; 2],
}

impl Default for AutoencoderKLFlux2Config {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec!["DownEncoderBlock2D".into(); 4],
            up_block_types: vec!["UpDecoderBlock2D".into(); 4],
            block_out_channels: vec![128, 256, 512, 512],
            decoder_block_out_channels: None,
            layers_per_block: 2,
            act_fn: "silu".into(),
            latent_channels: 32,
            norm_num_groups: 32,
            sample_size: 1024,
            force_upcast: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
            batch_norm_eps: 1e-4,
            batch_norm_momentum: 0.1,
            patch_size: [2, 2],
        }
    }
}

impl Config for AutoencoderKLFlux2Config {
    const CLASS: &'static str = "AutoencoderKLFlux2";

    fn check(&self) -> Result<()> {
        let stages = self.block_out_channels.len();
        self.shape().check("block_out_channels", &self.block_out_channels)?;
        self.shape().check("decoder_block_out_channels", self.decoder_channels())?;
        check_stages("down_block_types", &self.down_block_types, "DownEncoderBlock2D", stages)?;
        check_stages("up_block_types", &self.up_block_types, "UpDecoderBlock2D", self.decoder_channels().len())?;
        if self.decoder_channels().len() != stages {
            let got = self.decoder_channels().len();
            return Err(Error::config("decoder_block_out_channels", format!("{stages} stages"), got));
        }
        if self.act_fn != "silu" {
            return Err(Error::config("act_fn", "silu", &self.act_fn));
        }
        check_sizes([("patch_size", self.patch_size[0]), ("patch_size", self.patch_size[1])])
    }
}

impl AutoencoderKLFlux2Config {
    fn decoder_channels(&self) -> &[usize] {
        self.decoder_block_out_channels.as_deref().unwrap_or(&self.block_out_channels)
    }

    fn shape(&self) -> Shape {
        Shape {
            in_channels: self.in_channels,
            out_channels: self.out_channels,
            latent_channels: self.latent_channels,
            layers_per_block: self.layers_per_block,
            groups: self.norm_num_groups,
            mid_attention: self.mid_block_add_attention,
        }
    }
}

/// The autoencoder.
#[derive(Debug)]
pub struct AutoencoderKLFlux2 {
    config: AutoencoderKLFlux2Config,
    params: Params,
    networks: Networks,
    running_mean: Param,
    running_var: Param,
}

impl AutoencoderKLFlux2 {
    /// From its configuration.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: AutoencoderKLFlux2Config, params: &ParamBuilder) -> Result<Self> {
        let channels = [&config.block_out_channels[..], config.decoder_channels()];
        let convs = [config.use_quant_conv, config.use_post_quant_conv];
        let networks = Networks::new(params, &config.shape(), channels, convs)?;
        let width = config.latent_channels * config.patch_size[0] * config.patch_size[1];
        let statistics = params.sub("bn");
        let running_mean = statistics.get("running_mean", &[width], Init::Zeros)?;
        let running_var = statistics.get("running_var", &[width], Init::Ones)?;
        Ok(Self { networks, params: params.params(), running_mean, running_var, config })
    }

    /// Mean and variance of the patches' channels, beside `[B, C, h, w]`.
    fn statistics(&self) -> EngineResult<[Tensor; 2]> {
        let column = |param: &Param| param.value()?.reshape(&[param.numel(), 1, 1]);
        Ok([column(&self.running_mean)?, column(&self.running_var)?])
    }
}

impl Autoencoder for AutoencoderKLFlux2 {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> Value {
        config_json(&self.config)
    }

    fn encode(&self, pixels: &Tensor) -> Result<Posterior> {
        self.networks.encode(pixels)
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.networks.decode(latents)
    }

    fn normalise(&self, latents: &Tensor) -> Result<Tensor> {
        let tokens = patchify(latents, &self.config.patch_size)?;
        let grid = [2, 3].map(|axis| latents.dims()[axis] / self.config.patch_size[axis - 2]);
        let patches =
            tokens.reshape(&[latents.dims()[0], grid[0], grid[1], tokens.dims()[2]])?.permute(&[0, 3, 1, 2])?;
        let ([mean, var], eps) = (self.statistics()?, self.config.batch_norm_eps);
        Ok(pointwise_to(latents.dtype(), [&patches, &mean, &var], |[x, m, v]| (x - m) * (v + eps).rsqrt())?)
    }

    fn denormalise(&self, latents: &Tensor) -> Result<Tensor> {
        let ([mean, var], eps) = (self.statistics()?, self.config.batch_norm_eps);
        let x = pointwise_to(latents.dtype(), [latents, &mean, &var], |[x, m, v]| x * (v + eps).sqrt() + m)?;
        let ([down, right], channels) = (self.config.patch_size, self.config.latent_channels);
        let &[batch, _, height, width] = x.dims() else {
            return Err(flowtape_engine::Error::shape("denormalise", "latents [B, C, h, w]", latents.dims()).into());
        };
        let parts = x.reshape(&[batch, channels, down, right, height, width])?.permute(&[0, 1, 4, 2, 5, 3])?;
        Ok(parts.reshape(&[batch, channels, height * down, width * right])?)
    }

    fn latent_dims(&self, pixels: &[usize]) -> Vec<usize> {
        let ([down, right], ratio) = (self.config.patch_size, self.networks.ratio);
        match pixels {
            [lead @ .., _, height, width] => {
                let channels = self.config.latent_channels * down * right;
                [lead, &[channels, height / (ratio * down), width / (ratio * right)]].concat()
            }
            _ => pixels.to_vec(),
        }
    }

    fn set_tiling(&mut self, tiling: Option<Tiling>) -> Result<()> {
        self.networks.set_tiling(tiling)
    }

    fn is_ignored_key(&self, key: &str) -> bool {
        key == "bn.num_batches_tracked"
    }
}
