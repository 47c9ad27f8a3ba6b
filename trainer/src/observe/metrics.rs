//! `metrics.jsonl`.

use std::fs::File;
use std::io::Write;

use serde::Serialize;

use crate::hooks::{Event, Hook};
use crate::train::Session;
use crate::{Result, StepRecord};

/// Writes a line for each step, at once.
#[derive(Debug, Default)]
pub struct Metrics {
    file: Option<File>,
    mean: EpochMean,
}

/// A line: the step's record, and one more of NeMo's names.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    record: &'a StepRecord,
    /// The mean loss of the epoch so far.
    train_avg_loss: f64,
}

impl Hook for Metrics {
    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        match event {
            Event::Begin(begin) => {
                let (folder, from) = (run.folder(), begin.from);
                for record in &begin.history {
                    self.mean.add(record);
                }
                match folder.begin_lines(&folder.metrics_path(), from, |line: &StepRecord| line.step <= from) {
                    Ok(file) => self.file = Some(file),
                    Err(error) => tracing::warn!("{error}; the run goes on without"),
                }
            }
            Event::Step(record) => {
                let line = Line { record, train_avg_loss: self.mean.add(record) };
                let line = serde_json::to_string(&line).unwrap_or_default() + "\n";
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

/// The mean of the losses of an epoch, but for those that are not finite.
#[derive(Debug, Default)]
struct EpochMean {
    epoch: u64,
    sum: f64,
    count: u64,
}

impl EpochMean {
    /// The mean with one more step.
    fn add(&mut self, record: &StepRecord) -> f64 {
        if record.epoch != self.epoch {
            *self = Self { epoch: record.epoch, ..Self::default() };
        }
        if record.loss.is_finite() {
            self.sum += record.loss;
            self.count += 1;
        }
        self.sum / self.count as f64
    }
}
