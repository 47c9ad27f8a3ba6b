//! Programs that train by themselves: the example runs as it stands, and what it does not show.
#![allow(clippy::unwrap_used)] // a test

use std::path::Path;

use flowtape_engine::{Device, Tensor};
use flowtape_flowmatch::{Batch, DataType};
use flowtape_trainer::recipe::SamplingConfig;
use flowtape_trainer::{Recipe, Trainer};
use serde_json::{Value, json};

#[path = "../examples/embed.rs"]
mod embed;

#[test]
fn the_example_trains_and_draws() {
    embed::main().unwrap();
}

fn digits(settings: &[&str]) -> Recipe {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes/digits.yaml"));
    let small = ["model.num_layers=1", "model.num_single_layers=0", "step_scheduler.local_batch_size=8"];
    let settings: Vec<String> = small.iter().chain(settings).map(|setting| (*setting).to_owned()).collect();
    Recipe::load(path, &settings).unwrap()
}

fn losses(trainer: &mut Trainer, steps: usize) -> Vec<f64> {
    (0..steps).map(|_| trainer.step().unwrap().loss).collect()
}

#[test]
fn a_run_goes_on_from_memory_as_if_it_had_never_stopped() {
    for settings in [&["ema.decay=0.5"][..], &["optimizer.name=adamwschedulefree"], &["dtype=mixed_f16"]] {
        let recipe = digits(settings);
        let mut first = Trainer::new(&recipe).unwrap();
        losses(&mut first, 3);
        let (kept, weights) = (first.to_bytes().unwrap(), first.weights_to_bytes().unwrap());
        let mut second = Trainer::new(&recipe).unwrap();
        second.load_from_bytes(kept.clone()).unwrap();
        assert_eq!(second.state().progress.step, 3);
        assert!(second.weights_to_bytes().unwrap() == weights, "{settings:?}");
        assert_eq!(losses(&mut second, 3), losses(&mut first, 3), "{settings:?}");
        assert!(second.weights_to_bytes().unwrap() == first.weights_to_bytes().unwrap(), "{settings:?}");
        // Weights alone are weights: a new trainer samples with them.
        let mut third = Trainer::new(&recipe).unwrap();
        third.load_weights_from_bytes(weights.clone()).unwrap();
        assert!(third.weights_to_bytes().unwrap() == weights, "{settings:?}");
        let error = third.load_from_bytes(weights.clone()).unwrap_err().to_string();
        assert!(error.contains("weights alone"), "{error}");
        assert!(third.load_weights_from_bytes(kept).unwrap_err().to_string().contains("missing"));
        assert!(third.load_from_bytes(b"nothing".to_vec()).unwrap_err().to_string().contains("memory"));
    }
}

/// Conditions as the adapter of FLUX.1 reads them; what they hold is the same each time.
fn batch(n: usize, value: f32) -> Batch {
    let full = |dims: &[usize]| Tensor::full(dims, value.into(), flowtape_engine::DType::F32, &Device::cpu()).unwrap();
    Batch::new(full(&[n, 1, 8, 8]), DataType::Image)
        .with("text_embeddings", full(&[n, 3, 32]))
        .with("pooled_prompt_embeds", full(&[n, 32]))
}

#[test]
fn batches_may_come_from_the_program_and_a_recipe_may_be_a_configuration_alone() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes/digits.yaml")).unwrap();
    let whole: Value = serde_json::to_value(Recipe::for_own_data(&text).unwrap()).unwrap();
    let recipe = Recipe::of_model(whole["model"].clone(), 2e-3).unwrap();
    assert_eq!((recipe.optimizer.lr, &*recipe.flow_matching.adapter_type), (2e-3, "flux"));
    let mut trainer = Trainer::without_data(&Device::cpu(), &recipe).unwrap();
    let first: f64 = (0..5).map(|_| trainer.step_on(&[batch(8, 0.5)]).unwrap().loss).sum();
    (0..30).for_each(|_| drop(trainer.step_on(&[batch(8, 0.5)]).unwrap()));
    let last: f64 = (0..5).map(|_| trainer.step_on(&[batch(8, 0.5)]).unwrap().loss).sum();
    assert!(last < 0.7 * first, "{first} {last}");
    assert_eq!(trainer.state().progress.step, 40);
    // Micro-batches are one step.
    assert_eq!(trainer.step_on(&[batch(4, 0.5), batch(4, 0.5)]).unwrap().step, 41);
    let sampling = |steps| SamplingConfig { num_inference_steps: Some(steps), ..SamplingConfig::default() };
    trainer.set_sampling(sampling(4)).unwrap();
    let sample = |seed| trainer.sample(&batch(2, 0.5), Some(&batch(2, 0.0)), seed).unwrap();
    assert_eq!(sample(1).dims(), [2, 1, 8, 8]);
    let values = |tensor: &Tensor| tensor.to_vec::<f32>().unwrap();
    assert_eq!(values(&sample(1)), values(&sample(1)));
    assert_ne!(values(&sample(1)), values(&sample(2)));
    assert!(trainer.set_sampling(sampling(0)).unwrap_err().to_string().contains("num_inference_steps"));
    assert!(trainer.step_on(&[]).unwrap_err().to_string().contains("no samples"));
    assert!(trainer.step().is_err());
    for (wrong, part) in [(json!({}), "_class_name"), (json!({ "_class_name": "Flux" }), "FluxTransformer2DModel")] {
        let error = Recipe::of_model(wrong, 1e-3).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
