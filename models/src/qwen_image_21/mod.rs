//! Qwen-Image-2.1 (Alibaba, 2026): text, images to edit and the image to make are one sequence.

mod adapter;
mod config;
mod layout;
mod model;

pub use adapter::QwenImage21Adapter;
pub use config::QwenImage21Config;
pub use model::QwenImage21Transformer2DModel;
