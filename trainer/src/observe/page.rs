//! `report.html`.

use crate::Result;
use crate::hooks::{Event, Hook};
use crate::page::{self, RunReader, RunState};
use crate::train::Session;

/// Writes the page with each checkpoint and each grid of samples, and at the end.
#[derive(Debug, Default)]
pub struct Page {
    reader: Option<RunReader>,
}

impl Page {
    fn write(&mut self, state: RunState, run: &Session<'_>) -> Result<()> {
        let reader = match &mut self.reader {
            Some(reader) => reader,
            none => none.insert(RunReader::open(run.folder().path())?),
        };
        page::write_one(reader, state, &run.folder().page_path())
    }
}

impl Hook for Page {
    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        let state = match event {
            Event::Saved(_) | Event::Preview(_) => RunState::Running,
            Event::Failed => RunState::Stopped,
            Event::Ended(summary) if summary.interrupted => RunState::Stopped,
            Event::Ended(_) => RunState::Finished,
            _ => return Ok(()),
        };
        if let Err(error) = self.write(state, run) {
            tracing::warn!("{error}; the run goes on");
        }
        Ok(())
    }
}
