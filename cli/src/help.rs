//! What helps to use the command line: completions, manual pages, exit codes.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Command};
use clap_complete::Shell;

use crate::terminal::{delivered, out, say};

/// What a process that ends says.
pub const EXIT_CODES: &str = "Exit codes:
  0    done
  1    it failed, or what was asked for does not hold: a recipe that does not fit (check), a machine that can't train (doctor)
  2    the command line was wrong
  130  stopped by Ctrl-C, with a checkpoint; 143 by SIGTERM, 138 by SIGUSR1, 129 by SIGHUP (128 and the signal's number)";

/// For which shell.
#[derive(Args)]
pub struct Completions {
    /// The shell.
    shell: Shell,
}

/// Prints a shell's completions.
pub fn completions(args: &Completions, mut command: Command) -> Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, "flowtape", &mut text);
    out(format_args!("{}", String::from_utf8_lossy(&text)));
    delivered()
}

/// Where to.
#[derive(Args)]
pub struct Man {
    /// The folder, such as ~/.local/share/man/man1.
    #[arg(long, default_value = "man")]
    out: PathBuf,
}

/// Writes manual pages.
pub fn man(args: &Man, command: Command) -> Result<ExitCode> {
    let told = || format!("--out {}", args.out.display());
    std::fs::create_dir_all(&args.out).with_context(told)?;
    clap_mangen::generate_to(command.disable_help_subcommand(true), &args.out).with_context(told)?;
    say!("{}", args.out.display());
    delivered()
}
