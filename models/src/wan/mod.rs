//! Wan 2.1 and 2.2 (Alibaba, 2025), and NeMo's adapter for models of plain inputs.

mod adapter;
mod config;
mod model;

pub use adapter::SimpleAdapter;
pub use config::WanConfig;
pub use model::{WanAttention, WanTransformer3DModel, WanTransformerBlock};
