//! Steps, batches, and how a step is taken.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Gradient clipping.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClipGradNorm {
    /// The greatest norm of all gradients together.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub max_norm: f64,
}

impl ClipGradNorm {
    /// What the reference does where nothing is said.
    pub(super) fn reference() -> Option<Self> {
        Some(Self { max_norm: 1.0 })
    }
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
    /// Optimiser steps; as many as `num_epochs` has if it is left out, and never more than those.
    #[schemars(with = "Option<u64>", range(min = 1))]
    #[serde(default, deserialize_with = "or_zero", skip_serializing_if = "is_zero")]
    pub max_steps: u64,
    /// Passes over the data.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_epochs: Option<u64>,
    /// Steps between checkpoints; 0 for one at the end alone.
    #[serde(default)]
    pub ckpt_every_steps: u64,
    /// Whether there is also one at the end of each epoch.
    #[serde(default)]
    pub save_checkpoint_every_epoch: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's form
fn is_zero(steps: &u64) -> bool {
    *steps == 0
}

/// 0 for nothing.
fn or_zero<'de, D: serde::Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(0))
}

impl StepScheduler {
    /// Samples of an optimiser step.
    pub fn global_batch_size(&self) -> usize {
        self.global_batch_size.unwrap_or(self.local_batch_size)
    }

    /// Batches of a step, one after the other.
    pub fn micro_batches(&self) -> usize {
        (self.global_batch_size() / self.local_batch_size.max(1)).max(1)
    }

    /// The same where so many ranks take turns in the batches: a step has at least one of each.
    ///
    /// # Errors
    /// When its batches do not share out.
    pub fn on_ranks(&self, ranks: usize) -> Result<Self> {
        let all = self.local_batch_size.saturating_mul(ranks);
        let global = self.global_batch_size.unwrap_or(all);
        if ranks == 1 {
            return Ok(self.clone());
        }
        if global.is_multiple_of(all.max(1)) && global > 0 {
            return Ok(Self { global_batch_size: Some(global), ..self.clone() });
        }
        let local = self.local_batch_size;
        let what = format!(
            "step_scheduler.global_batch_size: expected a multiple of {all}, the local_batch_size ({local}) on {ranks} ranks, got {global}"
        );
        Err(Error::Run { path: "recipe".into(), what })
    }

    /// The same with `max_steps` as a number of samples decides it, where `num_epochs` is given. An epoch ends with what is left of
    /// its samples, or goes on into the next one's.
    #[must_use]
    pub fn resolved(&self, samples: usize, drop_last: bool, ranks: usize) -> Self {
        let Some(epochs) = self.num_epochs else { return self.clone() };
        // At a cursor all ranks take a batch.
        let local = self.local_batch_size.saturating_mul(ranks).max(1) as u64;
        let samples = samples as u64;
        // Each epoch begins so many batches, or one more; its last group may be smaller.
        let fewer = samples / local;
        let all = if drop_last { epochs.saturating_mul(fewer) } else { epochs.saturating_mul(samples).div_ceil(local) };
        let longer = all - epochs.saturating_mul(fewer).min(all);
        let groups = |batches: u64| batches.div_ceil((self.micro_batches() / ranks).max(1) as u64);
        let shorter = (epochs - longer.min(epochs)).saturating_mul(groups(fewer));
        let steps = shorter.saturating_add(longer.saturating_mul(groups(fewer + 1))).max(1);
        let max_steps = if self.max_steps == 0 { steps } else { self.max_steps.min(steps) };
        Self { max_steps, ..self.clone() }
    }
}

/// What becomes of a step whose loss or gradients are not finite.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NonFinite {
    /// The run stops, and a bundle of the step is written that `flowtape replay` runs again.
    #[default]
    Stop,
    /// The step changes nothing and is counted.
    Skip,
}

/// What is traded for time.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Performance {
    /// Whether a loss that is NaN or above 100 stops the run.
    pub check_loss: bool,
    /// Whether blocks run again in backward instead of keeping their activations: less memory, the same results.
    pub activation_checkpointing: bool,
    /// Blocks whose frozen weights lie in the host's memory, and come to the GPU while their block is computed with: less memory, the
    /// same results.
    pub blocks_to_swap: usize,
    /// Whether what the optimiser remembers lies in the host's memory, and comes to the GPU for the update of its parameter: less memory,
    /// the same results.
    pub optimizer_cpu_offload: bool,
}
