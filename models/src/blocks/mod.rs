//! What the transformers share.

mod attention;
mod checkpointing;
mod embeddings;
mod modulation;
mod rope;

pub use attention::{ADDED_QKV, QKV, QkNorm, QkvConfig, QkvHeads, attend};
pub use checkpointing::run_block;
pub(crate) use embeddings::CHANNELS;
pub use embeddings::{CombinedTimestepTextProjEmbeddings, time_proj};
pub use modulation::{Modulation, gate, modulate};
pub use rope::{RopePrecision, RopeTables};
