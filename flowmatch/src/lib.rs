//! The flow-matching training pipeline, independent of any model, with NeMo AutoModel's names and behaviour.
//!
//! | module | what it holds |
//! |---|---|
//! | [`schedule`] | [`LinearInterpolationSchedule`]: `x_t = (1 - σ) x_0 + σ ε` |
//! | [`timestep`] | [`TimestepSampling`]: the strategies that draw σ, flow shift, clamping |
//! | [`weighting`] | [`LossWeighting`]: `linear`, `bsmntw`, off |
//! | [`task`] | [`TaskType`], [`DataType`] and the i2v draw |
//! | [`draws`] | [`Draws`]: every random number of a step, from Philox or from a record |
//! | [`batch`] | [`Batch`]: latents and a map of model-specific tensors |
//! | [`adapter`] | [`ModelAdapter`], [`FlowModel`], [`ModelInputs`]: how a model meets the pipeline |
//! | [`pipeline`] | [`FlowMatchingPipeline`]: `step`, from a batch to a loss |
//! | [`metrics`], [`log`] | the scalars of a step, and its log through `tracing` |
//! | [`config`] | [`FlowMatchingConfig`]: the `flow_matching` section of a recipe |
//! | [`time_shift`] | shifts that depend on the sequence length; density helpers |
//! | [`scheduler`], [`solver`] | [`Scheduler`]: a pipeline's noise levels; [`Solver`]: Euler, Heun, DPM-Solver++ and UniPC along them |
//! | [`sampler`] | [`FlowMatchEulerDiscrete`]: the ODE solver, with and without guidance |
//!
//! A step draws the task type, σ and the noise, mixes the noisy latents, lets the adapter prepare the model's inputs
//! and run it, and compares the prediction with the velocity `ε - x_0`. `examples/own_model.rs` does all of it with a
//! model of its own.

pub mod adapter;
pub mod batch;
pub mod config;
pub mod draws;
mod error;
pub mod log;
pub mod metrics;
pub mod pipeline;
pub mod sampler;
pub mod schedule;
pub mod scheduler;
pub mod solver;
pub mod task;
pub mod time_shift;
pub mod timestep;
pub mod weighting;

pub use adapter::{
    FlowMatchingContext, FlowModel, Input, ModelAdapter, ModelInputs, ModelOutput, NoisedStream, Prediction,
};
pub use batch::Batch;
pub use config::{FlowMatchingConfig, SamplingStrategy};
pub use draws::{Draws, PhiloxDraws, Recorded, RecordedDraws};
pub use error::{Error, Result};
pub use metrics::{Metric, Metrics};
pub use pipeline::{FlowMatchingPipeline, Loss, Noised, StepOptions, StepOutput};
pub use sampler::{EulerConfig, EulerSchedule, EulerStep, FlowMatchEulerDiscrete, Guidance, Sampling};
pub use schedule::LinearInterpolationSchedule;
pub use scheduler::Scheduler;
pub use solver::Solver;
pub use task::{DataType, TaskType};
pub use timestep::{TimestepSample, TimestepSampler, TimestepSampling};
pub use weighting::LossWeighting;
