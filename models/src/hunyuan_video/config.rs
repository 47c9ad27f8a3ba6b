//! The configuration of diffusers' `HunyuanVideo15Transformer3DModel`.

use flowtape_engine::Device;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::blocks::{QkNorm, QkvConfig, RopePrecision, RopeTables, grid_positions};
use crate::config::{Config, check_layers, check_rope_axes, check_sizes, product, read, truth, whole};
use crate::{Error, Result};

/// Width inside the projection of the second text, in diffusers.
const BYT5_HIDDEN_DIM: usize = 2048;

/// `config.json`, with diffusers' defaults (those of HunyuanVideo-1.5).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HunyuanVideo15Config {
    /// Channels of the input: noisy latents, and condition latents with one channel more.
    pub in_channels: usize,
    /// Channels of the result; `in_channels` if none.
    pub out_channels: Option<usize>,
    /// Number of heads.
    pub num_attention_heads: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Double-stream blocks.
    pub num_layers: usize,
    /// Blocks that refine the text.
    pub num_refiner_layers: usize,
    /// Width inside the blocks' feed-forward layers, over the width of the model.
    pub mlp_ratio: f64,
    /// Side of a patch.
    pub patch_size: usize,
    /// Frames of a patch.
    pub patch_size_t: usize,
    /// Normalisation of the blocks' queries and keys: `rms_norm` or none.
    pub qk_norm: Option<String>,
    /// Width of the text embeddings.
    pub text_embed_dim: usize,
    /// Width of the second text embeddings (byT5).
    pub text_embed_2_dim: usize,
    /// Width inside the projection of the second text. diffusers fixes it at 2048 and has no key for it, so no file states
    /// it: another one is read off the weights.
    #[serde(skip)]
    pub byt5_hidden_dim: usize,
    /// Width of the image embeddings.
    pub image_embed_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Columns of the axes frame, row and column in the rotary tables; together a head's width.
    pub rope_axes_dim: Vec<usize>,
    /// Pixels of a side that the checkpoint is for; not used.
    #[serde(deserialize_with = "whole")]
    pub target_size: usize,
    /// What the checkpoint is for, `t2v` or `i2v`; not used.
    pub task_type: String,
    /// Whether a second time is embedded (MeanFlow).
    #[serde(deserialize_with = "truth")]
    pub use_meanflow: bool,
}

impl Default for HunyuanVideo15Config {
    fn default() -> Self {
        Self {
            in_channels: 65,
            out_channels: Some(32),
            num_attention_heads: 16,
            attention_head_dim: 128,
            num_layers: 54,
            num_refiner_layers: 2,
            mlp_ratio: 4.0,
            patch_size: 1,
            patch_size_t: 1,
            qk_norm: Some("rms_norm".into()),
            text_embed_dim: 3584,
            text_embed_2_dim: 1472,
            byt5_hidden_dim: BYT5_HIDDEN_DIM,
            image_embed_dim: 1152,
            rope_theta: 256.0,
            rope_axes_dim: vec![16, 56, 56],
            target_size: 640,
            task_type: "i2v".into(),
            use_meanflow: false,
        }
    }
}

impl Config for HunyuanVideo15Config {
    const CLASS: &'static str = "HunyuanVideo15Transformer3DModel";
    const NULLABLE: &'static [&'static str] = &["rope_theta", "target_size", "task_type"];

    fn check(&self) -> Result<()> {
        check_rope_axes::<3>("rope_axes_dim", &self.rope_axes_dim, self.attention_head_dim)?;
        if self.qk_norm.as_ref().is_some_and(|norm| norm != "rms_norm") {
            return Err(Error::config("qk_norm", "rms_norm or null", &self.qk_norm));
        }
        let patch = product(&self.patch());
        check_sizes([
            ("patch_size", self.patch_size),
            ("patch_size_t", self.patch_size_t),
            ("in_channels", product(&[self.in_channels, patch])),
            ("out_channels", product(&[self.out_channels(), patch])),
            ("num_attention_heads times attention_head_dim", self.inner_dim()),
            ("text_embed_dim", self.text_embed_dim),
            ("text_embed_2_dim", self.text_embed_2_dim),
            ("byt5_hidden_dim", self.byt5_hidden_dim),
            ("image_embed_dim", self.image_embed_dim),
            ("mlp_ratio times the width of the model", self.mlp_dim()),
        ])?;
        check_layers(1, [("num_layers", self.num_layers)])?;
        check_layers(0, [("num_refiner_layers", self.num_refiner_layers)])?;
        Ok(())
    }
}

impl HunyuanVideo15Config {
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

    /// Attention of the blocks.
    pub(super) fn qkv(&self) -> QkvConfig {
        let joint = QkvConfig::joint(self.inner_dim(), self.num_attention_heads);
        if self.qk_norm.is_some() { joint } else { QkvConfig { norm: QkNorm::None, ..joint } }
    }

    /// Width of the model.
    pub fn inner_dim(&self) -> usize {
        product(&[self.num_attention_heads, self.attention_head_dim])
    }

    /// Width inside the feed-forward layers.
    pub fn mlp_dim(&self) -> usize {
        (self.inner_dim() as f64 * self.mlp_ratio) as usize
    }

    /// Frames, rows and columns of a patch.
    pub fn patch(&self) -> [usize; 3] {
        [self.patch_size_t, self.patch_size, self.patch_size]
    }

    /// Rotary tables of a context, which has no positions, and then a grid of patches: frames, rows and columns.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn rope(&self, context: usize, grid: [usize; 3], device: &Device) -> Result<RopeTables> {
        // At position 0 nothing is rotated.
        let positions = [vec![0.0; context * grid.len()], grid_positions(&grid)].concat();
        Ok(RopeTables::new(&positions, &self.rope_axes_dim, self.rope_theta, RopePrecision::F32, device)?)
    }
}
