//! The progress bar; lines where there is no terminal.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use flowtape_trainer::hooks::{Begin, Event, Hook};
use flowtape_trainer::train::{Session, WINDOW, mean_of_finite};
use flowtape_trainer::validation::Validated;
use flowtape_trainer::{Result, StepRecord};
use indicatif::{ProgressBar, ProgressStyle};

use crate::signals::Stop;
use crate::terminal::{bar, note};
use crate::warnings;

/// Time between lines where there is no terminal.
const EVERY: Duration = Duration::from_secs(10);

/// Progress on stderr.
pub struct Terminal<'a> {
    stop: &'a Stop,
    bar: Option<ProgressBar>,
    steps: u64,
    /// Of the last steps.
    losses: VecDeque<f64>,
    last_line: Option<Instant>,
}

impl<'a> Terminal<'a> {
    /// Nothing is shown before a run begins.
    pub fn new(stop: &'a Stop) -> Self {
        Self { stop, bar: None, steps: 0, losses: VecDeque::new(), last_line: None }
    }

    fn begin(&mut self, begin: &Begin, folder: &Path) {
        self.stop.run_begins();
        let Begin { from, steps, parameters, history } = begin;
        note!("run {}: {parameters} parameters, steps {from} to {steps}", folder.display());
        self.steps = *steps;
        self.losses = history.iter().rev().take(WINDOW).rev().map(|record| record.loss).collect();
        let bar = bar(*steps).with_position(*from);
        let template = "{bar:30} {pos}/{len}  {msg}  ETA {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.reset_eta();
        self.bar = Some(bar);
    }

    fn step(&mut self, record: &StepRecord) {
        self.losses.push_back(record.loss);
        if self.losses.len() > WINDOW {
            self.losses.pop_front();
        }
        let mean = mean_of_finite(self.losses.iter().copied());
        let message = message(record, mean);
        let Some(bar) = &self.bar else { return };
        let due = self.last_line.is_none_or(|last| last.elapsed() >= EVERY) || record.step == self.steps;
        if bar.is_hidden() && due {
            note!("step {}/{}  {message}", record.step, self.steps);
            self.last_line = Some(Instant::now());
        }
        bar.set_message(message);
        bar.set_position(record.step);
    }

    fn validated(&self, validated: &Validated) {
        let Validated { step, raw, ema } = validated;
        let average = ema.as_ref().map_or(String::new(), |ema| format!(", of the weights' average {:.4}", ema.loss));
        self.line(&format!("step {step}: validation loss {:.4}{average}", raw.loss));
    }

    /// A line that stays, above the bar.
    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) if !bar.is_hidden() => bar.suspend(|| note!("{text}")),
            _ => note!("{text}"),
        }
    }

    fn busy(&self, what: &str) {
        let Some(bar) = &self.bar else { return };
        if bar.is_hidden() {
            note!("{what}");
        }
        bar.set_message(what.to_owned());
    }

    /// Takes the bar away.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// A step in a line.
fn message(record: &StepRecord, mean: f64) -> String {
    let StepRecord { loss, lr, grad_norm, samples_per_second, memory, .. } = record;
    let memory = match memory.max_allocated {
        none if none <= 0.0 => String::new(),
        small if small < 1.0 => format!("  {:.0} MB", small * 1024.0),
        gb => format!("  {gb:.1} GB"),
    };
    format!(
        "loss {loss:.4} (mean {mean:.4})  lr {lr:.2e}  gradient {grad_norm:.3}  {samples_per_second:.1} samples/s{memory}",
    )
}

impl Hook for &mut Terminal<'_> {
    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        match event {
            Event::Begin(begin) => self.begin(begin, run.folder().path()),
            Event::Step(record) => self.step(record),
            Event::Busy(what) => self.busy(what),
            Event::Validated(validated) => self.validated(validated),
            Event::Noticed(what) => self.line(what),
            _ => {}
        }
        for warning in warnings::taken() {
            run.emit(Event::Warned(&warning))?;
        }
        Ok(())
    }
}
