//! Checkpoints.

use super::{Event, Hook, due};
use crate::error::io;
use crate::platform::Aside;
use crate::ranks::shared_text;
use crate::state::TrainProgress;
use crate::train::Session;
use crate::{Error, Result};

/// Saves every so many steps, perhaps at the ends of epochs, and when there are no more; and the best by validation loss, where the run
/// validates. A thread brings them to the disk and hashes them while training goes on.
#[derive(Debug)]
pub struct Checkpoint {
    every: u64,
    each_epoch: bool,
    /// The step of the newest one, finished or not; there is none of step 0.
    saved: u64,
    /// The least validation loss so far.
    best: Option<f64>,
    /// What finishes the one of this step.
    finishing: Option<(u64, Aside<Result<()>>)>,
}

impl Checkpoint {
    /// Steps between checkpoints; 0 for one at the end alone.
    pub fn new(every: u64) -> Self {
        Self { every, each_epoch: false, saved: 0, best: None, finishing: None }
    }

    /// Also after the last step of each epoch, or not. To know it, each step is waited for.
    #[must_use]
    pub fn at_epoch_ends(mut self, each_epoch: bool) -> Self {
        self.each_epoch = each_epoch;
        self
    }

    /// Saves, if that was not done after this step.
    fn save(&mut self, best: bool, run: &mut Session<'_>) -> Result<()> {
        let step = run.trainer().state().progress.step;
        if step <= self.saved {
            return Ok(());
        }
        self.finish(run)?;
        if !run.is_first() {
            self.saved = step;
            let folder = run.folder().checkpoints().begun(step);
            return run.trainer().give_to_snapshot(&folder);
        }
        run.emit(Event::Busy("saving a checkpoint"))?;
        let begun = run.folder().begin_save(run.trainer())?;
        let keep = run.trainer().recipe().checkpoint.max_recent_checkpoints;
        let finishing =
            Aside::begin("checkpoint", move || begun.finish(keep, best)).map_err(io(run.folder().path()))?;
        self.saved = step;
        self.finishing = Some((step, finishing));
        Ok(())
    }

    /// Waits for what is under way.
    fn finish(&mut self, run: &mut Session<'_>) -> Result<()> {
        let Some((step, finishing)) = self.finishing.take() else { return Ok(()) };
        let broken = || Error::Run { path: run.folder().path().into(), what: "saving ended without a word".into() };
        finishing.join().unwrap_or_else(|_| Err(broken()))?;
        run.emit(Event::Saved(step))
    }
}

/// Nothing of a run goes on behind it.
impl Drop for Checkpoint {
    fn drop(&mut self) {
        if let Some((_, finishing)) = self.finishing.take() {
            let _ = finishing.join();
        }
    }
}

impl Hook for Checkpoint {
    fn needs_state(&self, step: u64) -> bool {
        due(self.every, step) || self.each_epoch
    }

    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        match event {
            Event::Begin(begin) => {
                self.saved = begin.from;
                // Where it was taken away, the next one is the best.
                let best = if run.is_first() { run.folder().checkpoints().best()? } else { None };
                let best = best.and_then(|best| TrainProgress::read(&best).ok()?.validation_loss);
                let trainer = run.trainer();
                // All ranks save at the same steps where all are needed for it.
                self.best = if trainer.is_shared_out() {
                    let text = best.map_or(String::new(), |best| best.to_bits().to_string());
                    shared_text(&**trainer.comm(), &text)?.parse().ok().map(f64::from_bits)
                } else {
                    best
                };
                Ok(())
            }
            Event::Validated(validated) if self.best.is_none_or(|best| validated.loss() < best) => {
                self.best = Some(validated.loss());
                if validated.step > self.saved {
                    return self.save(true, run);
                }
                self.finish(run)?;
                if run.is_first() { run.folder().checkpoints().mark_best(validated.step) } else { Ok(()) }
            }
            Event::Step(record) if due(self.every, record.step) => self.save(false, run),
            Event::Step(_) if self.each_epoch && run.trainer().ends_epoch() => self.save(false, run),
            Event::Step(_) if self.finishing.as_ref().is_some_and(|(_, thread)| thread.is_finished()) => {
                self.finish(run)
            }
            Event::Stopped(_) => {
                self.save(false, run)?;
                self.finish(run)
            }
            Event::Failed => self.finish(run),
            _ => Ok(()),
        }
    }
}
