//! `flowtape runs`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flowtape_trainer::run::quoted;
use flowtape_trainer::runs::{Run, Status, runs};

use crate::terminal::{delivered, note, say};

/// Which runs.
#[derive(Args)]
pub struct Runs {
    /// A folder of run folders, or one of these; `runs` by default.
    folder: Option<PathBuf>,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Lists runs.
pub fn run(args: &Runs) -> Result<ExitCode> {
    let usual = Path::new("runs");
    let found = match &args.folder {
        Some(folder) => runs(folder)?,
        None if usual.is_dir() => runs(usual)?,
        None => Vec::new(),
    };
    if args.json {
        for run in &found {
            say!("{}", serde_json::to_string(run)?);
        }
        return delivered();
    }
    if found.is_empty() {
        let folder = args.folder.as_deref().unwrap_or(usual);
        note!("no runs in {}: `flowtape train digits` makes one", folder.display());
        return delivered();
    }
    let name = |run: &Run| run.path.display().to_string();
    let width = found.iter().map(|run| name(run).chars().count()).max().unwrap_or(0).max(3);
    say!("{:<width$}  {:<8}  {:>15}  {:>8}  picture", "run", "status", "step", "loss");
    for run in &found {
        let status = match run.status {
            Status::Training => "training",
            Status::Finished => "finished",
            Status::Stopped => "stopped",
            Status::Crashed => "crashed",
        };
        let step = run.steps.map_or(run.step.to_string(), |steps| format!("{}/{steps}", run.step));
        let loss = run.loss.map_or("-".into(), |loss| format!("{loss:.4}"));
        let picture = run.picture.as_ref().map_or("-".into(), |path| path.display().to_string());
        say!("{:<width$}  {status:<8}  {step:>15}  {loss:>8}  {picture}", name(run));
    }
    for run in found.iter().filter(|run| matches!(run.status, Status::Stopped | Status::Crashed)) {
        let path = quoted(&run.path);
        let ended = if run.status == Status::Crashed { "ended without being asked to" } else { "was stopped" };
        match run.checkpoint {
            Some(at) => say!("\n{path} {ended}; it goes on from step {at}: flowtape train --resume {path}"),
            None => say!("\n{path} {ended}, and has no checkpoint: begin again with its recipe"),
        }
    }
    delivered()
}
