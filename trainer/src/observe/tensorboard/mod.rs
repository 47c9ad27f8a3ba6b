//! `tensorboard/`: what `tensorboard --logdir RUN` shows.

mod events;

use events::{EventFile, Summary};

use crate::hooks::{Event, Hook};
use crate::train::Session;
use crate::validation::{BINS, ValidationLoss};
use crate::{Result, StepRecord};

/// Steps whose samples are in one histogram.
const HISTOGRAM: u64 = 50;

/// Writes event files: scalars of each step, histograms of σ and of the loss by σ, validations, and grids of samples.
#[derive(Debug, Default)]
pub struct TensorBoard {
    file: Option<EventFile>,
    counts: [u64; BINS],
    sums: [f64; BINS],
}

impl TensorBoard {
    fn add(&mut self, step: u64, values: &[(String, Summary)], run: &Session<'_>) {
        let Some(Err(error)) = self.file.as_mut().map(|file| file.add(step, values)) else { return };
        // One warning is enough: a disk that is full stays full.
        tracing::warn!("{}: {error}; the run goes on without", run.folder().tensorboard_path().display());
        self.file = None;
    }

    /// A step's values, and those of the last steps where it ends some.
    fn step(&mut self, record: &StepRecord) -> Vec<(String, Summary)> {
        let scalars = [
            ("train_loss", Some(record.loss)),
            ("lr", Some(record.lr)),
            ("grad_norm", Some(record.grad_norm)),
            ("epoch", Some(record.epoch as f64)),
            ("step_time", Some(record.step_time)),
            ("samples_per_sec", Some(record.samples_per_second)),
            ("memory_allocated_gb", Some(record.memory.allocated)),
            ("max_memory_allocated_gb", Some(record.memory.max_allocated)),
            ("loss_scale", record.loss_scale),
            ("skipped_steps", record.skipped_steps.map(|steps| steps as f64)),
        ];
        let scalars = scalars.into_iter().filter_map(|(tag, value)| Some((tag.to_owned(), Summary::Scalar(value?))));
        let groups = record.grad_norm_by_group.iter();
        let groups = groups.map(|(group, norm)| (format!("grad_norm_by_group/{group}"), Summary::Scalar(*norm)));
        let mut values: Vec<(String, Summary)> = scalars.chain(groups).collect();
        for (bin, (count, loss)) in record.by_sigma.counts.iter().zip(&record.by_sigma.losses).enumerate() {
            let (Some(loss), true) = (loss, bin < BINS) else { continue };
            self.counts[bin] += count;
            self.sums[bin] += loss * *count as f64;
        }
        if record.step.is_multiple_of(HISTOGRAM) {
            let (counts, sums) = (std::mem::take(&mut self.counts), std::mem::take(&mut self.sums));
            let means: Vec<f64> = sums.iter().zip(counts).map(|(sum, n)| sum / n.max(1) as f64).collect();
            values.push(("sigma".into(), Summary::Histogram(counts.map(|n| n as f64).to_vec())));
            values.push(("train_loss_by_sigma".into(), Summary::Histogram(means)));
        }
        values
    }
}

fn validation(kind: &str, loss: &ValidationLoss) -> Vec<(String, Summary)> {
    let mut values = vec![(format!("validation_loss/{kind}"), Summary::Scalar(loss.loss))];
    let bins = loss.bins.iter().map(|bin| bin.unwrap_or(0.0)).collect();
    values.push((format!("validation_loss_by_sigma/{kind}"), Summary::Histogram(bins)));
    values
}

impl Hook for TensorBoard {
    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        match event {
            Event::Begin(begin) => {
                let folder = run.folder().tensorboard_path();
                match EventFile::create(&folder, begin.from) {
                    Ok(file) => self.file = Some(file),
                    Err(error) => tracing::warn!("{}: {error}; the run goes on without", folder.display()),
                }
            }
            Event::Step(record) => {
                let values = self.step(record);
                self.add(record.step, &values, run);
            }
            Event::Validated(validated) => {
                let ema = validated.ema.as_ref().map(|ema| validation("ema", ema)).unwrap_or_default();
                self.add(validated.step, &[validation("raw", &validated.raw), ema].concat(), run);
            }
            Event::Preview(path) => {
                let Ok(png) = std::fs::read(path) else { return Ok(()) };
                let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                // What tells several grids of one step apart.
                let kind = name.trim_start_matches("step_").trim_start_matches(|c: char| c.is_ascii_digit());
                let step = run.trainer().state().progress.step;
                self.add(step, &[(format!("samples{kind}"), Summary::Picture(png))], run);
            }
            _ => {}
        }
        Ok(())
    }
}
