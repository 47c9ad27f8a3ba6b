//! A run that is stopped and goes on has the bytes of one that was not: whatever is trained, also with another number of threads.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use flowtape_engine::Device;
use flowtape_engine::cpu::awake;
use flowtape_trainer::Recipe;
use flowtape_trainer::hooks::on_step;
use flowtape_trainer::train::{Resume, resume, train};

use crate::common::{files, small};

static NEVER: AtomicBool = AtomicBool::new(false);

fn with_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| awake(&Device::cpu(), work))
}

/// Trains a recipe at once with two threads, and in parts that are stopped at some steps with others; and compares the last
/// checkpoints.
fn goes_on(name: &str, folder: &Path, recipe: impl Fn(&Path) -> Recipe + Sync, stops: &[u64]) {
    let [whole, parts] = ["whole", "parts"].map(|part| folder.join(format!("{name}_{part}")));
    with_threads(2, || train(&recipe(&whole), Vec::new(), &NEVER).unwrap());
    for (i, at) in stops.iter().enumerate() {
        let stop = AtomicBool::new(false);
        let stopping = || on_step(|record| stop.store(record.step == *at, Ordering::Relaxed));
        let threads = [1, 3][i % 2];
        with_threads(threads, || {
            if i == 0 {
                train(&recipe(&parts), vec![stopping()], &stop).unwrap()
            } else {
                resume(&parts, &Resume::default(), vec![stopping()], &stop).unwrap()
            }
        });
    }
    with_threads(2, || resume(&parts, &Resume::default(), Vec::new(), &NEVER).unwrap());
    let (a, b) = (files(&whole), files(&parts));
    assert!(a.len() >= 2 && a.iter().map(|(path, _)| path).eq(b.iter().map(|(path, _)| path)), "{name}: {b:?}");
    for ((path, a), (_, b)) in a.iter().zip(&b) {
        assert!(a == b, "{name}: {} differs", path.display());
    }
}

const MORE: [&str; 4] = [
    "step_scheduler.global_batch_size=8",
    "data.caption_dropout_prob=0.3",
    "ema={decay: 0.9}",
    "validation={num_samples: 6, every_steps: 2}",
];

#[test]
fn full_training_goes_on_in_every_dtype_with_other_threads() {
    let folder = tempfile::tempdir().unwrap();
    for dtype in ["f32", "bf16", "bf16_stochastic", "bf16_kahan", "mixed", "mixed_f16"] {
        let setting = format!("dtype={dtype}");
        let more = [&MORE[..], &[&setting]].concat();
        goes_on(dtype, folder.path(), |run| small(run, &more), &[1, 3]);
    }
}

#[test]
fn adapters_go_on_with_other_threads() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    train(&small(&base, &[]), Vec::new(), &NEVER).unwrap();
    let model = format!("model={{pretrained_model_name_or_path: {}}}", base.display());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/digits.yaml");
    let lora = |run: &Path| {
        let run = format!("run_dir={}", run.display());
        let own = [
            &model,
            &run,
            "peft={dim: 4, alpha: 8, dropout: 0.2, target_modules: ['*attn.*']}",
            "step_scheduler={local_batch_size: 4, global_batch_size: 8, max_steps: 5, ckpt_every_steps: 2}",
            "sampling.every_steps=0",
            "sampling.num_inference_steps=1",
            "sampling.guidance_scale=1",
            "report=null",
        ];
        Recipe::load(&path, &own.iter().chain(&MORE[1..]).map(|s| (*s).to_owned()).collect::<Vec<_>>()).unwrap()
    };
    goes_on("lora", folder.path(), lora, &[2, 3]);
}

#[test]
fn a_model_of_videos_and_its_adapters_go_on_with_other_threads() {
    let folder = tempfile::tempdir().unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/moving_digits_wan.yaml");
    let recipe = |run: &Path, model: &[&str]| {
        let run = format!("run_dir={}", run.display());
        let own = [
            &run[..],
            "step_scheduler={local_batch_size: 2, global_batch_size: 4, max_steps: 5, ckpt_every_steps: 2}",
            "sampling.every_steps=0",
            "sampling.num_inference_steps=1",
            "sampling.guidance_scale=1",
            "report=null",
        ];
        let all = own.iter().chain(model).chain(&MORE[1..]);
        Recipe::load(&path, &all.map(|s| (*s).to_owned()).collect::<Vec<_>>()).unwrap()
    };
    let small =
        ["model.num_layers=1", "model.ffn_dim=32", "model.attention_head_dim=12", "model.num_attention_heads=2"];
    goes_on("wan", folder.path(), |run| recipe(run, &small), &[1, 3]);
    let base = format!("model={{pretrained_model_name_or_path: {}}}", folder.path().join("wan_whole").display());
    let adapters = [&base, "peft={dim: 4, alpha: 8, dropout: 0.2, target_modules: ['*attn1.*', '*ffn*']}"];
    goes_on("wan_lora", folder.path(), |run| recipe(run, &adapters), &[2, 3]);
}

/// The goldens' recipe of NeMo's: a cache of two resolutions, over several epochs with a short last group each.
#[test]
fn buckets_go_on_over_epochs_with_other_threads() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens");
    let folder = tempfile::tempdir().unwrap();
    let nemo = |run: &Path| {
        let settings = [
            format!("model.pretrained_model_name_or_path={}", goldens.join("flux_step").display()),
            format!("data.dataloader.cache_dir={}", goldens.join("recipe_flux/cache").display()),
            format!("checkpoint.checkpoint_dir={}", run.display()),
            "step_scheduler.num_epochs=3".into(),
            "data.dataloader.num_workers=2".into(),
            "ema.sigma_rel=0.2".into(),
        ];
        Recipe::load(&goldens.join("recipe_flux/config.yaml"), &settings).unwrap()
    };
    // Four steps an epoch: stopped within the first, at its end, and in the third.
    goes_on("buckets", folder.path(), nemo, &[2, 4, 9]);
}

/// A signal may come between two micro-batches: what was done of the step is lost, and nothing else.
#[test]
fn a_run_that_is_asked_to_stop_within_a_step_ends_behind_it() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, run) = (folder.path().join("whole"), folder.path().join("run"));
    let more = ["step_scheduler.global_batch_size=32"];
    train(&small(&whole, &more), Vec::new(), &NEVER).unwrap();
    // Asked while a step of eight micro-batches runs, the second or a later one.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| train(&small(&run, &more), Vec::new(), &stop).unwrap());
        while std::fs::metadata(run.join("metrics.jsonl")).map_or(0, |file| file.len()) == 0 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        stop.store(true, Ordering::Relaxed);
        assert!(running.join().unwrap().steps <= 5);
    });
    resume(&run, &Resume::default(), Vec::new(), &NEVER).unwrap();
    assert_eq!(files(&whole), files(&run));
}
