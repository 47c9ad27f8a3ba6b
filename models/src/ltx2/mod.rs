//! LTX-2 (Lightricks, 2025): video and audio in one transformer.

mod adapter;
mod block;
mod config;
mod model;
mod rope;

pub use adapter::LTX2Adapter;
pub use block::LTX2VideoTransformerBlock;
pub use config::LTX2Config;
pub use model::LTX2VideoTransformer3DModel;
