//! What a step does forward.

use std::sync::Arc;

use flowtape_engine::comm::Comm;
use flowtape_engine::nn::DropoutMasks;
use flowtape_engine::{Philox, Tape};
use flowtape_flowmatch::{
    Batch, Draws, FlowMatchingPipeline, FlowModel, ModelInputs, ModelOutput, PhiloxDraws, StepOptions, StepOutput,
};
use flowtape_models::Transformer;

use crate::recipe::Sharing;
use crate::{Recipe, Result};

/// The stream of the steps' random numbers, a fork of the seed.
const STEPS: u64 = 2;
/// The stream of the adapters' dropout, another fork of it.
const DROPOUT: u64 = 3;
/// Where the number of a micro-batch begins in that of a stream: its own stream is the step's, that of the first one.
const PARTS: u32 = 40;

/// The random numbers of a micro-batch of the step after so many others. They do not depend on who computes it.
fn draws_of(recipe: &Recipe, step: u64, part: u64) -> PhiloxDraws {
    PhiloxDraws { philox: Philox::new(recipe.seed).fork(STEPS).fork(step | part << PARTS) }
}

/// What a step does forward, micro-batch by micro-batch. Dropout is on as long as this is there, whatever ends it.
pub(crate) struct Forward<'a> {
    recipe: &'a Recipe,
    model: &'a dyn Transformer,
    pipeline: &'a FlowMatchingPipeline,
    masks: &'a DropoutMasks,
    step: u64,
    /// The number of the next micro-batch among those of all ranks, which take turns.
    part: u64,
    sharing: Sharing,
}

/// A model whose ranks share the tokens of what it is called with.
struct SharingTokens<'a> {
    model: &'a dyn Transformer,
    ranks: &'a Arc<dyn Comm>,
}

impl FlowModel for SharingTokens<'_> {
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<ModelOutput> {
        self.model.forward(&inputs.clone().with(ModelInputs::TOKEN_RANKS, self.ranks.clone()))
    }
}

impl<'a> Forward<'a> {
    /// Of a rank, in the step after so many others.
    pub fn new(
        recipe: &'a Recipe,
        model: &'a dyn Transformer,
        pipeline: &'a FlowMatchingPipeline,
        masks: &'a DropoutMasks,
        step: u64,
        sharing: Sharing,
    ) -> Self {
        Self { recipe, model, pipeline, masks, step, part: sharing.batches.index, sharing }
    }

    /// The next micro-batch, with the tape that it was recorded on. Random numbers follow from the seed, or come from `draws`.
    pub fn step(&mut self, batch: &Batch, draws: Option<&mut (dyn Draws + Send + '_)>) -> Result<(Tape, StepOutput)> {
        let dropout = Philox::new(self.recipe.seed).fork(DROPOUT).fork(self.step);
        let dropout = dropout.fork(self.part);
        // Each has other tokens.
        let tokens = self.sharing.tokens.as_ref();
        let own = tokens.map(|ranks| dropout.fork(ranks.rank() as u64));
        self.masks.set(Some(own.unwrap_or(dropout)));
        let mut own = draws_of(self.recipe, self.step, self.part);
        self.part += self.sharing.batches.count;
        let draws: &mut dyn Draws = match draws {
            Some(draws) => draws,
            None => &mut own,
        };
        let tape = Tape::new();
        let options = StepOptions {
            dtype: self.recipe.dtype.into(),
            collect_metrics: false,
            check_loss: self.recipe.performance.check_loss,
            ..StepOptions::recorded(&tape)
        };
        let output = match tokens {
            Some(ranks) => {
                let model = SharingTokens { model: self.model, ranks };
                self.pipeline.step(&model, batch, self.step, draws, &options)?
            }
            None => self.pipeline.step(self.model, batch, self.step, draws, &options)?,
        };
        Ok((tape, output))
    }
}

impl Drop for Forward<'_> {
    fn drop(&mut self) {
        self.masks.set(None);
    }
}
