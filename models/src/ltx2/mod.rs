//! LTX-2 (Lightricks, 2025): video and audio in one transformer.

mod adapter;
mod block;
mod config;
mod connectors;
mod model;
mod rope;

pub use adapter::LTX2Adapter;
pub use block::LTX2VideoTransformerBlock;
pub use config::LTX2Config;
pub use connectors::{ConnectedText, LTX2TextConnectors, LTX2TextConnectorsConfig};
pub use model::{ISOLATE_MODALITIES, LTX2VideoTransformer3DModel, PERTURBED_BLOCKS, VIDEO_KEYFRAMES_MASK};
