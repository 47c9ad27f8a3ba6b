//! The training loop.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use flowtape_engine::cpu::awake;
use flowtape_engine::optim::{
    Clipping, LossScale, LossScaleState, LrScheduler, LrSchedulerConfig, Optimizer, OptimizerStep, Rates, StepConfig,
};
use flowtape_engine::{DType, Device, Later, Philox, Tape, Tensor};
use flowtape_flowmatch::{FlowMatchingPipeline, PhiloxDraws, StepOptions};
use flowtape_models::{Condition, ModelKind, Transformer, create_model, create_pipeline};
use serde::{Deserialize, Serialize};

use crate::data::Data;
use crate::digits::{CAPTIONS, SIDE};
use crate::error::io;
use crate::generate::{Request, generate};
use crate::picture::{save_animation, save_grid, save_loss_curve};
use crate::recipe::Init;
use crate::report::{FirstFrame, Quality, judge, judge_first_frames, judge_videos};
use crate::run::{Line, RunFolder, State, write_line};
use crate::{Error, Recipe, Result};

/// Streams of random numbers of a run, each its own fork of the seed.
const DATA: u64 = 1;
const STEPS: u64 = 2;
/// Seeds of grids and report: the same in every run, so that pictures can be compared.
const GRID_SEED: u64 = 1;
const REPORT_SEED: u64 = 2;
/// Steps over which losses are averaged for people.
const WINDOW: usize = 100;

/// Columns of a grid: samples of one class.
const COLUMNS: usize = 10;
/// The same for videos, which are larger.
const VIDEO_COLUMNS: usize = 4;

/// What a run came to.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Summary {
    /// The run folder.
    pub run_dir: PathBuf,
    /// Optimiser steps done.
    pub steps: u64,
    /// The mean loss of the last 100 steps.
    pub final_loss: f64,
    /// Seconds of training, over all parts of a resumed run.
    pub train_seconds: f64,
    /// Seconds of everything: training, grids, checkpoints, report.
    pub total_seconds: f64,
    /// Whether it was stopped before its last step.
    pub interrupted: bool,
    /// Steps that were skipped because a gradient was not finite, where the loss is scaled.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub skipped_steps: Option<u64>,
    /// Figures of the report, where the recipe asks for one.
    #[serde(flatten)]
    pub quality: Option<Quality>,
    /// Figures of videos that go on from a given frame, where the recipe asks for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_to_video: Option<ImageToVideo>,
}

/// Figures of videos that go on from a given first frame.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct ImageToVideo {
    /// Of all frames.
    #[serde(flatten)]
    pub quality: Quality,
    /// Of the first one.
    pub first_frame: FirstFrame,
}

/// Told how a run goes.
pub trait Progress {
    /// The run begins at step `from` of `steps`.
    fn begin(&mut self, run: &Path, from: u64, steps: u64, parameters: usize);
    /// A step is done; `mean_loss` is over the last 100.
    fn step(&mut self, line: &Line, mean_loss: f64);
    /// Something else happens: a grid, a checkpoint, the report.
    fn note(&mut self, what: &str);
}

/// Trains a recipe from its beginning. `stop` ends it after the current step, with a checkpoint.
///
/// # Errors
/// When the recipe, the folder or a step fails.
pub fn train(recipe: &Recipe, progress: &mut dyn Progress, stop: &AtomicBool) -> Result<Summary> {
    train_on(&flowtape_gpu::device(&recipe.device)?, recipe, progress, stop)
}

/// The same on a device that is open already.
///
/// # Errors
/// When the recipe, the folder or a step fails.
pub fn train_on(device: &Device, recipe: &Recipe, progress: &mut dyn Progress, stop: &AtomicBool) -> Result<Summary> {
    awake(device, || {
        let trainer = Trainer::on(device, recipe)?;
        let run = RunFolder::create(recipe)?;
        trainer.run(&run, State::default(), progress, stop)
    })
}

/// Goes on with an interrupted run from its last checkpoint: the result is that of an uninterrupted run, bit for bit,
/// unless another `device` than the recipe's is named.
///
/// # Errors
/// When the device is not there, the folder has no checkpoint, or a step fails.
pub fn resume(path: &Path, device: Option<&str>, progress: &mut dyn Progress, stop: &AtomicBool) -> Result<Summary> {
    let (run, mut recipe) = RunFolder::open(path)?;
    recipe.device = device.map_or(recipe.device, str::to_owned);
    let device = flowtape_gpu::device(&recipe.device)?;
    awake(&device, || {
        let mut trainer = Trainer::on(&device, &recipe)?;
        let state = run.load(&*trainer.model, &mut trainer.optimizer)?;
        if let (Some(scale), Some(state)) = (&mut trainer.loss_scale, state.loss_scale) {
            scale.load(state)?;
        }
        trainer.run(&run, state, progress, stop)
    })
}

/// A step whose numbers are still on the device.
struct Enqueued {
    step: u64,
    losses: Vec<Later>,
    norm: Later,
    loss_scale: Option<Later>,
    lr: f64,
    samples: usize,
    started: Instant,
}

impl Enqueued {
    /// Waits for the numbers; `last_read` is when those of the step before had come.
    fn read(self, last_read: Option<Instant>) -> Result<Line> {
        let losses = self.losses.into_iter().map(Later::item).collect::<Result<Vec<f64>, _>>()?;
        let loss_scale = self.loss_scale.map(LossScaleState::read).transpose()?;
        let grad_norm = self.norm.item()?;
        // A step that overflowed was skipped: the scale is smaller then.
        if loss_scale.is_none() {
            Clipping::finite(grad_norm)?;
        }
        let since = last_read.map_or(self.started, |t| t.max(self.started));
        let samples_per_second = self.samples as f64 / since.elapsed().as_secs_f64();
        Ok(Line {
            step: self.step,
            loss: losses.iter().sum(),
            lr: self.lr,
            grad_norm,
            samples_per_second,
            loss_scale: loss_scale.map(|s| s.scale),
            skipped_steps: loss_scale.map(|s| s.skipped_steps),
        })
    }
}

/// Everything that a recipe makes.
pub struct Trainer<'a> {
    recipe: &'a Recipe,
    model: Box<dyn Transformer>,
    pipeline: FlowMatchingPipeline,
    optimizer: Optimizer,
    loss_scale: Option<LossScale>,
    schedule: LrScheduler,
    data: Data,
    device: Device,
}

impl<'a> Trainer<'a> {
    /// Model, pipeline, optimiser and data of a recipe.
    ///
    /// # Errors
    /// When a section does not fit.
    pub fn new(recipe: &'a Recipe) -> Result<Self> {
        Self::on(&flowtape_gpu::device(&recipe.device)?, recipe)
    }

    /// The same on a device that is open already.
    ///
    /// # Errors
    /// When a section does not fit.
    pub fn on(device: &Device, recipe: &'a Recipe) -> Result<Self> {
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
            optimizer: optimizer.build()?,
            loss_scale: recipe.dtype.loss_scale(recipe.loss_scale, device)?,
            schedule: LrScheduler::new(schedule, optimizer.lr, optimizer.weight_decay, steps)?,
            data: Data::new(&recipe.data, Philox::new(recipe.seed).fork(DATA).state().0)?,
            recipe,
            model,
            device: device.clone(),
        })
    }

    /// The model.
    pub fn model(&self) -> &dyn Transformer {
        &*self.model
    }

    /// One optimiser step, from 0. Its data and its random numbers follow from the seed and the step.
    ///
    /// # Errors
    /// When the loss exploded, the gradients' norm is not finite, or a parameter has no gradient.
    pub fn step(&mut self, step: u64) -> Result<Line> {
        self.enqueue(step)?.read(None)
    }

    /// The same, but nothing is read back yet: what is wrong with its numbers is found when they are read.
    fn enqueue(&mut self, step: u64) -> Result<Enqueued> {
        let started = Instant::now();
        let (global, local) = (self.recipe.global_batch_size(), self.recipe.step_scheduler.local_batch_size);
        let parts = global / local;
        let mut draws = PhiloxDraws { philox: Philox::new(self.recipe.seed).fork(STEPS).fork(step) };
        let rates = Rates { lr: self.schedule.lr(step), weight_decay: self.schedule.weight_decay(step) };
        let max_norm = self.recipe.clip_grad_norm.as_ref().map(|c| c.max_norm);
        let config = StepConfig { micro_batches: parts, max_norm };
        let (params, scale) = (self.model.params(), self.loss_scale.as_mut());
        let mut sinks = OptimizerStep::new(config, rates, &mut self.optimizer, params, scale)?;
        let mut losses = Vec::with_capacity(parts);
        let mut norm = None;
        for i in 0..parts {
            let from = step as usize * global + i * local;
            let batch = self.data.batch(from, local, &self.device)?;
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
            norm = sinks.backward(&tape, &share, &without)?;
        }
        drop(sinks);
        let norm =
            norm.ok_or_else(|| Error::Run { path: self.recipe.name.clone().into(), what: "no samples".into() })?;
        let (norm, loss_scale) = (norm.read_later()?, self.loss_scale.as_ref().map(LossScale::read_later).transpose()?);
        Ok(Enqueued { step: step + 1, losses, norm, loss_scale, lr: rates.lr, samples: global, started })
    }

    /// Whether the numbers of a step are there as soon as it is enqueued.
    fn reads_at_once(&self) -> bool {
        self.device.backend().is_host()
    }

    fn run(
        mut self,
        run: &RunFolder,
        State { step: first, train_seconds: seconds_before, .. }: State,
        progress: &mut dyn Progress,
        stop: &AtomicBool,
    ) -> Result<Summary> {
        let started = Instant::now();
        let steps = self.recipe.step_scheduler.max_steps;
        let (mut lines, mut metrics) = run.metrics(first)?;
        progress.begin(run.path(), first, steps, self.model.params().numel());
        let mut train_seconds = seconds_before;
        let mut saved = first;
        let mut step = first;
        let mut last_read = None;
        let due = |every: u64, step: u64| every > 0 && step.is_multiple_of(every);
        let mut ahead: Option<Enqueued> = None;
        while step < steps && !stop.load(Ordering::Relaxed) {
            let before = Instant::now();
            let diverged = |step: u64| move |error: Error| error.at(step, saved);
            let enqueued = self.enqueue(step).map_err(diverged(step + 1))?;
            step += 1;
            let checkpoint = due(self.recipe.step_scheduler.ckpt_every_steps, step) && step < steps;
            let grid = due(self.recipe.sampling.every_steps, step) && step < steps;
            // The device is kept busy: the step before is read while this one runs.
            let last = checkpoint || grid || step == steps || stop.load(Ordering::Relaxed) || self.reads_at_once();
            let mut to_read: Vec<Enqueued> = ahead.take().into_iter().chain([enqueued]).collect();
            if !last {
                ahead = to_read.pop();
            }
            let mut done = Vec::new();
            for enqueued in to_read {
                let failed = diverged(enqueued.step);
                let line = enqueued.read(last_read).map_err(failed)?;
                last_read = Some(Instant::now());
                done.push(line);
            }
            train_seconds += before.elapsed().as_secs_f64();
            for line in done {
                write_line(&mut metrics, &line).map_err(io(run.path()))?;
                lines.push(line);
                let window = &lines[lines.len().saturating_sub(WINDOW)..];
                progress.step(&lines[lines.len() - 1], mean_loss(window));
            }
            if checkpoint {
                self.save(run, step, train_seconds, &mut metrics, progress)?;
                saved = step;
            }
            if grid {
                self.grid(run, step, progress)?;
                last_read = None;
            }
        }
        // Interrupted between two steps.
        if let Some(enqueued) = ahead {
            let step = enqueued.step;
            let line = enqueued.read(last_read).map_err(|error| error.at(step, saved))?;
            write_line(&mut metrics, &line).map_err(io(run.path()))?;
            lines.push(line);
        }
        if saved < step || first == steps {
            self.save(run, step, train_seconds, &mut metrics, progress)?;
        }
        let curve: Vec<(u64, f64)> = lines.iter().map(|l| (l.step, l.loss)).collect();
        save_loss_curve(&run.curve_path(), &curve)?;
        let interrupted = step < steps;
        let (mut quality, mut image_to_video) = (None, None);
        if !interrupted {
            self.grid(run, step, progress)?;
            if let Some(config) = &self.recipe.report {
                progress.note("sampling for the report");
                let classes = by_class(config.samples_per_class);
                quality = Some(self.judge(&self.samples(&classes, REPORT_SEED, None)?, &classes));
                image_to_video = self.judge_image_to_video(&classes)?;
            }
        }
        let summary = Summary {
            run_dir: run.path().into(),
            steps: step,
            final_loss: mean_loss(&lines[lines.len().saturating_sub(WINDOW)..]),
            train_seconds,
            total_seconds: seconds_before + started.elapsed().as_secs_f64(),
            interrupted,
            skipped_steps: lines.last().and_then(|l| l.skipped_steps),
            quality,
            image_to_video,
        };
        if !interrupted {
            let text = format!("{:#}\n", serde_json::json!(summary));
            std::fs::write(run.report_path(), text).map_err(io(run.report_path()))?;
        }
        Ok(summary)
    }

    fn save(
        &self,
        run: &RunFolder,
        step: u64,
        train_seconds: f64,
        metrics: &mut impl Write,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        progress.note("saving a checkpoint");
        metrics.flush().map_err(io(run.path()))?;
        let loss_scale = self.loss_scale.as_ref().map(|scale| LossScaleState::read(scale.read_later()?)).transpose()?;
        run.save(&*self.model, &self.optimizer, &State { step, train_seconds, loss_scale })
    }

    fn samples(&self, classes: &[u8], seed: u64, first_frames: Option<&[f32]>) -> Result<Vec<f32>> {
        let prompts: Vec<&str> = classes.iter().map(|c| CAPTIONS[usize::from(*c)]).collect();
        let request = Request { prompts: &prompts, first_frames, seed, device: &self.device };
        generate(&*self.model, self.pipeline.adapter(), &self.data, &request, &self.recipe.sampling)
    }

    /// A row a class.
    fn grid(&self, run: &RunFolder, step: u64, progress: &mut dyn Progress) -> Result<()> {
        progress.note("sampling a grid");
        let columns = if self.data.video.is_some() { VIDEO_COLUMNS } else { COLUMNS };
        let classes = by_class(columns);
        save_samples(&self.samples(&classes, GRID_SEED, None)?, &self.data, columns, |kind| {
            run.samples_path(step, kind)
        })?;
        if self.recipe.sampling.image_to_video {
            let given = self.data.first_frames(&classes, GRID_SEED)?;
            let samples = self.samples(&classes, GRID_SEED, Some(&given))?;
            save_samples(&samples, &self.data, columns, |kind| run.samples_path(step, &format!("_i2v{kind}")))?;
        }
        Ok(())
    }

    fn judge(&self, samples: &[f32], classes: &[u8]) -> Quality {
        match &self.data.video {
            Some(size) => judge_videos(samples, size, classes, &self.data.digits),
            None => judge(samples, classes, &self.data.digits),
        }
    }

    fn judge_image_to_video(&self, classes: &[u8]) -> Result<Option<ImageToVideo>> {
        let Some(size) = self.data.video.filter(|_| self.recipe.sampling.image_to_video) else { return Ok(None) };
        let given = self.data.first_frames(classes, REPORT_SEED)?;
        let samples = self.samples(classes, REPORT_SEED, Some(&given))?;
        let first_frame = judge_first_frames(&samples, &given, &size);
        Ok(Some(ImageToVideo { quality: self.judge(&samples, classes), first_frame }))
    }
}

/// Writes samples as a grid; videos as one that plays, and the frames of each row's first one side by side. `path` says
/// where, from a suffix of the name.
///
/// # Errors
/// When a file can't be written.
pub fn save_samples(samples: &[f32], data: &Data, columns: usize, path: impl Fn(&str) -> PathBuf) -> Result<()> {
    let Some(size) = &data.video else {
        return save_grid(&path(""), samples, (SIDE, SIDE), columns);
    };
    save_animation(&path(""), samples, size, columns)?;
    let firsts: Vec<f32> = samples.chunks_exact(size.pixels()).step_by(columns).flatten().copied().collect();
    save_grid(&path("_frames"), &firsts, (size.height, size.width), size.frames)
}

/// Each class `n` times.
fn by_class(n: usize) -> Vec<u8> {
    (0..10).flat_map(|class| std::iter::repeat_n(class, n)).collect()
}

fn mean_loss(lines: &[Line]) -> f64 {
    lines.iter().map(|l| l.loss).sum::<f64>() / lines.len().max(1) as f64
}

/// A trained model behind its adapter, for sampling.
pub struct Trained {
    model: Box<dyn Transformer>,
    pipeline: FlowMatchingPipeline,
    /// What it was trained on.
    pub data: Data,
    /// The run's own settings.
    pub sampling: crate::recipe::SamplingConfig,
    device: Device,
}

impl Trained {
    /// From a run folder's newest checkpoint, on the recipe's device or another.
    ///
    /// # Errors
    /// When the device is not there, it is not a run folder or has no checkpoint.
    pub fn load(path: &Path, device: Option<&str>) -> Result<Self> {
        let (run, recipe) = RunFolder::open(path)?;
        let device = flowtape_gpu::device(device.unwrap_or(&recipe.device))?;
        let dtype: DType = recipe.dtype.into();
        let model = flowtape_models::checkpoint::load(&run.checkpoint()?, dtype, &device)?;
        let pipeline = create_pipeline(recipe.flow_matching)?;
        Ok(Self { model, pipeline, data: Data::new(&recipe.data, recipe.seed)?, sampling: recipe.sampling, device })
    }

    /// `n` samples of a prompt; videos may go on from a given first frame.
    ///
    /// # Errors
    /// When the prompt has an unknown word, `n` is 0, or the model takes no first frame.
    pub fn sample(&self, prompt: &str, n: usize, seed: u64, first_frame: Option<&[f32]>) -> Result<Vec<f32>> {
        let refused = |path: &str, what: &str| Err(Error::Run { path: path.into(), what: what.into() });
        if n == 0 {
            return refused("--n", "expected at least 1, got 0");
        }
        let kind = ModelKind::of_adapter(self.pipeline.adapter().name())?;
        if first_frame.is_some() && (self.data.video.is_none() || !kind.takes(Condition::FirstFrame)) {
            let able = Condition::FirstFrame.adapters().join(", ");
            return refused("--first-frame", &format!("only videos of these adapters go on from a frame: {able}"));
        }
        let first_frames = first_frame.map(|frame| frame.repeat(n));
        let prompts = vec![prompt; n];
        let request = Request { prompts: &prompts, first_frames: first_frames.as_deref(), seed, device: &self.device };
        awake(&self.device, || generate(&*self.model, self.pipeline.adapter(), &self.data, &request, &self.sampling))
    }
}
