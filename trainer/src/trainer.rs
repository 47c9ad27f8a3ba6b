//! One optimiser step after the other.

mod sampling;
mod saving;

pub(crate) use self::saving::trained_model;

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use flowtape_data::{Collator, Cursor, Loaded, Loader, Rank, Sampler};
use flowtape_engine::comm::{Comm, Solo};
use flowtape_engine::meta::Meta;
use flowtape_engine::nn::{AdapterSpec, DropoutMasks, Param, ParamBuilder, Units};
use flowtape_engine::optim::{
    Clipping, Ema, LossScale, LossScaleState, LrScheduler, OptimizerStep, Ranks, Rates, Rounding, StepConfig,
};
use flowtape_engine::platform::Instant;
use flowtape_engine::{Device, Later};
use flowtape_flowmatch::{Batch, Draws, FlowMatchingPipeline};
use flowtape_models::{Transformer, create_pipeline, peft};

use crate::data::Data;
use crate::forward::Forward;
use crate::gradients::{GradientSquares, Squared, Squares};
use crate::ranks::{Told, is_first};
use crate::recipe::{Fsdp, Init, NonFinite, Sharing};
use crate::record::{BySigma, LeftOut, StepRecord, losses_of_samples, norms_by_group};
use crate::replay::{self, Finding};
use crate::start::Start;
use crate::state::{TrainProgress, TrainState};
use crate::timing::{StepTimes, Timed};
use crate::validation::{HeldOut, Validated};
use crate::{Error, Recipe, Result};
use crate::{builtin, precision, swap};

/// Steps from one look at each parameter's gradient to the next.
const LOOK: u64 = 10;

/// A step whose numbers are still on the device.
pub(crate) struct Enqueued {
    /// Optimiser steps done with it.
    pub step: u64,
    /// Of each batch, on all ranks.
    told: Vec<Told>,
    norm: Later,
    squares: Option<Squares>,
    epoch: u64,
    loss_scale: Option<Later>,
    lr: f64,
    started: Instant,
    /// Where the time of handing it over went.
    pub times: StepTimes,
}

/// An error where a loss is NaN or infinite.
fn finite_loss(loss: f64) -> flowtape_engine::Result<()> {
    if loss.is_finite() {
        return Ok(());
    }
    Err(flowtape_engine::Error::NonFinite { op: "loss", what: format!("the loss ({loss})") })
}

/// Everything that a recipe makes: it does one step at a time, and knows nothing of files, pictures and reports.
pub struct Trainer {
    recipe: Recipe,
    device: Device,
    start: Start,
    model: Box<dyn Transformer>,
    /// The adapters by their layers, where the recipe has `peft`.
    adapters: BTreeMap<String, AdapterSpec>,
    masks: DropoutMasks,
    pipeline: FlowMatchingPipeline,
    schedule: LrScheduler,
    data: Data,
    held_out: Option<HeldOut>,
    sampler: Arc<dyn Sampler>,
    /// Where random numbers come from instead of the seed, where a run is replayed.
    draws: Option<Box<dyn Draws + Send>>,
    collator: Collator,
    /// Made when the first batch is asked for, and again where the cursor was set.
    loader: Option<Loader>,
    /// The batches of the last two steps, the newest first: of which one may still be to be judged.
    recent: VecDeque<(u64, Vec<Loaded>)>,
    state: TrainState,
    ranks: Ranks,
    sharing: Sharing,
    /// Whether this rank was asked to stop: the others hear of it with the next step.
    asked_to_stop: bool,
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
        Self::with_data(device, recipe, builtin::data(&recipe.data, device)?)
    }

    /// The same with data of one's own instead of the recipe's `data`.
    ///
    /// # Errors
    /// When a section does not fit.
    pub fn with_data(device: &Device, recipe: &Recipe, data: Data) -> Result<Self> {
        Self::among(Arc::new(Solo), device, recipe, data)
    }

    /// The same as one of several ranks, which make it together: each takes batches of its own, and all come to the same weights.
    /// Nothing but numbers of steps is exchanged beside gradients, so all ranks need the same recipe and the same data.
    ///
    /// # Errors
    /// When a section does not fit, or a rank fails.
    pub fn among(comm: Arc<dyn Comm>, device: &Device, recipe: &Recipe, data: Data) -> Result<Self> {
        let mut recipe = recipe.clone();
        let sharing = recipe.sharing_among(&comm)?;
        let rank = sharing.batches;
        recipe.step_scheduler = recipe.step_scheduler.on_ranks(rank.count as usize)?;
        let start = Start::of(&recipe.model)?;
        let flow_matching = start.flow_matching(&recipe.flow_matching);
        let fingerprint = data.source.fingerprint();
        let (data, held) = data.split(recipe.validation.as_ref())?;
        recipe.step_scheduler =
            recipe.step_scheduler.resolved(data.source.len(), recipe.data.drop_last, rank.count as usize);
        let (local, seed) = (recipe.step_scheduler.local_batch_size, recipe.seed);
        let collator = data.collator(&recipe.data, seed);
        let held_out = recipe.validation.is_some();
        let held_out =
            held_out.then(|| HeldOut::new(held, collator.clone(), &flow_matching, local, seed)).transpose()?;
        let masks = DropoutMasks::default();
        let adapters = adapters(&recipe, &start, &masks)?;
        let params = |device: &Device| {
            let params = match &recipe.peft {
                Some(config) => {
                    let plan = config.plan(recipe.dtype, adapters.clone());
                    ParamBuilder::with_plan(recipe.seed, plan, device)
                }
                None => recipe.dtype.params(recipe.seed, device),
            };
            params.with_adaln_zero(recipe.init == Init::AdalnZero)
        };
        let groups = recipe.fsdp.as_ref().map_or(Ok(None), |fsdp| fsdp.groups(&comm))?;
        let shares_weights = recipe.fsdp.as_ref().is_some_and(Fsdp::shares_weights);
        let mut builder = params(device);
        if let Some(groups) = groups.as_ref().filter(|_| shares_weights) {
            // What a rank keeps is known before anything is made, so that no rank ever has all.
            let shapes = start.model(params(&Meta::default().device()))?;
            let owners = Units::owners(shapes.params(), groups.group().world_size());
            builder = builder.sharing(Units::new(groups.group().clone(), owners));
        }
        swap::check_device(&recipe, device)?;
        swap::check_ranks(&recipe, groups.is_some())?;
        if recipe.performance.blocks_to_swap > 0 {
            let shapes = start.model(params(&Meta::default().device()))?;
            builder = builder.sharing(swap::units(&recipe, shapes.params(), groups.is_some() && shares_weights)?);
        }
        // Of shared weights each rank has some, which make no whole file.
        let cache = recipe.peft.as_ref().and_then(|peft| peft.quantize_cache_dir.as_ref());
        if let Some(folder) = cache.filter(|_| groups.is_none() || !shares_weights) {
            builder = builder.keeping_codes(folder);
        }
        let mut model = start.model(builder)?;
        recipe.peft.as_ref().map_or(Ok(()), |config| config.start(&*model, &adapters))?;
        model.set_gradient_checkpointing(recipe.performance.activation_checkpointing);
        if sharing.tokens.is_some() && !model.shares_tokens() {
            let class = start.config["_class_name"].as_str().unwrap_or_default();
            let what = format!("fsdp.cp_size: ranks can't share the tokens of a {class}: leave it out");
            return Err(Error::Run { path: "recipe".into(), what });
        }
        let sampler = data.sampler(&recipe.data, local, seed)?;
        let dropped = sampler.dropped(rank);
        if dropped > 0 && is_first(&*comm) && device.backend().has_data() {
            let of = data.source.len();
            tracing::warn!("data.drop_last: each epoch leaves out {dropped} of {of} samples, which fill no batch");
        }
        let optimizer = &recipe.optimizer;
        let schedule = recipe.schedule()?;
        if let Some(max) = recipe.lr_scheduler.and_then(|s| s.max_lr).filter(|max| *max != optimizer.lr) {
            tracing::warn!("lr_scheduler.max_lr ({max}) is what counts, not optimizer.lr ({})", optimizer.lr);
        }
        if device.backend().has_data() && is_first(&*comm) {
            if let Some(caution) = start.caution {
                tracing::warn!("{caution}");
            }
            let lr = schedule.config().max_lr.unwrap_or(optimizer.lr);
            if recipe.dtype.rounding(recipe.seed) == Rounding::Nearest {
                precision::warn(&optimizer.name, lr, model.params())?;
            }
        }
        if device.backend().has_data() {
            // All begin with the same bits, whatever machines they are.
            Ranks::replicated(comm.clone()).align(model.params())?;
        }
        // Averages begin with the wider copies, as long as all have those.
        let ema = recipe.ema.as_ref().map(|config| Ema::new(config, model.params())).transpose()?;
        let ranks = match groups {
            // Adapters are small, and all ranks update them.
            Some(groups) if shares_weights || recipe.peft.is_none() => Ranks::in_groups(groups, model.params())?,
            _ => Ranks::replicated(comm),
        };
        Ok(Self {
            pipeline: create_pipeline(flow_matching)?,
            schedule,
            sampler,
            draws: None,
            collator,
            held_out,
            state: TrainState {
                optimizer: optimizer
                    .build()?
                    .with_rounding(recipe.dtype.rounding(recipe.seed))
                    .with_cpu_offload(recipe.performance.optimizer_cpu_offload),
                ema,
                loss_scale: recipe.dtype.loss_scale(recipe.loss_scale, device)?,
                progress: TrainProgress {
                    step: 0,
                    cursor: Default::default(),
                    validation_loss: None,
                    train_seconds: 0.0,
                    skipped_steps: 0,
                    data: fingerprint,
                    ranks: rank.count,
                },
            },
            ranks,
            sharing,
            asked_to_stop: false,
            recipe,
            start,
            model,
            adapters,
            masks,
            data,
            loader: None,
            recent: VecDeque::new(),
            device: device.clone(),
        })
    }

    /// Without data: each step is given its batches ([`Trainer::step_on`]).
    ///
    /// # Errors
    /// When a section does not fit.
    pub fn without_data(device: &Device, recipe: &Recipe) -> Result<Self> {
        Self::with_data(device, recipe, Data::none()?)
    }

    /// With batches and random numbers of one's own instead of those that follow from the seed: to replay another program's run.
    #[must_use]
    pub fn replaying(self, sampler: Arc<dyn Sampler>, draws: impl Draws + Send + 'static) -> Self {
        Self { sampler, draws: Some(Box::new(draws)), loader: None, ..self }
    }

    /// The recipe.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// What is not trained on although it is there.
    pub fn left_out(&self) -> LeftOut {
        LeftOut {
            unreadable: self.loader.as_ref().map_or(0, Loader::skipped),
            dropped_each_epoch: self.sampler.dropped(self.rank()),
        }
    }

    /// The model.
    pub fn model(&self) -> &dyn Transformer {
        &*self.model
    }

    /// What goes on from step to step beside the weights.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// The ranks that train together.
    pub fn comm(&self) -> &Arc<dyn Comm> {
        self.ranks.comm()
    }

    /// This one of those that have batches of their own.
    pub(crate) fn rank(&self) -> Rank {
        self.sharing.batches
    }

    /// Tells the others with the next step that this rank was asked to stop.
    pub(crate) fn ask_to_stop(&mut self, stop: bool) {
        self.asked_to_stop = stop;
    }

    /// Writes a bundle of one of the last two steps, which was not finite, and says where it stopped being that. The folder is whole
    /// afterwards, or not there.
    ///
    /// # Errors
    /// When the step is another, its weights are gone (without clipping they are updated on the way of backward), or a file can't be
    /// written.
    pub fn bundle(&self, step: u64, folder: &Path) -> Result<Finding> {
        let refused = |what: String| Err(Error::Run { path: folder.into(), what });
        let Some((_, parts)) = self.recent.iter().find(|(recent, parts)| *recent == step && !parts.is_empty()) else {
            return refused(format!("the samples of step {step} are gone"));
        };
        if self.recipe.clip_grad_norm.is_none() && self.state.progress.step >= step {
            let what = "its weights are gone: without clip_grad_norm they are updated before all gradients are known";
            return refused(what.into());
        }
        if self.shares_weights() {
            return refused("ranks share out its weights (`fsdp`): none has them all".into());
        }
        replay::write(self, step, parts, folder)
    }

    /// What a step after so many others does forward, on a rank.
    pub(crate) fn forward_of(&self, step: u64, rank: Rank) -> Forward<'_> {
        let sharing = Sharing { batches: rank, tokens: None };
        Forward::new(&self.recipe, &*self.model, &self.pipeline, &self.masks, step, sharing)
    }

    /// The batch of loaded samples.
    pub(crate) fn collate(&self, loaded: &Loaded) -> Result<Batch> {
        Ok(self.collator.batch(loaded, &self.device)?)
    }

    /// What the source calls a sample.
    pub(crate) fn sample_name(&self, index: usize) -> String {
        self.data.source.name(index)
    }

    /// Where it trains.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What it trains on.
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// Sizes of a sample in pixels: `[C, H, W]` or `[C, F, H, W]`.
    ///
    /// # Errors
    /// When the data has none.
    pub fn sample_dims(&self) -> Result<Vec<usize>> {
        self.data.sample_dims()
    }

    /// Bytes of what the optimiser remembers in the host's memory, instead of the device's.
    pub(crate) fn offloaded(&self) -> u64 {
        self.state.optimizer.offloaded()
    }

    /// Whether all ranks are needed for a snapshot.
    pub(crate) fn is_shared_out(&self) -> bool {
        self.ranks.is_sharded() || self.shares_weights()
    }

    /// Whether all ranks are needed for whatever the model does.
    pub(crate) fn shares_weights(&self) -> bool {
        self.ranks.shares_weights()
    }

    /// Whether this rank updates a parameter.
    pub(crate) fn updates(&self, param: &Param) -> bool {
        self.ranks.updates(param)
    }

    /// One optimiser step. Its data and its random numbers follow from the seed and from where the run stands.
    ///
    /// # Errors
    /// When a sample can't be read, the loss exploded, the gradients' norm is not finite, or a parameter has no gradient.
    pub fn step(&mut self) -> Result<StepRecord> {
        self.step_of(None)
    }

    /// The same on batches that the caller has (latents and what the adapter reads, by name) in place of the data's: several are the
    /// micro-batches of one step. Their place among the data does not move.
    ///
    /// # Errors
    /// As above, and when a batch does not fit the model or there is none.
    pub fn step_on(&mut self, batches: &[Batch]) -> Result<StepRecord> {
        self.step_of(Some(batches))
    }

    fn step_of(&mut self, given: Option<&[Batch]>) -> Result<StepRecord> {
        let started = Instant::now();
        let enqueued = self.enqueue_of(given)?;
        let record = self.read(enqueued, None)?;
        self.count_time(started);
        Ok(record)
    }

    /// Waits for the numbers of a step; `last_read` is when those of the step before had come.
    pub(crate) fn read(&mut self, enqueued: Enqueued, last_read: Option<Instant>) -> Result<StepRecord> {
        let Enqueued { step, epoch, told, norm, squares, loss_scale, lr, started, times } = enqueued;
        let told = told.into_iter().map(Told::wait).collect::<Result<Vec<_>>>()?.concat();
        let loss_scale = loss_scale.map(LossScaleState::read).transpose()?;
        let grad_norm = norm.item()?;
        let skip = self.recipe.non_finite == NonFinite::Skip;
        // A step that overflowed was skipped: the scale is smaller then.
        if loss_scale.is_none() && !skip {
            Clipping::finite(grad_norm)?;
        }
        let skipped = &mut self.state.progress.skipped_steps;
        *skipped += u64::from(skip && loss_scale.is_none() && !grad_norm.is_finite());
        let since = last_read.map_or(started, |t| t.max(started));
        let step_time = since.elapsed().as_secs_f64();
        let gradient_squares = squares.map_or(Ok(Vec::new()), Squares::wait)?;
        let samples: usize = told.iter().map(|rank| rank.samples.len()).sum();
        let skipped_steps = loss_scale.map(|s| s.skipped_steps).or(skip.then_some(*skipped));
        Ok(StepRecord {
            step,
            epoch,
            loss: told.iter().map(|rank| rank.share).sum(),
            lr,
            grad_norm,
            grad_norm_by_group: norms_by_group(grad_norm, &gradient_squares),
            step_time,
            samples_per_second: samples as f64 / step_time,
            memory: self.device.backend().memory().into(),
            by_sigma: BySigma::of(told.iter().flat_map(|rank| rank.samples.iter().copied())),
            stop: told.iter().any(|rank| rank.stop),
            loss_scale: loss_scale.map(|s| s.scale),
            skipped_steps,
            gradient_squares,
            times,
        })
    }

    /// Adds the time since then to that of training.
    pub(crate) fn count_time(&mut self, since: Instant) {
        self.state.progress.train_seconds += since.elapsed().as_secs_f64();
    }

    /// Whether the next batch begins another epoch.
    pub(crate) fn ends_epoch(&self) -> bool {
        let at = self.state.progress.cursor;
        self.sampler.plan(at, self.rank()).is_none_or(|plan| plan.next.epoch != at.epoch)
    }

    /// Batches of the step at a cursor. An epoch's last step takes those that are left, and is divided by their number, as in NeMo.
    fn parts(&self, mut at: Cursor) -> usize {
        let most = self.recipe.step_scheduler.micro_batches() / self.rank().count as usize;
        let (mut parts, mut epoch) = (0, None);
        while most > 1 && parts < most {
            let Some(plan) = self.sampler.plan(at, self.rank()) else { break };
            if *epoch.get_or_insert(plan.next.epoch) != plan.next.epoch {
                break;
            }
            (parts, at) = (parts + 1, plan.next);
        }
        parts.max(1)
    }

    /// The same, but nothing is read back yet: what is wrong with its numbers is found when they are read.
    pub(crate) fn enqueue(&mut self) -> Result<Enqueued> {
        self.enqueue_of(None)
    }

    /// The same on the caller's batches, or on the data's.
    fn enqueue_of(&mut self, given: Option<&[Batch]>) -> Result<Enqueued> {
        self.recent.truncate(1);
        self.recent.push_front((self.state.progress.step + 1, Vec::new()));
        let started = Instant::now();
        let TrainProgress { step, mut cursor, .. } = self.state.progress;
        let parts = given.map_or_else(|| self.parts(cursor), <[Batch]>::len);
        let rank = self.rank();
        let all_parts = parts * rank.count as usize;
        let rates = Rates { lr: self.schedule.lr(step), weight_decay: self.schedule.weight_decay(step) };
        let max_norm = self.recipe.clip_grad_norm.as_ref().map(|c| c.max_norm);
        let skip_non_finite = self.recipe.non_finite == NonFinite::Skip;
        let config = StepConfig { micro_batches: parts, max_norm, skip_non_finite };
        let looked_at = (step + 1).is_multiple_of(LOOK);
        let squares = looked_at.then(|| GradientSquares::new(self.model.params(), &self.device)).transpose()?;
        let scaled = self.state.loss_scale.is_some();
        let TrainState { optimizer, loss_scale, .. } = &mut self.state;
        let updates = Cell::new(0.0);
        let (params, ranks) = (self.model.params(), Some(&self.ranks));
        let mut sinks = OptimizerStep::on_ranks(config, rates, optimizer, params, loss_scale.as_mut(), ranks)?
            .behind(|sink| Timed { sink, seconds: &updates })
            .behind(|sink| Squared { sink, squares: squares.as_ref() });
        let mut times = StepTimes::default();
        let mut told = Vec::with_capacity(parts);
        let mut norm = None;
        let on_host = self.device.backend().is_host();
        let (recipe, model) = (&self.recipe, &*self.model);
        let mut forward = Forward::new(recipe, model, &self.pipeline, &self.masks, step, self.sharing.clone());
        for part in 0..parts {
            let begun = Instant::now();
            let (batch, most) = match given {
                // Those of all ranks are of one size.
                Some(given) => (given[part].clone(), given[part].size()?),
                None => {
                    let loader = match &mut self.loader {
                        Some(loader) => loader,
                        none => {
                            let sampler = self.sampler.clone();
                            none.insert(self.data.loader(&recipe.data, sampler, rank, recipe.seed, cursor)?)
                        }
                    };
                    let planned = self.sampler.plan(cursor, rank);
                    let loaded = loader.next()?;
                    // Where batches are passed over, ranks would lose count of each other.
                    if rank.count > 1 && planned.as_ref().is_some_and(|plan| plan.next != loaded.plan.next) {
                        let what = "no sample of a batch can be read, and several ranks can't pass one over".into();
                        return Err(Error::Run { path: "data".into(), what });
                    }
                    cursor = loaded.plan.next;
                    let batch = self.collator.batch(&loaded, &self.device)?;
                    self.recent[0].1.push(loaded);
                    (batch, planned.map_or(0, |plan| plan.picks.len()))
                }
            };
            let with_data = Instant::now();
            let (tape, output) = forward.step(&batch, self.draws.as_deref_mut())?;
            let share =
                if all_parts == 1 { output.loss.clone() } else { output.loss.mul_scalar(1.0 / all_parts as f64)? };
            // Before anything is updated by it, where the host need not wait.
            if on_host && !skip_non_finite && !scaled {
                finite_loss(share.item()?)?;
            }
            let without = model.parameters_without_gradient(&output.inputs);
            let with_loss = Instant::now();
            times.forward_bytes = times.forward_bytes.max(self.device.backend().memory().used);
            norm = sinks.backward(&tape, &share, &without)?;
            times.data += (with_data - begun).as_secs_f64();
            times.forward += (with_loss - with_data).as_secs_f64();
            // Ranks meet here for their gradients; before it, they would wait for each other twice.
            let (losses, sigmas) = (losses_of_samples(&output)?, &output.noised.sample.sigma);
            told.push(Told::gather(
                &**self.ranks.comm(),
                &self.sharing,
                &share,
                &losses,
                sigmas,
                most,
                self.asked_to_stop,
            )?);
            times.backward += with_loss.elapsed().as_secs_f64();
        }
        drop((sinks, forward));
        if let Some(ema) = &mut self.state.ema {
            ema.update_on_ranks(&self.ranks, self.model.params(), step + 1)?;
        }
        times.optimizer = updates.get();
        times.backward -= times.optimizer;
        let nothing = || Error::Run { path: self.recipe.name.clone().into(), what: "no samples".into() };
        let norm = norm.ok_or_else(nothing)?.read_later()?;
        let loss_scale = self.state.loss_scale.as_ref().map(LossScale::read_later).transpose()?;
        self.state.progress.step = step + 1;
        self.state.progress.cursor = cursor;
        let squares = squares.map(|squares| squares.read_later()).transpose()?;
        let (step, epoch) = (step + 1, cursor.epoch);
        Ok(Enqueued { step, epoch, told, norm, squares, loss_scale, lr: rates.lr, started, times })
    }

    /// Whether the numbers of a step are there as soon as it is enqueued.
    pub(crate) fn reads_at_once(&self) -> bool {
        self.device.backend().is_host()
    }

    /// How well the model does on the samples that are held out, with its weights and with their average; nothing where none are,
    /// or where it was asked to stop meanwhile.
    ///
    /// # Errors
    /// When a sample can't be read, or the model fails.
    pub fn validate(&mut self, stop: &AtomicBool) -> Result<Option<Validated>> {
        let Some(held_out) = &self.held_out else { return Ok(None) };
        let loss = || held_out.loss(&*self.model, self.recipe.dtype.into(), &self.device, stop);
        let Some(raw) = self.as_evaluated(loss)? else { return Ok(None) };
        let ema = match &self.state.ema {
            Some(ema) => match ema.instead(self.model.params(), loss)? {
                Some(found) => Some(found),
                None => return Ok(None),
            },
            None => None,
        };
        let validated = Validated { step: self.state.progress.step, raw, ema };
        self.state.progress.validation_loss = Some(validated.loss());
        Ok(Some(validated))
    }
}

/// The adapters of a recipe, by their layers: none where it has no `peft`.
fn adapters(recipe: &Recipe, start: &Start, masks: &DropoutMasks) -> Result<BTreeMap<String, AdapterSpec>> {
    match &recipe.peft {
        Some(config) => config.adapters(recipe.dtype, &peft::linears(&start.config)?, masks),
        None => Ok(BTreeMap::new()),
    }
}
