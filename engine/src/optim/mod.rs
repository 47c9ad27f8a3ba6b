//! Optimisers, gradient clipping and schedules.

mod adamw;
mod clip;
mod schedule;

pub use adamw::{AdamW, AdamWConfig};
pub use clip::{Clipping, clip_grad_norm};
pub use schedule::{DecayStyle, LrScheduler, LrSchedulerConfig, WdIncrStyle, WsdDecayStyle};
