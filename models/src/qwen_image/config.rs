//! The configuration of diffusers' `QwenImageTransformer2DModel`.

use flowtape_engine::Device;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::PATCH;
use crate::Result;
use crate::blocks::{RopePrecision, RopeTables};
use crate::config::{Config, check_layers, check_rope_axes, check_sizes, product, read, truth};
use crate::requirements::{Fixed, Requirements, check_prediction, packed_channels};

/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;

/// `config.json`, with diffusers' defaults (those of Qwen-Image).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QwenImageConfig {
    /// Side of a patch of the result.
    pub patch_size: usize,
    /// Channels of a packed token.
    pub in_channels: usize,
    /// Channels of the result's latents; `in_channels` if none.
    pub out_channels: Option<usize>,
    /// Double-stream blocks.
    pub num_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Number of heads.
    pub num_attention_heads: usize,
    /// Width of the text embeddings.
    pub joint_attention_dim: usize,
    /// Not used, as in diffusers: no guidance is embedded.
    #[serde(deserialize_with = "truth")]
    pub guidance_embeds: bool,
    /// Columns of the axes frame, row and column in the rotary tables; together a head's width.
    pub axes_dims_rope: Vec<usize>,
    /// Whether the tokens of reference images are modulated by time zero (Qwen-Image-Edit-2511).
    #[serde(deserialize_with = "truth")]
    pub zero_cond_t: bool,
    /// Whether a flag is embedded beside the time (Qwen-Image-Layered).
    #[serde(deserialize_with = "truth")]
    pub use_additional_t_cond: bool,
    /// Whether the last image is the one that conditions the others, at frame -1 (Qwen-Image-Layered).
    #[serde(deserialize_with = "truth")]
    pub use_layer3d_rope: bool,
}

impl Default for QwenImageConfig {
    fn default() -> Self {
        Self {
            patch_size: 2,
            in_channels: 64,
            out_channels: Some(16),
            num_layers: 60,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 3584,
            guidance_embeds: false,
            axes_dims_rope: vec![16, 56, 56],
            zero_cond_t: false,
            use_additional_t_cond: false,
            use_layer3d_rope: false,
        }
    }
}

/// Positions of images and of the text that goes with them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RotaryLayout {
    /// Image i is frame i and on.
    Frames,
    /// The same, but for the last image, which is frame -1.
    Layers,
}

impl RotaryLayout {
    /// Positions frame, row, column of images `[frames, rows, columns]`, one after the other: rows and columns count from
    /// each image's middle.
    pub fn of_images(self, images: &[Vec<usize>]) -> Vec<f32> {
        let mut positions = Vec::new();
        for (i, image) in images.iter().enumerate() {
            let &[frames, rows, columns] = &image[..] else { continue };
            let first = if self == Self::Layers && i + 1 == images.len() { -1.0 } else { i as f32 };
            let centred = |at: usize, size: usize| at as f32 - (size - size / 2) as f32;
            for place in 0..frames * rows * columns {
                let (frame, row, column) = (place / (rows * columns), place / columns % rows, place % columns);
                positions.extend([first + frame as f32, centred(row, rows), centred(column, columns)]);
            }
        }
        positions
    }

    /// The same of a text: its tokens go on along the diagonal where the largest image ends.
    pub fn of_text(self, images: &[Vec<usize>], len: usize) -> Vec<f32> {
        let half = images.iter().flat_map(|image| &image[1..]).map(|side| side / 2).max().unwrap_or(0);
        let start = if self == Self::Layers { half.max(images.len().saturating_sub(1)) } else { half };
        (0..len).flat_map(|i| [(start + i) as f32; 3]).collect()
    }
}

impl Config for QwenImageConfig {
    const CLASS: &'static str = "QwenImageTransformer2DModel";

    fn check(&self) -> Result<()> {
        check_rope_axes::<3>("axes_dims_rope", &self.axes_dims_rope, self.attention_head_dim)?;
        check_sizes([
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("out_channels", product(&[self.patch_size, self.patch_size, self.out_channels()])),
            ("num_attention_heads times attention_head_dim", self.inner_dim()),
            ("joint_attention_dim", self.joint_attention_dim),
        ])?;
        check_layers(1, [("num_layers", self.num_layers)])?;
        Ok(())
    }
}

impl QwenImageConfig {
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

    /// What the model asks of a batch, with either adapter.
    pub(super) fn requirements(&self) -> Result<Requirements> {
        let outputs = self.patch_size.pow(2) * self.out_channels();
        check_prediction("patch_size^2 out_channels", outputs, Fixed::new("in_channels", self.in_channels))?;
        Ok(Requirements {
            channels: packed_channels(self.in_channels)?,
            patch: PATCH.into(),
            widths: vec![("text_embeddings", Fixed::new("joint_attention_dim", self.joint_attention_dim))],
        })
    }

    /// Rotary tables of a text and then images `[frames, rows, columns]`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn rope(&self, text: usize, images: &[Vec<usize>], device: &Device) -> Result<RopeTables> {
        let layout = if self.use_layer3d_rope { RotaryLayout::Layers } else { RotaryLayout::Frames };
        let positions = [layout.of_text(images, text), layout.of_images(images)].concat();
        Ok(RopeTables::new(&positions, &self.axes_dims_rope, THETA, RopePrecision::F32, device)?)
    }
}
