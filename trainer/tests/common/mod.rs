//! A recipe that trains in a second.
#![allow(clippy::unwrap_used)] // the helpers of tests may panic

use std::path::Path;

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
