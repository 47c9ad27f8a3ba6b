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
mod tokens;

pub(crate) use attention::TOKEN;
pub use attention::{ADDED_QKV, QKV, QkNorm, QkvConfig, QkvHeads, attend, key_mask, shared_heads, split_heads};
pub use captions::{Captions, read_marks};
pub use conditioning::{
    drop_samples, guidance, image_dims, reference_latents, required_text_mask, text_attention_mask, text_embeddings,
    unit_times, video_dims, with_batch_axis,
};
pub(crate) use embeddings::CHANNELS;
pub use embeddings::{CombinedTimestepTextProjEmbeddings, time_proj, with_time_projections};
pub use flowtape_engine::ops::patchify;
pub(crate) use modulation::equal_parts;
pub use modulation::{AdaLayerNormContinuous, Modulation, ScaleShiftTable, gate, scaled, tanh_gate};
pub use patch::{ChannelOrder, PatchEmbed, patchify_as, unpatchify};
pub use rope::{RopePrecision, RopeTables, grid_positions, latent_image_ids};
pub use sandwich::{SandwichBlock, SandwichNorms};
pub use stream::{DoubleStream, JointTokens, JointTransformerBlock, SingleStream, StreamKind, gelu_feed_forward};
pub use swiglu::SwiGlu;
pub use tokens::Tokens;
