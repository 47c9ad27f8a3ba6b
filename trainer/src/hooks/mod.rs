//! What a run does beside its steps: everything that is told of events.

mod checkpoint;
mod preview;
mod validate;

use std::path::Path;

use crate::Result;
use crate::record::StepRecord;
use crate::train::{Session, Summary};
use crate::validation::Validated;

pub use checkpoint::Checkpoint;
pub use preview::Preview;
pub use validate::Validate;

/// Something that happened in a run.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The run begins, or goes on.
    Begin(&'a Begin),
    /// A step's numbers are there.
    Step(&'a StepRecord),
    /// Something begins that takes its time, such as "sampling a grid".
    Busy(&'a str),
    /// Held-out samples were looked at.
    Validated(&'a Validated),
    /// A picture of samples was written.
    Preview(&'a Path),
    /// A checkpoint of this step was written.
    Saved(u64),
    /// Something about the training that a person should know.
    Noticed(&'a str),
    /// Something of the log that a person should know, which was shown already.
    Warned(&'a str),
    /// A step failed, and the run ends with its error: what is under way is to be finished.
    Failed,
    /// There are no more steps.
    Stopped(Cause),
    /// Everything is done, and this is what it came to.
    Ended(&'a Summary),
}

/// How a run begins.
#[derive(Clone, PartialEq, Debug)]
pub struct Begin {
    /// What the steps so far came to, where it goes on.
    pub history: Vec<StepRecord>,
    /// Steps done so far.
    pub from: u64,
    /// Steps in all.
    pub steps: u64,
    /// Numbers that are trained.
    pub parameters: u64,
}

/// Why there are no more steps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Cause {
    /// All are done.
    Finished,
    /// It was asked to stop.
    Interrupted,
}

/// Something that listens to a run. A closure that takes an event and the session is one.
pub trait Hook {
    /// Whether it looks at weights or state when it hears of this step. Then no later step is under way yet; otherwise one may
    /// be, so that a GPU is kept busy.
    fn needs_state(&self, step: u64) -> bool {
        let _ = step;
        false
    }

    /// An event. What it tells of in turn ([`Session::emit`]) reaches all other hooks at once.
    ///
    /// # Errors
    /// When the run can't go on. What is only a by-product is a warning instead.
    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()>;
}

impl<F: FnMut(&Event<'_>, &mut Session<'_>) -> Result<()>> Hook for F {
    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        self(event, run)
    }
}

/// A hook that is told of each step.
pub fn on_step<'h>(mut told: impl FnMut(&StepRecord) + 'h) -> Box<dyn Hook + 'h> {
    Box::new(move |event: &Event<'_>, _: &mut Session<'_>| {
        if let Event::Step(record) = event {
            told(record);
        }
        Ok(())
    })
}

/// Whether something is due after a step that happens every so many steps; 0 for never.
pub(crate) fn due(every: u64, step: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
