//! FLUX.2 and FLUX.2-klein (Black Forest Labs, 2025 and 2026).

mod adapter;
mod config;
mod edit;
mod model;

pub use adapter::{Flux2Adapter, latent_ids, reference_ids, text_ids};
pub use config::Flux2Config;
pub use edit::Flux2EditAdapter;
pub use model::{Flux2SingleTransformerBlock, Flux2Transformer2DModel, feed_forward};
