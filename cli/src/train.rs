//! `flowtape train`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use clap::Args;
use flowtape_trainer::Recipe;
use flowtape_trainer::builtin::digits::{ImageToVideo, Quality};
use flowtape_trainer::builtin::pictures::Nearest;
use flowtape_trainer::hooks::Hook;
use flowtape_trainer::recipe::ReportConfig;
use flowtape_trainer::run::RunFolder;
use flowtape_trainer::run::quoted;
use flowtape_trainer::train::{Resume, Summary, WINDOW, resume_among, train_among};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::preprocess::prepare;
use crate::progress::Terminal;
use crate::ranks::{Place, spread};
use crate::recipes;
use crate::signals::Stop;
use crate::terminal::say;

/// What to train.
#[derive(Args)]
pub struct Train {
    /// The recipe: a file, or the name of one that `flowtape recipes` lists, such as digits.
    #[arg(required_unless_present = "resume", conflicts_with = "resume")]
    recipe: Option<PathBuf>,
    /// Override a key of the recipe, such as optimizer.lr=1e-4; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Go on with this run folder from its last checkpoint. With --set step_scheduler.max_steps=NUMBER it is made longer.
    #[arg(long, value_name = "RUN")]
    resume: Option<PathBuf>,
    /// Go on although something that changes the training is other than it was.
    #[arg(long, requires = "resume")]
    accept_changes: bool,
    /// Where to train: cpu, cuda, cuda:NUMBER, wgpu or wgpu:NUMBER; see `flowtape devices`. The recipe's own device by default.
    #[arg(long)]
    device: Option<String>,
    /// Train as this many ranks on this machine, each with its share of the steps' micro-batches: on cuda a process for each GPU, on
    /// cpu threads of this one. Not needed where torchrun, srun or mpirun starts the ranks.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=4096))]
    nproc: Option<u64>,
    /// Print one JSON object as the last line instead of a table.
    #[arg(long)]
    json: bool,
}

/// Trains, and prints what it came to. A run that was stopped ends with 128 and the number of the signal: 130 after Ctrl-C,
/// 143 after SIGTERM.
pub fn run(args: &Train) -> Result<ExitCode> {
    let stop = Stop::listen().context("listening for Ctrl-C")?;
    let recipe = match (&args.recipe, &args.resume) {
        (Some(path), _) => recipes::load(path, &args.set)?,
        (None, Some(run)) => RunFolder::open_with(run, &args.set)?.1,
        (None, None) => anyhow::bail!("name a recipe, or a run folder with --resume"),
    };
    let recipe = Recipe { device: args.device.clone().unwrap_or_else(|| recipe.device.clone()), ..recipe };
    let code =
        spread(args.nproc.map(|n| n as usize), &recipe.device, &stop, &|place| train(args, &recipe, &place, &stop))?;
    Ok(code.unwrap_or_else(|| stop.exit_code()))
}

/// Trains as one rank. The first one tells how it goes and what it came to; none of a code is the one of a signal.
fn train(args: &Train, recipe: &Recipe, place: &Place<'_>, stop: &Stop) -> Result<Option<ExitCode>> {
    let mut progress = Terminal::new(stop);
    let hooks: Vec<Box<dyn Hook + '_>> = if place.is_first() { vec![Box::new(&mut progress)] } else { Vec::new() };
    let summary = if let Some(run) = &args.resume {
        let with = Resume { device: args.device.as_deref(), set: &args.set, accept_changes: args.accept_changes };
        resume_among(&place.comm, place.open, run, &with, hooks, stop.asked())?
    } else {
        let was_stopped = place.first_does(|| {
            let Some(folder) = &recipe.data.folder else { return Ok(false) };
            prepare(folder, recipe.data.num_workers, &recipe.device, stop)?;
            Ok(stop.asked().load(Ordering::Relaxed))
        })?;
        if was_stopped {
            if place.is_first() {
                say!("stopped while encoding; what is done is kept, and the same command goes on");
            }
            return Ok(None);
        }
        let device = (place.open)(&recipe.device)?;
        train_among(&place.comm, &device, recipe, hooks, stop.asked())?
    };
    progress.finish();
    if place.is_first() {
        if args.json {
            say!("{}", serde_json::to_string(&summary)?);
        } else {
            print_summary(&summary, recipe.report.as_ref().filter(|_| args.resume.is_none()));
        }
    }
    Ok((!summary.interrupted).then_some(ExitCode::SUCCESS))
}

fn print_summary(s: &Summary, report: Option<&ReportConfig>) {
    let run = quoted(&s.run_dir);
    if s.interrupted && s.steps == 0 {
        say!("stopped before the first step: there is nothing to go on with");
        return;
    }
    if s.interrupted {
        say!("stopped after step {}; go on with: flowtape train --resume {run}", s.steps);
        return;
    }
    say!("run             {}", s.run_dir.display());
    say!("steps           {}", s.steps);
    say!("final loss      {:.4}  (mean of the last {} steps)", s.final_loss, s.steps.min(WINDOW as u64));
    say!("training        {:.1} s, {:.4} s a step", s.train_seconds, s.train_seconds / s.steps.max(1) as f64);
    say!("everything      {:.1} s", s.total_seconds);
    if s.left_out.unreadable > 0 {
        say!("left out        {} readings of samples failed, as the log says", s.left_out.unreadable);
    }
    if s.left_out.dropped_each_epoch > 0 {
        say!("dropped         {} samples each epoch, which fill no batch", s.left_out.dropped_each_epoch);
    }
    if let Some(q) = figures::<Quality>(Some(&Value::Object(s.figures.clone()))) {
        let each = report.map_or(String::new(), |r| format!(", {} a class", r.samples_per_class));
        say!("accuracy        {:.1} %  (3 nearest real digits; {} samples{each})", 100.0 * q.accuracy, q.samples);
        if let Some(before) = figures::<Quality>(s.figures.get("before")) {
            say!("before          {:.1} %  (of the checkpoint that it started from)", 100.0 * before.accuracy);
            for (class, after) in q.accuracy_by_class.iter().flatten().enumerate() {
                let before = before.accuracy_by_class.map_or(f64::NAN, |classes| classes[class]);
                say!("  class {class}       {:.1} %, before {:.1} %", 100.0 * after, 100.0 * before);
            }
        }
        if let Some(error) = q.background_error {
            say!("background      {error:.4}  (mean squared distance from black)");
        }
        say!("distance ratio  {:.3}  (to the nearest real digit, over real to real)", q.distance_ratio);
    }
    if let Some(n) = figures::<Nearest>(s.figures.get("nearest")) {
        let (own, group) = (100.0 * n.own, 100.0 * n.group);
        let (own_chance, group_chance) = (100.0 * n.own_shuffled, 100.0 * n.group_shuffled);
        say!(
            "nearest picture own {own:.1} % (captions shuffled {own_chance:.1} %), of the group {group:.1} % ({group_chance:.1} %)"
        );
    }
    if let Some(i2v) = figures::<ImageToVideo>(s.figures.get("image_to_video")) {
        let (quality, first) = (i2v.quality, i2v.first_frame);
        say!("image to video  accuracy {:.1} %", 100.0 * quality.accuracy);
        say!("first frame     error {:.4}, against another's {:.4}", first.error, first.error_shuffled);
    }
    say!("look at         {}, {}", s.run_dir.join("samples").display(), s.run_dir.join("loss.svg").display());
    if let Some(prompt) = s.figures.get("prompt").and_then(Value::as_str) {
        let prompt = shlex::try_quote(prompt).unwrap_or_default();
        say!("sample it       flowtape sample {run} --prompt {prompt} --n 16 --seed 1 --out samples.png");
    }
}

/// Figures that a report may hold.
fn figures<T: DeserializeOwned>(found: Option<&Value>) -> Option<T> {
    found.and_then(|value| serde_json::from_value(value.clone()).ok())
}
