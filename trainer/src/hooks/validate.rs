//! Validation.

use super::{Cause, Event, Hook, due};
use crate::Result;
use crate::train::Session;

/// Validates every so many steps and at the end.
#[derive(Debug)]
pub struct Validate {
    every: u64,
    /// The step of the last validation.
    done: u64,
}

impl Validate {
    /// Steps between validations; 0 for one at the end alone.
    pub fn new(every: u64) -> Self {
        Self { every, done: 0 }
    }
}

impl Hook for Validate {
    fn needs_state(&self, step: u64) -> bool {
        due(self.every, step)
    }

    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        let step = run.trainer().state().progress.step;
        match event {
            Event::Step(record) if self.needs_state(record.step) => {}
            Event::Stopped(Cause::Finished) if step > self.done => {}
            _ => return Ok(()),
        }
        run.emit(Event::Busy("validating"))?;
        if let Some(validated) = run.validate()? {
            self.done = step;
            run.emit(Event::Validated(&validated))?;
        }
        Ok(())
    }
}
