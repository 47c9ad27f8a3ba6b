//! FLUX.1 (Black Forest Labs, 2024).

mod adapter;
mod config;
mod model;

pub use adapter::FluxAdapter;
pub use config::FluxConfig;
pub use model::{FluxSingleTransformerBlock, FluxTransformer2DModel};
