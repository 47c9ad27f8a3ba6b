//! Chroma (Lodestone Rock, 2025): FLUX.1 whose modulation comes from one small network.

mod adapter;
mod config;
mod model;

pub use adapter::ChromaAdapter;
pub use config::ChromaConfig;
pub use model::{ChromaApproximator, ChromaTransformer2DModel};
