//! diffusers' `AutoencoderKL`: the autoencoder of FLUX.1 and Z-Image.

use flowtape_engine::Tensor;
use flowtape_engine::nn::{Conv, ParamBuilder, Params};
use flowtape_engine::ops::pointwise;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::blocks::{Decoder, Encoder, Shape, conv2d};
use super::tiling::{Sides, Tiling, tiled};
use super::{Autoencoder, Posterior, check_pixels};
use crate::config::{Config, config_json, truth};
use crate::{Error, Result};

/// `config.json`, with diffusers' defaults.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AutoencoderKLConfig {
    /// Channels of a picture.
    pub in_channels: usize,
    /// Channels of a decoded picture.
    pub out_channels: usize,
    /// Kinds of the encoder's stages: `DownEncoderBlock2D` alone is known.
    pub down_block_types: Vec<String>,
    /// Kinds of the decoder's stages: `UpDecoderBlock2D` alone is known.
    pub up_block_types: Vec<String>,
    /// Channels of each stage; each but the last halves the sides.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of an encoder's stage; a decoder's has one more.
    pub layers_per_block: usize,
    /// The function after norms: `silu` alone is known.
    pub act_fn: String,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// Side of a tile, in pixels, where none is given.
    pub sample_size: usize,
    /// Factor of the latents.
    pub scaling_factor: f64,
    /// Taken off the latents before that.
    pub shift_factor: Option<f64>,
    /// Statistics that no pipeline of ours reads.
    pub latents_mean: Option<Vec<f64>>,
    /// Statistics that no pipeline of ours reads.
    pub latents_std: Option<Vec<f64>>,
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
}

impl Default for AutoencoderKLConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec!["DownEncoderBlock2D".into()],
            up_block_types: vec!["UpDecoderBlock2D".into()],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: "silu".into(),
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            force_upcast: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

/// Checks that there is a stage of the one known kind for each entry of `block_out_channels`.
pub(super) fn check_stages(key: &'static str, kinds: &[String], known: &str, count: usize) -> Result<()> {
    if kinds.len() == count && kinds.iter().all(|kind| kind == known) {
        return Ok(());
    }
    Err(Error::config(key, format!("`{known}` for each of {count} block_out_channels"), format!("{kinds:?}")))
}

impl Config for AutoencoderKLConfig {
    const CLASS: &'static str = "AutoencoderKL";

    fn check(&self) -> Result<()> {
        self.shape().check("block_out_channels", &self.block_out_channels)?;
        let stages = self.block_out_channels.len();
        check_stages("down_block_types", &self.down_block_types, "DownEncoderBlock2D", stages)?;
        check_stages("up_block_types", &self.up_block_types, "UpDecoderBlock2D", stages)?;
        if self.act_fn != "silu" {
            return Err(Error::config("act_fn", "silu", &self.act_fn));
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor != 0.0) {
            return Err(Error::config("scaling_factor", "a number other than 0", self.scaling_factor));
        }
        Ok(())
    }
}

impl AutoencoderKLConfig {
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

/// Encoder and decoder of pictures with the convolutions of size 1 between them and the latents.
#[derive(Debug)]
pub(super) struct Networks {
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Option<Conv>,
    post_quant_conv: Option<Conv>,
    channels: usize,
    /// Pixels of a latent's side.
    pub ratio: usize,
    tiles: Option<Sides>,
}

impl Networks {
    pub fn new(
        params: &ParamBuilder,
        shape: &Shape,
        [encoder, decoder]: [&[usize]; 2],
        [quant, post_quant]: [bool; 2],
    ) -> Result<Self> {
        let latents = shape.latent_channels;
        let conv = |name: &str, channels: usize| conv2d(&params.sub(name), channels, channels, 1);
        Ok(Self {
            channels: shape.in_channels,
            ratio: 1 << (encoder.len() - 1),
            encoder: Encoder::new(&params.sub("encoder"), shape, encoder)?,
            decoder: Decoder::new(&params.sub("decoder"), shape, decoder)?,
            quant_conv: quant.then(|| conv("quant_conv", 2 * latents)).transpose()?,
            post_quant_conv: post_quant.then(|| conv("post_quant_conv", latents)).transpose()?,
            tiles: None,
        })
    }

    pub fn set_tiling(&mut self, tiling: Option<Tiling>) -> Result<()> {
        self.tiles = tiling.map(|tiling| tiling.tiles(self.ratio)).transpose()?;
        Ok(())
    }

    pub fn encode(&self, pixels: &Tensor) -> Result<Posterior> {
        check_pixels(pixels, 4, self.channels, self.ratio)?;
        let encode = |x: &Tensor| -> Result<Tensor> {
            let moments = self.encoder.forward(x)?;
            Ok(self.quant_conv.as_ref().map_or(Ok(moments.clone()), |conv| conv.forward(&moments))?)
        };
        Posterior::of(&tiled(pixels, self.tiles.map(|tiles| tiles.pixels), encode)?)
    }

    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let decode = |z: &Tensor| -> Result<Tensor> {
            match &self.post_quant_conv {
                Some(conv) => Ok(self.decoder.forward(&conv.forward(z)?)?),
                None => Ok(self.decoder.forward(z)?),
            }
        };
        tiled(latents, self.tiles.map(|tiles| tiles.latents), decode)
    }
}

/// The autoencoder.
#[derive(Debug)]
pub struct AutoencoderKL {
    config: AutoencoderKLConfig,
    params: Params,
    networks: Networks,
}

impl AutoencoderKL {
    /// From its configuration.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: AutoencoderKLConfig, params: &ParamBuilder) -> Result<Self> {
        let channels = &config.block_out_channels[..];
        let convs = [config.use_quant_conv, config.use_post_quant_conv];
        let networks = Networks::new(params, &config.shape(), [channels; 2], convs)?;
        Ok(Self { networks, params: params.params(), config })
    }
}

impl Autoencoder for AutoencoderKL {
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
        let (shift, scale) = (self.config.shift_factor.unwrap_or(0.0), self.config.scaling_factor);
        Ok(pointwise([latents], |[z]| (z - shift) * scale)?)
    }

    fn denormalise(&self, latents: &Tensor) -> Result<Tensor> {
        let (shift, scale) = (self.config.shift_factor.unwrap_or(0.0), self.config.scaling_factor);
        Ok(pointwise([latents], |[z]| z / scale + shift)?)
    }

    fn latent_dims(&self, pixels: &[usize]) -> Vec<usize> {
        let ratio = self.networks.ratio;
        match pixels {
            [lead @ .., _, height, width] => {
                [lead, &[self.config.latent_channels, height / ratio, width / ratio]].concat()
            }
            _ => pixels.to_vec(),
        }
    }

    fn set_tiling(&mut self, tiling: Option<Tiling>) -> Result<()> {
        self.networks.set_tiling(tiling)
    }
}
