//! `metrics.jsonl`.

use std::fs::File;
use std::io::Write;

use crate::hooks::{Event, Hook};
use crate::train::Session;
use crate::{Result, StepRecord};

/// Writes a line for each step, at once.
#[derive(Debug, Default)]
pub struct Metrics {
    file: Option<File>,
}

impl Hook for Metrics {
    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        match event {
            Event::Begin(begin) => {
                let (folder, from) = (run.folder(), begin.from);
                match folder.begin_lines(&folder.metrics_path(), from, |line: &StepRecord| line.step <= from) {
                    Ok(file) => self.file = Some(file),
                    Err(error) => tracing::warn!("{error}; the run goes on without"),
                }
            }
            Event::Step(record) => {
                let line = format!("{}\n", serde_json::json!(record));
                // One warning is enough: a disk that is full stays full.
                if let Some(Err(error)) = self.file.as_mut().map(|file| file.write_all(line.as_bytes())) {
                    tracing::warn!("{}: {error}; the run goes on without", run.folder().metrics_path().display());
                    self.file = None;
                }
            }
            _ => {}
        }
        Ok(())
    }
}
