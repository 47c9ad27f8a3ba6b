//! What the tests of the binary share.
#![allow(dead_code)] // not every file of tests calls all

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

pub const RECIPES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes");
pub const RECIPE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes/digits.yaml");

/// A run that takes a second: a small model, few steps, everything else as in the recipe.
pub const SMALL: [&str; 10] = [
    "model.num_layers=1",
    "model.num_single_layers=1",
    "model.attention_head_dim=8",
    "model.axes_dims_rope=[4, 2, 2]",
    "step_scheduler.local_batch_size=8",
    "step_scheduler.max_steps=6",
    "step_scheduler.ckpt_every_steps=2",
    "sampling.every_steps=3",
    "sampling.num_inference_steps=2",
    "report.samples_per_class=1",
];

pub fn flowtape(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_flowtape")).args(arguments).output().unwrap()
}

pub fn train(run: &Path, more: &[&str]) -> Output {
    let run_dir = format!("run_dir={}", run.display());
    let mut arguments = vec!["train", RECIPE, "--set", &run_dir];
    SMALL.iter().for_each(|s| arguments.extend(["--set", s]));
    arguments.extend(more);
    flowtape(&arguments)
}

pub fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The message of a command that must fail, without a panic.
pub fn failure(output: &Output) -> String {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !message.contains("panicked"), "{message}");
    message
}

/// The weights that a run has come to.
pub fn weights(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("checkpoints/LATEST/diffusion_pytorch_model.safetensors")).unwrap()
}

/// What a run wrote for each of its steps.
pub fn metrics(run: &Path, key: &str) -> Vec<String> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()[key].to_string()).collect()
}

/// A run that ends by a signal alone.
#[cfg(unix)]
pub fn endless(run: &Path, more: &str) -> Child {
    endless_by(Command::new(env!("CARGO_BIN_EXE_flowtape")), run, more)
}

/// The same by a command that starts the binary.
#[cfg(unix)]
pub fn endless_by(mut command: Command, run: &Path, more: &str) -> Child {
    let run_dir = format!("run_dir={}", run.display());
    let long = ["step_scheduler.max_steps=1000000", "sampling.every_steps=0", more, &run_dir];
    command.args(["train", RECIPE]).args(SMALL.iter().chain(&long).flat_map(|s| ["--set", s]));
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}
