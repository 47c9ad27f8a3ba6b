//! The configuration of diffusers' `Flux2Transformer2DModel`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Result;
use crate::config::{Config, check_layers, check_rope_axes, check_sizes, product, read, truth, whole};

/// Columns of a position: time, row, column, place in the text.
pub(super) const AXES: usize = 4;

/// `config.json`, with diffusers' defaults, which are those of FLUX.2-dev.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Flux2Config {
    /// Side of a patch; latents come patched already, so 1.
    pub patch_size: usize,
    /// Channels of a token.
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
    /// Channels of the sinusoidal projections of time and guidance.
    pub timestep_guidance_channels: usize,
    /// Inner width of the feed-forward layers, in widths of the model.
    pub mlp_ratio: f64,
    /// Columns of each of the four position axes in the rotary tables; together a head's width.
    pub axes_dims_rope: Vec<usize>,
    /// Base of the rotary frequencies.
    #[serde(deserialize_with = "whole")]
    pub rope_theta: usize,
    /// Added to the variance in every normalisation.
    pub eps: f64,
    /// Whether a guidance scale is embedded.
    #[serde(deserialize_with = "truth")]
    pub guidance_embeds: bool,
}

impl Default for Flux2Config {
    fn default() -> Self {
        Self {
            patch_size: 1,
            in_channels: 128,
            out_channels: None,
            num_layers: 8,
            num_single_layers: 48,
            attention_head_dim: 128,
            num_attention_heads: 48,
            joint_attention_dim: 15360,
            timestep_guidance_channels: 256,
            mlp_ratio: 3.0,
            axes_dims_rope: vec![32; AXES],
            rope_theta: 2000,
            eps: 1e-6,
            guidance_embeds: true,
        }
    }
}

impl Config for Flux2Config {
    const CLASS: &'static str = "Flux2Transformer2DModel";
    const NULLABLE: &'static [&'static str] = &["eps", "rope_theta"];

    fn check(&self) -> Result<()> {
        check_rope_axes::<AXES>("axes_dims_rope", &self.axes_dims_rope, self.attention_head_dim)?;
        check_sizes([
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("out_channels", product(&[self.patch_size, self.patch_size, self.out_channels()])),
            ("num_attention_heads times attention_head_dim", self.inner_dim()),
            ("joint_attention_dim", self.joint_attention_dim),
            ("timestep_guidance_channels", self.timestep_guidance_channels),
            ("mlp_ratio times the width of the model", self.mlp_dim()),
        ])?;
        check_layers(0, [("num_layers", self.num_layers), ("num_single_layers", self.num_single_layers)])?;
        Ok(())
    }
}

impl Flux2Config {
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

    /// Inner width of the feed-forward layers, rounded down as in the reference.
    pub fn mlp_dim(&self) -> usize {
        (self.inner_dim() as f64 * self.mlp_ratio) as usize
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_configuration_comes_back_and_a_wrong_one_is_named() {
        let dev = Flux2Config::default();
        assert_eq!((dev.inner_dim(), dev.mlp_dim()), (6144, 18432));
        assert_eq!(Flux2Config::from_json(&json!(dev)).unwrap(), dev);
        // Rounded down, as Python's `int` does.
        let odd = json!({"attention_head_dim": 8, "num_attention_heads": 1, "axes_dims_rope": [2, 2, 2, 2], "mlp_ratio": 2.9});
        assert_eq!(Flux2Config::from_json(&odd).unwrap().mlp_dim(), 23);
        for (value, key) in [
            (json!({"axes_dims_rope": [32, 32, 64]}), "axes_dims_rope"),
            (json!({"axes_dims_rope": [31, 33, 32, 32]}), "axes_dims_rope"),
            (json!({"mlp_ratio": 0.0}), "mlp_ratio"),
            (json!({"in_channels": 0}), "in_channels"),
            (json!({"guidance_embed": true}), "guidance_embeds"),
        ] {
            let error = Flux2Config::from_json(&value).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
