//! Cases from the field (`tests/cases`): configurations as people have them, and a model that no golden has.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flowtape_engine::meta::Meta;
use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::safetensors::SafeTensors;
use flowtape_engine::{DType, Device, Philox, Tape, Tensor};
use flowtape_flowmatch::{
    Batch, DataType, FlowMatchingConfig, FlowMatchingPipeline, ModelInputs, PhiloxDraws, StepOptions,
};
use flowtape_models::checkpoint::{self, load_config};
use flowtape_models::summary::Summary;
use flowtape_models::{Error, MODELS, create_adapter, create_model};
use serde_json::{Value, json};

fn cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases")
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn configurations_count_as_diffusers_counts_them_or_are_refused() {
    let folder = cases().join("configs");
    let expected: BTreeMap<String, Value> = serde_json::from_value(read(&folder.join("expected.json"))).unwrap();
    assert!(!expected.is_empty());
    let mut wrong = Vec::new();
    for (name, expected) in &expected {
        let path = folder.join(name);
        let ours = load_config(&path).and_then(|config| Summary::of_config(&config));
        // diffusers leaves the quantised weights to a library; what we can't read we refuse.
        let quantised = read_text(&path).contains("quantization_config");
        match (expected["parameters"].as_u64().filter(|_| !quantised), ours) {
            (Some(count), Ok(summary)) if summary.parameters == count => {}
            (None, Err(error)) if error.to_string().contains(name.as_str()) => {}
            (_, ours) => {
                wrong.push(format!("{name}: expected {expected}, got {:?}", ours.map(|summary| summary.parameters)));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), expected.len(), wrong.join("\n"));
}

fn read_text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn refusals_name_the_file_and_the_key() {
    let refused = |name: &str, parts: &[&str]| {
        let error = load_config(&cases().join("configs").join(name)).unwrap_err().to_string();
        assert!(parts.iter().chain(&[name]).all(|part| error.contains(part)), "{error}");
    };
    refused("flux-quant.json", &["quantization_config", "not quantised"]);
    refused("flux-null-num_attention_heads.json", &["num_attention_heads", "null"]);
    refused("wan-float-freq_dim.json", &["freq_dim", "32.0"]);
    refused("mlp.json", &["mlp_ratio"]);
    refused("mlpneg.json", &["mlp_ratio"]);
    refused("trailingcomma.json", &["line 1"]);
    refused("wan-original.json", &["WanModel", "WanTransformer3DModel"]);
}

#[test]
fn a_recipes_model_has_no_unknown_keys() {
    let make = |config: &Value| create_model(config, &ParamBuilder::new(0, DType::F32, &Meta::default().device()));
    for kind in MODELS {
        // Z-Image counts its layers under another name.
        let defaults = kind.config.complete(&json!({"_class_name": kind.class})).unwrap();
        let (key, near) = match defaults.get("num_layers") {
            Some(_) => ("num_layer", "did you mean `num_layers`"),
            None => ("n_layer", "did you mean `n_layers`"),
        };
        let Err(error) = make(&json!({"_class_name": kind.class, key: 1})) else { panic!("taken") };
        assert!([key, near, kind.class].iter().all(|part| error.to_string().contains(part)), "{error}");
    }
}

#[test]
fn a_float_keeps_its_last_bit() {
    let config = r#"{"_class_name": "Flux2Transformer2DModel", "in_channels": 8, "num_layers": 1, "num_single_layers": 2,
        "attention_head_dim": 30, "num_attention_heads": 4, "joint_attention_dim": 11, "timestep_guidance_channels": 32,
        "axes_dims_rope": [6, 8, 8, 8], "mlp_ratio": 1.9333333333333333}"#;
    let config: Value = serde_json::from_str(config).unwrap();
    let model = create_model(&config, &ParamBuilder::new(0, DType::F32, &Meta::default().device())).unwrap();
    // Python: int(120 * 1.9333333333333333) = 232, and 231 with the next number below.
    assert_eq!(model.params().get("transformer_blocks.0.ff.linear_out.weight").unwrap().dims(), [120, 232]);
    assert_eq!(model.config()["mlp_ratio"], 1.9333333333333333);
}

#[test]
fn absurd_sizes_are_refused_before_anything_is_made() {
    for kind in MODELS {
        let defaults = kind.config.complete(&json!({"_class_name": kind.class})).unwrap();
        for (key, value) in defaults.as_object().unwrap() {
            if !value.is_u64()
                || ["target_size", "rope_max_seq_len", "rope_theta", "audio_patch_size"].contains(&&**key)
            {
                continue;
            }
            for absurd in [json!(u64::MAX), json!(1u64 << 62), json!(100_000_000), json!(1e300), json!(-1)] {
                let mut config = defaults.clone();
                config[key] = absurd.clone();
                let started = std::time::Instant::now();
                let params = ParamBuilder::new(0, DType::F32, &Meta::default().device());
                let Err(error) = create_model(&config, &params) else { panic!("{}: {key} {absurd}", kind.class) };
                assert!(error.to_string().contains(key), "{}: {key} {absurd}: {error}", kind.class);
                assert!(started.elapsed().as_secs() < 2, "{key} {absurd}");
                assert!(params.params().is_empty());
            }
        }
    }
}

#[test]
fn first_and_last_frame_have_positions_of_their_own() {
    let folder = cases().join("models/wan_flf2v");
    let device = Device::cpu();
    let model = checkpoint::load(&folder.join("f32"), DType::F32, &device).unwrap();
    let file = SafeTensors::open(folder.join("inputs.safetensors")).unwrap();
    let mut inputs = ModelInputs::new();
    for name in file.names() {
        inputs.insert(&name, file.get(&name, &device, Some(DType::F32)).unwrap());
    }
    let values = |x: &Tensor| x.to_vec::<f64>().unwrap();
    let got = values(&model.forward(&inputs).unwrap().sample);
    let expected = SafeTensors::open(folder.join("expected.safetensors")).unwrap();
    let want = values(&expected.get("sample", &device, Some(DType::F32)).unwrap());
    let largest = want.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    let worst = got.iter().zip(&want).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs())) / largest;
    // The goldens' bound of a prediction, without the reference's projections of time.
    assert!(got.len() == want.len() && worst < 1e-4, "{worst}");
    // One image alone has no pair, and images of another length no positions.
    let image = inputs.tensor("encoder_hidden_states_image").unwrap().clone();
    for wrong in [image.narrow(0, 0, 3).unwrap(), image.narrow(1, 0, 2).unwrap()] {
        let error = model.forward(&inputs.clone().with("encoder_hidden_states_image", wrong)).unwrap_err().to_string();
        assert!(error.contains("pairs of images of 3 tokens"), "{error}");
    }
}

#[test]
fn a_flux_without_guidance_trains_whatever_the_adapter_is_told() {
    let config = |embeds: bool| {
        json!({
            "_class_name": "FluxTransformer2DModel", "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8,
            "guidance_embeds": embeds, "axes_dims_rope": [2, 2, 4],
        })
    };
    let latents = Philox::new(1).normal(&[2, 1, 4, 4], &Device::cpu()).unwrap();
    let text = |dims: &[usize]| Philox::new(2).normal(dims, &Device::cpu()).unwrap();
    let batch = Batch::new(latents, DataType::Image)
        .with("text_embeddings", text(&[2, 3, 8]))
        .with("pooled_prompt_embeds", text(&[2, 8]));
    let step = |embeds: bool, kwargs: Value| {
        let kwargs = kwargs.as_object().unwrap();
        let pipeline = FlowMatchingPipeline::new(FlowMatchingConfig::default(), create_adapter("flux", kwargs)?)?;
        let model = create_model(&config(embeds), &ParamBuilder::new(0, DType::F32, &Device::cpu()))?;
        let tape = Tape::new();
        let options = StepOptions::recorded(&tape);
        let step = pipeline.step(&*model, &batch, 1, &mut PhiloxDraws::new(3), &options)?;
        model.params().check_gradients(&tape.backward(&step.loss)?, &[])?;
        Ok::<f64, Error>(step.loss.item()?)
    };
    let schnell = step(false, json!({"use_guidance_embeds": false})).unwrap();
    assert_eq!(step(false, json!({})).unwrap(), schnell);
    // A model that embeds a guidance is told one, whatever the argument says.
    assert!(step(true, json!({"guidance_scale": 1.0})).unwrap() != step(true, json!({"guidance_scale": 9.0})).unwrap());
    assert_eq!(step(true, json!({"use_guidance_embeds": false})).unwrap(), step(true, json!({})).unwrap());
}
