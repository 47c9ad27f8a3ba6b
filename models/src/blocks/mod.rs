//! What the transformers share.

mod attention;
mod captions;
mod conditioning;
mod embeddings;
mod modulation;
mod patch;
mod rope;
mod sandwich;
mod stream;
mod swiglu;

pub(crate) use attention::TOKEN;
pub use attention::{ADDED_QKV, QKV, QkNorm, QkvConfig, QkvHeads, attend, key_mask, split_heads};
pub use captions::Captions;
pub use conditioning::{
    drop_samples, guidance, image_dims, reference_latents, text_attention_mask, text_embeddings, unit_times,
    video_dims, with_batch_axis,
};
pub(crate) use embeddings::CHANNELS;
pub use embeddings::{CombinedTimestepTextProjEmbeddings, time_proj, with_time_projections};
pub use flowtape_engine::ops::patchify;
pub use modulation::{AdaLayerNormContinuous, Modulation, ScaleShiftTable, gate, scaled};
pub use patch::{ChannelOrder, PatchEmbed, patchify_as, unpatchify};
pub use rope::{RopePrecision, RopeTables, grid_positions};
pub use sandwich::{SandwichBlock, SandwichNorms};
pub use stream::{DoubleStream, JointTransformerBlock, StreamKind};
pub use swiglu::SwiGlu;
