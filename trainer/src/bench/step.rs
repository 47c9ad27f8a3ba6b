//! One training step: forward, backward, AdamW.

use std::time::Instant;

use flowtape_engine::optim::{AdamW, AdamWConfig};
use flowtape_engine::profile::{Entry, Profile};
use flowtape_engine::{DType, Device, Tape};
use flowtape_models::Transformer;
use serde::Serialize;

use super::{Batch, Work};
use crate::Result;

/// What flows where.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Everything f32.
    F32,
    /// Weights, activations, gradients and moments bf16, as after PyTorch's `.to(bfloat16)`.
    Bf16,
}

impl Precision {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// How a step is measured.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What flows where.
    pub precision: Precision,
    /// Steps that count.
    pub steps: usize,
    /// Steps before.
    pub warmup: usize,
    /// Whether each kernel is timed.
    pub profile: bool,
}

/// What a step takes. The fields are those of the peer's script.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    /// Who was measured.
    pub peer: &'static str,
    /// The device's name.
    pub device: String,
    /// The work's name.
    pub config: String,
    /// Samples of a batch.
    pub batch: usize,
    /// What flowed where.
    pub dtype: Precision,
    /// Threads.
    pub threads: usize,
    /// Numbers that are trained.
    pub params: usize,
    /// 10^9 floating-point operations of a step.
    pub gflop: f64,
    /// Seconds of a step, the median.
    pub s_step: f64,
    /// The fastest.
    pub s_min: f64,
    /// The slowest.
    pub s_max: f64,
    /// Seconds of the forward pass, the median; on a GPU until it is enqueued.
    pub s_fwd: f64,
    /// Seconds of the backward pass, the median; on a GPU until it is enqueued.
    pub s_bwd: f64,
    /// Seconds of the optimiser, the median; on a GPU until all of the step is done.
    pub s_opt: f64,
    /// `gflop / s_step`.
    pub gflops: f64,
    /// Cores that were busy with this process.
    pub cpu_per_wall: f64,
    /// Seconds of the very first step.
    pub first_step_s: f64,
    /// The most memory that the process ever held, in MiB.
    pub peak_rss_mb: u64,
    /// Memory before the first step, in MiB.
    pub rss_before_mb: u64,
    /// The loss of the first step.
    pub loss_first: f64,
    /// The loss of the last step.
    pub loss_last: f64,
    /// Time by kernel, of one step on average, the longest first; empty where it was not asked for.
    #[serde(skip)]
    pub profile: Vec<(String, Entry)>,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn rounded(value: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(digits);
    (value * unit).round() / unit
}

/// Trains for some steps and measures each.
///
/// # Errors
/// When memory runs out.
pub fn step(work: &Work, device: &Device, options: &Options) -> Result<Measurement> {
    let profile = Profile::default();
    let device = if options.profile { profile.device(device) } else { device.clone() };
    let dtype = options.precision.dtype();
    let model = work.model(dtype, &device)?;
    let params = model.params();
    let mut batch = Batch::new(work, dtype, &device)?;
    let mut optimizer = AdamW::new(AdamWConfig::default());
    let (lr, weight_decay) = (1e-4, 0.01);
    let before = process::memory();
    let (mut forward, mut backward, mut update, mut total) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut losses, mut first_step_s) = (Vec::new(), 0.0);
    let (mut cpu, mut wall) = (process::seconds(), Instant::now());
    for index in 0..options.warmup + options.steps {
        if index == options.warmup {
            (cpu, wall) = (process::seconds(), Instant::now());
            profile.take();
        }
        let start = Instant::now();
        let tape = Tape::new();
        let loss = batch.loss(&model, &tape)?;
        let t1 = start.elapsed().as_secs_f64();
        let gradients = tape.backward(&loss)?;
        let t2 = start.elapsed().as_secs_f64();
        optimizer.step(params, &gradients, lr, weight_decay, None)?;
        drop(gradients);
        // Reading waits for all work before, the update too: on a GPU the step ends here.
        let host = device.backend().is_host();
        let enqueued = start.elapsed().as_secs_f64();
        losses.push(loss.item()?);
        let t3 = if host { enqueued } else { start.elapsed().as_secs_f64() };
        if index == 0 {
            first_step_s = t3;
        }
        if index >= options.warmup {
            forward.push(t1);
            backward.push(t2 - t1);
            update.push(t3 - t2);
            total.push(t3);
        }
    }
    let cpu_per_wall = (process::seconds() - cpu) / wall.elapsed().as_secs_f64();
    let mut profile = profile.take();
    for (_, entry) in &mut profile {
        let steps = options.steps.max(1) as f64;
        entry.seconds /= steps;
        entry.flops /= steps;
        entry.bytes /= steps;
        entry.calls /= options.steps.max(1) as u64;
    }
    let gflop = work.flops() / 1e9;
    let (low, high) = total.iter().fold((f64::INFINITY, 0.0f64), |(a, b), &t| (a.min(t), b.max(t)));
    let s_step = median(total);
    Ok(Measurement {
        peer: "flowtape",
        device: device.backend().name().to_owned(),
        config: work.name.clone(),
        batch: work.batch,
        dtype: options.precision,
        threads: rayon::current_num_threads(),
        params: params.numel(),
        gflop: rounded(gflop, 2),
        s_step: rounded(s_step, 5),
        s_min: rounded(low, 5),
        s_max: rounded(high, 5),
        s_fwd: rounded(median(forward), 5),
        s_bwd: rounded(median(backward), 5),
        s_opt: rounded(median(update), 5),
        gflops: rounded(gflop / s_step, 1),
        cpu_per_wall: rounded(cpu_per_wall, 2),
        first_step_s: rounded(first_step_s, 2),
        peak_rss_mb: process::peak_memory() >> 20,
        rss_before_mb: before >> 20,
        loss_first: rounded(losses.first().copied().unwrap_or(f64::NAN), 4),
        loss_last: rounded(losses.last().copied().unwrap_or(f64::NAN), 4),
        profile,
    })
}

/// What the system says about this process; zeros where it has no `/proc`.
mod process {
    fn status(key: &str) -> u64 {
        let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = text.lines().find_map(|l| l.strip_prefix(key));
        let kib = line.and_then(|l| l.split_whitespace().nth(1)).and_then(|v| v.parse::<u64>().ok());
        kib.unwrap_or(0) << 10
    }

    /// Bytes in memory.
    pub fn memory() -> u64 {
        status("VmRSS")
    }

    /// The most bytes that ever were.
    pub fn peak_memory() -> u64 {
        status("VmHWM")
    }

    /// Seconds of processor time.
    pub fn seconds() -> f64 {
        let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // After the name, which may hold spaces, come the state and 10 more fields before the two times.
        let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace();
        let ticks: u64 = fields.skip(11).take(2).filter_map(|f| f.parse::<u64>().ok()).sum();
        // The clock ticks 100 times a second on every Linux.
        ticks as f64 / 100.0
    }
}
