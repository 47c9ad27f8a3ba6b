//! FLUX.3 klein (Black Forest Labs, 2026).

mod adapter;
mod config;
mod model;

pub use adapter::Flux3Adapter;
pub use config::Flux3Config;
pub use model::{Flux3Block, Flux3Transformer2DModel};
