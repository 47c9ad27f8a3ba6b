//! `flowtape watch`: the page of runs, served to browsers of this machine alone.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use clap::Args;
use flowtape_trainer::page::{self, RunReader};
use serde_json::Value;

use crate::loopback::{Answer, serve};

/// What to show.
#[derive(Args)]
pub struct Watch {
    /// Run folders; several are laid over each other.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The port on this machine; a free one by default.
    #[arg(long, default_value_t = 0)]
    port: u16,
}

/// Serves until it is ended.
pub fn run(args: &Watch) -> Result<ExitCode> {
    let runs = args.runs.iter().map(|run| RunReader::open(run)).collect::<Result<Vec<_>, _>>()?;
    let runs = Runs(Mutex::new(runs));
    serve(args.port, |path| runs.answer(path))?;
    Ok(ExitCode::SUCCESS)
}

/// The runs that are shown.
struct Runs(Mutex<Vec<RunReader>>);

impl Runs {
    fn answer(&self, path: &str) -> Answer {
        match path {
            "" => Answer::of("text/html; charset=utf-8", page::html(&self.pages(), true).into_bytes()),
            "data.json" => {
                let data = page::data(&self.pages(), true);
                let mut hasher = DefaultHasher::new();
                data.hash(&mut hasher);
                let tag = format!("\"{:016x}\"", hasher.finish());
                Answer::of("application/json", data.into_bytes()).tagged(tag)
            }
            rest => self.picture(rest).unwrap_or_else(|| Answer::refused(404, "there is no such picture")),
        }
    }

    /// What the runs say now.
    fn pages(&self) -> Vec<Value> {
        let mut runs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let page = |(index, run): (usize, &mut RunReader)| {
            run.refresh();
            let name = |path: &Path| Some(format!("samples/{index}/{}", path.file_name()?.to_str()?));
            run.page(run.status(), &mut |path| name(path))
        };
        page::named(runs.iter_mut().enumerate().map(page).collect())
    }

    /// One of a run's pictures, by the name that the page was given: nothing else in the folder can be named.
    fn picture(&self, rest: &str) -> Option<Answer> {
        let (index, name) = rest.strip_prefix("samples/")?.split_once('/')?;
        let runs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let path = runs.get(index.parse::<usize>().ok()?)?.picture(name)?;
        drop(runs);
        Some(Answer::of("image/png", std::fs::read(path).ok()?))
    }
}
