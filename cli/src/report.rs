//! `flowtape report`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use flowtape_trainer::page::{self, RunReader};

use crate::terminal::say;

/// What to show.
#[derive(Args)]
pub struct Report {
    /// Run folders; several are laid over each other.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The file to write; report.html in the run folder by default, or here for several runs.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Writes the page, and says where.
pub fn run(args: &Report) -> Result<ExitCode> {
    let mut runs = args.runs.iter().map(|run| RunReader::open(run)).collect::<Result<Vec<_>, _>>()?;
    let own = match &args.runs[..] {
        [run] => run.join("report.html"),
        _ => "report.html".into(),
    };
    let out = args.out.clone().unwrap_or(own);
    if out.is_dir() {
        bail!("{}: is a folder: name a file, such as {}", out.display(), out.join("report.html").display());
    }
    page::write(&mut runs, &out)?;
    say!("{}", out.display());
    Ok(ExitCode::SUCCESS)
}
