//! Checkpoints.

use super::{Event, Hook, due};
use crate::Result;
use crate::state::TrainProgress;
use crate::train::Session;

/// Saves every so many steps, perhaps at the ends of epochs, and when there are no more; and the best by validation loss, where the run validates.
#[derive(Debug)]
pub struct Checkpoint {
    every: u64,
    each_epoch: bool,
    /// The step of the newest one; there is none of step 0.
    saved: u64,
    /// The least validation loss so far.
    best: Option<f64>,
}

impl Checkpoint {
    /// Steps between checkpoints; 0 for one at the end alone.
    pub fn new(every: u64) -> Self {
        Self { every, each_epoch: false, saved: 0, best: None }
    }

    /// Also after the last step of each epoch, or not. To know it, each step is waited for.
    #[must_use]
    pub fn at_epoch_ends(self, each_epoch: bool) -> Self {
        Self { each_epoch, ..self }
    }

    /// Saves, if that was not done after this step.
    fn save(&mut self, run: &mut Session<'_>) -> Result<()> {
        let step = run.trainer().state().progress.step;
        if step > self.saved {
            run.emit(Event::Busy("saving a checkpoint"))?;
            run.folder().save(run.trainer())?;
            self.saved = step;
            run.emit(Event::Saved(step))?;
        }
        Ok(())
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
                let best = run.folder().checkpoints().best()?.and_then(|best| TrainProgress::read(&best).ok());
                self.best = best.and_then(|progress| progress.validation_loss);
                Ok(())
            }
            Event::Validated(validated) if self.best.is_none_or(|best| validated.loss() < best) => {
                self.save(run)?;
                self.best = Some(validated.loss());
                run.folder().checkpoints().mark_best(validated.step)
            }
            Event::Step(record) if due(self.every, record.step) => self.save(run),
            Event::Step(_) if self.each_epoch && run.trainer().ends_epoch() => self.save(run),
            Event::Stopped(_) => self.save(run),
            _ => Ok(()),
        }
    }
}
