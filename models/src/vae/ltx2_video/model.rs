//! diffusers' `AutoencoderKLLTX2Video`: the autoencoder of LTX-2's pictures. Its statistics of latents are in the weight file.

use flowtape_engine::nn::{Init, Param, ParamBuilder, Params};
use flowtape_engine::ops::pointwise_to;
use flowtape_engine::{Result as EngineResult, Tensor};
use serde_json::Value;

use super::config::AutoencoderKLLTX2VideoConfig;
use super::network::{Decoder, Encoder};
use crate::Result;
use crate::config::config_json;
use crate::vae::tiling::{self, FrameTiling, Sides, Spare, Tiles, Tiling};
use crate::vae::video::{check_clip, latent_dims};
use crate::vae::{Autoencoder, Posterior};

/// The autoencoder.
#[derive(Debug)]
pub struct AutoencoderKLLTX2Video {
    config: AutoencoderKLLTX2VideoConfig,
    params: Params,
    encoder: Encoder,
    decoder: Decoder,
    latents_mean: Param,
    latents_std: Param,
    tiles: Option<Sides>,
    /// Of frames and of latents.
    parts: Option<[Tiles; 2]>,
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
            tiles: None,
            parts: None,
        })
    }

    /// Moments of a clip, or of a part of it.
    fn moments(&self, x: &Tensor) -> Result<Tensor> {
        let ratio = self.config.space_ratio();
        let moments = tiling::tiled(x, self.tiles.map(|tiles| tiles.pixels), |x| Ok(self.encoder.forward(x)?))?;
        tiling::cut(&moments, [3, 4].map(|axis| x.dims()[axis] / ratio))
    }

    /// Pixels of latents, or of a part of them.
    fn frames(&self, z: &Tensor) -> Result<Tensor> {
        let ratio = self.config.space_ratio();
        let x = tiling::tiled(z, self.tiles.map(|tiles| tiles.latents), |z| Ok(self.decoder.forward(z)?))?;
        tiling::cut(&x, [3, 4].map(|axis| z.dims()[axis] * ratio))
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
        check_clip(pixels, self.config.in_channels, time, ratio)?;
        Posterior::of(&match self.parts.map(|[parts, _]| parts).filter(|parts| pixels.dims()[2] > parts.size) {
            Some(parts) => tiling::run_frames(pixels, &parts, Spare::First, |x| self.moments(x))?,
            None => self.moments(pixels)?,
        })
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let parts = self.parts.map(|[_, parts]| parts);
        match parts.filter(|parts| latents.dims().get(2).is_some_and(|n| *n > parts.size)) {
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
        latent_dims(pixels, self.config.latent_channels, time, ratio)
    }

    fn set_tiling(&mut self, tiling: Option<Tiling>) -> Result<()> {
        self.tiles = tiling.map(|tiling| tiling.tiles(self.config.space_ratio())).transpose()?;
        Ok(())
    }

    fn set_frame_tiling(&mut self, tiling: Option<FrameTiling>) -> Result<()> {
        self.parts = tiling.map(|tiling| tiling.tiles(self.config.time_ratio())).transpose()?;
        Ok(())
    }
}
