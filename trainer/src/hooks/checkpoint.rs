//! Checkpoints.

use super::{Event, Hook, due};
use crate::Result;
use crate::train::Session;

/// Saves every so many steps and when there are no more.
#[derive(Debug)]
pub struct Checkpoint {
    every: u64,
    /// The step of the newest one; there is none of step 0.
    saved: u64,
}

impl Checkpoint {
    /// Steps between checkpoints; 0 for one at the end alone.
    pub fn new(every: u64) -> Self {
        Self { every, saved: 0 }
    }
}

impl Hook for Checkpoint {
    fn needs_state(&self, step: u64) -> bool {
        due(self.every, step)
    }

    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        let step = run.trainer().state().progress.step;
        match event {
            Event::Begin(begin) => self.saved = begin.from,
            Event::Step(record) if self.needs_state(record.step) => {}
            Event::Stopped(_) => {}
            _ => return Ok(()),
        }
        if step > self.saved {
            run.emit(Event::Busy("saving a checkpoint"))?;
            run.folder().save(run.trainer())?;
            self.saved = step;
            run.emit(Event::Saved(step))?;
        }
        Ok(())
    }
}
