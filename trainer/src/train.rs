//! A run from its beginning, or from its last checkpoint, to its end.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use flowtape_engine::Device;
use flowtape_engine::comm::{Comm, Solo};
use flowtape_engine::cpu::awake;
use flowtape_engine::platform::Instant;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::changes::listed;
use crate::check::{Check, Depth};
use crate::hooks::{Begin, Cause, Checkpoint, Event, Hook, Validate};
#[cfg(feature = "charts")]
use crate::observe::LossCurve;
use crate::observe::{Environment, Learning, Metrics, Notices, Page, TensorBoard, Validations};
use crate::ranks::{in_turn, is_first, shared_path, together};
use crate::record::{LeftOut, StepRecord};
use crate::replay::told;
use crate::run::{RunFolder, quoted};
use crate::state::Stored;
use crate::trainer::{Enqueued, Trainer};
use crate::validation::Validated;
use crate::{Error, Recipe, Result, builtin};

/// Of what several ranks do together.
static NEVER: AtomicBool = AtomicBool::new(false);

/// Steps over which losses are averaged for people.
pub const WINDOW: usize = 100;

/// What a run came to.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Summary {
    /// The run folder; what of its name is no text is replaced where it is written.
    #[serde(serialize_with = "as_text")]
    pub run_dir: PathBuf,
    /// Optimiser steps done.
    pub steps: u64,
    /// The mean loss of the last 100 steps.
    pub final_loss: f64,
    /// Seconds of training, over all parts of a resumed run.
    pub train_seconds: f64,
    /// Seconds of everything: training, grids, checkpoints, report.
    pub total_seconds: f64,
    /// Whether it was stopped before everything was done.
    pub interrupted: bool,
    /// Steps that were skipped because a gradient was not finite, where the loss is scaled.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub skipped_steps: Option<u64>,
    /// Samples that were not trained on although they are there.
    #[serde(default)]
    pub left_out: LeftOut,
    /// What hooks found out, by name.
    #[serde(flatten)]
    pub figures: Map<String, Value>,
}

fn as_text<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&path.to_string_lossy())
}

/// Trains a recipe from its beginning. `hooks` are told of everything; `stop` ends the run after the current step, with a
/// checkpoint.
///
/// # Errors
/// When the recipe, the folder, a step or a hook fails.
pub fn train(recipe: &Recipe, hooks: Vec<Box<dyn Hook + '_>>, stop: &AtomicBool) -> Result<Summary> {
    train_on(&flowtape_gpu::device(&recipe.device)?, recipe, hooks, stop)
}

/// The same on a device that is open already.
///
/// # Errors
/// When the recipe, the folder, a step or a hook fails.
pub fn train_on(
    device: &Device,
    recipe: &Recipe,
    hooks: Vec<Box<dyn Hook + '_>>,
    stop: &AtomicBool,
) -> Result<Summary> {
    train_among(&(Arc::new(Solo) as Arc<dyn Comm>), device, recipe, hooks, stop)
}

/// The same as one of several ranks, which call it together with one recipe. Their batches are those that one rank would take one after
/// the other, so the weights are those of one rank whose steps have as many micro-batches. The first rank alone has a run folder,
/// checkpoints, pictures and hooks; the others go along. One that fails or is asked to stop, stops all.
///
/// # Errors
/// When the recipe, the folder, a step, a hook or another rank fails.
pub fn train_among(
    comm: &Arc<dyn Comm>,
    device: &Device,
    recipe: &Recipe,
    hooks: Vec<Box<dyn Hook + '_>>,
    stop: &AtomicBool,
) -> Result<Summary> {
    together(&**comm, || {
        if let Some(path) = recipe.run_dir.as_ref().filter(|_| is_first(&**comm)) {
            RunFolder::check_free(path)?;
        }
        let data = in_turn(&**comm, || builtin::data(&recipe.data, device))?;
        if is_first(&**comm) {
            Check::on_ranks(recipe, device, data.clone(), Depth::Handful, comm.world_size())?.require()?;
        }
        awake(device, || {
            let trainer = Trainer::among(comm.clone(), device, recipe, data)?;
            let folder = RunFolder::create_on_ranks(&**comm, trainer.recipe())?;
            with_all_hooks(Session::new(trainer, folder, stop), hooks)?.run()
        })
    })
}

/// What a run goes on with.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Resume<'a> {
    /// Another device than the recipe's.
    pub device: Option<&'a str>,
    /// Overrides `a.b=value` of the run's recipe, such as `step_scheduler.max_steps=2000`. The run keeps them.
    pub set: &'a [String],
    /// Whether what changes the training may be other than it was when the checkpoint was written; else that is an error.
    pub accept_changes: bool,
}

/// Goes on with an interrupted run from its last whole checkpoint: the result is that of an uninterrupted run, bit for bit,
/// unless it is asked for something else. Of a run that is done already this is what it came to.
///
/// # Errors
/// When the device is not there, the folder has no checkpoint or is another process's, something was changed and that is not
/// accepted, or a step or a hook fails.
pub fn resume(path: &Path, with: &Resume<'_>, hooks: Vec<Box<dyn Hook + '_>>, stop: &AtomicBool) -> Result<Summary> {
    let open = |device: &str| Ok(flowtape_gpu::device(device)?);
    resume_among(&(Arc::new(Solo) as Arc<dyn Comm>), &open, path, with, hooks, stop)
}

/// The same as one of several ranks, as many as before or others. All of them read the folder; `open` opens the device of this one, by
/// the recipe's name for it.
///
/// # Errors
/// As above, and when another rank fails.
pub fn resume_among(
    comm: &Arc<dyn Comm>,
    open: &dyn Fn(&str) -> Result<Device>,
    path: &Path,
    with: &Resume<'_>,
    hooks: Vec<Box<dyn Hook + '_>>,
    stop: &AtomicBool,
) -> Result<Summary> {
    together(&**comm, || resume_as(comm, open, path, with, hooks, stop))
}

fn resume_as(
    comm: &Arc<dyn Comm>,
    open: &dyn Fn(&str) -> Result<Device>,
    path: &Path,
    with: &Resume<'_>,
    hooks: Vec<Box<dyn Hook + '_>>,
    stop: &AtomicBool,
) -> Result<Summary> {
    let first = is_first(&**comm);
    let (mut folder, mut recipe) = RunFolder::open_with(path, with.set)?;
    let refuse = |what: String| Err(Error::Run { path: path.into(), what });
    if !folder.checkpoints().any()? {
        let (run, file) = (quoted(path), quoted(&path.join("recipe.yaml")));
        let again = format!("`flowtape train {file} --set run_dir={run}`");
        return refuse(format!("there is no checkpoint to go on with yet: begin again with {again}"));
    }
    // A run that is done needs no device.
    let data = in_turn(&**comm, || builtin::data(&recipe.data, &Device::cpu()))?;
    let trained = data.clone().split(recipe.validation.as_ref())?.0.source.len();
    let batch_ranks = recipe.batch_ranks(comm.world_size())?;
    let steps = recipe.step_scheduler.resolved(trained, recipe.data.drop_last, batch_ranks).max_steps;
    let step = Stored::read(&folder.checkpoints().newest()?).map_or(0, |stored| stored.progress.step);
    let report = folder.report()?.filter(|s| s.steps == step && step == steps);
    // Nothing is written until all ranks have looked.
    comm.barrier()?;
    if let Some(summary) = report {
        return Ok(summary);
    }
    let checkpoint = if first {
        folder.lock()?;
        folder.checkpoints().newest_whole()?
    } else {
        PathBuf::new()
    };
    let checkpoint = shared_path(&**comm, &checkpoint)?;
    let stored = Stored::read(&checkpoint)?;
    if stored.progress.step > steps {
        let done = stored.progress.step;
        return refuse(format!(
            "{done} steps are done already: step_scheduler.max_steps must be at least that, got {steps}"
        ));
    }
    recipe.device = with.device.map_or(recipe.device, str::to_owned);
    let changes = stored.changes(&recipe, data.source.fingerprint());
    if !changes.is_empty() && !with.accept_changes {
        let (step, changes) = (stored.progress.step, listed(&changes));
        return refuse(format!(
            "since the checkpoint of step {step}: {changes}; to go on with that add --accept-changes"
        ));
    }
    let device = open(&recipe.device)?;
    let data = if device.backend().is_host() { data } else { builtin::data(&recipe.data, &device)? };
    if first {
        Check::on_ranks(&recipe, &device, data.clone(), Depth::Handful, comm.world_size())?.require()?;
    }
    awake(&device, || {
        let mut trainer = Trainer::among(comm.clone(), &device, &recipe, data)?;
        trainer.load(&checkpoint)?;
        if first {
            folder.write_recipe(trainer.recipe())?;
        }
        with_all_hooks(Session::new(trainer, folder, stop), hooks)?.run()
    })
}

/// A run with what all have and its recipe asks for; `hooks` come in between, so that they hear of a step before what takes
/// long.
fn with_all_hooks<'h>(run: Session<'h>, hooks: Vec<Box<dyn Hook + 'h>>) -> Result<Session<'h>> {
    let (recipe, first) = (run.trainer().recipe().clone(), run.is_first());
    let checkpoint = Checkpoint::new(recipe.step_scheduler.ckpt_every_steps)
        .at_epoch_ends(recipe.step_scheduler.save_checkpoint_every_epoch);
    if !first && run.trainer().is_shared_out() {
        // The others come to the same losses, and give what they have to each checkpoint, and to pictures where that takes all.
        let validate = recipe.validation.as_ref().map(|config| Validate::new(config.every_steps));
        let run = validate.into_iter().fold(run, |run, validate| run.with(Box::new(validate)));
        let run = run.with(Box::new(checkpoint));
        if !run.trainer().shares_weights() {
            return Ok(run);
        }
        let run = run.with(Box::new(builtin::preview(&recipe)?));
        return Ok(builtin::report(&recipe)?.into_iter().fold(run, Session::with));
    }
    if !first {
        return Ok(run);
    }
    let preview = builtin::preview(&recipe)?;
    let run = run.with(Box::new(Metrics::default())).with(Box::new(Environment::new(&preview)));
    let run = run.with(Box::new(Notices::default())).with(Box::new(TensorBoard::default()));
    let run = hooks.into_iter().fold(run, Session::with);
    #[cfg(feature = "charts")]
    let run = run.with(Box::new(LossCurve::default()));
    let run = run.with(Box::new(Learning::default()));
    let run = match &recipe.validation {
        // Before the checkpoint of the step, which holds what the validation came to.
        Some(config) => run.with(Box::new(Validations::default())).with(Box::new(Validate::new(config.every_steps))),
        None => run,
    };
    let run = run.with(Box::new(checkpoint));
    let run = builtin::report(&recipe)?.into_iter().fold(run.with(Box::new(preview)), Session::with);
    Ok(run.with(Box::new(Page::default())))
}

/// The mean of losses, but for those of steps that were left out.
pub fn mean_of_finite(losses: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = losses.filter(|loss| loss.is_finite()).fold((0.0, 0u64), |(sum, n), loss| (sum + loss, n + 1));
    sum / count.max(1) as f64
}

/// A run under way: what hooks see of it. A program may start one with hooks of its own choice.
pub struct Session<'h> {
    trainer: Trainer,
    folder: RunFolder,
    stop: &'h AtomicBool,
    /// One is missing while it is told of something.
    hooks: Vec<Option<Box<dyn Hook + 'h>>>,
    /// The step of the last checkpoint; 0 for none.
    saved: u64,
    /// For [`Summary::figures`].
    pub figures: Map<String, Value>,
}

impl<'h> Session<'h> {
    /// A run that nothing listens to yet. A trainer that was loaded goes on.
    pub fn new(trainer: Trainer, folder: RunFolder, stop: &'h AtomicBool) -> Self {
        // Where a run goes on, it is from a checkpoint.
        let saved = trainer.state().progress.step;
        Self { trainer, folder, stop, hooks: Vec::new(), saved, figures: Map::new() }
    }

    /// With one more hook; they are told of an event in the order in which they came.
    #[must_use]
    pub fn with(mut self, hook: Box<dyn Hook + 'h>) -> Self {
        self.hooks.push(Some(hook));
        self
    }

    /// What does the steps.
    pub fn trainer(&self) -> &Trainer {
        &self.trainer
    }

    /// Validates, if the recipe says on what; nothing where the run was asked to stop meanwhile.
    ///
    /// # Errors
    /// Those of [`Trainer::validate`].
    pub fn validate(&mut self) -> Result<Option<Validated>> {
        // Several ranks come to the same together.
        self.trainer.validate(if self.trainer.is_shared_out() { &NEVER } else { self.stop })
    }

    /// Where the run is kept.
    pub fn folder(&self) -> &RunFolder {
        &self.folder
    }

    /// Set when the run is asked to stop what it does; never where that takes all ranks, which stop together.
    pub fn stop(&self) -> &AtomicBool {
        if self.trainer.shares_weights() { &NEVER } else { self.stop }
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Whether this is the rank that has a run folder, and tells of the run.
    pub(crate) fn is_first(&self) -> bool {
        is_first(&**self.trainer.comm())
    }

    /// Tells all hooks of an event, but for those that are being told of another: they know.
    ///
    /// # Errors
    /// The first error of a hook.
    pub fn emit(&mut self, event: Event<'_>) -> Result<()> {
        if let Event::Saved(step) = event {
            self.saved = step;
        }
        for i in 0..self.hooks.len() {
            let Some(mut hook) = self.hooks[i].take() else { continue };
            let done = hook.on(&event, self);
            self.hooks[i] = Some(hook);
            done?;
        }
        Ok(())
    }

    /// Steps until all are done or it is asked to stop.
    ///
    /// # Errors
    /// When a step or a hook fails, or another process trains in the folder.
    pub fn run(mut self) -> Result<Summary> {
        let started = Instant::now();
        let (first, alone) = (self.is_first(), self.trainer.comm().is_alone());
        if first {
            self.folder.lock()?;
        }
        let steps = self.trainer.recipe().step_scheduler.max_steps;
        let progress = &self.trainer.state().progress;
        let (from, seconds_before) = (progress.step, progress.train_seconds);
        let history = if first { self.folder.history(from) } else { Vec::new() };
        let mut recent: VecDeque<StepRecord> = history.iter().rev().take(WINDOW).rev().cloned().collect();
        let parameters = self.trainer.model().params().numel();
        self.emit(Event::Begin(&Begin { history, from, steps, parameters }))?;
        let mut step = from;
        let mut last_read = None;
        let mut ahead: Option<Enqueued> = None;
        // Several ranks stop together: behind the step after the one with which all heard that one was asked to.
        let mut last_step = steps;
        while step < last_step && !(alone && self.stopping()) {
            let before = Instant::now();
            self.trainer.ask_to_stop(self.stopping());
            let enqueued = self.trainer.enqueue();
            let enqueued = enqueued.map_err(|error| self.diverged(error, step + 1))?;
            step = enqueued.step;
            let looked_at = self.hooks.iter().flatten().any(|hook| hook.needs_state(step));
            // The device is kept busy: the step before is read while this one runs.
            let last = looked_at || step == last_step || (alone && self.stopping()) || self.trainer.reads_at_once();
            let mut to_read: Vec<Enqueued> = ahead.take().into_iter().chain([enqueued]).collect();
            if !last {
                ahead = to_read.pop();
            }
            let mut done = Vec::new();
            for enqueued in to_read {
                done.push(self.read(enqueued, last_read)?);
                last_read = Some(Instant::now());
            }
            if let Some(asked) = done.iter().find(|record| record.stop) {
                last_step = last_step.min(asked.step + 1);
            }
            self.trainer.count_time(before);
            self.tell(done, &mut recent)?;
        }
        // Interrupted between two steps.
        let rest = match ahead {
            Some(enqueued) => Some(self.read(enqueued, last_read)?),
            None => None,
        };
        self.tell(rest, &mut recent)?;
        self.emit(Event::Stopped(if step == steps { Cause::Finished } else { Cause::Interrupted }))?;
        let summary = Summary {
            run_dir: self.folder.path().into(),
            steps: step,
            final_loss: mean_of_finite(recent.iter().map(|record| record.loss)),
            train_seconds: self.trainer.state().progress.train_seconds,
            total_seconds: seconds_before + started.elapsed().as_secs_f64(),
            interrupted: step < steps || (first && self.stopping()),
            skipped_steps: recent.back().and_then(|record| record.skipped_steps),
            left_out: self.trainer.left_out(),
            figures: std::mem::take(&mut self.figures),
        };
        if first && !summary.interrupted {
            self.folder.write_report(&summary)?;
        }
        if first {
            self.folder.leave();
        }
        self.emit(Event::Ended(&summary))?;
        // The last checkpoint is there when a rank ends.
        self.trainer.comm().barrier()?;
        Ok(summary)
    }

    /// Waits for a step's numbers.
    fn read(&mut self, enqueued: Enqueued, last_read: Option<Instant>) -> Result<StepRecord> {
        let step = enqueued.step;
        let read = self.trainer.read(enqueued, last_read);
        read.map_err(|error| self.diverged(error, step))
    }

    /// What is told of a step that is not finite: it is kept, and run again to find where.
    fn diverged(&mut self, error: Error, step: u64) -> Error {
        if let Err(error) = self.emit(Event::Failed) {
            tracing::warn!("{error}");
        }
        let mut error = error.at(step, self.saved);
        if let Error::Diverged { found, .. } = &mut error {
            let path = self.folder.replay_path(step, self.trainer.comm().rank() as u64);
            match self.trainer.bundle(step, &path) {
                Ok(finding) => *found = Some(told(&finding, &path)),
                Err(error) => tracing::warn!("no bundle of step {step}: {error}"),
            }
        }
        error
    }

    /// Tells of steps whose numbers are there.
    fn tell(&mut self, records: impl IntoIterator<Item = StepRecord>, recent: &mut VecDeque<StepRecord>) -> Result<()> {
        for record in records {
            self.emit(Event::Step(&record))?;
            recent.push_back(record);
            if recent.len() > WINDOW {
                recent.pop_front();
            }
        }
        Ok(())
    }
}
