//! The configuration of diffusers' `QwenImage21Transformer2DModel`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{Config, check_layers, check_rope_axes, check_sizes, product, read, truth, whole};
use crate::{Error, Result};

/// `config.json`, with diffusers' defaults (those of Qwen-Image-2.1).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QwenImage21Config {
    /// Side of a patch; a token is one latent, so 1.
    pub patch_size: usize,
    /// Channels of a token.
    pub in_channels: usize,
    /// Channels of the result.
    pub out_channels: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Number of heads.
    pub num_attention_heads: usize,
    /// Width of the text embeddings.
    pub context_in_dim: usize,
    /// Inner width of the feed-forward layers, in widths of the model.
    #[serde(deserialize_with = "whole")]
    pub mlp_ratio: usize,
    /// Columns of each position axis in the rotary tables; together a head's width.
    pub axes_dims_rope: Vec<usize>,
    /// Added to the variance in every normalisation.
    pub eps: f64,
    /// Whether text and images to edit see what stands before them alone.
    #[serde(deserialize_with = "truth")]
    pub causal_condition: bool,
}

impl Default for QwenImage21Config {
    fn default() -> Self {
        Self {
            patch_size: 1,
            in_channels: 64,
            out_channels: 64,
            num_layers: 32,
            attention_head_dim: 128,
            num_attention_heads: 32,
            context_in_dim: 4096,
            mlp_ratio: 3,
            axes_dims_rope: vec![16, 56, 56],
            eps: 1e-6,
            causal_condition: true,
        }
    }
}

impl Config for QwenImage21Config {
    const CLASS: &'static str = "QwenImage21Transformer2DModel";

    fn check(&self) -> Result<()> {
        check_rope_axes::<3>("axes_dims_rope", &self.axes_dims_rope, self.attention_head_dim)?;
        check_sizes([
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("num_attention_heads times attention_head_dim", self.inner_dim()),
            ("context_in_dim", self.context_in_dim),
            ("mlp_ratio times the width of the model", self.mlp_dim()),
        ])?;
        if self.patch_size != 1 {
            return Err(Error::config("patch_size", "1: a token is one latent", self.patch_size));
        }
        if !self.causal_condition {
            return Err(Error::config("causal_condition", "true, as in the published model", false));
        }
        check_layers(1, [("num_layers", self.num_layers)])
    }
}

impl QwenImage21Config {
    /// Reads and checks the object of `config.json`.
    ///
    /// # Errors
    /// When a key is unknown or a value does not fit.
    pub fn from_json(value: &Value) -> Result<Self> {
        read(value)
    }

    /// Width of the model.
    pub fn inner_dim(&self) -> usize {
        product(&[self.num_attention_heads, self.attention_head_dim])
    }

    /// Inner width of the feed-forward layers.
    pub fn mlp_dim(&self) -> usize {
        product(&[self.mlp_ratio, self.inner_dim()])
    }
}
