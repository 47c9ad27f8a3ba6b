//! Adapters beside the layers of a model that a run starts from.
#![allow(clippy::unwrap_used)] // a test

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::safetensors::SafeTensors;
use flowtape_engine::{DType, Device};
use flowtape_models::{checkpoint, create_model};
use flowtape_trainer::hooks::{Hook, on_step};
use flowtape_trainer::train::{Resume, resume, train};
use flowtape_trainer::weights::{MAX_SHARD_SIZE, SaveFormat, Written, convert, extract, merge};
use flowtape_trainer::{Recipe, Trained, Trainer};
use serde_json::json;

use crate::common::small;

static NEVER: AtomicBool = AtomicBool::new(false);

/// A run that starts from another one's checkpoint.
fn adapted(base: &Path, run: &Path, more: &[&str]) -> Recipe {
    let model = format!("model={{pretrained_model_name_or_path: {}}}", base.display());
    let peft =
        "peft={dim: 2, alpha: 4, dropout: 0.2, target_modules: ['*attn.to_q', '*.ff.net.2'], _target_: PeftConfig}";
    let settings = ["dtype=f32", "report.samples_per_class=1", &model, peft, "step_scheduler.global_batch_size=8"];
    // The model's own settings stand before the section that replaces them.
    small(run, &[&settings[..], more].concat())
}

fn bytes(run: &Path, file: &str) -> Vec<u8> {
    std::fs::read(run.join("checkpoints/LATEST").join(file)).unwrap()
}

#[test]
fn a_run_of_adapters_keeps_them_alone_and_goes_on_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let [base, whole, parted] = ["base", "whole", "parted"].map(|name| folder.path().join(name));
    train(&small(&base, &[]), Vec::new(), &NEVER).unwrap();
    let before = bytes(&base, "diffusion_pytorch_model.safetensors");
    let summary = train(&adapted(&base, &whole, &["ema.decay=0.8"]), Vec::new(), &NEVER).unwrap();
    for key in ["accuracy", "before"] {
        assert!(summary.figures.contains_key(key), "{:?}", summary.figures);
    }
    let mut files: Vec<String> = std::fs::read_dir(whole.join("checkpoints/LATEST"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    files.sort();
    let wanted = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "automodel_peft_config.json",
        "ema",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
    ];
    assert_eq!(files, wanted);
    // The average is an adapter, too, and what it goes on with.
    let wanted = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "ema/ema.safetensors",
        "ema/adapter_model.safetensors",
    ];
    // Stopped twice, once where there is a checkpoint anyhow; blocks that run again drop the same elements.
    let stop = AtomicBool::new(false);
    let stopping: Vec<Box<dyn Hook + '_>> = vec![on_step(|record| stop.store(record.step == 3, Ordering::Relaxed))];
    let again = ["performance.activation_checkpointing=true", "ema.decay=0.8"];
    train(&adapted(&base, &parted, &again), stopping, &stop).unwrap();
    resume(&parted, &Resume::default(), Vec::new(), &NEVER).unwrap();
    for file in &wanted {
        assert!(bytes(&whole, file) == bytes(&parted, file), "{file}");
    }
    assert!(before == bytes(&base, "diffusion_pytorch_model.safetensors"));
    // What is sampled is the model with what it learned.
    let sample =
        |run: &Path| Trained::load(run, None).unwrap().sample("a handwritten seven", 2, 1, None).unwrap().pixels;
    assert_eq!(sample(&whole), sample(&parted));
    assert_ne!(sample(&whole), sample(&base));
}

#[test]
fn what_does_not_fit_is_said_before_anything_runs() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    train(&small(&base, &["step_scheduler.max_steps=1"]), Vec::new(), &NEVER).unwrap();
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes/digits.yaml"));
    let model = format!("model={{pretrained_model_name_or_path: {}}}", base.display());
    for (peft, part) in [
        ("peft={dim: 0}", "peft.dim"),
        ("peft={alpha: .inf}", "peft.alpha"),
        ("peft={alpha: 0}", "peft.alpha"),
        ("peft={dropout: 1}", "peft.dropout"),
        ("peft={lora_dtype: int4}", "peft.lora_dtype"),
        ("peft={lora_A_init: zero}", "xavier, uniform"),
        ("peft={save_formats: [kohya]}", "peft, diffusers, comfyui"),
        ("peft={algorithm: loha, use_dora: true}", "peft.use_dora"),
        ("peft={factor: 2}", "peft.factor"),
        ("peft={target_modules: ['*'], match_all_linear: true}", "peft.modules"),
        ("peft={target_modules: ['[']}", "pattern"),
        ("peft={ranks: 3}", "peft.ranks: unknown key"),
    ] {
        let error = Recipe::load(path, &[model.clone(), peft.into()]).unwrap_err().to_string();
        assert!(error.contains(part), "{peft}: {error}");
    }
    let error = Recipe::load(path, &["peft={}".into()]).unwrap_err().to_string();
    assert!(error.contains("model.pretrained_model_name_or_path"), "{error}");
    let recipe = Recipe::load(path, &[model, "peft={target_modules: [to_q]}".into()]).unwrap();
    let error = Trainer::new(&recipe).err().unwrap().to_string();
    assert!(error.contains("`*to_q`"), "{error}");
}

#[test]
fn a_quantised_base_loses_little_and_trains_to_the_same_bits_again() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    train(&small(&at("base"), &["step_scheduler.max_steps=20"]), Vec::new(), &NEVER).unwrap();
    let steps = ["step_scheduler.max_steps=20", "optimizer.lr=0.01", "peft.dropout=0"];
    let loss = |name: &str, more: &[&str]| {
        let recipe = adapted(&at("base"), &at(name), &[&steps[..], more].concat());
        train(&recipe, Vec::new(), &NEVER).unwrap().final_loss
    };
    let dense = loss("dense", &[]);
    for format in ["int8", "fp8", "nf4"] {
        let setting = format!("peft.quantize_base={format}");
        let quantised = loss(format, &[&setting]);
        assert!((quantised / dense - 1.0).abs() < 0.02, "{format}: {quantised}, {dense}");
        let again = format!("{format}-again");
        loss(&again, &[&setting, "performance.activation_checkpointing=true"]);
        assert!(bytes(&at(format), "adapter_model.safetensors") == bytes(&at(&again), "adapter_model.safetensors"));
        assert!(Trained::load(&at(format), None).is_ok());
    }
}

/// The greatest difference of two samples.
fn apart(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |most, (a, b)| most.max((a - b).abs()))
}

#[test]
fn adapters_are_merged_extracted_and_gone_on_from() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    train(&small(&at("base"), &[]), Vec::new(), &NEVER).unwrap();
    let forms = ["peft.save_formats=[diffusers, comfyui]", "peft.dropout=0", "optimizer.lr=0.05"];
    train(&adapted(&at("base"), &at("lora"), &forms), Vec::new(), &NEVER).unwrap();
    let sample = |run: &Path, loras: &[(std::path::PathBuf, f64)]| {
        let trained = Trained::load(run, None).unwrap();
        trained.add_adapters(loras, false).unwrap();
        trained.sample("a handwritten seven", 3, 1, None).unwrap().pixels
    };
    let (before, want) = (sample(&at("base"), &[]), sample(&at("lora"), &[]));
    let moved = apart(&before, &want);
    assert!(moved > 0.0);
    // Folded in while sampling, from each form, also by halves.
    let file = |name: &str| at("lora").join("checkpoints/LATEST").join(name);
    let files =
        [file("adapter_model.safetensors"), file("pytorch_lora_weights.safetensors"), file("comfyui_lora.safetensors")];
    for path in files {
        let off = apart(&sample(&at("base"), &[(path.clone(), 1.0)]), &want);
        assert!(off < 1e-3 * moved, "{}: {off} of {moved}", path.display());
        let halves = [(path.clone(), 0.5), (path, 0.5)];
        assert!(apart(&sample(&at("base"), &halves), &want) < 1e-3 * moved);
    }
    // A merged checkpoint is one to start from.
    merge(&at("base"), &[(at("lora").join("checkpoints/LATEST"), 1.0)], &at("merged"), &Written::default(), false)
        .unwrap();
    let merged = format!("model={{pretrained_model_name_or_path: {}}}", at("merged").display());
    let trainer = Trainer::new(&small(&at("x"), &["dtype=f32", &merged])).unwrap();
    let prompts = ["a handwritten seven"; 3];
    let request = flowtape_trainer::generate::Request { prompts: &prompts, first_frames: None, seed: 1 };
    let samples = trainer.generate(&request, &NEVER).unwrap().unwrap();
    assert!(apart(&samples.pixels, &want) < 1e-3 * moved);
    // What tells it from the base is the adapter.
    let found = extract(&at("base"), &at("merged"), 2, &at("extracted"), &[SaveFormat::Peft]).unwrap();
    assert!(found.left_out.is_empty() && found.kept.values().all(|kept| *kept > 0.9999), "{:?}", found.kept);
    let extracted = at("extracted");
    assert!(apart(&sample(&at("base"), &[(extracted.clone(), 1.0)]), &want) < 1e-2 * moved);
    assert!(extract(&at("base"), &at("base"), 2, &at("nothing"), &[SaveFormat::Peft]).is_err());
    // An adapter to go on from; of another scale it is refused.
    let start = format!("peft.init_from={}", file("comfyui_lora.safetensors").display());
    let trainer = Trainer::new(&adapted(&at("base"), &at("y"), &[&start])).unwrap();
    let samples = trainer.generate(&request, &NEVER).unwrap().unwrap();
    assert!(apart(&samples.pixels, &want) < 1e-4 * moved);
    let error = Trainer::new(&adapted(&at("base"), &at("y"), &[&start, "peft.alpha=5"])).err().unwrap().to_string();
    assert!(error.contains("init_from") && error.contains("scale"), "{error}");
    // Another dtype, and files of another size.
    let written = Written { dtype: Some(DType::BF16), max_shard_size: 20_000, ..Written::default() };
    convert(&at("merged"), &at("halved"), &written).unwrap();
    assert!(at("halved").join("diffusion_pytorch_model.safetensors.index.json").exists());
    assert!(convert(&at("merged"), &at("halved"), &written).is_err());
}

/// There and back, with nothing but the file: names, order of rows, configuration. What ComfyUI and diffusers make of such a file is
/// looked at by `interop/check.py`.
#[test]
fn one_file_in_the_authors_layout_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (class, config) in [
        (
            "FluxTransformer2DModel",
            json!({
                "in_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1,
                "joint_attention_dim": 12, "pooled_projection_dim": 6, "guidance_embeds": true,
            }),
        ),
        (
            "WanTransformer3DModel",
            json!({
                "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 1, "text_dim": 10, "freq_dim": 16,
                "ffn_dim": 24,
            }),
        ),
        (
            "QwenImageTransformer2DModel",
            json!({
                "in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 128, "num_attention_heads": 1,
                "joint_attention_dim": 10,
            }),
        ),
    ] {
        let mut config = config;
        config["_class_name"] = class.into();
        let [from, file, small, back, rough] = ["from", "whole.safetensors", "small.safetensors", "back", "rough"]
            .map(|name| at(&format!("{class}.{name}")));
        let params = ParamBuilder::new(5, DType::F32, &Device::cpu());
        checkpoint::save(&*create_model(&config, &params).unwrap(), &from, MAX_SHARD_SIZE).unwrap();
        let original = Written { original: true, ..Written::default() };
        convert(&from, &file, &original).unwrap();
        convert(&from, &small, &Written { float8: true, dtype: Some(DType::BF16), ..original }).unwrap();
        convert(&file, &back, &Written::default()).unwrap();
        convert(&small, &rough, &Written { dtype: Some(DType::F32), ..Written::default() }).unwrap();
        let read = |path: &Path| SafeTensors::open(path.join("diffusion_pytorch_model.safetensors")).unwrap();
        let (want, got, near) = (read(&from), read(&back), read(&rough));
        assert_eq!(want.names(), got.names());
        let stored = std::fs::metadata(&small).unwrap().len() as f64 / std::fs::metadata(&file).unwrap().len() as f64;
        assert!(stored < 0.5, "{class}: {stored}");
        for name in want.names() {
            let values = |file: &SafeTensors| {
                file.get(&name, &Device::cpu(), Some(DType::F32)).unwrap().to_vec::<f32>().unwrap()
            };
            assert_eq!(values(&want), values(&got), "{class}: {name}");
            // Half of the last of three bits of mantissa, or of the least number, and bf16 before.
            for (a, b) in values(&want).iter().zip(values(&near)) {
                assert!((a - b).abs() <= a.abs() * 0.066 + 2f32.powi(-10), "{class}: {name}: {a} became {b}");
            }
        }
        assert!(convert(&from, &file, &original).unwrap_err().to_string().contains("a file of that name"));
        assert!(convert(&from, &at("folder"), &original).unwrap_err().to_string().contains(".safetensors"));
    }
}
