//! The configuration of diffusers' `Flux3Transformer2DModel`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{Config, check_layers, check_rope_axes, check_sizes, product, read, truth, whole};
use crate::{Error, Result};

/// Columns of a position: time, row, column, place in the text or number of the reference.
pub(super) const AXES: usize = 4;

/// `config.json`, with diffusers' defaults, which are those of FLUX.3 klein base.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Flux3Config {
    /// Channels of a token, and of the result.
    pub in_channels: usize,
    /// Channels of a token of a reference.
    pub cond_in_channels: usize,
    /// Blocks of each mode by itself.
    pub num_layers: usize,
    /// Blocks of all modes together.
    pub num_single_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Number of heads.
    pub num_attention_heads: usize,
    /// Width of the text embeddings.
    pub joint_attention_dim: usize,
    /// Channels of the sinusoidal projection of the time.
    pub timestep_channels: usize,
    /// Inner width of the feed-forward layers, in widths of the model.
    pub mlp_ratio: f64,
    /// Columns of each of the four position axes in the rotary tables; together a head's width.
    pub axes_dims_rope: Vec<usize>,
    /// Base of the rotary frequencies.
    #[serde(deserialize_with = "whole")]
    pub rope_theta: usize,
    /// Added to the variance in every normalisation.
    pub eps: f64,
    /// Whether the model is told a second time, that up to which it steps: the distilled one.
    #[serde(deserialize_with = "truth")]
    pub flow_map: bool,
}

impl Default for Flux3Config {
    fn default() -> Self {
        Self {
            in_channels: 128,
            cond_in_channels: 128,
            num_layers: 5,
            num_single_layers: 28,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 20480,
            timestep_channels: 256,
            mlp_ratio: 3.0,
            axes_dims_rope: vec![32; AXES],
            rope_theta: 10_000,
            eps: 1e-6,
            flow_map: false,
        }
    }
}

impl Config for Flux3Config {
    const CLASS: &'static str = "Flux3Transformer2DModel";
    const NULLABLE: &'static [&'static str] = &["eps", "rope_theta"];

    fn check(&self) -> Result<()> {
        check_rope_axes::<AXES>("axes_dims_rope", &self.axes_dims_rope, self.attention_head_dim)?;
        check_sizes([
            ("in_channels", self.in_channels),
            ("cond_in_channels", self.cond_in_channels),
            ("num_attention_heads times attention_head_dim", self.inner_dim()),
            ("joint_attention_dim", self.joint_attention_dim),
            ("timestep_channels", self.timestep_channels),
            ("mlp_ratio times the width of the model", self.mlp_dim()),
        ])?;
        if self.rope_theta == 0 {
            return Err(Error::config("rope_theta", "at least 1", 0));
        }
        check_layers(0, [("num_layers", self.num_layers)])?;
        check_layers(1, [("num_single_layers", self.num_single_layers)])
    }
}

impl Flux3Config {
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

    /// Inner width of the feed-forward layers, rounded down as in the reference.
    pub fn mlp_dim(&self) -> usize {
        (self.inner_dim() as f64 * self.mlp_ratio) as usize
    }
}
