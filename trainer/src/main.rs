//! The `flowtape` binary.

mod bench_cli;
mod progress;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use flowtape_engine::cpu::awake;
use flowtape_trainer::picture::save_grid;
use flowtape_trainer::train::{Summary, Trained, resume, train};
use flowtape_trainer::{Recipe, recipe::ReportConfig};

use crate::progress::Terminal;

/// Trains flow-matching transformers.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    /// Threads of the CPU; all by default. The results do not depend on it.
    #[arg(long, global = true)]
    threads: Option<usize>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a recipe, or go on with an interrupted run.
    Train(Train),
    /// Generate images with a trained run.
    Sample(Sample),
    /// Measure what steps and kernels take on this machine.
    #[command(subcommand)]
    Bench(bench_cli::Bench),
}

#[derive(Args)]
struct Train {
    /// The recipe, such as recipes/digits.yaml.
    #[arg(required_unless_present = "resume", conflicts_with = "resume")]
    recipe: Option<PathBuf>,
    /// Override a key of the recipe, such as optimizer.lr=1e-4; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "resume")]
    set: Vec<String>,
    /// Go on with this run folder from its last checkpoint.
    #[arg(long, value_name = "RUN")]
    resume: Option<PathBuf>,
    /// Print one JSON object as the last line instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Sample {
    /// A run folder.
    run: PathBuf,
    /// What to draw, such as "a handwritten seven".
    #[arg(long)]
    prompt: String,
    /// How many images.
    #[arg(long, default_value_t = 16)]
    n: usize,
    /// The same seed gives the same images.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Euler steps; the run's own number by default.
    #[arg(long)]
    steps: Option<usize>,
    /// Scale of classifier-free guidance; the run's own by default.
    #[arg(long)]
    guidance: Option<f64>,
    /// The PNG to write.
    #[arg(long, default_value = "samples.png")]
    out: PathBuf,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    // Logs go to stderr, where RUST_LOG asks for them: flow_matching=debug shows what the pipeline does.
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let cli = Cli::parse();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(cli.threads.unwrap_or(0)).build()?;
    // All work starts inside the pool: forking from outside it costs many times more.
    pool.install(|| {
        awake(|| match cli.command {
            Command::Train(args) => run_train(&args),
            Command::Sample(args) => run_sample(&args),
            Command::Bench(args) => bench_cli::run(&args),
        })
    })
}

fn run_train(args: &Train) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)).context("installing the interrupt handler")?;
    let mut progress = Terminal::default();
    let (summary, report) = match (&args.recipe, &args.resume) {
        (Some(path), _) => {
            let recipe = Recipe::load(path, &args.set)?;
            (train(&recipe, &mut progress, &stop)?, recipe.report)
        }
        (None, Some(run)) => (resume(run, &mut progress, &stop)?, None),
        (None, None) => anyhow::bail!("name a recipe, or a run folder with --resume"),
    };
    progress.finish();
    if args.json {
        println!("{}", serde_json::to_string(&summary)?);
    } else {
        print_summary(&summary, report.as_ref());
    }
    Ok(())
}

fn print_summary(s: &Summary, report: Option<&ReportConfig>) {
    let run = s.run_dir.display();
    if s.interrupted {
        println!("stopped after step {}; go on with: flowtape train --resume {run}", s.steps);
        return;
    }
    println!("run             {run}");
    println!("steps           {}", s.steps);
    println!("final loss      {:.4}  (mean of the last 100 steps)", s.final_loss);
    println!("training        {:.1} s, {:.4} s a step", s.train_seconds, s.train_seconds / s.steps.max(1) as f64);
    println!("everything      {:.1} s", s.total_seconds);
    if let Some(q) = s.quality {
        let each = report.map_or(String::new(), |r| format!(", {} a class", r.samples_per_class));
        println!("accuracy        {:.1} %  (3 nearest real digits; {} samples{each})", 100.0 * q.accuracy, q.samples);
        println!("distance ratio  {:.3}  (to the nearest real digit, over real to real)", q.distance_ratio);
    }
    println!("look at         {run}/samples, {run}/loss.svg");
    println!("sample it       flowtape sample {run} --prompt \"a handwritten seven\" --n 16 --seed 1 --out sevens.png");
}

fn run_sample(args: &Sample) -> Result<()> {
    let mut trained = Trained::load(&args.run)?;
    if let Some(steps) = args.steps {
        trained.sampling.num_inference_steps = steps;
    }
    if let Some(scale) = args.guidance {
        trained.sampling.guidance_scale = scale;
    }
    let images = trained.sample(&args.prompt, args.n, args.seed)?;
    save_grid(&args.out, &images, (args.n as f64).sqrt().ceil() as usize)?;
    println!("{}", args.out.display());
    Ok(())
}
