//! FLUX.2 (Black Forest Labs, 2025).

mod adapter;
mod config;
mod model;

pub use adapter::{Flux2Adapter, latent_ids, text_ids};
pub use config::Flux2Config;
pub use model::{Flux2SingleTransformerBlock, Flux2Transformer2DModel, feed_forward};
