//! Whole runs of the digits recipe on a GPU: what they submit and read, and what is left when the device fails.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use flowtape_engine::backend::call::{Checked, Upload};
use flowtape_engine::backend::{Backend, Buffer, Decorator, Pending};
use flowtape_engine::nn::{Role, Units};
use flowtape_engine::{Device, Error, Tensor};
use flowtape_gpu::wgpu::{Counts, Wgpu, WgpuOptions};
use flowtape_tests::devices::{gpus, gpus_of, is_slow};
use flowtape_trainer::hooks::{Hook, on_step};
use flowtape_trainer::train::{Resume, Summary, resume, train_on};
use flowtape_trainer::{Error as TrainerError, Recipe, Result, Trainer};
use serde_json::json;

/// A fresh device, where there is one.
fn open() -> Option<(Wgpu, Device)> {
    gpus_of("wgpu").first()?;
    let wgpu = Wgpu::open(None, WgpuOptions::default()).unwrap();
    Some((wgpu.clone(), Device::new(wgpu)))
}

/// A small run of `steps` steps.
fn recipe(run: &Path, steps: u64, more: &[&str]) -> Recipe {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/digits.yaml");
    let settings = [
        format!("run_dir={}", run.display()),
        format!("step_scheduler.max_steps={steps}"),
        "step_scheduler.local_batch_size=4".into(),
        "step_scheduler.ckpt_every_steps=0".into(),
        "sampling.every_steps=0".into(),
        "sampling.num_inference_steps=1".into(),
        "report=null".into(),
        "device=wgpu".into(),
    ];
    let settings: Vec<String> = settings.into_iter().chain(more.iter().map(|s| s.to_string())).collect();
    Recipe::load(&path, &settings).unwrap()
}

fn each<'a>(mut each: impl FnMut(u64) + 'a) -> Vec<Box<dyn Hook + 'a>> {
    vec![on_step(move |record| {
        assert!(record.loss.is_finite() && record.grad_norm > 0.0);
        each(record.step);
    })]
}

fn run(device: &Device, recipe: &Recipe, told: impl FnMut(u64)) -> Result<Summary> {
    train_on(device, recipe, each(told), &AtomicBool::new(false))
}

/// Loss and norm are all that a step reads, while the next one is under way; kernels go out many at once.
#[test]
fn a_step_waits_for_its_logged_numbers_alone() {
    let Some((wgpu, device)) = open() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut after: Vec<Counts> = vec![wgpu.counts()];
    run(&device, &recipe(&folder.path().join("run"), 7, &[]), |_| after.push(wgpu.counts())).unwrap();
    let step = |i: usize| {
        let (a, b) = (after[i], after[i + 1]);
        (b.kernels - a.kernels, b.submissions - a.submissions, b.reads - a.reads)
    };
    // The last step is read with the one before.
    let kernels = step(3).0;
    for i in 2..5 {
        let (k, submissions, reads) = step(i);
        // A small upload goes along as a kernel where its memory is still in use.
        assert!(k.abs_diff(kernels) < 8 && reads == 2, "step {i}: {k} of {kernels} kernels, {reads} reads");
        assert!(k > 200 && submissions <= k / 128 + 2, "step {i}: {k} kernels, {submissions} submissions");
    }
    assert_eq!(step(6), (0, 0, 0));
    // When the first step's numbers have come, the second is handed over: twice the kernels, and those that make a model.
    assert!(after[1].kernels - after[0].kernels > 2 * kernels);
}

/// Memory that recorded kernels use is handed on to an upload: a small one goes along with them, a larger one sends them off,
/// and neither they nor it are waited for. Memory that none uses is written without either.
#[test]
fn an_upload_waits_for_nothing() {
    let Some((wgpu, device)) = open() else { return };
    let upload = |value: f32, len: usize| Tensor::from_vec(vec![value; len], &[len], &device).unwrap();
    let done = |before: Counts| {
        let after = wgpu.counts();
        (after.kernels - before.kernels, after.submissions - before.submissions, after.reads - before.reads)
    };
    // Sizes of memory that nothing else has.
    for (len, reused) in [(900, (1, 0, 0)), (300_000, (0, 1, 0))] {
        let first = upload(2.0, len);
        let doubled = first.add(&first).unwrap();
        let before = wgpu.counts();
        let beside = upload(3.0, len);
        assert_eq!(done(before), (0, 0, 0), "{len} numbers beside recorded kernels");
        drop(first);
        let before = wgpu.counts();
        let after = upload(5.0, len);
        assert_eq!(done(before), reused, "{len} numbers to memory of recorded kernels");
        for (tensor, value) in [(doubled, 4.0), (beside, 3.0), (after, 5.0)] {
            // What the host wrote is read from the device too.
            assert_eq!(tensor.mul_scalar(1.0).unwrap().to_vec::<f32>().unwrap(), vec![value; len]);
        }
    }
}

/// The engine's error that stopped a run.
fn engine(error: &TrainerError) -> &Error {
    match error {
        TrainerError::Engine(error) | TrainerError::Pipeline(flowtape_flowmatch::Error::Engine(error)) => error,
        other => panic!("not the engine's: {other}"),
    }
}

fn is_lost(error: &TrainerError) -> bool {
    matches!(engine(error), Error::DeviceFailed { .. })
}

#[test]
fn a_run_whose_device_is_lost_goes_on_from_its_last_checkpoint() {
    let Some((wgpu, device)) = open() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let settings = |run: &str| recipe(&folder.path().join(run), 6, &["step_scheduler.ckpt_every_steps=2"]);
    let recipe = settings("run");
    let lost = run(&device, &recipe, |step| {
        if step == 3 {
            wgpu.destroy();
        }
    });
    let error = lost.unwrap_err();
    assert!(is_lost(&error) && error.to_string().contains("last checkpoint"), "{error}");
    // Everything on it fails now, and says so.
    assert!(is_lost(&run(&device, &settings("again"), |_| ()).unwrap_err()));
    let mut steps = Vec::new();
    let summary = resume(&path, &Resume::default(), each(|step| steps.push(step)), &AtomicBool::new(false)).unwrap();
    assert_eq!((summary.steps, steps), (6, vec![3, 4, 5, 6]));
}

#[test]
fn a_run_without_memory_names_the_tensor_and_keeps_its_checkpoint() {
    let Some((wgpu, device)) = open() else { return };
    let folder = tempfile::tempdir().unwrap();
    let out_of_memory = |error: &TrainerError, part: &str| {
        let memory = matches!(engine(error), Error::OutOfMemory { .. });
        assert!(memory && error.to_string().contains(part), "{error}");
    };
    wgpu.limit_memory(1 << 20);
    let none = run(&device, &recipe(&folder.path().join("none"), 2, &[]), |_| ()).unwrap_err();
    out_of_memory(&none, "parameter ");
    // A grid takes more than a step does: it is made after the checkpoint.
    wgpu.limit_memory(u64::MAX);
    let path = folder.path().join("run");
    let more = ["step_scheduler.ckpt_every_steps=2", "sampling.every_steps=2"];
    let recipe = recipe(&path, 3, &more);
    let failed = run(&device, &recipe, |step| {
        if step == 1 {
            let usage = device.backend().memory();
            wgpu.limit_memory(usage.used + usage.kept + (64 << 10));
        }
    });
    out_of_memory(&failed.unwrap_err(), "f32 [");
    // The device itself is well.
    wgpu.limit_memory(u64::MAX);
    let summary = resume(&path, &Resume::default(), Vec::new(), &AtomicBool::new(false)).unwrap();
    assert_eq!(summary.steps, 3);
}

/// All in bf16, with each way to round its weights, and in f16 with weights and moments in f32: the losses follow the CPU's.
#[test]
fn the_digits_train_in_halves() {
    if gpus_of("wgpu").is_empty() {
        return;
    }
    let losses = |dtype: &str, device: &str| -> Vec<f64> {
        let set = [format!("dtype={dtype}"), format!("device={device}")];
        let set: Vec<&str> = set.iter().map(String::as_str).collect();
        let recipe = recipe(Path::new("unused"), 3, &set);
        let mut trainer = Trainer::new(&recipe).unwrap();
        (0..3).map(|_| trainer.step().unwrap().loss).collect()
    };
    for dtype in ["bf16", "bf16_stochastic", "bf16_kahan", "mixed_f16"] {
        for (a, b) in losses(dtype, "wgpu").into_iter().zip(losses(dtype, "cpu")) {
            assert!((a - b).abs() < 0.02 * b, "{dtype}: {a} instead of {b}");
        }
    }
}

/// Counts the bytes that go to a device, and those that come from it.
#[derive(Debug)]
struct Counted {
    inner: Device,
    there: Arc<AtomicUsize>,
    back: Arc<AtomicUsize>,
}

impl Counted {
    fn on(device: &Device) -> (Device, [Arc<AtomicUsize>; 2]) {
        let (there, back) = (Arc::default(), Arc::default());
        let counted = Self { inner: device.clone(), there: Arc::clone(&there), back: Arc::clone(&back) };
        (Device::new(counted), [there, back])
    }
}

impl Decorator for Counted {
    fn inner(&self) -> &dyn Backend {
        self.inner.backend()
    }

    fn upload(&self, call: Checked<Upload<'_>>) -> flowtape_engine::Result<()> {
        self.there.fetch_add(call.bytes.len(), Ordering::Relaxed);
        self.inner().upload(call)
    }

    fn read_later(&self, buffer: &dyn Buffer, bytes: Range<usize>) -> flowtape_engine::Result<Box<dyn Pending>> {
        self.back.fetch_add(bytes.len(), Ordering::Relaxed);
        self.inner().read_later(buffer, bytes)
    }
}

/// Whose turn it is: a device's memory is measured.
static TURN: Mutex<()> = Mutex::new(());

/// A recipe of single samples whose model is small: many blocks count here, not wide ones.
fn narrow(steps: u64, more: &[&str]) -> Recipe {
    let small = ["model.num_attention_heads=1", "data.num_workers=0", "step_scheduler.local_batch_size=1"];
    recipe(Path::new("unused"), steps, &[&small, more].concat())
}

/// Steps of adapters beside a frozen model: the adapters, the bytes that went to the device in each step, and its memory behind them.
fn adapted(device: &Device, swapped: usize) -> (Vec<Vec<u8>>, Vec<usize>, u64, Vec<usize>) {
    let (counted, [bytes, _]) = Counted::on(device);
    let mut recipe = narrow(4, &[&format!("performance.blocks_to_swap={swapped}")]);
    // Beside weights as they start, which no recipe's text asks for.
    let peft = json!({ "dim": 2, "alpha": 4, "target_modules": ["*attn.to_q", "*.proj_mlp"] });
    recipe.peft = serde_json::from_value(peft).unwrap();
    let before = device.backend().memory().used;
    let mut trainer = Trainer::on(&counted, &recipe).unwrap();
    let mut came = Vec::new();
    for _ in 0..3 {
        let before = bytes.load(Ordering::Relaxed);
        trainer.step().unwrap();
        came.push(bytes.load(Ordering::Relaxed) - before);
    }
    let params = trainer.model().params();
    let adapters = params.adapters().tensors().unwrap().iter().map(|(_, t)| t.to_bytes().unwrap()).collect();
    let of_block = |block: &str| {
        let frozen = params.iter().filter(|p| p.role() == Role::Frozen && p.block() == Some(block));
        frozen.map(|p| 4 * p.numel()).sum()
    };
    let blocks = Units::swappable(params).into_iter().map(of_block).collect();
    (adapters, came, device.backend().memory().used - before, blocks)
}

/// The weights of blocks on the host: the bits of steps on a device that has them all, in less of its memory. Each comes once for each
/// way, but that the last one of a way is there for the next.
#[test]
fn blocks_of_the_host_change_no_bit() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for device in gpus() {
        let (expected, plain, all, blocks) = adapted(device, 0);
        let some = if is_slow(device) { vec![] } else { vec![3] };
        for swapped in [blocks.len()].into_iter().chain(some) {
            let (got, came, used, _) = adapted(device, swapped);
            assert!(got == expected, "{swapped} blocks on {}", device.backend().name());
            let chosen: Vec<usize> = (0..swapped).map(|i| blocks[i * blocks.len() / swapped]).collect();
            let (sum, first, last) = (chosen.iter().sum::<usize>(), chosen[0], chosen[swapped - 1]);
            let more: Vec<usize> = came.iter().zip(&plain).map(|(swapped, plain)| swapped - plain).collect();
            // From the second step on the end of one sends for what the next begins with.
            let both = 2 * sum - first - last;
            assert_eq!(more, [2 * sum - last, both + chosen[1], both]);
            let away = (sum - chosen[0] - chosen[1]) as f64;
            assert!((all - used) as f64 > 0.8 * away, "{used} of {all}, without {away}");
        }
    }
}

/// Steps of a model whose optimiser remembers on the device or on the host: weights and what is remembered, the bytes that went and
/// came in each step, and the device's memory behind them.
fn remembering(device: &Device, offload: bool) -> (Vec<Vec<u8>>, Vec<[usize; 2]>, u64, usize) {
    let (counted, counts) = Counted::on(device);
    let recipe = narrow(4, &[&format!("performance.optimizer_cpu_offload={offload}")]);
    let before = device.backend().memory().used;
    let mut trainer = Trainer::on(&counted, &recipe).unwrap();
    let now = || counts.each_ref().map(|count| count.load(Ordering::Relaxed));
    let mut moved = Vec::new();
    for _ in 0..3 {
        let [there, back] = now();
        trainer.step().unwrap();
        let [after, back_after] = now();
        moved.push([after - there, back_after - back]);
    }
    let params = trainer.model().params();
    let weights = params.tensors().unwrap().iter().map(|(_, t)| t.to_bytes().unwrap()).collect();
    (weights, moved, device.backend().memory().used - before, 4 * params.numel() as usize)
}

/// What AdamW remembers on the host: the bits of steps on a device that has it, in less of its memory. It comes once for each update but
/// the first, which makes it, and goes once.
#[test]
fn an_optimiser_that_remembers_on_the_host_changes_no_bit() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for device in gpus() {
        let (expected, plain, all, weights) = remembering(device, false);
        let (got, moved, used, _) = remembering(device, true);
        assert!(got == expected, "on {}", device.backend().name());
        let more = |i: usize| [moved[i][0] - plain[i][0], moved[i][1] - plain[i][1]];
        assert_eq!([0, 1, 2].map(more), [[0, 2 * weights], [2 * weights; 2], [2 * weights; 2]]);
        assert!((all - used) as f64 > 0.8 * 2.0 * weights as f64, "{used} of {all}, without {}", 2 * weights);
    }
}
