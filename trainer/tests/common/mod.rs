//! A recipe that trains in a second.
#![allow(clippy::unwrap_used)] // the helpers of tests may panic

use std::path::{Path, PathBuf};

use flowtape_trainer::Recipe;

/// The digits with a small model: five steps with checkpoints after the second and the fourth.
pub fn small(run: &Path, more: &[&str]) -> Recipe {
    let settings = [
        "model.num_layers=1",
        "model.num_single_layers=1",
        "model.attention_head_dim=8",
        "model.axes_dims_rope=[4, 2, 2]",
        "step_scheduler.local_batch_size=4",
        "step_scheduler.max_steps=5",
        "step_scheduler.ckpt_every_steps=2",
        "sampling.every_steps=0",
        "sampling.num_inference_steps=1",
        "sampling.guidance_scale=1",
        "report=null",
    ];
    let run_dir = format!("run_dir={}", run.display());
    let settings = settings.iter().chain(more).map(|s| (*s).to_owned()).chain([run_dir]);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes/digits.yaml");
    Recipe::load(Path::new(path), &settings.collect::<Vec<_>>()).unwrap()
}

/// All files of the last checkpoint but those that hold the time.
#[allow(dead_code)] // not all tests look at files
pub fn files(run: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let latest = run.join("checkpoints/LATEST");
    let mut found = Vec::new();
    let mut folders = vec![latest.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if !["state.json", "manifest.json"].iter().any(|name| path.ends_with(name)) {
                found.push((path.strip_prefix(&latest).unwrap().into(), std::fs::read(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}
