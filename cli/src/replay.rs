//! `flowtape replay`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flowtape_trainer::replay::replay;

use crate::terminal::{delivered, note, say};

/// What to run again.
#[derive(Args)]
pub struct Replay {
    /// The bundle: a folder of a run's `replay`.
    bundle: PathBuf,
    /// Where to run it; the run's own device by default.
    #[arg(long)]
    device: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the step, and says what was found. It is no error of this command that a step is not finite.
pub fn run(args: &Replay) -> Result<ExitCode> {
    let replayed = replay(&args.bundle, args.device.as_deref())?;
    if args.json {
        say!("{}", serde_json::to_string(&replayed.finding)?);
    } else {
        say!("{}", replayed.finding);
    }
    if replayed.finding != replayed.before {
        note!("when it was written: {}", replayed.before);
    }
    delivered()
}
