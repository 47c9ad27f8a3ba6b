//! One training step of the product: a batch, forward, backward, AdamW.

use std::time::Instant;

use flowtape_engine::profile::{Entry, Profile};
use flowtape_engine::{Device, cpu};
use flowtape_trainer::recipe::Dtype;
use flowtape_trainer::{StepTimes, Trainer};
use serde::Serialize;

use super::Work;
use crate::{Error, Result};

/// How a step is measured.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What flows where.
    pub dtype: Dtype,
    /// Steps that count.
    pub steps: usize,
    /// Steps before.
    pub warmup: usize,
    /// Whether parameters are updated as soon as their gradients are final; else after the backward pass.
    pub at_once: bool,
    /// Whether each kernel is timed.
    pub profile: bool,
    /// The rank of LoRA adapters beside all linear layers, where these alone are trained.
    pub lora: Option<usize>,
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
    pub dtype: Dtype,
    /// Threads.
    pub threads: usize,
    /// Numbers that are trained.
    pub params: u64,
    /// 10^9 floating-point operations of a step.
    pub gflop: f64,
    /// Seconds of a step, the median.
    pub s_step: f64,
    /// The fastest.
    pub s_min: f64,
    /// The slowest.
    pub s_max: f64,
    /// Seconds of the forward pass and of the batch before it, the median. On a device that runs behind the host this and the next are what it took to
    /// hand the work over, and waiting for it counts as the optimiser's.
    pub s_fwd: f64,
    /// Seconds of the backward pass without the updates on its way, the median.
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
    /// The most memory that the device's tensors took, in MiB.
    pub tensors_mb: u64,
    /// Blocks of memory that the steps that count had to ask the system or the device for.
    pub pool_misses: u64,
    /// The loss of the first step.
    pub loss_first: f64,
    /// The loss of the last step.
    pub loss_last: f64,
    /// Seconds of a step, the mean: what the kernels' times add up to.
    #[serde(skip)]
    pub s_mean: f64,
    /// Floating-point operations a second that the CPU's units can do at best in the dtype of the products, where kernels
    /// were timed there.
    #[serde(skip)]
    pub peak_flops: Option<f64>,
    /// Time by kernel, of one step on average, the longest first; empty where it was not asked for.
    #[serde(skip)]
    pub profile: Vec<(String, Entry)>,
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
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
    if options.steps == 0 {
        return Err(Error::Run { path: "--steps".into(), what: "expected at least 1, got 0".into() });
    }
    let recipe = work.recipe(options.dtype, options.at_once, options.lora)?;
    let mut trainer = Trainer::with_data(&device, &recipe, work.data()?)?;
    // Before and after: a machine whose clock moves would else be told to run above its peak.
    let peak = || (options.profile && device.backend().is_host()).then(|| cpu::peak_flops(options.dtype.into()));
    let peak_before = peak();
    let before = process::memory();
    let (mut forward, mut backward, mut update, mut total) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut losses, mut first_step_s, mut misses) = (Vec::new(), 0.0, 0);
    let (mut busy, mut wall) = (process::seconds(), Instant::now());
    for index in 0..options.warmup + options.steps {
        if index == options.warmup {
            (busy, wall) = (process::seconds(), Instant::now());
            misses = device.backend().memory().misses;
            profile.take();
        }
        let start = Instant::now();
        let record = trainer.step()?;
        let seconds = start.elapsed().as_secs_f64();
        let StepTimes { data, forward: there, backward: back, .. } = record.times;
        losses.push(record.loss);
        if index == 0 {
            first_step_s = seconds;
        }
        if index >= options.warmup {
            forward.push(data + there);
            backward.push(back);
            update.push(seconds - data - there - back);
            total.push(seconds);
        }
    }
    let memory = device.backend().memory();
    let cpu_per_wall = (process::seconds() - busy) / wall.elapsed().as_secs_f64();
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
    let s_mean = total.iter().sum::<f64>() / total.len().max(1) as f64;
    let s_step = median(total);
    Ok(Measurement {
        peer: "flowtape",
        device: device.backend().name().to_owned(),
        config: work.name.clone(),
        batch: work.batch,
        dtype: options.dtype,
        threads: rayon::current_num_threads(),
        params: trainer.model().params().numel(),
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
        tensors_mb: memory.peak >> 20,
        pool_misses: memory.misses - misses,
        loss_first: rounded(losses.first().copied().unwrap_or(f64::NAN), 4),
        loss_last: rounded(losses.last().copied().unwrap_or(f64::NAN), 4),
        s_mean,
        peak_flops: [peak_before, peak()].into_iter().flatten().reduce(f64::max),
        profile,
    })
}

/// What the system says about this process; zeros where it has no `/proc`.
pub(crate) mod process {
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

#[cfg(test)]
mod tests {
    use flowtape_engine::cpu::Cpu;

    use super::*;

    /// The small configuration with few blocks, on a device of its own.
    fn measured(batch: usize, dtype: Dtype, at_once: bool) -> Measurement {
        let work = Work { double: 1, single: 1, batch, ..Work::s() };
        let options = Options { dtype, steps: 3, warmup: 2, at_once, profile: false, lora: None };
        step(&work, &Device::new(Cpu::default()), &options).unwrap()
    }

    #[test]
    fn a_step_after_the_first_ones_asks_the_system_for_no_memory() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Mixed] {
            for at_once in [true, false] {
                assert_eq!(measured(4, dtype, at_once).pool_misses, 0, "{dtype:?}, at once: {at_once}");
            }
        }
    }

    #[test]
    fn updates_on_the_way_change_nothing_but_the_memory() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Mixed] {
            let (first, last) = (measured(1, dtype, true), measured(1, dtype, false));
            assert_eq!((first.loss_first, first.loss_last), (last.loss_first, last.loss_last), "{dtype:?}");
            assert!(first.tensors_mb < last.tensors_mb, "{dtype:?}: {} and {}", first.tensors_mb, last.tensors_mb);
        }
    }

    #[test]
    fn a_mixed_step_begins_with_the_loss_of_f32() {
        let (mixed, wide) = (measured(4, Dtype::Mixed, true), measured(4, Dtype::F32, true));
        assert!((mixed.loss_first / wide.loss_first - 1.0).abs() < 2e-3, "{} {}", mixed.loss_first, wide.loss_first);
        assert!((mixed.loss_last / wide.loss_last - 1.0).abs() < 1e-2, "{} {}", mixed.loss_last, wide.loss_last);
    }

    #[test]
    fn a_profile_adds_up_to_the_step() {
        let work = Work { double: 1, single: 1, batch: 1, ..Work::s() };
        let options = Options { dtype: Dtype::F32, steps: 5, warmup: 1, at_once: true, profile: true, lora: None };
        let m = step(&work, &Device::cpu(), &options).unwrap();
        let kernels: f64 = m.profile.iter().map(|(_, e)| e.seconds).sum();
        assert!(kernels > 0.0 && kernels <= m.s_mean, "{kernels} of {}", m.s_mean);
    }
}
