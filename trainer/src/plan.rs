//! What a step takes, without taking it: steps on the device that has shapes and no data.

use std::sync::Arc;

use flowtape_engine::comm::Planned;
use flowtape_engine::meta::Meta;
use flowtape_engine::nn::{Param, Params, Units};
use flowtape_engine::profile::Profile;
use serde::Serialize;

use crate::data::Data;
use crate::trainer::Trainer;
use crate::{Recipe, Result};

/// Bytes of a training step by what they hold, and its floating-point operations.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct StepPlan {
    /// Parameters, with their wider copies and their average.
    pub weights: u64,
    /// What the optimiser remembers on the device.
    pub optimizer: u64,
    /// Gradients that are kept until all are there, for their norm or over micro-batches; 0 where each is used at once.
    pub gradients: u64,
    /// What forward keeps for backward.
    pub activations: u64,
    /// What the peak holds beside: inputs of operations that are under way.
    pub workspace: u64,
    /// The most at once; activations go while gradients come, so it may be less than the sum.
    pub peak: u64,
    /// What a checkpoint takes on the disk.
    pub checkpoint: u64,
    /// Operations of all matrix products and attention of an optimiser step.
    pub flops: f64,
    /// Bytes that a rank sends to others in an optimiser step of at most three micro-batches.
    pub sent: u64,
    /// Blocks with frozen weights: as many as `performance.blocks_to_swap` may be.
    pub swappable_blocks: usize,
}

impl StepPlan {
    /// Of a recipe's step on data. The first of it is read.
    ///
    /// # Errors
    /// What the step itself would come to: a section that does not fit, or a sample that can't be read.
    pub fn of(recipe: &Recipe, data: Data) -> Result<Self> {
        Self::on_ranks(recipe, data, 1)
    }

    /// The same of the first of so many ranks: memory and operations of that one.
    ///
    /// # Errors
    /// As above.
    pub fn on_ranks(recipe: &Recipe, data: Data, ranks: usize) -> Result<Self> {
        let (meta, profile) = (Meta::default(), Profile::default());
        let device = profile.device(&meta.device());
        // The sum of two micro-batches may be wider than the gradients of one; a fourth takes no more than the third.
        let mut short = recipe.clone();
        let local = recipe.step_scheduler.local_batch_size;
        let batch_ranks = recipe.batch_ranks(ranks)?;
        let parts = recipe.step_scheduler.on_ranks(batch_ranks)?.micro_batches() / batch_ranks;
        short.step_scheduler.global_batch_size = Some(local.saturating_mul(parts.min(3)).saturating_mul(batch_ranks));
        short.data.num_workers = 0;
        let comm = Arc::new(Planned::new(0, ranks, &device)?);
        let mut trainer = Trainer::among(comm.clone(), &device, &short, data)?;
        let weights = meta.used();
        // The first step makes what the optimiser remembers.
        trainer.enqueue()?;
        let before = meta.used();
        profile.take();
        comm.take_sent();
        let forward = trainer.enqueue()?.times.forward_bytes;
        let flops: f64 = profile.take().iter().map(|(_, entry)| entry.flops).sum();
        let (optimizer, sent) = (before - weights, comm.take_sent());
        // The sums of micro-batches and of ranks are wider.
        let summed = parts > 1 || ranks > 1;
        let kept = recipe.clip_grad_norm.is_some() || parts > 1;
        let all = trainer.model().params();
        let gradients = if kept { gradients(all, summed, |param| parts > 1 || trainer.updates(param)) } else { 0 };
        let activations = forward.saturating_sub(before);
        // With more than one micro-batch the gradients so far are there in forward.
        let activations = if parts > 1 { activations.saturating_sub(gradients) } else { activations };
        let peak = meta.peak();
        let workspace = peak.saturating_sub(before + gradients.max(activations));
        let flops = flops * parts as f64 / parts.min(3) as f64;
        // A run of adapters saves them alone.
        let saved = if recipe.peft.is_some() { all.adapters() } else { all.base() };
        let kept = saved.iter().map(|param| (param.numel() * param.kept_dtype().size()) as u64);
        let averages = if recipe.ema.is_some() { saved.numel() * 4 } else { 0 };
        // Files have what all ranks remember.
        let remembered = optimizer + trainer.offloaded();
        let remembered = if trainer.is_shared_out() { remembered.saturating_mul(ranks as u64) } else { remembered };
        let checkpoint = remembered + averages + kept.sum::<u64>();
        let swappable_blocks = Units::swappable(all).len();
        Ok(Self {
            weights,
            optimizer,
            gradients,
            activations,
            workspace,
            peak,
            checkpoint,
            flops,
            sent,
            swappable_blocks,
        })
    }
}

/// Bytes of the gradients that are kept: in f32 where they are summed over micro-batches or ranks.
fn gradients(params: &Params, summed: bool, kept: impl Fn(&Param) -> bool) -> u64 {
    let size = |dtype: flowtape_engine::DType| if summed { dtype.size().max(4) } else { dtype.size() };
    trained(params).filter(|param| kept(param)).map(|param| (param.numel() * size(param.dtype())) as u64).sum()
}

fn trained(params: &Params) -> impl Iterator<Item = &Param> {
    params.iter().filter(|param| param.var().is_some())
}

/// Bytes for people.
pub fn gigabytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
