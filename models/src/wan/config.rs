//! The configuration of diffusers' `WanTransformer3DModel`.

use flowtape_engine::Device;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::blocks::{RopePrecision, RopeTables};
use crate::config::{Config, check_layers, check_sizes, product, read, truth};
use crate::{Error, Result};

/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;

/// `config.json`, with diffusers' defaults (those of Wan2.1-T2V-14B).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WanConfig {
    /// Sides of a patch: frames, rows, columns.
    pub patch_size: [usize; 3],
    /// Number of heads.
    pub num_attention_heads: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Channels of the latents (with what they are conditioned on).
    pub in_channels: usize,
    /// Channels of the result; `in_channels` if none.
    pub out_channels: Option<usize>,
    /// Width of the text embeddings.
    pub text_dim: usize,
    /// Channels of the sinusoidal projection of time.
    pub freq_dim: usize,
    /// Inner width of the feed-forward layers; four times the width of the model if none.
    pub ffn_dim: Option<usize>,
    /// Blocks.
    pub num_layers: usize,
    /// Whether cross-attention has a norm of its own.
    #[serde(deserialize_with = "truth")]
    pub cross_attn_norm: bool,
    /// The norm of queries and keys: `rms_norm_across_heads`, whatever is said, as in diffusers.
    pub qk_norm: Option<String>,
    /// Added to variances.
    pub eps: f64,
    /// Width of the image embeddings, where the model takes any.
    pub image_dim: Option<usize>,
    /// Width of what the added keys and values are made of.
    pub added_kv_proj_dim: Option<usize>,
    /// The greatest position on an axis.
    pub rope_max_seq_len: usize,
    /// Length of the image embeddings' learned positions.
    pub pos_embed_seq_len: Option<usize>,
}

impl Default for WanConfig {
    fn default() -> Self {
        Self {
            patch_size: [1, 2, 2],
            num_attention_heads: 40,
            attention_head_dim: 128,
            in_channels: 16,
            out_channels: Some(16),
            text_dim: 4096,
            freq_dim: 256,
            ffn_dim: Some(13824),
            num_layers: 40,
            cross_attn_norm: true,
            qk_norm: Some("rms_norm_across_heads".into()),
            eps: 1e-6,
            image_dim: None,
            added_kv_proj_dim: None,
            rope_max_seq_len: 1024,
            pos_embed_seq_len: None,
        }
    }
}

impl Config for WanConfig {
    const CLASS: &'static str = "WanTransformer3DModel";
    const NULLABLE: &'static [&'static str] = &["eps"];

    fn check(&self) -> Result<()> {
        let patch = product(&self.patch_size);
        if !self.attention_head_dim.is_multiple_of(2) || self.attention_head_dim < 6 {
            let got = self.attention_head_dim;
            return Err(Error::config("attention_head_dim", "an even number of at least 6", got));
        }
        check_sizes([
            ("patch_size", patch),
            ("num_attention_heads times attention_head_dim", self.inner_dim()),
            ("in_channels", product(&[self.in_channels, patch])),
            ("out_channels", product(&[self.out_channels(), patch])),
            ("text_dim", self.text_dim),
            ("freq_dim", self.freq_dim / 2),
            ("ffn_dim", self.ffn_dim()),
            ("image_dim", self.image_dim.unwrap_or(1)),
            ("added_kv_proj_dim", self.added_kv_proj_dim.unwrap_or(1)),
            ("pos_embed_seq_len", self.pos_embed_seq_len.unwrap_or(1)),
        ])?;
        check_layers(0, [("num_layers", self.num_layers)])?;
        Ok(())
    }
}

impl WanConfig {
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

    /// Channels of the result.
    pub fn out_channels(&self) -> usize {
        self.out_channels.filter(|channels| *channels > 0).unwrap_or(self.in_channels)
    }

    /// Inner width of the feed-forward layers.
    pub fn ffn_dim(&self) -> usize {
        self.ffn_dim.unwrap_or(product(&[4, self.inner_dim()]))
    }

    /// Rotary tables of a grid of frames, rows and columns.
    ///
    /// # Errors
    /// When an axis is longer than `rope_max_seq_len`, or memory runs out.
    pub fn rope(&self, grid: &[usize], device: &Device) -> Result<RopeTables> {
        if let Some(long) = grid.iter().find(|n| **n > self.rope_max_seq_len) {
            let expected = format!("at least {long}, the patches along an axis of the latents");
            return Err(Error::config("rope_max_seq_len", expected, self.rope_max_seq_len));
        }
        let side = 2 * (self.attention_head_dim / 6);
        let axes = [self.attention_head_dim - 2 * side, side, side];
        Ok(RopeTables::of_grid(grid, &axes, THETA, RopePrecision::F64, device)?)
    }
}
