//! Adapters in files: all forms hold all that they say, and what other programs call a layer is found.
#![allow(clippy::unwrap_used)] // a test

use std::collections::BTreeMap;

use flowtape_engine::meta::Meta;
use flowtape_engine::nn::{AdapterKind, AdapterPlan, AdapterSpec, ParamBuilder, Params, Placement};
use flowtape_engine::safetensors::{SafeTensors, save};
use flowtape_engine::{DType, Device, Philox, Tensor};
use flowtape_models::create_model;
use flowtape_models::peft::{AdapterWeights, SaveFormat, load_any, save_as};
use serde_json::{Value, json};

fn flux() -> Value {
    json!({
        "_class_name": "FluxTransformer2DModel", "in_channels": 12, "num_layers": 1, "num_single_layers": 1,
        "attention_head_dim": 12, "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 6,
        "guidance_embeds": true, "axes_dims_rope": [2, 4, 6],
    })
}

fn wan() -> Value {
    json!({
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3,
        "out_channels": 3, "text_dim": 8, "freq_dim": 32, "ffn_dim": 16, "num_layers": 1,
    })
}

fn hunyuan() -> Value {
    json!({
        "_class_name": "HunyuanVideo15Transformer3DModel", "in_channels": 5, "out_channels": 2, "num_layers": 1,
        "num_refiner_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "text_embed_dim": 8,
        "text_embed_2_dim": 6, "image_embed_dim": 10, "rope_axes_dim": [2, 4, 6],
    })
}

/// A model whose adapters of a kind stand beside some layers, with random values.
fn adapted(config: &Value, kind: AdapterKind, chosen: impl Fn(&str) -> bool) -> (Params, AdapterWeights) {
    let plain = create_model(config, &ParamBuilder::new(0, DType::F32, &Meta::default().device())).unwrap();
    let spec = AdapterSpec { kind, ..AdapterSpec::lora(2, 3.0, Placement::trained(DType::F32)) };
    let modules = plain.params().linears().iter().filter(|module| chosen(module)).cloned();
    let adapters: BTreeMap<String, AdapterSpec> = modules.map(|module| (module, spec.clone())).collect();
    let plan = AdapterPlan { base: Placement::frozen(DType::F32), adapters: adapters.clone() };
    let model = create_model(config, &ParamBuilder::with_plan(1, plan, &Device::cpu())).unwrap();
    let mut random = Philox::new(7);
    for param in model.params().adapters().iter() {
        param.copy_from(&random.normal(param.dims(), &Device::cpu()).unwrap()).unwrap();
    }
    (model.params().clone(), AdapterWeights::of(model.params(), &adapters).unwrap())
}

fn keys(path: &std::path::Path) -> Vec<String> {
    SafeTensors::open(path).unwrap().names()
}

/// `save_as` reads back what it wrote and compares the changes itself.
#[test]
fn every_form_holds_what_it_says_it_holds() {
    use AdapterKind::{Dora, Loha, Lokr, Lora};
    use SaveFormat::{Comfyui, Diffusers, Peft};
    for config in [flux(), wan(), hunyuan()] {
        let class = config["_class_name"].as_str().unwrap();
        // Of layers that are one in ComfyUI without a name for each.
        let has_fused = class.starts_with("Hunyuan");
        for kind in [Lora, Dora, Loha, Lokr { factor: None }, Lokr { factor: Some(2) }] {
            let (params, weights) = adapted(&config, kind, |module| module != "proj_out_");
            for form in [Peft, Diffusers, Comfyui] {
                let folder = tempfile::tempdir().unwrap();
                let saved = save_as(form, &weights, &params, class, folder.path());
                let refused = match form {
                    Peft => false,
                    Diffusers => !matches!(kind, Lora | Dora),
                    Comfyui => kind == Dora || (has_fused && kind != Lora),
                };
                assert_eq!(saved.is_err(), refused, "{class} {kind:?} {form:?}: {:?}", saved.err());
                if !refused {
                    let (read, unused) = load_any(folder.path(), &params, class).unwrap();
                    assert!(unused.is_empty() && read.0.len() == weights.0.len());
                }
            }
        }
    }
}

/// The names that ComfyUI's loader maps (`comfy/lora.py`), and diffusers' own.
#[test]
fn keys_are_those_that_other_programs_look_for() {
    let folder = tempfile::tempdir().unwrap();
    let written = |config: &Value, module: &str, form| {
        let (params, weights) = adapted(config, AdapterKind::Lora, |m| m == module);
        keys(&save_as(form, &weights, &params, config["_class_name"].as_str().unwrap(), folder.path()).unwrap())
    };
    let with = |layer: &str| ["alpha", "lora_down.weight", "lora_up.weight"].map(|end| format!("{layer}.{end}"));
    let comfyui = written(&flux(), "transformer_blocks.0.attn.to_out.0", SaveFormat::Comfyui);
    assert_eq!(comfyui, with("lora_transformer_transformer_blocks_0_attn_to_out_0"));
    let comfyui = written(&wan(), "blocks.0.ffn.net.0.proj", SaveFormat::Comfyui);
    assert_eq!(comfyui, with("lora_unet_blocks_0_ffn_0"));
    // Of three layers that ComfyUI has as one: rows of the others stay as they are.
    let comfyui = written(&hunyuan(), "transformer_blocks.0.attn.to_k", SaveFormat::Comfyui);
    assert_eq!(comfyui, with("lora_unet_double_blocks_0_img_attn_qkv"));
    let comfyui = written(&hunyuan(), "transformer_blocks.0.ff.net.2", SaveFormat::Comfyui);
    assert_eq!(comfyui, with("lora_unet_double_blocks_0_img_mlp_2"));
    let diffusers = written(&flux(), "transformer_blocks.0.attn.to_q", SaveFormat::Diffusers);
    let layer = "transformer.transformer_blocks.0.attn.to_q";
    assert_eq!(diffusers, [format!("{layer}.lora_A.weight"), format!("{layer}.lora_B.weight")]);
}

/// kohya's files are of the original model, where one layer holds queries, keys, values and the feed-forward's input.
#[test]
fn layers_of_the_original_model_are_taken_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kohya.safetensors");
    let (params, _) = adapted(&flux(), AdapterKind::Lora, |_| true);
    let (width, rank, alpha) = (24, 3, 6.0);
    let mut random = Philox::new(3);
    let mut tensors = Vec::new();
    let mut layer = |name: &str, [outputs, inputs]: [usize; 2]| -> (Vec<f64>, Vec<f64>) {
        let mut part = |end: &str, dims: [usize; 2]| {
            let tensor = random.normal(&dims, &Device::cpu()).unwrap();
            tensors.push((format!("{name}.{end}"), tensor.clone()));
            tensor.to_vec::<f64>().unwrap()
        };
        let (down, up) = (part("lora_down.weight", [rank, inputs]), part("lora_up.weight", [outputs, rank]));
        tensors.push((format!("{name}.alpha"), Tensor::full(&[], alpha, DType::F32, &Device::cpu()).unwrap()));
        (down, up)
    };
    let fused = layer("lora_unet_single_blocks_0_linear1", [7 * width, width]);
    let modulation = layer("lora_unet_final_layer_adaLN_modulation_1", [2 * width, width]);
    let text = layer("lora_unet_double_blocks_0_txt_mlp_2", [width, 4 * width]);
    tensors.push(("lora_te1_text_model.alpha".into(), Tensor::full(&[], 1.0, DType::F32, &Device::cpu()).unwrap()));
    save(&path, &tensors, &BTreeMap::new()).unwrap();
    let (weights, unused) = load_any(&path, &params, "FluxTransformer2DModel").unwrap();
    assert_eq!(unused, ["lora_te1_text_model.alpha"]);
    // The change of one row, by its definition.
    let row = |(down, up): &(Vec<f64>, Vec<f64>), row: usize, inputs: usize| -> Vec<f64> {
        let at = |j: usize| (0..rank).map(|r| up[row * rank + r] * down[r * inputs + j]).sum::<f64>();
        (0..inputs).map(|j| alpha / rank as f64 * at(j)).collect()
    };
    let check = |module: &str,
                 [outputs, inputs]: [usize; 2],
                 source: &(Vec<f64>, Vec<f64>),
                 from: &dyn Fn(usize) -> usize| {
        let change = weights.0[module].change([outputs, inputs]).unwrap().to_vec::<f64>().unwrap();
        for (i, got) in change.chunks(inputs).enumerate() {
            for (got, want) in got.iter().zip(row(source, from(i), inputs)) {
                assert!((got - want).abs() < 1e-4 * (1.0 + want.abs()), "{module} row {i}: {got} instead of {want}");
            }
        }
    };
    for (place, layer) in ["attn.to_q", "attn.to_k", "attn.to_v"].into_iter().enumerate() {
        let module = format!("single_transformer_blocks.0.{layer}");
        check(&module, [width, width], &fused, &|i| place * width + i);
    }
    check("single_transformer_blocks.0.proj_mlp", [4 * width, width], &fused, &|i| 3 * width + i);
    // The original's shift stands before its scale.
    check("norm_out.linear", [2 * width, width], &modulation, &|i| (i + width) % (2 * width));
    check("transformer_blocks.0.ff_context.net.2", [width, 4 * width], &text, &|i| i);
    assert_eq!(weights.0.len(), 6);
}
