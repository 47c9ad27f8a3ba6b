//! The `flowtape` binary.

mod bench_cli;
mod progress;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use flowtape_engine::cpu::usable_threads;
use flowtape_trainer::digits::SIDE;
use flowtape_trainer::inspect::inspect;
use flowtape_trainer::picture::load_grey;
use flowtape_trainer::train::{Summary, Trained, resume, save_samples, train};
use flowtape_trainer::{Recipe, recipe::ReportConfig};

use crate::progress::Terminal;

/// Trains flow-matching transformers.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    /// Threads of the CPU, at most one for each core; 0, the default, means all cores. The results do not depend on it.
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
    /// List what there is to compute on, and why something can't be used.
    Devices,
    /// Show a model's architecture and counts without its weights in memory.
    Inspect(Inspect),
    /// Measure what steps and kernels take on this machine.
    #[command(subcommand)]
    Bench(bench_cli::Bench),
}

#[derive(Args)]
struct Inspect {
    /// A preset such as flux.1-dev, a config.json, a diffusers folder, a safetensors file, or a run folder.
    target: String,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
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
    /// Where to train: cpu, cuda, cuda:NUMBER, wgpu or wgpu:NUMBER; see `flowtape devices`. The recipe's own device by default.
    #[arg(long)]
    device: Option<String>,
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
    /// Where to sample; the run's own device by default.
    #[arg(long)]
    device: Option<String>,
    /// Euler steps; the run's own number by default.
    #[arg(long)]
    steps: Option<usize>,
    /// Scale of classifier-free guidance; the run's own by default.
    #[arg(long)]
    guidance: Option<f64>,
    /// A grey PNG of a frame's size, from which the videos go on: for models trained on image-to-video.
    #[arg(long, value_name = "PNG")]
    first_frame: Option<PathBuf>,
    /// The PNG to write; videos are animated, and their frames stand beside it in NAME_frames.png.
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
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads(cli.threads)).build()?;
    // All work starts inside the pool: forking from outside it costs many times more.
    pool.install(|| match cli.command {
        Command::Train(args) => run_train(&args),
        Command::Sample(args) => run_sample(&args),
        Command::Devices => list_devices(),
        Command::Inspect(args) => run_inspect(&args),
        Command::Bench(args) => bench_cli::run(&args),
    })
}

/// The threads to make, and a note where they are not those asked for. Unasked, rayon decides (`RAYON_NUM_THREADS`).
fn threads(asked: Option<usize>) -> usize {
    let Some(asked) = asked else { return 0 };
    let threads = usable_threads(asked);
    match asked {
        0 => eprintln!("--threads 0: all {threads} cores"),
        _ if asked > threads => eprintln!("--threads {asked}: this machine has {threads} cores, so {threads} are used"),
        _ => {}
    }
    threads
}

fn run_train(args: &Train) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)).context("installing the interrupt handler")?;
    let mut progress = Terminal::default();
    let (summary, report) = match (&args.recipe, &args.resume) {
        (Some(path), _) => {
            let mut recipe = Recipe::load(path, &args.set)?;
            recipe.device = args.device.clone().unwrap_or(recipe.device);
            (train(&recipe, &mut progress, &stop)?, recipe.report)
        }
        (None, Some(run)) => (resume(run, args.device.as_deref(), &mut progress, &stop)?, None),
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
        if let Some(error) = q.background_error {
            println!("background      {error:.4}  (mean squared distance from black)");
        }
        println!("distance ratio  {:.3}  (to the nearest real digit, over real to real)", q.distance_ratio);
    }
    if let Some(i2v) = s.image_to_video {
        let (quality, first) = (i2v.quality, i2v.first_frame);
        println!("image to video  accuracy {:.1} %", 100.0 * quality.accuracy);
        println!("first frame     error {:.4}, against another's {:.4}", first.error, first.error_shuffled);
    }
    println!("look at         {run}/samples, {run}/loss.svg");
    println!("sample it       flowtape sample {run} --prompt \"a handwritten seven\" --n 16 --seed 1 --out sevens.png");
}

fn list_devices() -> Result<()> {
    flowtape_gpu::reports().iter().try_for_each(|device| say(format_args!("{device}\n")))
}

fn run_inspect(args: &Inspect) -> Result<()> {
    let found = inspect(&args.target)?;
    if args.json { say(format_args!("{}\n", serde_json::to_string(&found)?)) } else { say(format_args!("{found}")) }
}

/// Prints to stdout. A reader that has gone away, such as `head`, is no error.
fn say(text: std::fmt::Arguments<'_>) -> Result<()> {
    match std::io::stdout().write_fmt(text) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn run_sample(args: &Sample) -> Result<()> {
    let mut trained = Trained::load(&args.run, args.device.as_deref())?;
    if let Some(steps) = args.steps {
        trained.sampling.num_inference_steps = steps;
    }
    if let Some(scale) = args.guidance {
        trained.sampling.guidance_scale = scale;
    }
    let sides = trained.data.video.map_or((SIDE, SIDE), |size| (size.height, size.width));
    let first_frame = args.first_frame.as_ref().map(|path| load_grey(path, sides)).transpose()?;
    let samples = trained.sample(&args.prompt, args.n, args.seed, first_frame.as_deref())?;
    let name = args.out.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let path = |kind: &str| args.out.with_file_name(format!("{name}{kind}.png"));
    save_samples(&samples, &trained.data, (args.n as f64).sqrt().ceil() as usize, path)?;
    println!("{}", args.out.display());
    Ok(())
}
