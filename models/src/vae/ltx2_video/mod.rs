//! The autoencoder of LTX-2's pictures.

mod config;
mod model;
mod network;

pub use config::{AutoencoderKLLTX2VideoConfig, Flags, PaddingMode, Scaling};
pub use model::AutoencoderKLLTX2Video;
