//! The configuration of diffusers' `AutoencoderKLLTX2Video`.

use flowtape_engine::ops::Padding;
use serde::{Deserialize, Serialize};

use crate::config::{Config, check_layers, check_sizes, truth};
use crate::{Error, Result};

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
    pub(super) fn get(&self, i: usize) -> bool {
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
    pub(super) fn factors(self) -> [usize; 3] {
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

    pub(super) fn space_ratio(&self) -> usize {
        self.spatial_compression_ratio.unwrap_or(self.patch_size << self.scalings().min(16))
    }

    pub(super) fn time_ratio(&self) -> usize {
        self.temporal_compression_ratio.unwrap_or(1 << self.scalings().min(16))
    }
}
