//! The progress bar; lines where there is no terminal.

use std::path::Path;
use std::time::{Duration, Instant};

use flowtape_trainer::run::Line;
use flowtape_trainer::train::Progress;
use indicatif::{ProgressBar, ProgressStyle};

use crate::signals::Stop;
use crate::terminal::note;

/// Time between lines where there is no terminal.
const EVERY: Duration = Duration::from_secs(10);

/// Progress on stderr.
pub struct Terminal<'a> {
    stop: &'a Stop,
    bar: Option<ProgressBar>,
    steps: u64,
    last_line: Option<Instant>,
}

impl<'a> Terminal<'a> {
    /// Nothing is shown before a run begins.
    pub fn new(stop: &'a Stop) -> Self {
        Self { stop, bar: None, steps: 0, last_line: None }
    }

    /// Takes the bar away.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Terminal<'_> {
    fn begin(&mut self, run: &Path, from: u64, steps: u64, parameters: usize) {
        self.stop.run_begins();
        note!("run {}: {parameters} parameters, steps {from} to {steps}", run.display());
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
        let due = self.last_line.is_none_or(|last| last.elapsed() >= EVERY) || line.step == self.steps;
        if bar.is_hidden() && due {
            note!("step {}/{}  {message}", line.step, self.steps);
            self.last_line = Some(Instant::now());
        }
        bar.set_message(message);
        bar.set_position(line.step);
    }

    fn note(&mut self, what: &str) {
        let Some(bar) = &self.bar else { return };
        if bar.is_hidden() {
            note!("{what}");
        }
        bar.set_message(what.to_owned());
    }
}
