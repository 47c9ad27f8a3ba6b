//! Qwen-Image and Qwen-Image-Edit (Alibaba, 2025).

mod adapter;
mod config;
mod edit;
mod model;
#[cfg(test)]
mod tests;

pub use adapter::QwenImageAdapter;
pub use config::{QwenImageConfig, RotaryLayout};
pub use edit::QwenImageEditAdapter;
pub use model::{QwenImageTransformer2DModel, QwenImageTransformerBlock};

/// Latents of a token: rows and columns.
const PATCH: [usize; 2] = [2, 2];
