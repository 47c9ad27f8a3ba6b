//! Krea 2 (Krea, 2026).

mod adapter;
mod config;
mod model;

pub use adapter::Krea2Adapter;
pub use config::Krea2Config;
pub use model::Krea2Transformer2DModel;
