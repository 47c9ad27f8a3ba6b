//! The configuration of diffusers' `FluxTransformer2DModel`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Result;
use crate::config::{Config, check_layers, check_rope_axes, check_sizes, product, read, truth};

/// `config.json`, with diffusers' defaults (those of FLUX.1-schnell).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FluxConfig {
    /// Side of a patch; the model takes packed latents, so 1.
    pub patch_size: usize,
    /// Channels of a packed token.
    pub in_channels: usize,
    /// Channels of the result; `in_channels` if none.
    pub out_channels: Option<usize>,
    /// Double-stream blocks.
    pub num_layers: usize,
    /// Single-stream blocks.
    pub num_single_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Number of heads.
    pub num_attention_heads: usize,
    /// Width of the text embeddings.
    pub joint_attention_dim: usize,
    /// Width of the pooled text embedding.
    pub pooled_projection_dim: usize,
    /// Whether a guidance scale is embedded.
    #[serde(deserialize_with = "truth")]
    pub guidance_embeds: bool,
    /// Columns of each position axis in the rotary tables; together a head's width.
    pub axes_dims_rope: Vec<usize>,
}

impl Default for FluxConfig {
    fn default() -> Self {
        Self {
            patch_size: 1,
            in_channels: 64,
            out_channels: None,
            num_layers: 19,
            num_single_layers: 38,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: false,
            axes_dims_rope: vec![16, 56, 56],
        }
    }
}

impl Config for FluxConfig {
    const CLASS: &'static str = "FluxTransformer2DModel";

    fn check(&self) -> Result<()> {
        check_rope_axes::<3>("axes_dims_rope", &self.axes_dims_rope, self.attention_head_dim)?;
        check_sizes([
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("out_channels", product(&[self.patch_size, self.patch_size, self.out_channels()])),
            ("num_attention_heads times attention_head_dim", self.inner_dim()),
            ("joint_attention_dim", self.joint_attention_dim),
            ("pooled_projection_dim", self.pooled_projection_dim),
        ])?;
        check_layers(0, [("num_layers", self.num_layers), ("num_single_layers", self.num_single_layers)])?;
        Ok(())
    }
}

impl FluxConfig {
    /// Reads and checks the object of `config.json`.
    ///
    /// # Errors
    /// When a key is unknown or a value does not fit.
    pub fn from_json(value: &Value) -> Result<Self> {
        read(value)
    }

    /// Channels of the result.
    pub fn out_channels(&self) -> usize {
        self.out_channels.filter(|channels| *channels > 0).unwrap_or(self.in_channels)
    }

    /// Width of the model.
    pub fn inner_dim(&self) -> usize {
        product(&[self.num_attention_heads, self.attention_head_dim])
    }
}
