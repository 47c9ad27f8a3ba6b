//! What the transformers share.

mod attention;
mod embeddings;
mod modulation;
mod rope;

pub use attention::{QkvHeads, attend};
pub use embeddings::{CombinedTimestepTextProjEmbeddings, time_proj};
pub use modulation::{Modulation, gate, modulate};
pub use rope::RopeTables;
