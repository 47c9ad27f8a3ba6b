//! `flowtape bench`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use flowtape_benches::{
    EncoderMeasurement, EncoderOptions, Measurement, OpMeasurement, OpsOptions, Options, Point, Work, data, encoders,
    ops, plot, scaling, step, table,
};
use flowtape_engine::backend::Backend;
use flowtape_engine::cpu::awake;
use flowtape_engine::{DType, Device};
use flowtape_trainer::recipe::Dtype;

use crate::terminal::{delivered, note, out, say};

/// What to measure.
#[derive(Subcommand)]
pub enum Bench {
    /// A training step: forward, backward and AdamW.
    Step(Step),
    /// The operations one by one, against what the machine can do at best.
    Ops(Ops),
    /// Autoencoders of published shapes with random weights: encoding and decoding.
    Encoders(Encoders),
    /// Whether reading slow samples keeps up with the steps, and what the index of a large cache takes.
    Data(DataBench),
    /// How a step's time and memory grow with the batch, the tokens, the width and the depth.
    Scaling(Scaling),
}

#[derive(Args)]
pub struct Step {
    /// The sizes; docs/BENCHMARKS.md has them.
    #[arg(long, value_enum, default_value = "s")]
    config: Config,
    /// What flows where: `bf16` means weights, activations, gradients and moments; `mixed` keeps weights and moments in f32,
    /// and so does `mixed_f16`.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeName,
    /// Where to run: a name that `flowtape devices` lists.
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
    /// Update after the backward pass, not each parameter as soon as its gradient is final: more memory, the same bits.
    #[arg(long)]
    update_last: bool,
    /// Print where the time goes, kernel by kernel.
    #[arg(long)]
    profile: bool,
    /// Train LoRA adapters of this rank beside all linear layers, which are frozen.
    #[arg(long, value_name = "RANK")]
    lora: Option<usize>,
}

#[derive(Args)]
pub struct Ops {
    /// The operands.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: OperandName,
    /// Where to run: a name that `flowtape devices` lists.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// The sizes of FLUX.1 at 1024 x 1024 pixels, for GPUs.
    #[arg(long)]
    large: bool,
    /// Only operations whose name or sizes contain this, such as matmul, "attention backward" or 640x768.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Seconds that each operation is measured for.
    #[arg(long, default_value_t = 0.2)]
    seconds: f64,
    /// The device's peak in GFLOP/s by its data sheet; the CPU's is measured.
    #[arg(long, value_name = "GFLOPS")]
    peak: Option<f64>,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub struct Encoders {
    /// Weights and activations.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: OperandName,
    /// Where to run: a name that `flowtape devices` lists.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Only what has this in its name or sizes, such as decode or 512x512.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// How often each is run; the fastest counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Cut pictures into tiles of this side, in pixels.
    #[arg(long, value_name = "PIXELS")]
    tile: Option<usize>,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub struct DataBench {
    /// Milliseconds that reading a sample takes.
    #[arg(long, value_name = "MS", default_value_t = 5)]
    pause: u64,
    /// Steps of each kind that count.
    #[arg(long, default_value_t = 15)]
    steps: usize,
    /// Samples of the index.
    #[arg(long, default_value_t = 1_000_000)]
    samples: usize,
    /// A folder to write the index into, which must be empty or not there.
    #[arg(long, value_name = "FOLDER")]
    index: PathBuf,
}

#[derive(Args)]
pub struct Scaling {
    /// What flows where.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeName,
    /// Where to run: a name that `flowtape devices` lists.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Steps of each size that count.
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// Write a picture to this SVG.
    #[arg(long, value_name = "SVG")]
    plot: Option<PathBuf>,
    /// Print one JSON object a line instead of a Markdown table.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum OperandName {
    F32,
    Bf16,
    F16,
}

impl From<OperandName> for DType {
    fn from(name: OperandName) -> Self {
        match name {
            OperandName::F32 => Self::F32,
            OperandName::Bf16 => Self::BF16,
            OperandName::F16 => Self::F16,
        }
    }
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
    Mixed,
    #[value(name = "mixed_f16")]
    MixedF16,
}

impl From<DtypeName> for Dtype {
    fn from(name: DtypeName) -> Self {
        match name {
            DtypeName::F32 => Self::F32,
            DtypeName::Bf16 => Self::Bf16,
            DtypeName::Mixed => Self::Mixed,
            DtypeName::MixedF16 => Self::MixedF16,
        }
    }
}

fn name<T: ValueEnum>(value: T) -> String {
    value.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
}

/// Runs a benchmark and prints it.
pub fn run(bench: &Bench) -> Result<ExitCode> {
    match bench {
        Bench::Step(args) => run_step(args)?,
        Bench::Ops(args) => run_ops(args)?,
        Bench::Encoders(args) => run_encoders(args)?,
        Bench::Data(args) => run_data(args)?,
        Bench::Scaling(args) => run_scaling(args)?,
    }
    delivered()
}

fn run_ops(args: &Ops) -> Result<()> {
    let options = OpsOptions {
        device: flowtape_gpu::device(&args.device)?,
        device_name: args.device.clone(),
        dtype: args.dtype.into(),
        large: args.large,
        only: args.only.clone(),
        seconds: args.seconds,
        peak_gflops: args.peak,
    };
    if !args.json {
        let head = ["op", "shape", "best us", "median us", "GFLOP/s", "GB/s", "%"];
        say!(
            "{:<22} {:<16} {:>10} {:>10} {:>9} {:>7} {:>6}  limit",
            head[0],
            head[1],
            head[2],
            head[3],
            head[4],
            head[5],
            head[6]
        );
    }
    let mut found = false;
    let measured = |m: &OpMeasurement| {
        found = true;
        say!("{}", if args.json { serde_json::json!(m).to_string() } else { op_line(m) });
    };
    awake(&options.device, || ops(&options, measured))?;
    match &args.only {
        Some(text) if !found => {
            anyhow::bail!("--only {text}: no operation has this in its name or sizes; without it all are listed")
        }
        _ => Ok(()),
    }
}

fn run_encoders(args: &Encoders) -> Result<()> {
    let options = EncoderOptions {
        device: flowtape_gpu::device(&args.device)?,
        dtype: args.dtype.into(),
        only: args.only.clone(),
        rounds: args.rounds,
        tile: args.tile,
    };
    let measured = |m: &EncoderMeasurement| {
        let line = || format!("{:<16} {:<18} {:>9.3} s {:>7} MiB of tensors", m.name, m.shape, m.s_min, m.tensors_mb);
        say!("{}", if args.json { serde_json::json!(m).to_string() } else { line() });
    };
    Ok(awake(&options.device, || encoders(&options, measured))?)
}

/// A JSON object a line. The index comes first: its memory is the process's.
fn run_data(args: &DataBench) -> Result<()> {
    say!("{}", serde_json::json!(data::index(&args.index, args.samples)?));
    let (work, device) = (Work::s(), Device::cpu());
    let measured = awake(&device, || data::loading(&work, &device, Duration::from_millis(args.pause), args.steps))?;
    say!("{}", serde_json::json!(measured));
    Ok(())
}

fn run_scaling(args: &Scaling) -> Result<()> {
    let device = flowtape_gpu::device(&args.device)?;
    let measured = |point: &Point| {
        note!("{} {}: {} s, {} MiB", point.axis, point.value, point.s_step, point.memory_mb);
    };
    let points = awake(&device, || scaling(&device, args.dtype.into(), args.steps, measured))?;
    if args.json {
        points.iter().for_each(|point| say!("{}", serde_json::json!(point)));
    } else {
        out(format_args!("{}", table(&points)));
    }
    args.plot.as_ref().map_or(Ok(()), |path| Ok(plot(path, &points)?))
}

fn op_line(m: &OpMeasurement) -> String {
    let optional = |value: Option<f64>| value.map_or(String::new(), |v| format!("{v:.1}"));
    let OpMeasurement { op, shape, limit, .. } = m;
    let (best, median, flops) = (1e6 * m.s_min, 1e6 * m.s_median, optional(m.gflops));
    let percent = optional(m.fraction.map(|f| 100.0 * f));
    format!("{op:<22} {shape:<16} {best:>10.1} {median:>10.1} {flops:>9} {:>7.1} {percent:>6}  {limit}", m.gb_s)
}

fn run_step(args: &Step) -> Result<()> {
    let mut work = Work::named(&name(args.config)).context("a configuration")?;
    work.batch = args.batch.unwrap_or(work.batch);
    let device = flowtape_gpu::device(&args.device)?;
    let &Step { steps, warmup, profile, lora, .. } = args;
    let dtype = args.dtype.into();
    let options = Options { dtype, steps, warmup, at_once: !args.update_last, profile, lora };
    let measured = awake(&device, || step(&work, &device, &options))?;
    if profile {
        out(format_args!("{}", profile_table(&measured)));
    }
    if args.json {
        say!("{}", serde_json::to_string(&measured)?);
    } else {
        out(format_args!("device   {}\n{}", title(device.backend()), step_lines(&measured)));
    }
    Ok(())
}

/// A device's name and what its maker calls it. GPUs are looked for only where one is in use.
fn title(backend: &dyn Backend) -> String {
    let name = backend.name();
    let report = if backend.is_host() { None } else { flowtape_gpu::reports().into_iter().find(|r| r.name == name) };
    report.map_or(name.to_owned(), |r| format!("{name}, {}", r.title))
}

fn step_lines(m: &Measurement) -> String {
    [
        format!("{} {:?}, batch {}, {} threads, {} parameters\n", m.config, m.dtype, m.batch, m.threads, m.params),
        format!("step     {:.4} s  (fastest {:.4}, slowest {:.4})\n", m.s_step, m.s_min, m.s_max),
        format!("forward  {:.4} s, backward {:.4} s, optimiser {:.4} s\n", m.s_fwd, m.s_bwd, m.s_opt),
        format!("rate     {:.1} GFLOP/s, {:.2} cores busy\n", m.gflops, m.cpu_per_wall),
        format!("memory   {} MiB at most, {} before the first step\n", m.peak_rss_mb, m.rss_before_mb),
        format!("tensors  {} MiB at most, {} blocks asked for after warm-up\n", m.tensors_mb, m.pool_misses),
    ]
    .concat()
}

/// Rates are those of each kernel's fastest call, so that they hold on a busy machine too.
fn profile_table(m: &Measurement) -> String {
    let kernels: f64 = m.profile.iter().map(|(_, e)| e.seconds).sum();
    let best: f64 = m.profile.iter().map(|(_, e)| e.calls as f64 * e.fastest).sum();
    let row = |cells: [String; 7], kernel: &str| {
        let [calls, ms, percent, best, gflops, peak, gb] = cells;
        format!("{calls:>6} {ms:>9} {percent:>6} {best:>9} {gflops:>8} {peak:>6} {gb:>6}  {kernel}\n")
    };
    let mut out = row(["calls", "ms", "%", "best ms", "GFLOP/s", "% peak", "GB/s"].map(String::from), "kernel");
    let percent = |part: f64| format!("{:.2}", 100.0 * part);
    for (kernel, e) in &m.profile {
        let calls = e.calls as f64;
        let (flops, bytes) = (e.flops / calls / e.fastest, e.bytes / calls / e.fastest);
        let rate = |rate: f64| if rate > 0.0 { format!("{:.1}", rate / 1e9) } else { String::new() };
        let of_peak =
            m.peak_flops.filter(|_| flops > 0.0).map_or(String::new(), |p| format!("{:.0}", 100.0 * flops / p));
        let ms = |seconds: f64| format!("{:.3}", 1e3 * seconds);
        let part = percent(e.seconds / m.s_mean);
        let cells =
            [e.calls.to_string(), ms(e.seconds), part, ms(calls * e.fastest), rate(flops), of_peak, rate(bytes)];
        out += &row(cells, kernel);
    }
    let rest = m.s_mean - kernels;
    let cells = |ms: f64, percent: String, best: String| {
        [String::new(), format!("{:.3}", 1e3 * ms), percent, best, String::new(), String::new(), String::new()]
    };
    out += &row(cells(rest, percent(rest / m.s_mean), String::new()), "the tape, views and shapes");
    out + &row(cells(kernels, percent(kernels / m.s_mean), format!("{:.3}", 1e3 * best)), "all kernels")
}
