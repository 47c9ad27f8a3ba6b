//! The autoencoder of Wan (2025) and Qwen-Image: diffusers' `AutoencoderKLWan` and `AutoencoderKLQwenImage`.
//!
//! A clip passes in pieces, one frame and then four at a time (encoding), or latent by latent (decoding): each convolution along
//! time remembers the last frames that it saw, so that memory does not grow with the clip.

mod config;
mod layers;
mod model;
mod network;

pub use config::{AutoencoderKLQwenImageConfig, AutoencoderKLWanConfig};
pub use model::AutoencoderKLWan;
