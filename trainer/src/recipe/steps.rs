//! Steps, batches, and how a step is taken.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Gradient clipping.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClipGradNorm {
    /// The greatest norm of all gradients together.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub max_norm: f64,
}

/// Steps and batches.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StepScheduler {
    /// Samples of an optimiser step; a multiple of `local_batch_size`, which it is if left out.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1_073_741_824))]
    pub global_batch_size: Option<usize>,
    /// Samples that go through the model at once.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub local_batch_size: usize,
    /// Optimiser steps.
    #[schemars(range(min = 1))]
    pub max_steps: u64,
    /// Steps between checkpoints; 0 for one at the end alone.
    #[serde(default)]
    pub ckpt_every_steps: u64,
}

/// What is traded for time.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Performance {
    /// Whether a loss that is NaN or above 100 stops the run.
    pub check_loss: bool,
    /// Whether blocks run again in backward instead of keeping their activations: less memory, the same results.
    pub activation_checkpointing: bool,
}
