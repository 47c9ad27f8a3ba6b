//! The configuration of diffusers' `ChromaTransformer2DModel`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{Config, check_layers, check_rope_axes, check_sizes, product, read};
use crate::{Error, Result};

/// `config.json`, with diffusers' defaults (those of Chroma1).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ChromaConfig {
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
    /// Columns of each position axis in the rotary tables; together a head's width.
    pub axes_dims_rope: Vec<usize>,
    /// Channels of what the modulation is made of: a quarter for the time, a quarter for a guidance of 0, half for the row.
    pub approximator_num_channels: usize,
    /// Width of the network that makes it.
    pub approximator_hidden_dim: usize,
    /// Its layers.
    pub approximator_layers: usize,
}

impl Default for ChromaConfig {
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
            axes_dims_rope: vec![16, 56, 56],
            approximator_num_channels: 64,
            approximator_hidden_dim: 5120,
            approximator_layers: 5,
        }
    }
}

impl Config for ChromaConfig {
    const CLASS: &'static str = "ChromaTransformer2DModel";

    fn check(&self) -> Result<()> {
        check_rope_axes::<3>("axes_dims_rope", &self.axes_dims_rope, self.attention_head_dim)?;
        check_sizes([
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("out_channels", product(&[self.patch_size, self.patch_size, self.out_channels()])),
            ("num_attention_heads times attention_head_dim", self.inner_dim()),
            ("joint_attention_dim", self.joint_attention_dim),
            ("approximator_num_channels", self.approximator_num_channels),
            ("approximator_hidden_dim", self.approximator_hidden_dim),
        ])?;
        if !self.approximator_num_channels.is_multiple_of(4) {
            let expected = "a multiple of 4: a quarter is for the time, a quarter for a guidance, half for the row";
            return Err(Error::config("approximator_num_channels", expected, self.approximator_num_channels));
        }
        check_layers(0, [("num_layers", self.num_layers), ("approximator_layers", self.approximator_layers)])?;
        check_layers(1, [("num_single_layers", self.num_single_layers)])
    }
}

impl ChromaConfig {
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

    /// Vectors of the modulation: three for each single block, six for each stream of a double block, two for the last norm.
    pub fn modulation_rows(&self) -> usize {
        3 * self.num_single_layers + 12 * self.num_layers + 2
    }
}
