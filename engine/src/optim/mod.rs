//! Optimisers, the way of gradients to the parameters, and schedules.

mod clip;
mod config;
mod ema;
mod loss_scale;
mod offload;
mod optimizer;
mod ranks;
mod reduce;
mod rules;
mod schedule;
mod sinks;
mod updates;

pub use clip::{Clipping, SquareSums, clip_grad_norm};
pub use config::OptimizerConfig;
pub use ema::{Ema, EmaConfig};
pub use loss_scale::{LossScale, LossScaleConfig, LossScaleState};
pub use optimizer::{Optimizer, ParamGroup, Rates};
pub use ranks::{Groups, Ranks};
pub use reduce::Reduce;
pub use rules::*;
pub use schedule::{DecayStyle, LrScheduler, LrSchedulerConfig, WdIncrStyle, WsdDecayStyle};
pub use sinks::{Accumulate, Clip, OptimizerStep, Step, StepConfig, StepSink};
pub use updates::Rounding;
pub(crate) use updates::functions;
