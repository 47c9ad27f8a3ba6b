//! Event files, as the package `tensorboard` reads them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // the helpers of tests may panic, and say what they skip

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use common::{stdout, train};

mod common;

/// What TensorBoard itself makes of a folder, as JSON.
const READ: &str = r#"
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "images": 0, "histograms": 0})
found.Reload()
tags = found.Tags()
number = lambda x: x if x == x else None
print(json.dumps({
    "scalars": {tag: [[e.step, number(e.value)] for e in found.Scalars(tag)] for tag in tags["scalars"]},
    "images": {tag: [[e.step, e.width, e.height, e.encoded_image_string.hex()] for e in found.Images(tag)] for tag in tags["images"]},
    "histograms": {tag: [[e.step, e.histogram_value.num, e.histogram_value.bucket_limit, e.histogram_value.bucket]
                         for e in found.Histograms(tag)] for tag in tags["histograms"]},
}))
"#;

/// A Python with the package; without one nothing is tested, which is said. `FLOWTAPE_REQUIRE=tensorboard` makes it a failure.
fn python() -> Option<String> {
    let python = std::env::var("FLOWTAPE_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", "import tensorboard"]).output();
    if found.is_ok_and(|out| out.status.success()) {
        return Some(python);
    }
    let required = std::env::var("FLOWTAPE_REQUIRE").is_ok_and(|r| r.split(',').any(|r| r == "tensorboard"));
    assert!(!required, "FLOWTAPE_REQUIRE=tensorboard, and {python} has no such package");
    println!("skipped: no tensorboard (FLOWTAPE_PYTHON names a Python that has it)");
    None
}

fn read(python: &str, run: &Path) -> Value {
    let out = Command::new(python).args(["-c", READ]).arg(run.join("tensorboard")).output().unwrap();
    serde_json::from_str(&stdout(&out)).unwrap()
}

#[test]
fn tensorboard_reads_what_the_other_files_say() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let settings = ["step_scheduler.max_steps=60", "step_scheduler.ckpt_every_steps=40", "sampling.every_steps=30"];
    let more = ["validation.num_samples=16", "validation.every_steps=20", "ema.decay=0.5"];
    let arguments: Vec<&str> = settings.iter().chain(&more).flat_map(|setting| ["--set", *setting]).collect();
    stdout(&train(&run, &arguments));
    // The last checkpoint is damaged, so that the run goes on from the one before and steps are done twice.
    std::fs::remove_file(run.join("report.json")).unwrap();
    std::fs::remove_file(run.join("checkpoints/step_000060/optimizer.safetensors")).unwrap();
    stdout(&common::flowtape(&["train", "--resume", run.to_str().unwrap()]));
    assert_eq!(std::fs::read_dir(run.join("tensorboard")).unwrap().count(), 2);

    let found = read(&python, &run);
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps = |of: &Value| -> Vec<u64> {
        of.as_array().unwrap_or_else(|| panic!("nothing in {of}")).iter().map(|one| one[0].as_u64().unwrap()).collect()
    };
    for tag in ["train_loss", "lr", "grad_norm", "samples_per_sec", "step_time", "max_memory_allocated_gb"] {
        let scalars = &found["scalars"][tag];
        assert_eq!(steps(scalars), (1..=60).collect::<Vec<_>>(), "{tag}");
        for (scalar, line) in scalars.as_array().unwrap().iter().zip(&lines) {
            assert_eq!(scalar[1].as_f64().unwrap() as f32, line[tag].as_f64().unwrap() as f32, "{tag} of {line}");
        }
    }
    assert_eq!(steps(&found["scalars"]["grad_norm_by_group/transformer_blocks"]), [10, 20, 30, 40, 50, 60]);
    let text = std::fs::read_to_string(run.join("validation.jsonl")).unwrap();
    for (i, line) in text.lines().enumerate() {
        let line: Value = serde_json::from_str(line).unwrap();
        for kind in ["raw", "ema"] {
            let scalar = &found["scalars"][format!("validation_loss/{kind}")][i];
            assert_eq!(scalar[0], line["step"]);
            assert_eq!(scalar[1].as_f64().unwrap() as f32, line[kind]["loss"].as_f64().unwrap() as f32);
            let histogram = &found["histograms"][format!("validation_loss_by_sigma/{kind}")][i];
            assert_eq!((&histogram[0], &histogram[3]), (&line["step"], &line[kind]["bins"]));
        }
    }
    // The resumed run's histogram at step 50 is of its own steps.
    let sigma = &found["histograms"]["sigma"][0];
    let counts = |step: u64| lines[step as usize - 1]["sigma_counts"].as_array().unwrap().clone();
    let sums: Vec<f64> = (0..10).map(|bin| (41..=50).map(|step| counts(step)[bin].as_f64().unwrap()).sum()).collect();
    let limits: Vec<f64> = (1..=10).map(|i| f64::from(i) / 10.0).collect();
    assert_eq!(sigma[0], 50);
    assert_eq!(
        (sigma[2].clone(), sigma[3].clone(), sigma[1].as_f64()),
        (limits.into(), sums.clone().into(), Some(sums.iter().sum()))
    );
    assert_eq!(steps(&found["histograms"]["train_loss_by_sigma"]), [50]);
    let images = found["images"]["samples"].as_array().unwrap();
    assert_eq!(steps(&found["images"]["samples"]), [30, 60]);
    for image in images {
        let png = std::fs::read(run.join(format!("samples/step_{:06}.png", image[0].as_u64().unwrap()))).unwrap();
        let hex: String = png.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(image[3] == *hex && image[1].as_u64() > Some(100) && image[2].as_u64() > Some(100));
    }
}
