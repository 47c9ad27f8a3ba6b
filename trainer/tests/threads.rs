//! A training run has the same bits with any number of threads.
#![allow(clippy::unwrap_used)] // a test

use std::path::Path;

use flowtape_engine::Device;
use flowtape_engine::cpu::awake;
use flowtape_trainer::{Recipe, Trainer};

#[test]
fn threads_do_not_change_a_training_run() {
    // Large enough that work is shared.
    let settings = [
        "model.num_layers=1",
        "model.num_single_layers=1",
        "model.attention_head_dim=32",
        "model.axes_dims_rope=[8, 12, 12]",
        "step_scheduler.local_batch_size=32",
    ];
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes/digits.yaml"));
    let recipe = Recipe::load(path, &settings.map(String::from)).unwrap();
    let run = |threads: usize| -> Vec<Vec<u8>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            awake(&Device::cpu(), || {
                let mut trainer = Trainer::new(&recipe).unwrap();
                for _ in 0..2 {
                    trainer.step().unwrap();
                }
                trainer.model().params().iter().map(|p| p.value().unwrap().to_bytes().unwrap()).collect()
            })
        })
    };
    let one = run(1);
    assert!(one == run(2) && one == run(7));
}
