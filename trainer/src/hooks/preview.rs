//! Sample grids.

use super::{Cause, Event, Hook, due};
use std::path::PathBuf;

use flowtape_models::pipeline::{KnownPrompts, PipelineFolder};

use crate::generate::{Request, Samples};
use crate::picture::save_samples;
use crate::train::Session;
use crate::{Error, Result};

/// Samples a grid every so many steps and at the end.
#[derive(Debug)]
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
    /// The pipeline that makes them, where one does.
    pub pipeline: Option<PathBuf>,
    /// The same with what it knows of the prompts, when it was opened.
    pub opened: Option<KnownPrompts>,
}

impl Preview {
    /// By the pipeline, where there is one that can make them.
    fn samples(&mut self, request: &Request<'_>, run: &Session<'_>) -> Result<Option<Samples>> {
        let trainer = run.trainer();
        if let Some(path) = &self.pipeline {
            let opened = match &mut self.opened {
                Some(opened) => Ok(opened),
                none => {
                    PipelineFolder::open(path).map(|folder| none.insert(KnownPrompts::new(folder, trainer.device())))
                }
            };
            match opened.map_err(Error::from).and_then(|opened| trainer.generate_by(opened, request, run.stop())) {
                Ok(samples) => return Ok(samples),
                Err(error) => tracing::warn!("{}: {error}; grids are made without its schedule", path.display()),
            }
            self.pipeline = None;
        }
        trainer.generate(request, run.stop())
    }

    fn grids(&mut self, run: &mut Session<'_>) -> Result<()> {
        if self.prompts.is_empty() {
            return Ok(());
        }
        run.emit(Event::Busy("sampling a grid"))?;
        let (prompts, first_frames) = (self.prompts.clone(), self.first_frames.clone());
        let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
        let kinds = [("", None), ("_i2v", first_frames.as_deref())];
        for (kind, first_frames) in kinds.into_iter().filter(|(kind, frames)| kind.is_empty() || frames.is_some()) {
            let request = Request { prompts: &prompts, first_frames, seed: self.seed };
            let Some(samples) = self.samples(&request, run)? else { return Ok(()) };
            if !run.is_first() {
                continue;
            }
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
