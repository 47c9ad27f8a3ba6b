//! Layers and their parameters, named as PyTorch and diffusers name them.

mod adapter;
mod blocks;
mod conv;
mod embedding;
mod layers;
mod param;
mod params;
mod plan;
mod start;
mod units;

pub use adapter::{
    AdapterKind, AdapterPlan, AdapterSpec, Dropout, DropoutMasks, DropoutPosition, LoraInit, ModulePattern,
    ModuleSelection, Parts,
};
pub use blocks::Blocks;
pub use conv::{Conv, GroupNorm};
pub use embedding::{TimestepEmbedding, TimestepProjection, timestep_embedding};
pub use layers::{Activation, FeedForward, LayerNorm, Linear, RmsNorm};
pub use param::{Operand, Param, Role};
pub use params::{ParamBuilder, Params};
pub use plan::{ParamPlan, Placement};
pub use start::Init;
pub use units::Units;
pub(crate) use units::{Home, share_out};
