//! What activation checkpointing saves, for every published model: a whole training step on the device without data,
//! whose allocator counts. `cargo test -p flowtape-tests --test memory -- --nocapture` prints the table.
#![allow(clippy::unwrap_used)] // a test

use std::collections::HashSet;

use flowtape_engine::meta::Meta;
use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::{DType, GradientSink, Result, Tape, Tensor, VarId};
use flowtape_flowmatch::{Batch, FlowMatchingConfig, PhiloxDraws, StepOptions};
use flowtape_models::presets::{PRESETS, Preset, preset};
use flowtape_models::{MODELS, create_model, create_pipeline};
use serde_json::json;

/// Adapter and latents of a preset: an image of 1024 x 1024, or a few seconds of video.
fn subject(preset: &Preset) -> (&'static str, Vec<usize>) {
    match preset.name {
        "flux.2-klein-base-4b" => ("flux2_edit", vec![1, 128, 64, 64]),
        name if name.starts_with("flux.2") => ("flux2", vec![1, 128, 64, 64]),
        "qwen-image" => ("qwen_image", vec![1, 16, 128, 128]),
        "qwen-image-edit-2511" => ("qwen_image_edit", vec![1, 16, 128, 128]),
        "hunyuanvideo-1.5" => ("hunyuan", vec![1, 32, 11, 30, 52]),
        "ltx-2.3" | "ltx-2.5" => ("ltx2", vec![1, 128, 16, 16, 24]),
        "lumina-image-2.0" => ("lumina2", vec![1, 16, 128, 128]),
        "qwen-image-2.1" => ("qwen_image_21", vec![1, 64, 64, 64]),
        "flux.3-klein-base" => ("flux3", vec![1, 128, 64, 64]),
        "krea-2-raw" | "krea-2-turbo" => ("krea2", vec![1, 16, 128, 128]),
        name if name.starts_with("chroma1") => ("chroma", vec![1, 16, 128, 128]),
        name if name.starts_with("z-image") => ("z_image", vec![1, 16, 128, 128]),
        name if name.starts_with("flux.1") => ("flux", vec![1, 16, 128, 128]),
        "wan2.2-ti2v-5b" => ("wan_ti2v", vec![1, 48, 11, 30, 52]),
        name if name.starts_with("wan") && name.contains("i2v") => ("wan_i2v", vec![1, 16, 11, 60, 104]),
        name if name.contains("flf2v") => ("wan_i2v", vec![1, 16, 11, 60, 104]),
        _ => ("simple", vec![1, 16, 11, 60, 104]),
    }
}

/// Adapters that train a preset beside the first one, on the same latents.
const FURTHER: &[(&str, &str)] = &[("qwen-image-2.1", "qwen_image_21_edit")];

/// Takes gradients as they become final and lets them go, as an optimiser does that steps at once.
struct Taken(HashSet<VarId>);

impl GradientSink for Taken {
    fn gradient(&mut self, var: VarId, _: Tensor) -> Result<()> {
        self.0.insert(var);
        Ok(())
    }
}

/// Bytes of weights, and the most that a step takes beside them.
fn activations(preset: &Preset, (adapter, latents): (&str, &[usize]), checkpointing: bool) -> (u64, u64) {
    let meta = Meta::default();
    let device = meta.device();
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::BF16, &device).unwrap();
    let mut model = create_model(&(preset.config)(), &ParamBuilder::new(0, DType::BF16, &device)).unwrap();
    model.set_gradient_checkpointing(checkpointing);
    let weights = meta.used();
    let config = model.config();
    let text = |keys: &[&str]| keys.iter().find_map(|k| config[k].as_u64()).unwrap_or(4096) as usize;
    let width = text(&[
        "joint_attention_dim",
        "text_embed_dim",
        "text_dim",
        "cross_attention_dim",
        "cap_feat_dim",
        "text_hidden_dim",
        "context_in_dim",
    ]);
    // The states of several layers where a model takes them.
    let layers = config["num_text_layers"].as_u64().map_or(vec![], |layers| vec![layers as usize]);
    // Where images stand in the text, a token of it for four of theirs.
    let len = if adapter == "qwen_image_21_edit" { 256 + latents[2] * latents[3] / 4 } else { 256 };
    let kind = if latents.len() == 4 { "image" } else { "video" };
    let batch = Batch::new(zeros(latents), kind.into())
        .with("text_embeddings", zeros(&[&[1, len], &layers[..], &[width]].concat()))
        .with("text_mask", zeros(&[1, 256]))
        .with("text_embeddings_2", zeros(&[1, 64, text(&["text_embed_2_dim"])]))
        .with("text_mask_2", zeros(&[1, 64]))
        .with("pooled_prompt_embeds", zeros(&[1, 768]))
        .with("text_attention_mask", zeros(&[1, len]))
        .with("image_pad_mask", zeros(&[1, len]))
        .with("condition_latents", zeros(latents))
        .with("audio_latents", zeros(&[1, 8, 64, 16]))
        .with("audio_text_embeddings", zeros(&[1, 256, text(&["audio_cross_attention_dim"])]))
        .with_list("context_latents", vec![zeros(latents)]);
    // What an image is told by, where the model takes it.
    let batch = match config["image_dim"].as_u64() {
        Some(width) => {
            let tokens = config["pos_embed_seq_len"].as_u64().unwrap_or(257);
            batch.with("image_embeds", zeros(&[1, tokens as usize, width as usize]))
        }
        None => batch,
    };
    let config = FlowMatchingConfig { adapter_type: adapter.into(), ..FlowMatchingConfig::default() };
    let pipeline = create_pipeline(config).unwrap();
    let tape = Tape::new();
    let options =
        StepOptions { dtype: DType::BF16, collect_metrics: false, check_loss: false, ..StepOptions::recorded(&tape) };
    let output = pipeline.step(&*model, &batch, 0, &mut PhiloxDraws::new(0), &options).unwrap();
    let without = model.parameters_without_gradient(&output.inputs);
    let one = Tensor::ones(&[], DType::F32, &device).unwrap();
    let mut taken = Taken(HashSet::new());
    tape.backward_with(&[(&output.loss, &one)], &mut taken).unwrap();
    for parameter in model.params().iter() {
        let name = parameter.path();
        let found = parameter.var().is_some_and(|v| taken.0.contains(&v));
        assert!(found || without.iter().any(|n| n == name), "{name}");
    }
    (weights, meta.peak() - weights)
}

#[test]
fn checkpointing_every_block_saves_most_of_the_activations() {
    let gigabytes = |bytes: u64| format!("{:.1} GB", bytes as f64 / 1e9);
    println!(
        "| model | latents | weights, bf16 | activations | with checkpointing | ratio |\n|---|---|---|---|---|---|"
    );
    let first = PRESETS.iter().map(|preset| (preset, subject(preset)));
    let further = FURTHER.iter().map(|(name, adapter)| {
        let preset = preset(name).unwrap();
        (preset, (*adapter, subject(preset).1))
    });
    let all: Vec<_> = first.chain(further).collect();
    for (preset, (adapter, latents)) in &all {
        let [(weights, plain), (_, replayed)] = [false, true].map(|on| activations(preset, (adapter, latents), on));
        let ratio = replayed as f64 / plain as f64;
        let sizes = [weights, plain, replayed].map(gigabytes).join(" | ");
        println!("| {} | {} | {sizes} | {ratio:.2} |", preset.name, json!(latents));
        assert!(ratio < 0.3, "{}: {ratio}", preset.name);
    }
    let adapters: Vec<&str> = all.iter().map(|(_, (adapter, _))| *adapter).collect();
    assert!(MODELS.iter().all(|m| adapters.contains(&m.adapter)), "{adapters:?}");
}
