//! The autoencoder of Wan and Qwen-Image.

use flowtape_engine::nn::{Conv, ParamBuilder, Params};
use flowtape_engine::ops::{ConvAxis, pointwise, pointwise_to};
use flowtape_engine::{Result as EngineResult, Tensor};
use serde_json::Value;

use super::config::{AutoencoderKLQwenImageConfig, AutoencoderKLWanConfig};
use super::network::{Decoder, Encoder};
use crate::Result;
use crate::config::config_json;
use crate::vae::pieces::Memory;
use crate::vae::tiling::{self, Tiling};
use crate::vae::video::{latent_dims, patches, statistic, unpatched};
use crate::vae::{Autoencoder, Posterior, check_pixels};

/// Frames of a piece after the first one, and of a latent: the reference has no other.
const PIECE: usize = 4;

/// The autoencoder of clips and, as clips of one frame, of pictures.
#[derive(Debug)]
pub struct AutoencoderKLWan {
    config: AutoencoderKLWanConfig,
    /// The configuration as the file has it.
    json: Value,
    params: Params,
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Conv,
    post_quant_conv: Conv,
    tiling: Option<Tiling>,
}

impl AutoencoderKLWan {
    /// From the configuration of Wan's.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: AutoencoderKLWanConfig, params: &ParamBuilder) -> Result<Self> {
        let json = config_json(&config);
        Self::with_json(config, json, params)
    }

    /// From the configuration of Qwen-Image's.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn of_qwen_image(config: &AutoencoderKLQwenImageConfig, params: &ParamBuilder) -> Result<Self> {
        Self::with_json(config.as_wan(), config_json(config), params)
    }

    fn with_json(config: AutoencoderKLWanConfig, json: Value, params: &ParamBuilder) -> Result<Self> {
        let z = config.z_dim;
        let conv = |name: &str, channels: usize| {
            Conv::new(&params.sub(name), channels, channels, &[(1, ConvAxis::default()); 3])
        };
        Ok(Self {
            encoder: Encoder::new(&params.sub("encoder"), &config)?,
            decoder: Decoder::new(&params.sub("decoder"), &config)?,
            quant_conv: conv("quant_conv", 2 * z)?,
            post_quant_conv: conv("post_quant_conv", z)?,
            params: params.params(),
            config,
            json,
            tiling: None,
        })
    }

    /// Pixels of a latent's side.
    fn ratio(&self) -> usize {
        self.config.patch() << (self.config.dim_mult.len() - 1)
    }

    /// Moments of a clip, or of a tile of it.
    fn moments(&self, x: &Tensor) -> Result<Tensor> {
        let mut memory = Memory::default();
        let mut parts = Vec::new();
        // What is left behind whole pieces is passed over, as in the reference.
        let pieces = 1 + (x.dims()[2] - 1) / PIECE;
        for i in 0..pieces {
            let (start, count) = if i == 0 { (0, 1) } else { (1 + PIECE * (i - 1), PIECE) };
            let part = self.encoder.forward(&x.narrow(2, start, count)?, &mut memory)?;
            parts.push(self.quant_conv.forward(&part)?);
        }
        Ok(Tensor::cat(&parts.iter().collect::<Vec<_>>(), 2)?)
    }

    /// Patches of pixels of latents, or of a tile of them.
    fn frames(&self, z: &Tensor) -> Result<Tensor> {
        let mut memory = Memory::default();
        let z = self.post_quant_conv.forward(z)?;
        let part = |i: usize| self.decoder.forward(&z.narrow(2, i, 1)?, &mut memory);
        let parts = (0..z.dims()[2]).map(part).collect::<EngineResult<Vec<_>>>()?;
        Ok(Tensor::cat(&parts.iter().collect::<Vec<_>>(), 2)?)
    }
}

impl Autoencoder for AutoencoderKLWan {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> Value {
        self.json.clone()
    }

    fn encode(&self, pixels: &Tensor) -> Result<Posterior> {
        let patch = self.config.patch();
        check_pixels(pixels, 5, self.config.in_channels / (patch * patch), self.ratio())?;
        // The reference compares pixels with tiles, but then cuts patches by their numbers.
        let tiles = self.tiling.map(|tiling| tiling.tiles(self.ratio())).transpose()?;
        let exceeds = tiles.is_some_and(|tiles| tiling::exceeds(pixels, &tiles.pixels));
        let x = if patch > 1 { patches(pixels, patch)? } else { pixels.clone() };
        match self.tiling.filter(|_| exceeds) {
            None => Posterior::of(&self.moments(&x)?),
            Some(tiling) => {
                let ratio = self.ratio() / patch;
                let moments = tiling::run(&x, &tiling.tiles(ratio)?.pixels, |x| self.moments(x))?;
                Posterior::of(&tiling::cut(&moments, [3, 4].map(|axis| x.dims()[axis] / ratio))?)
            }
        }
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let (patch, ratio) = (self.config.patch(), self.ratio());
        let tiles = self.tiling.map(|tiling| tiling.tiles(ratio)).transpose()?;
        // What is made of a tile is patches of pixels.
        let patched = |side: tiling::Tiles| {
            let whole = side.blend + side.keep;
            let keep = side.keep / patch;
            tiling::Tiles { keep, blend: (whole / patch).saturating_sub(keep), ..side }
        };
        let tiles = tiles.map(|tiles| tiles.latents.map(patched));
        let mut x = tiling::tiled(latents, tiles, |z| self.frames(z))?;
        x = tiling::cut(&x, [3, 4].map(|axis| latents.dims()[axis] * ratio / patch))?;
        if patch > 1 {
            x = unpatched(&x, patch)?;
        }
        Ok(pointwise([&x], |[x]| x.maximum(-1.0).minimum(1.0))?)
    }

    fn normalise(&self, latents: &Tensor) -> Result<Tensor> {
        let mean = statistic(latents, &self.config.latents_mean)?;
        let std = statistic(latents, &self.config.latents_std)?;
        Ok(pointwise_to(latents.dtype(), [latents, &mean, &std], |[z, m, s]| (z - m) / s)?)
    }

    fn denormalise(&self, latents: &Tensor) -> Result<Tensor> {
        let mean = statistic(latents, &self.config.latents_mean)?;
        let std = statistic(latents, &self.config.latents_std)?;
        Ok(pointwise_to(latents.dtype(), [latents, &mean, &std], |[z, m, s]| z * s + m)?)
    }

    fn has_frames(&self) -> bool {
        true
    }

    fn latent_dims(&self, pixels: &[usize]) -> Vec<usize> {
        latent_dims(pixels, self.config.z_dim, PIECE, self.ratio())
    }

    fn set_tiling(&mut self, tiling: Option<Tiling>) -> Result<()> {
        tiling.map(|tiling| tiling.tiles(self.ratio())).transpose()?;
        self.tiling = tiling;
        Ok(())
    }
}
