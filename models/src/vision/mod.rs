//! What sees pictures for text encoders and transformers, with transformers' names and checkpoints.
//!
//! | module | what it holds |
//! |---|---|
//! | [`clip`] | [`CLIPVisionModel`]: the given frames of Wan 2.1's image-to-video |
//! | [`siglip`] | [`SiglipVisionModel`]: the first frame of HunyuanVideo 1.5's image-to-video |
//! | [`qwen25_vl`] | [`Qwen25VisionTransformer`] and [`Qwen25VL`]: pictures among the words of Qwen2.5-VL |

pub mod clip;
pub mod qwen25_vl;
pub mod siglip;

pub use clip::CLIPVisionModel;
pub use qwen25_vl::{Positions, Qwen25VL, Qwen25VisionTransformer};
pub use siglip::SiglipVisionModel;
