//! Z-Image and Z-Image-Turbo (Alibaba Tongyi Lab, 2025).

mod adapter;
mod config;
mod model;

pub use adapter::ZImageAdapter;
pub use config::ZImageConfig;
pub use model::ZImageTransformer2DModel;
