//! `report.html`.

use crate::Result;
use crate::hooks::{Event, Hook};
use crate::page::{self, RunReader};
use crate::runs::Status;
use crate::train::Session;

/// Writes the page with each checkpoint and each grid of samples, and at the end.
#[derive(Debug, Default)]
pub struct Page {
    reader: Option<RunReader>,
}

impl Page {
    fn write(&mut self, status: Status, run: &Session<'_>) -> Result<()> {
        let reader = match &mut self.reader {
            Some(reader) => reader,
            none => none.insert(RunReader::open(run.folder().path())?),
        };
        page::write_one(reader, status, &run.folder().page_path())
    }
}

impl Hook for Page {
    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        let status = match event {
            Event::Saved(_) | Event::Preview(_) => Status::Training,
            Event::Failed => Status::Crashed,
            Event::Ended(summary) if summary.interrupted => Status::Stopped,
            Event::Ended(_) => Status::Finished,
            _ => return Ok(()),
        };
        if let Err(error) = self.write(status, run) {
            tracing::warn!("{error}; the run goes on");
        }
        Ok(())
    }
}
