//! One optimiser step after the other.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use flowtape_data::{Collator, Loader};
use flowtape_engine::optim::{AdamW, AdamWConfig, Clipping, LrScheduler, LrSchedulerConfig, clip_grad_norm};
use flowtape_engine::{Device, Gradients, Later, Philox, Tape, Tensor};
use flowtape_flowmatch::{FlowMatchingPipeline, PhiloxDraws, StepOptions};
use flowtape_models::{Transformer, create_model, create_pipeline};
use serde::{Deserialize, Serialize};

use crate::builtin;
use crate::data::Data;
use crate::generate::{Generator, Request, Samples};
use crate::recipe::Init;
use crate::state::{TrainProgress, TrainState};
use crate::update::backward_and_step;
use crate::{Recipe, Result};

/// The stream of the steps' random numbers, a fork of the seed.
const STEPS: u64 = 2;

/// What a step came to: a line of `metrics.jsonl`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimiser steps done, from 1.
    pub step: u64,
    /// The mean loss of the step's samples.
    pub loss: f64,
    /// The learning rate of the step.
    pub lr: f64,
    /// The norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Training speed of this step.
    pub samples_per_second: f64,
}

/// A step whose numbers are still on the device.
pub(crate) struct Enqueued {
    /// Optimiser steps done with it.
    pub step: u64,
    losses: Vec<Later>,
    norm: Later,
    lr: f64,
    samples: usize,
    started: Instant,
}

impl Enqueued {
    /// Waits for the numbers; `last_read` is when those of the step before had come.
    pub fn read(self, last_read: Option<Instant>) -> Result<StepRecord> {
        let losses = self.losses.into_iter().map(Later::item).collect::<Result<Vec<f64>, _>>()?;
        let grad_norm = Clipping::finite(self.norm.item()?)?;
        let since = last_read.map_or(self.started, |t| t.max(self.started));
        let samples_per_second = self.samples as f64 / since.elapsed().as_secs_f64();
        Ok(StepRecord { step: self.step, loss: losses.iter().sum(), lr: self.lr, grad_norm, samples_per_second })
    }
}

/// Everything that a recipe makes: it does one step at a time, and knows nothing of files, pictures and reports.
pub struct Trainer {
    recipe: Recipe,
    device: Device,
    model: Box<dyn Transformer>,
    pipeline: FlowMatchingPipeline,
    schedule: LrScheduler,
    data: Data,
    collator: Collator,
    /// Made when the first batch is asked for, and again where the cursor was set.
    loader: Option<Loader>,
    state: TrainState,
}

impl Trainer {
    /// Model, pipeline, optimiser and data of a recipe, on its device.
    ///
    /// # Errors
    /// When a section does not fit.
    pub fn new(recipe: &Recipe) -> Result<Self> {
        Self::on(&flowtape_gpu::device(&recipe.device)?, recipe)
    }

    /// The same on a device that is open already.
    ///
    /// # Errors
    /// When a section does not fit.
    pub fn on(device: &Device, recipe: &Recipe) -> Result<Self> {
        Self::with_data(device, recipe, builtin::data(&recipe.data)?)
    }

    /// The same with data of one's own instead of the recipe's `data.source`.
    ///
    /// # Errors
    /// When a section does not fit.
    pub fn with_data(device: &Device, recipe: &Recipe, data: Data) -> Result<Self> {
        let mut model = create_model(&recipe.model, &recipe.dtype.params(recipe.seed, device))?;
        model.set_gradient_checkpointing(recipe.performance.activation_checkpointing);
        if recipe.init == Init::AdalnZero {
            let names = model.zero_init_parameters();
            let params = model.params();
            for (name, parameter) in params.iter().filter(|(name, _)| names.iter().any(|n| n == name)) {
                params.set(name, &Tensor::zeros(parameter.dims(), parameter.dtype(), device)?)?;
            }
        }
        let optimizer = &recipe.optimizer;
        let constant = LrSchedulerConfig {
            lr_decay_style: flowtape_engine::optim::DecayStyle::Constant,
            lr_warmup_steps: Some(0),
            ..LrSchedulerConfig::default()
        };
        let steps = recipe.step_scheduler.max_steps;
        let schedule = recipe.lr_scheduler.as_ref().unwrap_or(&constant);
        Ok(Self {
            pipeline: create_pipeline(recipe.flow_matching.clone())?,
            schedule: LrScheduler::new(schedule, optimizer.lr, optimizer.weight_decay, steps)?,
            collator: data.collator(&recipe.data, recipe.seed),
            state: TrainState {
                optimizer: AdamW::new(AdamWConfig { betas: optimizer.betas, eps: optimizer.eps }),
                progress: TrainProgress {
                    step: 0,
                    cursor: Default::default(),
                    train_seconds: 0.0,
                    recipe: recipe.fingerprint(),
                    data: data.source.fingerprint(),
                },
            },
            recipe: recipe.clone(),
            model,
            data,
            loader: None,
            device: device.clone(),
        })
    }

    /// The recipe.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The model.
    pub fn model(&self) -> &dyn Transformer {
        &*self.model
    }

    /// What goes on from step to step beside the weights.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// Goes on from a checkpoint: weights and state.
    ///
    /// # Errors
    /// When it can't be read or does not fit the model.
    pub fn load(&mut self, checkpoint: &std::path::Path) -> Result<()> {
        self.model.params().load(&flowtape_models::checkpoint::open_weights(checkpoint)?)?;
        self.loader = None;
        self.state.load(self.model.params(), checkpoint)
    }

    /// One optimiser step. Its data and its random numbers follow from the seed and from where the run stands.
    ///
    /// # Errors
    /// When a sample can't be read, the loss exploded, the gradients' norm is not finite, or a parameter has no gradient.
    pub fn step(&mut self) -> Result<StepRecord> {
        let started = Instant::now();
        let record = self.enqueue()?.read(None)?;
        self.count_time(started);
        Ok(record)
    }

    /// Adds the time since then to that of training.
    pub(crate) fn count_time(&mut self, since: Instant) {
        self.state.progress.train_seconds += since.elapsed().as_secs_f64();
    }

    /// The same, but nothing is read back yet: what is wrong with its numbers is found when they are read.
    pub(crate) fn enqueue(&mut self) -> Result<Enqueued> {
        let started = Instant::now();
        let (global, local) = (self.recipe.global_batch_size(), self.recipe.step_scheduler.local_batch_size);
        let parts = global / local;
        let TrainProgress { step, mut cursor, .. } = self.state.progress;
        let mut draws = PhiloxDraws { philox: Philox::new(self.recipe.seed).fork(STEPS).fork(step) };
        let (lr, weight_decay) = (self.schedule.lr(step), self.schedule.weight_decay(step));
        let scale = self.recipe.dtype.loss_scale();
        // A gradient that needs no other one, neither for the norm nor for a sum, is used and gone at once.
        let at_once = parts == 1 && self.recipe.clip_grad_norm.is_none() && scale == 1.0;
        let mut gradients = Gradients::default();
        let mut losses = Vec::with_capacity(parts);
        let mut norm = None;
        for _ in 0..parts {
            let loader = match &mut self.loader {
                Some(loader) => loader,
                none => none.insert(self.data.loader(&self.recipe.data, local, self.recipe.seed, cursor)?),
            };
            let loaded = loader.next()?;
            cursor = loaded.plan.next;
            let batch = self.collator.batch(&loaded, &self.device)?;
            let tape = Tape::new();
            let options = StepOptions {
                dtype: self.recipe.dtype.into(),
                collect_metrics: false,
                check_loss: self.recipe.performance.check_loss,
                ..StepOptions::recorded(&tape)
            };
            let output = self.pipeline.step(&*self.model, &batch, step, &mut draws, &options)?;
            let share = if parts == 1 { output.loss } else { output.loss.mul_scalar(1.0 / parts as f64)? };
            losses.push(share.read_later()?);
            let without = self.model.parameters_without_gradient(&output.inputs);
            let params = self.model.params();
            if at_once {
                let rates = (lr, weight_decay);
                norm = Some(backward_and_step(&tape, &share, &mut self.state.optimizer, params, rates, &without)?);
            } else {
                let part = tape.backward(&if scale == 1.0 { share } else { share.mul_scalar(scale)? })?;
                params.check_gradients(&part, &without)?;
                gradients.add(part)?;
            }
        }
        let norm = match norm {
            Some(norm) => norm,
            None => {
                let max_norm = self.recipe.clip_grad_norm.as_ref().map(|c| scale * c.max_norm);
                let clipping = clip_grad_norm(&gradients, max_norm)?.unscaled(scale)?;
                let (params, coefficient) = (self.model.params(), Some(&clipping.coefficient));
                self.state.optimizer.step(params, &gradients, lr, weight_decay, coefficient)?;
                clipping.norm
            }
        };
        self.state.progress.step = step + 1;
        self.state.progress.cursor = cursor;
        Ok(Enqueued { step: step + 1, losses, norm: norm.read_later()?, lr, samples: global, started })
    }

    /// Whether the numbers of a step are there as soon as it is enqueued.
    pub(crate) fn reads_at_once(&self) -> bool {
        self.device.backend().is_host()
    }

    /// Samples with the model as it is now; none where it was asked to stop meanwhile.
    ///
    /// # Errors
    /// When a prompt is not taken, or the model fails.
    pub fn generate(&self, request: &Request<'_>, stop: &AtomicBool) -> Result<Option<Samples>> {
        let generator = Generator {
            model: &*self.model,
            adapter: self.pipeline.adapter(),
            data: &self.data,
            sampling: &self.recipe.sampling,
            device: &self.device,
        };
        generator.generate(request, stop)
    }
}
