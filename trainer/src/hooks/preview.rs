//! Sample grids.

use super::{Cause, Event, Hook, due};
use crate::Result;
use crate::generate::Request;
use crate::picture::save_samples;
use crate::train::Session;

/// Samples a grid every so many steps and at the end.
#[derive(Clone, PartialEq, Debug)]
pub struct Preview {
    /// Steps between grids; 0 for one at the end alone.
    pub every: u64,
    /// What is shown, row by row; no grids where it is nothing.
    pub prompts: Vec<String>,
    /// Samples side by side.
    pub columns: usize,
    /// Pixels of first frames, one after the other and one for each prompt: then there is a second grid of videos that go
    /// on from them.
    pub first_frames: Option<Vec<f32>>,
    /// The same in every run, so that pictures can be compared.
    pub seed: u64,
}

impl Preview {
    fn grids(&self, run: &mut Session<'_>) -> Result<()> {
        if self.prompts.is_empty() {
            return Ok(());
        }
        run.emit(Event::Busy("sampling a grid"))?;
        let prompts: Vec<&str> = self.prompts.iter().map(String::as_str).collect();
        let kinds = [("", None), ("_i2v", self.first_frames.as_deref())];
        for (kind, first_frames) in kinds.into_iter().filter(|(kind, frames)| kind.is_empty() || frames.is_some()) {
            let request = Request { prompts: &prompts, first_frames, seed: self.seed };
            let Some(samples) = run.trainer().generate(&request, run.stop())? else { return Ok(()) };
            let step = run.trainer().state().progress.step;
            let path = |part: &str| run.folder().samples_path(step, &format!("{kind}{part}"));
            let made = run.folder().make_samples_folder();
            match made.and_then(|()| save_samples(&samples, self.columns, path)) {
                Ok(()) => {
                    let path = path("");
                    run.emit(Event::Preview(&path))?;
                }
                // A picture is not worth a run.
                Err(error) => tracing::warn!("{error}; the run goes on"),
            }
        }
        Ok(())
    }
}

impl Hook for Preview {
    fn needs_state(&self, step: u64) -> bool {
        due(self.every, step)
    }

    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        match event {
            // The last grid comes when the last checkpoint is safe.
            Event::Step(record)
                if self.needs_state(record.step) && record.step < run.trainer().recipe().step_scheduler.max_steps =>
            {
                self.grids(run)
            }
            Event::Stopped(Cause::Finished) => {
                // An example of what can be asked for.
                let prompt = self.prompts.first().map(|prompt| ("prompt".to_owned(), prompt.as_str().into()));
                run.figures.extend(prompt);
                self.grids(run)
            }
            _ => Ok(()),
        }
    }
}
