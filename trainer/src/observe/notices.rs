//! `notices.jsonl`.

use std::fs::File;
use std::io::Write;

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::hooks::{Event, Hook};
use crate::train::Session;

/// Writes a line for each thing that a person should know.
#[derive(Debug, Default)]
pub struct Notices {
    file: Option<File>,
}

/// A line.
#[derive(Serialize, Deserialize)]
struct Notice {
    /// Optimiser steps done then.
    step: u64,
    text: String,
}

impl Hook for Notices {
    fn on(&mut self, event: &Event<'_>, run: &mut Session<'_>) -> Result<()> {
        let path = run.folder().notices_path();
        match event {
            Event::Begin(begin) => {
                let from = begin.from;
                match run.folder().begin_lines(&path, from, |line: &Notice| line.step <= from) {
                    Ok(file) => self.file = Some(file),
                    Err(error) => tracing::warn!("{error}; the run goes on without"),
                }
            }
            Event::Noticed(text) | Event::Warned(text) => {
                let notice = Notice { step: run.trainer().state().progress.step, text: (*text).to_owned() };
                let line = format!("{}\n", serde_json::json!(notice));
                if self.file.as_mut().is_some_and(|file| file.write_all(line.as_bytes()).is_err()) {
                    // It was told on the terminal, and a warning of a warning would come here again.
                    self.file = None;
                }
            }
            _ => {}
        }
        Ok(())
    }
}
