//! The configuration of diffusers' `ZImageTransformer2DModel`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{Config, check_heads, check_layers, check_rope_axes, check_sizes, product, read, truth};
use crate::{Error, Result};

/// Columns of a position: place in the text or frame, row, column.
pub(super) const AXES: usize = 3;
/// Rows and columns, and frames, of the patches that the model is called with.
pub(super) const PATCH: (usize, usize) = (2, 1);
/// The greatest width of the embedding of the time.
const TIME_DIM: usize = 256;

/// `config.json`, with diffusers' defaults, which are those of Z-Image but for `axes_lens`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ZImageConfig {
    /// Rows and columns of a patch, for each kind of patch; images are cut into those of 2.
    pub all_patch_size: Vec<usize>,
    /// Frames of a patch, for each kind.
    pub all_f_patch_size: Vec<usize>,
    /// Channels of the latents, and of the result.
    pub in_channels: usize,
    /// Width of the model.
    pub dim: usize,
    /// Blocks over image and caption together.
    pub n_layers: usize,
    /// Blocks over each of them before.
    pub n_refiner_layers: usize,
    /// Number of heads.
    pub n_heads: usize,
    /// Without effect, as in diffusers: keys and values have as many heads as queries.
    pub n_kv_heads: usize,
    /// Added to the mean square in the norms of the blocks and of the caption.
    pub norm_eps: f64,
    /// Whether queries and keys are normalised.
    #[serde(deserialize_with = "truth")]
    pub qk_norm: bool,
    /// Width of the text embeddings.
    pub cap_feat_dim: usize,
    /// Width of embeddings of reference images in the "omni" models, which are not supported.
    pub siglip_feat_dim: Option<usize>,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Factor of the time, which is 0 to 1.
    pub t_scale: f64,
    /// Columns of each position axis in the rotary tables; together a head's width.
    pub axes_dims: Vec<usize>,
    /// The number of positions on each axis.
    pub axes_lens: Vec<usize>,
}

impl Default for ZImageConfig {
    fn default() -> Self {
        Self {
            all_patch_size: vec![PATCH.0],
            all_f_patch_size: vec![PATCH.1],
            in_channels: 16,
            dim: 3840,
            n_layers: 30,
            n_refiner_layers: 2,
            n_heads: 30,
            n_kv_heads: 30,
            norm_eps: 1e-5,
            qk_norm: true,
            cap_feat_dim: 2560,
            siglip_feat_dim: None,
            rope_theta: 256.0,
            t_scale: 1000.0,
            axes_dims: vec![32, 48, 48],
            axes_lens: vec![1024, 512, 512],
        }
    }
}

impl Config for ZImageConfig {
    const CLASS: &'static str = "ZImageTransformer2DModel";

    fn check(&self) -> Result<()> {
        if self.siglip_feat_dim.is_some() {
            let expected = "null: the models that take reference images (Z-Image-Omni) are not supported";
            return Err(Error::config("siglip_feat_dim", expected, "a width"));
        }
        check_sizes([
            ("in_channels", self.in_channels),
            ("dim", self.dim),
            ("cap_feat_dim", self.cap_feat_dim),
            ("n_kv_heads", self.n_kv_heads),
        ])?;
        if self.all_patch_size.len() != self.all_f_patch_size.len() {
            let expected = format!("as many as all_patch_size has, {}", self.all_patch_size.len());
            return Err(Error::config("all_f_patch_size", expected, self.all_f_patch_size.len()));
        }
        if self.patches().filter(|patch| *patch == PATCH).count() != 1 {
            let expected = "once 2, with 1 in all_f_patch_size at its place";
            return Err(Error::config("all_patch_size", expected, &self.all_patch_size));
        }
        for (side, frames) in self.patches() {
            check_sizes([("all_patch_size", product(&[side, side, frames, self.in_channels]))])?;
        }
        check_heads(("dim", self.dim), ("n_heads", self.n_heads))?;
        check_rope_axes::<AXES>("axes_dims", &self.axes_dims, self.dim / self.n_heads)?;
        if self.axes_lens.len() != AXES {
            return Err(Error::config("axes_lens", format!("{AXES} numbers"), &self.axes_lens));
        }
        check_layers(1, [("n_layers", self.n_layers)])?;
        check_layers(0, [("n_refiner_layers", self.n_refiner_layers)])
    }
}

impl ZImageConfig {
    /// Reads and checks the object of `config.json`.
    ///
    /// # Errors
    /// When a key is unknown or a value does not fit.
    pub fn from_json(value: &Value) -> Result<Self> {
        read(value)
    }

    /// The kinds of patches: rows and columns, and frames.
    pub(super) fn patches(&self) -> impl Iterator<Item = (usize, usize)> {
        self.all_patch_size.iter().copied().zip(self.all_f_patch_size.iter().copied())
    }

    /// Inner width of the feed-forward layers, rounded down as in the reference.
    pub fn mlp_dim(&self) -> usize {
        (self.dim as f64 / 3.0 * 8.0) as usize
    }

    /// Width of the embedding of the time.
    pub fn time_dim(&self) -> usize {
        self.dim.min(TIME_DIM)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_configuration_comes_back_and_a_wrong_one_is_named() {
        let base = ZImageConfig::default();
        assert_eq!((base.mlp_dim(), base.time_dim()), (10240, 256));
        assert_eq!(ZImageConfig::from_json(&json!(base)).unwrap(), base);
        for (value, key) in [
            (json!({"siglip_feat_dim": 1152}), "siglip_feat_dim"),
            (json!({"all_patch_size": [4]}), "all_patch_size"),
            (json!({"all_patch_size": [2, 4]}), "all_f_patch_size"),
            (json!({"all_patch_size": [2, 0], "all_f_patch_size": [1, 1]}), "all_patch_size"),
            (json!({"n_heads": 7}), "n_heads"),
            (json!({"axes_dims": [32, 32, 32]}), "axes_dims"),
            (json!({"axes_lens": [32, 32]}), "axes_lens"),
            (json!({"n_kv_head": 2}), "n_kv_heads"),
        ] {
            let error = ZImageConfig::from_json(&value).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
