//! The progress bar; lines where there is no terminal.

use std::path::Path;

use flowtape_trainer::run::Line;
use flowtape_trainer::train::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// Lines without a terminal: one in this many steps.
const EVERY: u64 = 100;

/// Progress on stderr.
#[derive(Default)]
pub struct Terminal {
    bar: Option<ProgressBar>,
    steps: u64,
}

impl Terminal {
    /// Takes the bar away.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Terminal {
    fn begin(&mut self, run: &Path, from: u64, steps: u64, parameters: usize) {
        eprintln!("run {}: {parameters} parameters, steps {from} to {steps}", run.display());
        self.steps = steps;
        let bar = ProgressBar::new(steps).with_position(from);
        let template = "{bar:30} {pos}/{len}  {msg}  ETA {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.reset_eta();
        self.bar = Some(bar);
    }

    fn step(&mut self, line: &Line, mean_loss: f64) {
        let message = format!("loss {mean_loss:.4}  {:.0} samples/s", line.samples_per_second);
        let Some(bar) = &self.bar else { return };
        if bar.is_hidden() && (line.step.is_multiple_of(EVERY) || line.step == self.steps) {
            eprintln!("step {}/{}  {message}", line.step, self.steps);
        }
        bar.set_message(message);
        bar.set_position(line.step);
    }

    fn note(&mut self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
        }
    }
}
