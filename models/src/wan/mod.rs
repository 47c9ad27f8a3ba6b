//! Wan 2.1 and 2.2 (Alibaba, 2025), and NeMo's adapter for models of plain inputs.

mod adapter;
mod config;
mod i2v;
mod model;
mod ti2v;

pub use adapter::SimpleAdapter;
pub use config::WanConfig;
pub use i2v::WanI2VAdapter;
pub use model::{WanAttention, WanTransformer3DModel, WanTransformerBlock};
pub use ti2v::WanTI2VAdapter;
