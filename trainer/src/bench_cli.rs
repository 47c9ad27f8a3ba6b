//! `flowtape bench`.

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use flowtape_trainer::bench::{Measurement, Options, Precision, Work, step};

/// What to measure.
#[derive(Subcommand)]
pub enum Bench {
    /// A training step: forward, backward and AdamW.
    Step(Step),
}

#[derive(Args)]
pub struct Step {
    /// The sizes; docs/BENCHMARKS.md has them.
    #[arg(long, value_enum, default_value = "s")]
    config: Config,
    /// What flows where: `bf16` means weights, activations, gradients and moments.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeName,
    /// Where to run: cpu, cuda, cuda:NUMBER, wgpu or wgpu:NUMBER.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Samples of a batch; the size's own number by default.
    #[arg(long)]
    batch: Option<usize>,
    /// Steps that count.
    #[arg(long, default_value_t = 7)]
    steps: usize,
    /// Steps before.
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Print where the time goes, kernel by kernel.
    #[arg(long)]
    profile: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Config {
    S,
    M,
    L,
    Xl,
    Digits,
}

#[derive(Clone, Copy, ValueEnum)]
enum DtypeName {
    F32,
    Bf16,
}

fn name<T: ValueEnum>(value: T) -> String {
    value.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
}

/// Runs a benchmark and prints it.
pub fn run(bench: &Bench) -> Result<()> {
    let Bench::Step(args) = bench;
    let mut work = Work::named(&name(args.config)).context("a configuration")?;
    work.batch = args.batch.unwrap_or(work.batch);
    let device = flowtape_gpu::device(&args.device)?;
    let precision = match args.dtype {
        DtypeName::F32 => Precision::F32,
        DtypeName::Bf16 => Precision::Bf16,
    };
    let Step { steps, warmup, profile, .. } = *args;
    let measured = step(&work, &device, &Options { precision, steps, warmup, profile })?;
    if profile {
        print_profile(&measured);
    }
    if args.json {
        println!("{}", serde_json::to_string(&measured)?);
    } else {
        print_step(&measured);
    }
    Ok(())
}

fn print_step(m: &Measurement) {
    println!("{} {}, batch {}, {} parameters", m.config, name_of(m.dtype), m.batch, m.params);
    println!("device   {}, {} threads", m.device, m.threads);
    println!("step     {:.4} s  (fastest {:.4}, slowest {:.4})", m.s_step, m.s_min, m.s_max);
    println!("forward  {:.4} s, backward {:.4} s, optimiser {:.4} s", m.s_fwd, m.s_bwd, m.s_opt);
    println!("rate     {:.1} GFLOP/s, {:.2} cores busy", m.gflops, m.cpu_per_wall);
    println!("memory   {} MiB at most, {} before the first step", m.peak_rss_mb, m.rss_before_mb);
}

fn name_of(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
    }
}

/// Rates are those of each kernel's fastest call, so that they hold on a busy machine too.
fn print_profile(m: &Measurement) {
    let kernels: f64 = m.profile.iter().map(|(_, e)| e.seconds).sum();
    let best: f64 = m.profile.iter().map(|(_, e)| e.calls as f64 * e.fastest).sum();
    let head = ["calls", "ms", "%", "best ms", "GFLOP/s", "GB/s"];
    println!("{:>6} {:>9} {:>6} {:>9} {:>8} {:>6}  kernel", head[0], head[1], head[2], head[3], head[4], head[5]);
    for (kernel, e) in &m.profile {
        let calls = e.calls as f64;
        let rate = |amount: f64| {
            if amount > 0.0 { format!("{:.1}", amount / calls / e.fastest / 1e9) } else { String::new() }
        };
        println!(
            "{:>6} {:>9.3} {:>6.2} {:>9.3} {:>8} {:>6}  {kernel}",
            e.calls,
            1e3 * e.seconds,
            100.0 * e.seconds / m.s_step,
            1e3 * calls * e.fastest,
            rate(e.flops),
            rate(e.bytes)
        );
    }
    let rest = m.s_step - kernels;
    println!("{:>6} {:>9.3} {:>6.2} {:>32}", "", 1e3 * rest, 100.0 * rest / m.s_step, "the tape, views and shapes");
    println!("{:>6} {:>9.3} {:>6} {:>9.3}  all kernels", "", 1e3 * kernels, "", 1e3 * best);
}
