//! The configuration of diffusers' `FluxTransformer2DModel`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Result;
use crate::config::{check_rope_axes, check_sizes, parse_config};

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

impl FluxConfig {
    /// Reads and checks the object of `config.json`.
    ///
    /// # Errors
    /// When a key is unknown or a value does not fit.
    pub fn from_json(value: &Value) -> Result<Self> {
        let config: Self = parse_config(value)?;
        check_rope_axes::<3>("axes_dims_rope", &config.axes_dims_rope, config.attention_head_dim)?;
        check_sizes([
            ("patch_size", config.patch_size),
            ("in_channels", config.in_channels),
            ("attention_head_dim", config.attention_head_dim),
            ("num_attention_heads", config.num_attention_heads),
            ("joint_attention_dim", config.joint_attention_dim),
            ("pooled_projection_dim", config.pooled_projection_dim),
        ])?;
        Ok(config)
    }

    /// Width of the model.
    pub fn inner_dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }
}
