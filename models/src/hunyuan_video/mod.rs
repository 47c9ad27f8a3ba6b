//! HunyuanVideo-1.5 (Tencent, 2025).

mod adapter;
mod config;
mod context;
mod model;
#[cfg(test)]
mod tests;

pub use adapter::{HunyuanAdapter, condition_latents};
pub use config::HunyuanVideo15Config;
pub use model::HunyuanVideo15Transformer3DModel;
