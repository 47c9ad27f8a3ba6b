//! `validation.jsonl`, and a warning where training and validation part.

use std::fs::File;
use std::io::Write;

use crate::Result;
use crate::hooks::{Event, Hook};
use crate::train::Session;
use crate::validation::Validated;

/// Validations in a row that are worse than the best one before a warning.
const PATIENCE: usize = 3;
/// How much worse, relative to the best.
const WORSE: f64 = 0.02;
/// The share of the mean training loss that a step's loss makes up.
const SHARE: f64 = 0.02;

/// Writes a line for each validation, at once.
#[derive(Debug, Default)]
pub struct Validations {
    file: Option<File>,
    parting: Parting,
}

impl Hook for Validations {
    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        let path = run.folder().validation_path();
        match event {
            Event::Begin(begin) if run.trainer().recipe().validation.is_some() => {
                let from = begin.from;
                match run.folder().begin_lines(&path, from, |line: &Validated| line.step <= from) {
                    Ok(file) => self.file = Some(file),
                    Err(error) => tracing::warn!("{error}; the run goes on without"),
                }
            }
            Event::Step(record) => self.parting.trained(record.loss),
            Event::Validated(validated) => {
                let line = format!("{}\n", serde_json::json!(validated));
                if let Some(Err(error)) = self.file.as_mut().map(|file| file.write_all(line.as_bytes())) {
                    tracing::warn!("{}: {error}; the run goes on without", path.display());
                    self.file = None;
                }
                if let Some(best) = self.parting.validated(validated) {
                    let what = format!(
                        "step {}: the validation loss has not come back to the {:.4} of step {} while the training loss falls: \
                         the model begins to know its samples by heart",
                        validated.step,
                        best.loss(),
                        best.step
                    );
                    run.emit(Event::Noticed(&what))?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Notices once where training gets better and validation does not.
#[derive(Debug, Default)]
struct Parting {
    /// A running mean of the training loss.
    mean: Option<f64>,
    /// The best validation, and the mean then.
    best: Option<(Validated, f64)>,
    worse: usize,
}

impl Parting {
    fn trained(&mut self, loss: f64) {
        if loss.is_finite() {
            self.mean = Some(self.mean.map_or(loss, |mean| mean + SHARE * (loss - mean)));
        }
    }

    /// The best validation, where this is the one at which to warn.
    fn validated(&mut self, validated: &Validated) -> Option<&Validated> {
        let mean = self.mean?;
        if self.best.as_ref().is_none_or(|(best, _)| validated.loss() < best.loss()) {
            self.worse = 0;
            self.best = Some((validated.clone(), mean));
            return None;
        }
        let (best, then) = self.best.as_ref()?;
        let parts = validated.loss() > best.loss() * (1.0 + WORSE) && mean < *then;
        self.worse = if parts { self.worse + 1 } else { 0 };
        (self.worse == PATIENCE).then_some(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validation::ValidationLoss;

    #[test]
    fn a_warning_comes_once_and_only_where_the_two_part() {
        let run = |losses: &[(f64, f64)]| {
            let mut parting = Parting::default();
            let mut warned = Vec::new();
            for (step, (training, validation)) in losses.iter().enumerate() {
                (0..100).for_each(|_| parting.trained(*training));
                let raw = ValidationLoss { loss: *validation, bins: Vec::new() };
                let validated = Validated { step: step as u64, raw, ema: None };
                warned.extend(parting.validated(&validated).map(|best| (step, best.step)));
            }
            warned
        };
        assert_eq!(run(&[(1.0, 1.0), (0.9, 0.9), (0.8, 1.0), (0.7, 1.1), (0.6, 1.2), (0.5, 1.3)]), [(4, 1)]);
        // Both get worse, both get better, or validation wavers.
        assert!(run(&[(1.0, 1.0), (1.1, 1.2), (1.2, 1.3), (1.3, 1.4), (1.4, 1.5)]).is_empty());
        assert!(run(&[(1.0, 1.0), (0.9, 0.9), (0.8, 0.8), (0.7, 0.7), (0.6, 0.6)]).is_empty());
        assert!(run(&[(1.0, 1.0), (0.9, 1.1), (0.8, 1.0), (0.7, 1.1), (0.6, 1.0), (0.5, 1.1)]).is_empty());
    }
}
