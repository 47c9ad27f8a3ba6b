//! Every field of every configuration: a change is refused, changes the parameters or changes the prediction, or the field
//! is known to have no effect, as in diffusers. With `--nocapture` the table is printed.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::{DType, Device, Philox, Tensor};
use flowtape_flowmatch::{Batch, DataType, FlowMatchingConfig, PhiloxDraws, Result, StepOptions};
use flowtape_models::{MODELS, ModelKind, create_model, create_pipeline};
use serde_json::{Value, json};

/// Fields that diffusers takes and has no use for in training.
const WITHOUT_EFFECT: &[(&str, &str)] = &[
    ("WanTransformer3DModel", "qk_norm"),
    ("QwenImageTransformer2DModel", "guidance_embeds"),
    ("HunyuanVideo15Transformer3DModel", "target_size"),
    ("HunyuanVideo15Transformer3DModel", "task_type"),
    ("Lumina2Transformer2DModel", "sample_size"),
    ("Lumina2Transformer2DModel", "scaling_factor"),
    ("LTX2VideoTransformer3DModel", "perturbed_attn"),
    ("LTX2VideoTransformer3DModel", "audio_patch_size"),
    ("ZImageTransformer2DModel", "n_kv_heads"),
];

/// What a change comes to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Effect {
    None,
    Refused,
    Parameters,
    Prediction,
}

fn normal(dims: &[usize]) -> Tensor {
    Philox::new(dims.iter().sum::<usize>() as u64).normal(dims, &Device::cpu()).unwrap()
}

/// For each class an adapter, a small model that has every part, and latents.
fn subjects() -> Vec<(&'static str, Value, Vec<usize>)> {
    vec![
        (
            "simple",
            json!({
                "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 3, "text_dim": 8,
                "freq_dim": 32, "ffn_dim": 16, "num_layers": 2, "image_dim": 6, "added_kv_proj_dim": 24,
                "pos_embed_seq_len": 4, "rope_max_seq_len": 3,
            }),
            vec![2, 3, 2, 4, 6],
        ),
        (
            "flux",
            json!({
                "in_channels": 12, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 12,
                "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 6, "guidance_embeds": true,
                "axes_dims_rope": [2, 4, 6],
            }),
            vec![2, 3, 4, 6],
        ),
        (
            "flux2",
            json!({
                "in_channels": 3, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 12,
                "num_attention_heads": 2, "joint_attention_dim": 8, "timestep_guidance_channels": 16,
                "axes_dims_rope": [2, 2, 4, 4],
            }),
            vec![2, 3, 4, 6],
        ),
        (
            "qwen_image_edit",
            json!({
                "in_channels": 12, "out_channels": 3, "num_layers": 1, "attention_head_dim": 12,
                "num_attention_heads": 2, "joint_attention_dim": 8, "axes_dims_rope": [2, 4, 6],
            }),
            vec![2, 3, 4, 6],
        ),
        (
            "hunyuan",
            json!({
                "in_channels": 7, "out_channels": 3, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
                "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 8, "text_embed_2_dim": 5,
                "image_embed_dim": 6, "rope_axes_dim": [2, 4, 6],
            }),
            vec![2, 3, 2, 4, 6],
        ),
        (
            "ltx2",
            json!({
                "in_channels": 3, "out_channels": 3, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12,
                "cross_attention_dim": 24, "cross_attn_mod": true, "audio_in_channels": 32, "audio_out_channels": 32,
                "audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
                "audio_cross_attn_mod": true, "caption_channels": 8, "rope_type": "split",
            }),
            vec![2, 3, 2, 4, 6],
        ),
        (
            "chroma",
            json!({
                "in_channels": 12, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 12,
                "num_attention_heads": 2, "joint_attention_dim": 8, "axes_dims_rope": [2, 4, 6],
                "approximator_num_channels": 16, "approximator_hidden_dim": 10, "approximator_layers": 1,
            }),
            vec![2, 3, 4, 6],
        ),
        (
            "lumina2",
            json!({
                "in_channels": 3, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2,
                "num_kv_heads": 1, "multiple_of": 8, "ffn_dim_multiplier": 1.0, "axes_dim_rope": [4, 4, 4],
                "axes_lens": [8, 4, 4], "cap_feat_dim": 8,
            }),
            vec![2, 3, 4, 6],
        ),
        (
            "qwen_image_21_edit",
            json!({
                "in_channels": 3, "out_channels": 3, "num_layers": 1, "attention_head_dim": 12, "num_attention_heads": 2,
                "context_in_dim": 8, "axes_dims_rope": [2, 4, 6],
            }),
            vec![2, 3, 4, 6],
        ),
        (
            "flux3",
            json!({
                "in_channels": 3, "cond_in_channels": 3, "num_layers": 1, "num_single_layers": 1,
                "attention_head_dim": 12, "num_attention_heads": 2, "joint_attention_dim": 8, "timestep_channels": 16,
                "axes_dims_rope": [2, 2, 4, 4],
            }),
            vec![2, 3, 4, 6],
        ),
        (
            "krea2",
            json!({
                "in_channels": 12, "num_layers": 1, "attention_head_dim": 12, "num_attention_heads": 2,
                "num_key_value_heads": 1, "intermediate_size": 16, "timestep_embed_dim": 16, "text_hidden_dim": 8,
                "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 1,
                "text_intermediate_size": 6, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
                "axes_dims_rope": [2, 4, 6],
            }),
            vec![2, 3, 4, 6],
        ),
        (
            "z_image",
            json!({
                "in_channels": 3, "dim": 24, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
                "cap_feat_dim": 8, "axes_dims": [4, 4, 4], "axes_lens": [40, 4, 4],
            }),
            vec![2, 3, 4, 6],
        ),
    ]
}

fn batch(kind: &ModelKind, config: &Value, latents: &[usize]) -> Batch {
    let mask = || Tensor::ones(&[2, 5], DType::F32, &Device::cpu()).unwrap();
    let data: DataType = kind.capabilities.data.clone();
    // The states of several layers where a model takes them.
    let text = config["num_text_layers"].as_u64().map_or(vec![2, 5, 8], |layers| vec![2, 5, layers as usize, 8]);
    Batch::new(normal(latents), data)
        .with("text_embeddings", normal(&text))
        .with("text_mask", mask())
        .with("text_embeddings_2", normal(&[2, 5, 5]))
        .with("text_mask_2", mask())
        .with("image_embeds", normal(&[2, 3, 6]))
        .with("pooled_prompt_embeds", normal(&[2, 6]))
        .with("text_attention_mask", mask())
        .with("audio_latents", normal(&[2, 2, 3, 16]))
        .with("audio_text_embeddings", normal(&[2, 5, 8]))
        .with("image_pad_mask", Tensor::from_slice(&[0u32, 1, 1, 0, 0].repeat(2), &[2, 5], &Device::cpu()).unwrap())
        .with_list("context_latents", vec![normal(&[2, 3, 2, 4])])
}

/// The parameters' names and shapes, and the predictions of a step.
struct Outcome {
    parameters: Vec<(String, Vec<usize>)>,
    predictions: Result<Vec<Vec<f32>>>,
}

fn run(kind: &ModelKind, config: &Value, latents: &[usize]) -> Result<Outcome> {
    let model = create_model(config, &ParamBuilder::new(3, DType::F32, &Device::cpu()))?;
    let parameters = model.params().iter().map(|p| (p.path().to_owned(), p.dims().to_vec())).collect();
    let step = || {
        let flow_matching = FlowMatchingConfig {
            adapter_type: kind.adapter.into(),
            i2v_prob: 1.0,
            cfg_dropout_prob: 0.0,
            ..FlowMatchingConfig::default()
        };
        let batch = batch(kind, config, latents);
        let step = create_pipeline(flow_matching)?.step(
            &*model,
            &batch,
            1,
            &mut PhiloxDraws::new(4),
            &StepOptions::default(),
        )?;
        let all = std::iter::once(&step.prediction.velocity).chain(step.prediction.auxiliary.values());
        all.map(|x| Ok(x.to_vec::<f32>()?)).collect()
    };
    Ok(Outcome { parameters, predictions: step() })
}

/// Other values of a field.
fn changes(value: &Value) -> Vec<Value> {
    match value {
        Value::Null => vec![json!(6), json!(true)],
        Value::Bool(flag) => vec![json!(!flag)],
        Value::Number(n) if n.is_u64() => {
            let n = n.as_u64().unwrap();
            vec![json!(n + 1), json!(n + 2), json!(2 * n), json!(n / 2)]
        }
        Value::Number(n) => vec![json!(1e3 * n.as_f64().unwrap()), json!(1.5 * n.as_f64().unwrap())],
        Value::String(_) => vec![json!("gelu"), json!("interleaved"), json!("other"), Value::Null],
        Value::Array(items) => {
            let reversed = Value::from(items.iter().rev().cloned().collect::<Vec<_>>());
            let one = |i: usize| {
                let mut items = items.clone();
                items[i] = json!(2 * items[i].as_u64().unwrap());
                Value::from(items)
            };
            std::iter::once(reversed).chain((0..items.len()).map(one)).collect()
        }
        Value::Object(_) => panic!("an object in a configuration"),
    }
}

#[test]
fn every_field_of_every_configuration_has_its_effect() {
    let mut silent = Vec::new();
    let tried: Vec<&str> =
        subjects().iter().map(|(adapter, ..)| ModelKind::of_adapter(adapter).unwrap().class).collect();
    assert!(MODELS.iter().all(|kind| tried.contains(&kind.class)), "{tried:?}");
    for (adapter, config, latents) in subjects() {
        let kind = ModelKind::of_adapter(adapter).unwrap();
        let mut config = config;
        config["_class_name"] = kind.class.into();
        let config = kind.config.complete(&config).unwrap();
        let base = run(kind, &config, &latents).unwrap();
        let predictions = base.predictions.unwrap();
        for (key, value) in config.as_object().unwrap().iter().filter(|(key, _)| !key.starts_with('_')) {
            let effect = |change: Value| {
                let mut config = config.clone();
                config[key] = change;
                match run(kind, &config, &latents) {
                    Err(_) => Effect::Refused,
                    Ok(other) if other.parameters != base.parameters => Effect::Parameters,
                    Ok(Outcome { predictions: Err(_), .. }) => Effect::Refused,
                    Ok(Outcome { predictions: Ok(other), .. }) if other != predictions => Effect::Prediction,
                    Ok(_) => Effect::None,
                }
            };
            let best = changes(value).into_iter().filter(|change| change != value).map(effect).max().unwrap();
            println!("{:<34} {key:<40} {best:?}", kind.class);
            let known = WITHOUT_EFFECT.contains(&(kind.class, key));
            // What only refuses other values is a choice with one value, or a limit.
            if known != (best == Effect::None) {
                silent.push(format!("{} {key}: {best:?}", kind.class));
            }
        }
    }
    assert!(silent.is_empty(), "{}", silent.join("\n"));
}
