//! Layers and their parameters, named as PyTorch and diffusers name them.

mod embedding;
mod layers;
mod params;

pub use embedding::{TimestepEmbedding, TimestepProjection, timestep_embedding};
pub use layers::{Activation, FeedForward, LayerNorm, Linear, RmsNorm};
pub use params::{Init, ParamBuilder, Params};
