//! Runs on the emulated driver of NVIDIA: they come out as on the CPU, and end well when the device fails.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

mod common;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};

use flowtape_cuda_emulator::{Settings, set, usage};
use flowtape_trainer::hooks::on_step;
use flowtape_trainer::train::{Resume, Summary, resume, train};
use flowtape_trainer::{Error, Recipe, Trained};
use serde_json::Value;

use crate::common::small;

/// The emulated driver as it was made, for one test at a time.
fn emulated() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(flowtape_cuda_emulator::install());
    set(|settings| *settings = Settings::default());
    alone
}

fn recipe(run: &Path, device: &str) -> Recipe {
    small(run, &[&format!("device={device}")])
}

fn losses(run: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["train_loss"].as_f64().unwrap()).collect()
}

fn on_the_cpu(run: PathBuf) -> Vec<f64> {
    train(&recipe(&run, "cpu"), Vec::new(), &AtomicBool::new(false)).unwrap();
    losses(&run)
}

fn assert_close(got: &[f64], wanted: &[f64]) {
    assert_eq!(got.len(), wanted.len());
    for (step, (a, b)) in got.iter().zip(wanted).enumerate() {
        assert!((a - b).abs() < 1e-3 * b, "step {step}: {a} instead of {b}");
    }
}

#[test]
fn a_run_on_cuda_trains_and_samples_as_on_the_cpu() {
    let _alone = emulated();
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let never = AtomicBool::new(false);
    let summary: Summary = train(&recipe(&run, "cuda"), Vec::new(), &never).unwrap();
    assert!(summary.steps == 5 && usage().launches > 500, "{summary:?}, {:?}", usage());
    assert_close(&losses(&run), &on_the_cpu(folder.path().join("cpu")));
    let sample = |device: Option<&str>| {
        Trained::load(&run, device).unwrap().sample("a handwritten seven", 1, 1, None).unwrap().pixels
    };
    for (a, b) in sample(None).iter().zip(sample(Some("cpu"))) {
        assert!((a - b).abs() < 1e-3, "{a} instead of {b}");
    }
}

#[test]
fn a_run_that_loses_its_device_leaves_a_good_checkpoint() {
    let _alone = emulated();
    let folder = tempfile::tempdir().unwrap();
    let wanted = on_the_cpu(folder.path().join("cpu"));
    let never = AtomicBool::new(false);
    for (code, words) in [(700, "illegal memory access"), (719, "launch failure"), (2, "out of memory")] {
        let run = folder.path().join(format!("run{code}"));
        set(|settings| *settings = Settings::default());
        let fail = on_step(move |record| match (record.step, code) {
            // A launch of the step after: it is seen when that step's numbers are read.
            (3, 700..) => set(|settings| settings.fails = code),
            (3, _) => set(|settings| settings.memory = 0),
            _ => {}
        });
        let error = train(&recipe(&run, "cuda"), vec![fail], &never).unwrap_err();
        let text = error.to_string();
        assert!(text.to_lowercase().contains(words), "{text}");
        match (&error, code) {
            (Error::Engine(flowtape_engine::Error::DeviceFailed { .. }), 700..) => {
                assert!(text.contains("launched last: ") && text.contains("the last checkpoint is good"), "{text}");
            }
            (Error::Engine(flowtape_engine::Error::OutOfMemory { .. }), 2) => {
                assert!(text.contains("bytes are free") && text.contains("f32 ["), "{text}");
            }
            _ => panic!("{error:?}"),
        }
        // The run goes on elsewhere, from the last checkpoint, as if nothing had been.
        set(|settings| *settings = Settings::default());
        let summary = resume(&run, &Resume { device: Some("cpu"), ..Resume::default() }, Vec::new(), &never).unwrap();
        assert_eq!(summary.steps, 5);
        assert_close(&losses(&run), &wanted);
    }
}
