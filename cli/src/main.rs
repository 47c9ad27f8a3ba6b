//! The `flowtape` binary.

mod bench;
mod check;
mod doctor;
mod help;
mod import;
mod loopback;
mod preprocess;
mod progress;
mod ranks;
mod recipes;
mod replay;
mod report;
mod runs;
mod sample;
mod settings;
mod signals;
mod terminal;
mod train;
mod warnings;
mod watch;
mod web;
mod weights;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use flowtape_engine::cpu::usable_threads;
use flowtape_trainer::inspect::inspect;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::terminal::{Stderr, be_quiet, delivered, err, note, out, say};

/// Trains flow-matching transformers.
#[derive(Parser)]
#[command(version, arg_required_else_help = true, after_help = help::EXIT_CODES)]
struct Cli {
    /// Threads of the CPU, at most one for each core; 0, the default, means all cores. The results do not depend on it.
    #[arg(long, global = true)]
    threads: Option<usize>,
    /// Tell nothing but errors on standard error: no progress, no notes, no warnings. Results go to standard output as ever.
    #[arg(long, short, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a recipe, or go on with an interrupted run.
    Train(train::Train),
    /// Take over samples that NeMo's preprocessing encoded.
    Import(import::Import),
    /// Encode pictures and captions once, for training.
    Preprocess(preprocess::Preprocess),
    /// List the recipes that come with this binary, or print one.
    Recipes(recipes::Recipes),
    /// Write what runs came to as one HTML file, to be read in a browser.
    Report(report::Report),
    /// Show runs in a browser while they train.
    Watch(watch::Watch),
    /// Train the digits in a browser: a page that needs nothing else, for browsers of this machine or as a file.
    Web(web::Web),
    /// Run a step again that was not finite, and say where numbers stopped being that.
    Replay(replay::Replay),
    /// Generate images with a trained run.
    Sample(Box<sample::Sample>),
    /// Fold adapters (LoRA and its kin, in any known form) into a checkpoint.
    Merge(weights::Merge),
    /// Write a checkpoint in another dtype, or in files of another size.
    Convert(weights::Convert),
    /// Make a LoRA of what tells two checkpoints of one model apart.
    Extract(weights::Extract),
    /// Say what a recipe would take, and whether it can be had, before anything is made.
    Check(check::CheckArgs),
    /// Print the JSON Schema of recipes, for editors.
    Schema,
    /// Look at this machine: what it offers, and what is in the way, each with what mends it.
    Doctor(doctor::Doctor),
    /// List what there is to compute on, and why something can't be used.
    Devices(Devices),
    /// List runs with their state, step, loss and newest picture.
    Runs(runs::Runs),
    /// Show a model's architecture and counts without its weights in memory.
    Inspect(Inspect),
    /// Measure what steps and kernels take on this machine.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Print what a shell needs to complete commands and options.
    Completions(help::Completions),
    /// Write manual pages, one a command.
    Man(help::Man),
}

#[derive(Args)]
struct Devices {
    /// Print one JSON array.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Inspect {
    /// A preset such as flux.1-dev, a config.json, a diffusers folder, a safetensors file, or a run folder.
    target: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        err(format_args!("error: {error:#}\n"));
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    let matches = numbers_may_be_negative(Cli::command()).get_matches_from(settings::spelled_out(std::env::args_os()));
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if cli.quiet {
        be_quiet();
    }
    log(if cli.quiet { "error" } else { "warn" });
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads(cli.threads)).build()?;
    // All work starts inside the pool: forking from outside it costs many times more.
    pool.install(|| match cli.command {
        Command::Train(args) => train::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Preprocess(args) => preprocess::run(&args),
        Command::Recipes(args) => recipes::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Watch(args) => watch::run(&args),
        Command::Web(args) => web::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Sample(args) => sample::run(&args),
        Command::Merge(args) => weights::merge(&args),
        Command::Convert(args) => weights::convert(&args),
        Command::Extract(args) => weights::extract(&args),
        Command::Check(args) => check::run(&args),
        Command::Schema => {
            say!("{:#}", flowtape_trainer::recipe::schema());
            delivered()
        }
        Command::Doctor(args) => doctor::run(&args),
        Command::Devices(args) => list_devices(args.json),
        Command::Runs(args) => runs::run(&args),
        Command::Inspect(args) => run_inspect(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Completions(args) => help::completions(&args, Cli::command()),
        Command::Man(args) => help::man(&args, Cli::command()),
    })
}

/// So that a number below 0 is told to be a wrong value, and not an unknown option.
fn numbers_may_be_negative(command: clap::Command) -> clap::Command {
    let takes = |arg: clap::Arg| if arg.get_action().takes_values() { arg.allow_negative_numbers(true) } else { arg };
    command.mut_args(takes).mut_subcommands(numbers_may_be_negative)
}

/// The threads to make, and a note where they are not those asked for. Unasked, rayon decides (`RAYON_NUM_THREADS`).
fn threads(asked: Option<usize>) -> usize {
    let Some(asked) = asked else { return 0 };
    let threads = usable_threads(asked);
    match asked {
        0 => note!("--threads 0: all {threads} cores"),
        _ if asked > threads => note!("--threads {asked}: this machine has {threads} cores, so {threads} are used"),
        _ => {}
    }
    threads
}

/// Logs go to stderr: warnings, or what RUST_LOG asks for (flow_matching=debug shows what the pipeline does).
fn log(usual: &str) {
    let asked = std::env::var(EnvFilter::DEFAULT_ENV).unwrap_or_default();
    let filter = EnvFilter::try_new(if asked.is_empty() { usual } else { &asked });
    let filter = filter.unwrap_or_else(|error| {
        note!("RUST_LOG: {error}; showing {usual}s");
        EnvFilter::new(usual)
    });
    let printed = tracing_subscriber::fmt::layer().with_writer(|| Stderr).with_filter(filter);
    let kept = warnings::Keep.with_filter(LevelFilter::WARN);
    tracing_subscriber::registry().with(printed).with(kept).init();
}

fn list_devices(json: bool) -> Result<ExitCode> {
    let found = flowtape_gpu::reports();
    if json {
        say!("{}", serde_json::to_string(&found)?);
    } else {
        found.iter().for_each(|device| say!("{device}"));
    }
    delivered()
}

fn run_inspect(args: &Inspect) -> Result<ExitCode> {
    let found = inspect(&args.target)?;
    if args.json {
        say!("{}", serde_json::to_string(&found)?);
    } else {
        out(format_args!("{found}"));
    }
    delivered()
}
