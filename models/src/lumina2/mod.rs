//! Lumina-Image 2.0 (Shanghai AI Laboratory, 2025).

mod adapter;
mod config;
mod model;

pub use adapter::Lumina2Adapter;
pub use config::Lumina2Config;
pub use model::Lumina2Transformer2DModel;
