//! Runs that are interrupted: by a signal, by a terminal that goes, by being killed.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::io::BufRead;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use common::{RECIPE, SMALL, endless, endless_by, metrics, stdout, train, weights};

mod common;

fn send(signal: &str, child: &std::process::Child) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn a_signal_ends_a_run_with_a_checkpoint_and_an_exit_code_of_its_own() {
    for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-USR1", 138)] {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let child = endless(&run, "seed=1");
        while !run.join("checkpoints/LATEST/state.json").exists() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        send(signal, &child);
        let output = child.wait_with_output().unwrap();
        let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{out}{error}");
        assert!(error.contains("stopping after this step; press again to quit now"), "{error}");
        assert!(out.contains("go on with: flowtape train --resume"), "{out}");
        let state: Value =
            serde_json::from_slice(&std::fs::read(run.join("checkpoints/LATEST/state.json")).unwrap()).unwrap();
        assert_eq!(state["step"].as_u64(), Some(metrics(&run, "step").len() as u64));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_behind_nohup_outlives_its_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let mut nohup = Command::new("nohup");
    nohup.arg(env!("CARGO_BIN_EXE_flowtape"));
    let child = endless_by(nohup, &run, "seed=1");
    let saved = || {
        let text = std::fs::read(run.join("checkpoints/LATEST/state.json")).ok()?;
        serde_json::from_slice::<Value>(&text).ok()?["step"].as_u64()
    };
    let wait_for = |step: u64| {
        while saved().is_none_or(|s| s < step) {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    };
    wait_for(2);
    send("-HUP", &child);
    let later = saved().unwrap_or(2) + 20;
    wait_for(later);
    send("-TERM", &child);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(143));
}

#[test]
fn a_second_signal_ends_a_run_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    // A step of a million parts.
    let mut child = endless(&run, "step_scheduler.global_batch_size=8000000");
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
    let mut wait_for = |text: &str| while !lines.next().unwrap().unwrap().contains(text) {};
    wait_for("parameters");
    send("-INT", &child);
    wait_for("press again");
    send("-INT", &child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!run.join("checkpoints").exists());
}

/// Moments are of this test's choice, and a third of them within a save.
#[test]
fn a_run_that_is_killed_anywhere_comes_to_the_same_weights() {
    const KILLS: usize = 30;
    let folder = tempfile::tempdir().unwrap();
    let [whole, killed] = ["whole", "killed"].map(|n| folder.path().join(n));
    let settings = [
        "step_scheduler.max_steps=120",
        "step_scheduler.ckpt_every_steps=1",
        "step_scheduler.global_batch_size=16",
        "sampling.every_steps=0",
        "ema.decay=0.9",
        "report=null",
    ];
    let settings: Vec<&str> = settings.into_iter().flat_map(|s| ["--set", s]).collect();
    stdout(&train(&whole, &settings));
    let saved = |name: &str| {
        let names = std::fs::read_dir(killed.join("checkpoints")).into_iter().flatten().flatten();
        names.filter(|entry| entry.file_name().to_string_lossy().ends_with(name)).count() > 0
    };
    let begin = || {
        let run_dir = format!("run_dir={}", killed.display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_flowtape"));
        if saved("LATEST") {
            command.args(["train", "--resume", killed.to_str().unwrap()]);
        } else {
            command
                .args(["train", RECIPE, "--set", &run_dir])
                .args(SMALL.iter().flat_map(|s| ["--set", s]))
                .args(&settings);
        }
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut random = 1u64;
    let (mut kills, mut while_saving) = (0, 0);
    while kills < KILLS {
        let mut child = begin();
        // From a first step on, or at once in a few cases.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let steps = || std::fs::metadata(killed.join("metrics.jsonl")).map_or(0, |file| file.len());
        let before = steps();
        let running = |child: &mut std::process::Child| child.try_wait().unwrap().is_none();
        while kills % 10 != 9 && steps() <= before && running(&mut child) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_micros(random >> 33 & 0x7fff));
        while kills % 3 == 0 && !saved(".partial") && running(&mut child) {
            std::hint::spin_loop();
        }
        if !running(&mut child) {
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        while_saving += usize::from(saved(".partial"));
        kills += 1;
    }
    let last = begin().wait_with_output().unwrap();
    assert!(last.status.success(), "{}", String::from_utf8_lossy(&last.stderr));
    assert!(kills == KILLS && while_saving >= 3, "{kills} kills, {while_saving} of them while it saved");
    assert!(weights(&whole) == weights(&killed), "after {kills} kills the weights are others");
    for file in ["optimizer.safetensors", "ema/diffusion_pytorch_model.safetensors"] {
        let read = |run: &Path| std::fs::read(run.join("checkpoints/LATEST").join(file)).unwrap();
        assert!(read(&whole) == read(&killed), "{file}");
    }
    assert_eq!(metrics(&whole, "train_loss"), metrics(&killed, "train_loss"));
    assert!(!saved(".partial"));
}
