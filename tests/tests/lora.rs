//! Adapters beside the layers of every model that has goldens of a step.
#![allow(clippy::unwrap_used)] // a test

use std::collections::BTreeSet;
use std::path::PathBuf;

use flowtape_engine::nn::{AdapterKind, AdapterSpec, Placement};
use flowtape_engine::optim::{AdamW, Optimizer, Rates};
use flowtape_engine::{DType, Device, Tensor};
use flowtape_models::{MODELS, checkpoint};
use flowtape_tests::goldens;
use flowtape_tests::lora::adapted;
use flowtape_tests::step::recorded;
use serde_json::Value;

const KINDS: [AdapterKind; 4] =
    [AdapterKind::Lora, AdapterKind::Dora, AdapterKind::Loha, AdapterKind::Lokr { factor: None }];

/// The folders of steps of models that are built, with their adapters' names.
fn steps() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(goldens()).unwrap() {
        let path = entry.unwrap().path();
        let Ok(text) = std::fs::read(path.join("case.json")) else { continue };
        let case: Value = serde_json::from_slice(&text).unwrap();
        let adapter = case["adapter"].as_str().unwrap_or_default().to_owned();
        if path.to_string_lossy().ends_with("_step") && MODELS.iter().any(|m| m.adapter == adapter) {
            found.push((path, adapter));
        }
    }
    found
}

#[test]
fn every_model_trains_adapters_alone() {
    let mut met = BTreeSet::new();
    for (folder, adapter) in steps() {
        let plain = checkpoint::load(&folder, DType::F32, &Device::cpu()).unwrap();
        let (reference, _) = recorded(&folder, &*plain).unwrap();
        for kind in KINDS {
            let name = format!("{} {kind:?}", folder.display());
            let spec = AdapterSpec { kind, ..AdapterSpec::lora(2, 4.0, Placement::trained(DType::F32)) };
            let mut model = adapted(&folder, plain.params().linears(), &spec).unwrap();
            let before = model.params().base();
            let before: Vec<Vec<u8>> = before.iter().map(|p| p.value().unwrap().to_bytes().unwrap()).collect();
            let (first, gradients) = recorded(&folder, &*model).unwrap();
            // DoRA divides a length by itself, which rounds.
            let largest = |t: &Tensor| t.to_vec::<f64>().unwrap().into_iter().fold(0.0, |m: f64, v| m.max(v.abs()));
            let off = largest(&first.model_pred().detach().sub(&reference.model_pred().detach()).unwrap());
            let allowed = if kind == AdapterKind::Dora { 5e-6 * largest(reference.model_pred()) } else { 0.0 };
            assert!(off <= allowed, "{name}: {off}");
            let without = model.parameters_without_gradient(&first.inputs);
            model.params().check_gradients(&gradients, &without).unwrap();
            let adapters = model.params().adapters();
            let trained = adapters.iter().filter(|p| gradients.of(*p).is_some()).count();
            // The latents are the other leaf.
            assert_eq!(gradients.iter().count(), trained + 1, "{name}");
            assert!(trained > 0 && trained + without.len() >= adapters.len(), "{name}");
            // Blocks that run again give the same bits.
            model.set_gradient_checkpointing(true);
            let (_, replayed) = recorded(&folder, &*model).unwrap();
            for param in adapters.iter() {
                let bytes = |g: Option<&Tensor>| g.map(|g| g.to_bytes().unwrap());
                assert_eq!(bytes(replayed.of(param)), bytes(gradients.of(param)), "{name}: {}", param.path());
            }
            let mut optimizer = Optimizer::new(AdamW { betas: (0.9, 0.999), eps: 1e-8 });
            let rates = Rates { lr: 1e-3, weight_decay: 0.0 };
            optimizer.step(model.params(), &gradients, rates, None).unwrap();
            for _ in 0..4 {
                let (_, gradients) = recorded(&folder, &*model).unwrap();
                optimizer.step(model.params(), &gradients, rates, None).unwrap();
            }
            let (last, _) = recorded(&folder, &*model).unwrap();
            let losses = [first.loss.item().unwrap(), last.loss.item().unwrap()];
            assert!(losses[1] < losses[0], "{name}: {losses:?}");
            let after = model.params().base();
            let after: Vec<Vec<u8>> = after.iter().map(|p| p.value().unwrap().to_bytes().unwrap()).collect();
            assert!(before == after, "{name}");
        }
        met.insert(adapter);
    }
    assert_eq!(met.len(), MODELS.iter().map(|m| m.adapter).collect::<BTreeSet<_>>().len(), "{met:?}");
}
