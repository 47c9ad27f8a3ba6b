//! The configuration of diffusers' `Krea2Transformer2DModel`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{Config, check_heads, check_layers, check_rope_axes, check_sizes, product, read};
use crate::{Error, Result};

/// `config.json`, with diffusers' defaults (those of Krea 2 Raw and Turbo).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Krea2Config {
    /// Channels of a packed token, and of the result.
    pub in_channels: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Number of heads.
    pub num_attention_heads: usize,
    /// Heads of keys and values, each of which several heads of queries share.
    pub num_key_value_heads: usize,
    /// Inner width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Channels of the sinusoidal projection of the time.
    pub timestep_embed_dim: usize,
    /// Width of the text model's states.
    pub text_hidden_dim: usize,
    /// How many of its layers each token has the states of.
    pub num_text_layers: usize,
    /// Heads in the blocks of the text.
    pub text_num_attention_heads: usize,
    /// Heads of keys and values there.
    pub text_num_key_value_heads: usize,
    /// Inner width of the feed-forward layers there.
    pub text_intermediate_size: usize,
    /// Blocks in which the layers of a token attend to each other.
    pub num_layerwise_text_blocks: usize,
    /// Blocks in which the text's tokens do.
    pub num_refiner_text_blocks: usize,
    /// Columns of each position axis in the rotary tables; together a head's width.
    pub axes_dims_rope: Vec<usize>,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Added to the mean square in every normalisation.
    pub norm_eps: f64,
}

impl Default for Krea2Config {
    fn default() -> Self {
        Self {
            in_channels: 64,
            num_layers: 28,
            attention_head_dim: 128,
            num_attention_heads: 48,
            num_key_value_heads: 12,
            intermediate_size: 16384,
            timestep_embed_dim: 256,
            text_hidden_dim: 2560,
            num_text_layers: 12,
            text_num_attention_heads: 20,
            text_num_key_value_heads: 20,
            text_intermediate_size: 6912,
            num_layerwise_text_blocks: 2,
            num_refiner_text_blocks: 2,
            axes_dims_rope: vec![32, 48, 48],
            rope_theta: 1000.0,
            norm_eps: 1e-5,
        }
    }
}

impl Config for Krea2Config {
    const CLASS: &'static str = "Krea2Transformer2DModel";

    fn check(&self) -> Result<()> {
        check_rope_axes::<3>("axes_dims_rope", &self.axes_dims_rope, self.attention_head_dim)?;
        check_sizes([
            ("in_channels", self.in_channels),
            ("num_attention_heads times attention_head_dim", self.inner_dim()),
            ("intermediate_size", self.intermediate_size),
            ("timestep_embed_dim", self.timestep_embed_dim),
            ("num_text_layers times text_hidden_dim", product(&[self.num_text_layers, self.text_hidden_dim])),
            ("text_intermediate_size", self.text_intermediate_size),
        ])?;
        if !self.timestep_embed_dim.is_multiple_of(2) {
            return Err(Error::config("timestep_embed_dim", "an even number", self.timestep_embed_dim));
        }
        let heads = (self.num_attention_heads, self.text_num_attention_heads);
        check_heads(("num_attention_heads", heads.0), ("num_key_value_heads", self.num_key_value_heads))?;
        check_heads(("text_hidden_dim", self.text_hidden_dim), ("text_num_attention_heads", heads.1))?;
        check_heads(
            ("text_num_attention_heads", heads.1),
            ("text_num_key_value_heads", self.text_num_key_value_heads),
        )?;
        check_layers(0, [("num_layerwise_text_blocks", self.num_layerwise_text_blocks)])?;
        check_layers(0, [("num_refiner_text_blocks", self.num_refiner_text_blocks)])?;
        check_layers(1, [("num_layers", self.num_layers)])
    }
}

impl Krea2Config {
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
}
