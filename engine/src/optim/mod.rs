//! Optimisers, gradient clipping and schedules.

mod adamw;
mod clip;
mod schedule;

pub use adamw::{AdamW, AdamWConfig, Stepping};
pub use clip::{Clipping, SquareSums, clip_grad_norm};
pub use schedule::{DecayStyle, LrScheduler, LrSchedulerConfig, WdIncrStyle, WsdDecayStyle};
