//! What a trainer lets its model be looked at with.

use std::sync::atomic::AtomicBool;

use flowtape_engine::nn::{ParamBuilder, Placement};
use flowtape_engine::{Philox, Tensor};
use flowtape_flowmatch::{Batch, TaskType};
use flowtape_models::Transformer;
use flowtape_models::pipeline::KnownPrompts;

use super::Trainer;
use crate::generate::{Generator, Request, Samples};
use crate::recipe::SamplingConfig;
use crate::{Error, Result, compose};

impl Trainer {
    /// Samples with the checkpoint that the run started from, as it was; none where it was asked to stop meanwhile, or the model
    /// was new.
    ///
    /// # Errors
    /// When a prompt is not taken, or the model fails.
    pub fn generate_from_start(&self, request: &Request<'_>, stop: &AtomicBool) -> Result<Option<Samples>> {
        if self.start.weights.is_none() {
            return Ok(None);
        }
        let frozen = Placement::frozen(self.recipe.dtype.into());
        let model = self.start.model(ParamBuilder::with_plan(0, frozen, &self.device))?;
        self.generator(&*model).generate(request, stop)
    }

    fn generator<'a>(&'a self, model: &'a dyn Transformer) -> Generator<'a> {
        Generator {
            model,
            adapter: self.pipeline.adapter(),
            data: &self.data,
            sampling: &self.recipe.sampling,
            device: &self.device,
        }
    }

    /// Samples with the model as it is now, with the average of its weights where one is kept; none where it was asked to stop
    /// meanwhile.
    ///
    /// # Errors
    /// When a prompt is not taken, or the model fails.
    pub fn generate(&self, request: &Request<'_>, stop: &AtomicBool) -> Result<Option<Samples>> {
        let generator = self.generator(&*self.model);
        self.as_sampled(|| generator.generate(request, stop))
    }

    /// Latents of conditions that the caller has (what the adapter reads, by name; the latents give the sizes), from noise that follows
    /// from `seed`, as `sampling` says: with guidance away from `negative`, where that is given. With the average of the weights, where
    /// one is kept.
    ///
    /// # Errors
    /// When a condition is missing or does not fit, or the model fails.
    pub fn sample(&self, conditions: &Batch, negative: Option<&Batch>, seed: u64) -> Result<Tensor> {
        let noise = Philox::new(seed).normal(conditions.latents.dims(), &self.device)?;
        let generator = self.generator(&*self.model);
        self.as_sampled(|| generator.sample(conditions, negative, TaskType::T2V, &noise))
    }

    /// Samples as `sampling` says from now on, and no longer as the recipe does.
    ///
    /// # Errors
    /// When a number is outside its range.
    pub fn set_sampling(&mut self, sampling: SamplingConfig) -> Result<()> {
        sampling.check().map_err(|what| Error::Run { path: "sampling".into(), what })?;
        self.recipe.sampling = sampling;
        Ok(())
    }

    /// The same as the data's pipeline makes pictures, so that they are those of later inference: each is that of its prompt alone, with
    /// the request's seed.
    ///
    /// # Errors
    /// When a part of the pipeline is missing, or the model fails.
    pub fn generate_by(
        &self,
        pipeline: &KnownPrompts,
        request: &Request<'_>,
        stop: &AtomicBool,
    ) -> Result<Option<Samples>> {
        let dims = self.sample_dims()?;
        self.as_sampled(|| compose::samples(pipeline, &*self.model, &self.recipe, &dims, request, stop))
    }

    /// Runs `work` with the weights that are sampled with: their average, where one is kept.
    pub(crate) fn as_sampled<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        match &self.state.ema {
            Some(ema) => ema.instead(self.model.params(), work),
            None => self.as_evaluated(work),
        }
    }

    /// Runs `work` with the weights that the optimiser means to be looked at.
    pub(crate) fn as_evaluated<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        self.state.optimizer.evaluated(self.model.params(), work)
    }
}
