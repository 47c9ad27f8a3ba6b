//! The configuration of diffusers' `Lumina2Transformer2DModel`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{Config, check_heads, check_layers, check_rope_axes, check_sizes, product, read};
use crate::{Error, Result};

/// Position axes: place in the text, row, column.
pub(super) const AXES: usize = 3;
/// The widest embedding of the time.
const TIME_DIM: usize = 1024;

/// `config.json`, with diffusers' defaults.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lumina2Config {
    /// Not used, as in diffusers.
    pub sample_size: usize,
    /// Side of a patch.
    pub patch_size: usize,
    /// Channels of the latents.
    pub in_channels: usize,
    /// Channels of the result; `in_channels` if none.
    pub out_channels: Option<usize>,
    /// Width of the model.
    pub hidden_size: usize,
    /// Blocks of the joint sequence.
    pub num_layers: usize,
    /// Blocks of the text and of the latents before it.
    pub num_refiner_layers: usize,
    /// Number of heads.
    pub num_attention_heads: usize,
    /// Heads of keys and values, each of which several heads of queries share; as many as there are heads if none.
    pub num_kv_heads: Option<usize>,
    /// What the inner width of the feed-forward layers is a multiple of.
    pub multiple_of: usize,
    /// Factor of that width, before it is rounded up.
    pub ffn_dim_multiplier: Option<f64>,
    /// Added to the mean square in the blocks' norms.
    pub norm_eps: f64,
    /// Not used, as in diffusers.
    pub scaling_factor: f64,
    /// Columns of each position axis in the rotary tables; together a head's width.
    pub axes_dim_rope: Vec<usize>,
    /// How many positions each axis has.
    pub axes_lens: Vec<usize>,
    /// Width of the text embeddings.
    pub cap_feat_dim: usize,
}

impl Default for Lumina2Config {
    fn default() -> Self {
        Self {
            sample_size: 128,
            patch_size: 2,
            in_channels: 16,
            out_channels: None,
            hidden_size: 2304,
            num_layers: 26,
            num_refiner_layers: 2,
            num_attention_heads: 24,
            num_kv_heads: Some(8),
            multiple_of: 256,
            ffn_dim_multiplier: None,
            norm_eps: 1e-5,
            scaling_factor: 1.0,
            axes_dim_rope: vec![32; AXES],
            axes_lens: vec![300, 512, 512],
            cap_feat_dim: 1024,
        }
    }
}

impl Config for Lumina2Config {
    const CLASS: &'static str = "Lumina2Transformer2DModel";

    fn check(&self) -> Result<()> {
        check_heads(("hidden_size", self.hidden_size), ("num_attention_heads", self.num_attention_heads))?;
        check_heads(("num_attention_heads", self.num_attention_heads), ("num_kv_heads", self.kv_heads()))?;
        check_rope_axes::<AXES>("axes_dim_rope", &self.axes_dim_rope, self.hidden_size / self.num_attention_heads)?;
        check_sizes([
            ("sample_size", self.sample_size),
            ("patch_size", self.patch_size),
            ("in_channels", product(&[self.patch_size, self.patch_size, self.in_channels])),
            ("out_channels", product(&[self.patch_size, self.patch_size, self.out_channels()])),
            ("hidden_size", self.hidden_size),
            ("multiple_of", self.multiple_of),
            ("ffn_dim_multiplier times 4 times hidden_size", self.mlp_dim()),
            ("cap_feat_dim", self.cap_feat_dim),
        ])?;
        if self.axes_lens.len() != AXES {
            return Err(Error::config("axes_lens", format!("{AXES} numbers"), &self.axes_lens));
        }
        check_layers(0, [("num_refiner_layers", self.num_refiner_layers)])?;
        check_layers(1, [("num_layers", self.num_layers)])
    }
}

impl Lumina2Config {
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

    /// Heads of keys and values.
    pub fn kv_heads(&self) -> usize {
        self.num_kv_heads.unwrap_or(self.num_attention_heads)
    }

    /// Inner width of the feed-forward layers: rounded down, and then up, as in the reference.
    pub fn mlp_dim(&self) -> usize {
        let wanted = product(&[4, self.hidden_size]);
        let wanted = self.ffn_dim_multiplier.map_or(wanted, |factor| (factor * wanted as f64) as usize);
        wanted.checked_next_multiple_of(self.multiple_of).unwrap_or(usize::MAX)
    }

    /// Width of the embedding of the time.
    pub fn time_dim(&self) -> usize {
        self.hidden_size.min(TIME_DIM)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_configuration_comes_back_and_a_wrong_one_is_named() {
        let base = Lumina2Config::default();
        assert_eq!((base.mlp_dim(), base.time_dim(), base.kv_heads()), (9216, 1024, 8));
        assert_eq!(Lumina2Config::from_json(&json!(base)).unwrap(), base);
        let wide = json!({"ffn_dim_multiplier": 1.01, "num_kv_heads": null});
        let wide = Lumina2Config::from_json(&wide).unwrap();
        assert_eq!((wide.mlp_dim(), wide.kv_heads()), (9472, 24));
        for (value, key) in [
            (json!({"num_kv_heads": 5}), "num_kv_heads"),
            (json!({"axes_dim_rope": [32, 32, 30]}), "axes_dim_rope"),
            (json!({"axes_lens": [300, 512]}), "axes_lens"),
            (json!({"multiple_of": 0}), "multiple_of"),
            (json!({"ffn_dim_multiplier": 1e9}), "ffn_dim_multiplier"),
        ] {
            let error = Lumina2Config::from_json(&value).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
