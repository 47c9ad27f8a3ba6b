//! Recipes as people write them: the cases from the field, and those that come with the project.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use flowtape_data::{Media, MemorySource, Sample, Text, TextEmbeddings};
use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::safetensors::save;
use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::FlowMatchingConfig;
use flowtape_models::{Condition, MODELS, ModelKind, Transformer, checkpoint, original};
use flowtape_trainer::builtin::WordTable;
use flowtape_trainer::data::Data;
use flowtape_trainer::plan::StepPlan;
use flowtape_trainer::recipe::Dtype;
use flowtape_trainer::start::Start;
use flowtape_trainer::train::train;
use flowtape_trainer::{Recipe, Trainer};
use serde_json::json;

fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder);
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "yaml"));
    files.sort();
    files
}

#[test]
fn cases_from_the_field_train_or_are_refused_as_they_should() {
    // The table of the cases' README: what is refused, with what its message says.
    let refused: &[(&str, &[&str])] = &[
        (
            "02-timestep-typo__r",
            &[":22:", "flow_matching.timestep_sampling", "uniform, logit_normal, mode, lognorm, mix, beta"],
        ),
        ("03-encodings__latin1", &[":1:9: ", "not UTF-8"]),
        ("04-merge-keys__bomb", &["anchors"]),
        ("05-duplicates__model", &["`num_layers`", "lines 9 and 10"]),
        ("07-set-missing__noopt", &["optimizer: missing"]),
    ];
    let settings: &[(&str, &str)] = &[("07-set-missing__noopt", "optimizer.lr=1e-3")];
    let cases = files("tests/cases/recipes");
    assert!(cases.len() >= 10, "{cases:?}");
    for path in cases {
        let name = path.file_stem().unwrap().to_str().unwrap();
        if let Some((_, parts)) = refused.iter().find(|(case, _)| *case == name) {
            let started = Instant::now();
            let error = Recipe::load(&path, &[]).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
            assert!(started.elapsed().as_millis() < 1000, "{name} took {:?}", started.elapsed());
            assert!(error.len() < 1000, "{error}");
        }
        let set = settings.iter().find(|(case, _)| *case == name).map(|(_, set)| (*set).to_owned());
        if set.is_some() || refused.iter().all(|(case, _)| *case != name) {
            let folder = tempfile::tempdir().unwrap();
            let run_dir = format!("run_dir={}", folder.path().join("run").display());
            let recipe = Recipe::load(&path, &[set, Some(run_dir)].into_iter().flatten().collect::<Vec<_>>());
            let recipe = recipe.unwrap_or_else(|error| panic!("{error}"));
            let summary = train(&recipe, Vec::new(), &AtomicBool::new(false)).unwrap();
            assert_eq!(summary.steps, 3, "{name}");
        }
    }
}

#[test]
fn recipes_of_the_project_are_taken() {
    let recipes = files("recipes");
    assert!(recipes.len() >= 3);
    let folder = tempfile::tempdir().unwrap();
    for path in recipes {
        let text = std::fs::read_to_string(&path).unwrap();
        // Their published weights are not here; what they plan is below.
        if text.contains("PATH_TO_YOUR_DATA") {
            continue;
        }
        // Their paths are those of someone who stands in the repository.
        let pictures = || -> Vec<String> {
            let emoji = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/emoji");
            let of = |key: &str, path: &Path| format!("data.folder.{key}={}", path.display());
            let cache = folder.path().join("cache");
            vec![of("path", &emoji.join("pictures")), of("pipeline", &emoji.join("pipeline")), of("cache_dir", &cache)]
        };
        let mut settings = if text.contains("data/emoji") { pictures() } else { Vec::new() };
        // What starts from another recipe's run needs one.
        if let Some((_, rest)) = text.split_once("pretrained_model_name_or_path: runs/") {
            let name = rest.lines().next().unwrap().trim();
            let run = folder.path().join(name);
            let short =
                ["step_scheduler.max_steps=1", "step_scheduler.local_batch_size=1", "sampling.num_inference_steps=1"];
            let short = short.map(str::to_owned).into_iter();
            let short = short.chain([
                "report=null".to_owned(),
                "lr_scheduler=null".to_owned(),
                format!("run_dir={}", run.display()),
            ]);
            let short = short.chain(settings.clone()).collect::<Vec<_>>();
            let base = Recipe::load(&path.with_file_name(format!("{name}.yaml")), &short).unwrap();
            train(&base, Vec::new(), &AtomicBool::new(false)).unwrap();
            settings.push(format!("model.pretrained_model_name_or_path={}", run.display()));
        }
        let recipe = Recipe::load(&path, &settings).unwrap_or_else(|error| panic!("{error}"));
        // Patterns of layers are compared with a model when one is made.
        if recipe.peft.is_some() {
            Trainer::new(&recipe).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
    }
}

/// Tokens of a text.
const TEXT: usize = 40;

/// A small sample of what a recipe's model takes.
fn sample_of(recipe: &Recipe) -> Sample {
    let kind = ModelKind::of_adapter(&recipe.flow_matching.adapter_type).unwrap();
    let config = kind.config.complete(&Start::of(&recipe.model).unwrap().config).unwrap();
    let asked = (kind.requirements)(&config, &recipe.flow_matching.adapter_kwargs).unwrap();
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::cpu()).unwrap();
    let ones = |dims: &[usize]| Tensor::ones(dims, DType::F32, &Device::cpu()).unwrap();
    let sides = asked.patch.iter().map(|patch| 4 * patch);
    let dims: Vec<usize> = [asked.channels.size].into_iter().chain(sides).collect();
    let mut text = TextEmbeddings::default();
    for (name, width) in &asked.widths {
        let one = [width.size];
        // The states of several layers where a model takes them.
        let layers = config["num_text_layers"].as_u64().map_or(vec![], |layers| vec![layers as usize]);
        let tokens = [&[TEXT], &layers[..], &one].concat();
        text = text.with(name, zeros(if *name == "pooled_prompt_embeds" { &one } else { &tokens }));
    }
    let mut sample = Sample::new(Media::Latents(zeros(&dims)), Text::Embeddings(text));
    for mask in ["text_mask", "text_mask_2", "text_attention_mask"] {
        sample.tensors.insert(mask.into(), ones(&[TEXT]));
    }
    if kind.takes(Condition::ReferenceImages) {
        for i in 0..2 {
            sample.tensors.insert(format!("context_latents.{i}"), zeros(&dims));
        }
        // Where the text has them, in models that read them there: a place for four of an image's tokens.
        let places = 2 * dims[1..].iter().product::<usize>() / 4;
        let places = (0..TEXT).map(|i| f32::from(u8::from((1..=places).contains(&i)))).collect::<Vec<_>>();
        sample.tensors.insert("image_pad_mask".into(), Tensor::from_vec(places, &[TEXT], &Device::cpu()).unwrap());
    }
    if kind.takes(Condition::GivenFrames) {
        sample.tensors.insert("condition_latents".into(), zeros(&dims));
    }
    if kind.takes(Condition::Audio) {
        sample.tensors.insert("audio_latents".into(), zeros(&[8, 4, 16]));
    }
    sample
}

#[test]
fn recipes_of_nemos_schema_plan_a_step_for_every_model_and_mode() {
    let recipes = files("recipes");
    let mut modes = BTreeSet::new();
    for path in recipes {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        if !text.contains("PATH_TO_YOUR_DATA") {
            continue;
        }
        // The published weights are not here: their configuration is known, and so is a sample.
        let recipe =
            Recipe::load(&path, &["model.mode=pretrain", "step_scheduler.num_epochs=10000"].map(str::to_owned))
                .unwrap_or_else(|error| panic!("{error}"));
        let source = MemorySource::new(vec![sample_of(&recipe)]).unwrap();
        let data = Data::of_pixels(Arc::new(source), WordTable::new(&[], 1));
        let plan = StepPlan::of(&recipe, data).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(plan.weights > 1 << 30 && plan.flops > 0.0, "{name}: {plan:?}");
        // Adapters alone are trained, and remembered.
        let lora = name.ends_with("_lora");
        assert_eq!(plan.optimizer < plan.weights / 10, lora, "{name}: {plan:?}");
        modes.insert((recipe.flow_matching.adapter_type, name.rsplit('_').next().unwrap_or_default().to_owned()));
    }
    for kind in MODELS.iter().filter(|kind| !kind.takes(Condition::ReferenceImages)) {
        for mode in ["finetune", "lora", "pretrain"] {
            assert!(modes.contains(&(kind.adapter.to_owned(), mode.to_owned())), "{} {mode}", kind.adapter);
        }
    }
}

/// A recipe as NeMo's are, for a tiny model: but for the data, which is ours.
const NEMO: &str = r#"
seed: 42
wandb:
  enable: false
  project: digits
  mode: online
  name: nemo_run
dist_env: {backend: nccl, init_method: "env://", timeout_minutes: 30}
model:
  pretrained_model_name_or_path: CHECKPOINT
  model_type: flux
  mode: finetune
  cache_dir: null
  attention_backend: flash
  torch_dtype: float32
  compute_dtype: bfloat16
  transformer_engine_fp8: true
  transformer_engine_fp8_recipe: delayed
  pipeline_spec: {transformer_cls: FluxTransformer2DModel, subfolder: transformer, load_full_pipeline: false}
optimizer:
  _target_: transformer_engine.pytorch.optimizers.fused_adam.FusedAdam
  lr: "5e-6"
  weight_decay: 0.01
  betas: [0.9, 0.99]
  master_weights: true
  store_param_remainders: true
  exp_avg_dtype: float32
  exp_avg_sq_dtype: torch.float32
  adam_w_mode: true
  bias_correction: true
lr_scheduler: {lr_decay_style: cosine, lr_warmup_steps: 0, min_lr: 1e-6}
performance: {check_loss: false, grad_clip_foreach: true}
fsdp:
  dp_size: 8
  tp_size: 1
  activation_checkpointing: true
  cpu_offload: false
  enable_compile: none
flow_matching:
  adapter_type: "flux"
  adapter_kwargs: {guidance_scale: 1, use_guidance_embeds: true}
  timestep_sampling: "logit_normal"
  flow_shift: 1.0
  i2v_prob: 0.0
  use_loss_weighting: false
step_scheduler:
  num_epochs: 5000
  local_batch_size: 2
  global_batch_size: 4
  ckpt_every_steps: 500
  log_remote_every_steps: 1
  max_steps: null
data:
  source: digits
  text_dim: 8
checkpoint:
  enabled: true
  checkpoint_dir: RUN
  model_save_format: safetensors
  save_consolidated: final
  diffusers_compatible: true
  restore_from:
sampling: {num_inference_steps: 1}
ci: {recipe_owner: somebody, time: "00:30:00"}
"#;

/// The model of the cases, in a folder of diffusers' form.
fn saved_model(folder: &Path, more: &[&str]) -> Box<dyn Transformer> {
    let settings: Vec<String> = more.iter().map(|s| (*s).to_owned()).collect();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/recipes/00-base__tiny.yaml");
    let recipe = Recipe::load(&path, &settings).unwrap();
    let params = ParamBuilder::new(recipe.seed, DType::F32, &Device::cpu());
    let model = Start::of(&recipe.model).unwrap().model(params).unwrap();
    checkpoint::save(&*model, folder, checkpoint::MAX_SHARD_SIZE).unwrap();
    model
}

fn first_weights(model: &dyn Transformer) -> Vec<f32> {
    model.params().iter().next().unwrap().value().unwrap().to_vec().unwrap()
}

fn start(model: serde_json::Value) -> Result<(Start, Vec<f32>), String> {
    let start = Start::of(&model).map_err(|error| error.to_string())?;
    let made = start.model(ParamBuilder::new(7, DType::F32, &Device::cpu())).map_err(|error| error.to_string())?;
    let weights = first_weights(&*made);
    Ok((start, weights))
}

#[test]
fn a_distilled_checkpoint_is_told_of_where_its_weights_are_trained() {
    let folder = tempfile::tempdir().unwrap();
    let caution = |name: &str, mode: &str| {
        let path = folder.path().join(name);
        saved_model(&path, &[]);
        let path = path.to_string_lossy().into_owned();
        start(json!({"pretrained_model_name_or_path": path, "mode": mode})).unwrap().0.caution
    };
    let told = caution("FLUX.1-schnell", "finetune").unwrap();
    assert!(told.contains("distilled") && told.contains("Train FLUX.1-dev"), "{told}");
    assert_eq!((caution("FLUX.1-schnell", "pretrain"), caution("my_model", "finetune")), (None, None));
    // A pipeline that says so of itself.
    let pipeline = folder.path().join("pipeline");
    saved_model(&pipeline.join("transformer"), &[]);
    std::fs::write(pipeline.join("model_index.json"), r#"{"is_distilled": true}"#).unwrap();
    let (pipeline, _) = start(json!({"pretrained_model_name_or_path": pipeline.to_string_lossy()})).unwrap();
    assert!(pipeline.caution.unwrap().contains("is_distilled"));
}

#[test]
fn a_recipe_of_nemo_runs_with_only_its_paths_changed() {
    let folder = tempfile::tempdir().unwrap();
    let (pipeline, run) = (folder.path().join("pipeline"), folder.path().join("run"));
    saved_model(&pipeline.join("transformer"), &[]);
    let path = folder.path().join("nemo.yaml");
    let text = NEMO.replace("CHECKPOINT", pipeline.to_str().unwrap()).replace("RUN", run.to_str().unwrap());
    std::fs::write(&path, &text).unwrap();
    let load = |settings: &[&str]| {
        let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
        Recipe::load(&path, &settings).map_err(|error| error.to_string())
    };
    let recipe = load(&[]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((&recipe.name[..], recipe.run_dir.as_deref(), recipe.dtype), ("nemo_run", Some(&*run), Dtype::Mixed));
    assert_eq!((&recipe.optimizer.name[..], recipe.optimizer.lr), ("adamw", 5e-6));
    assert_eq!(recipe.clip_grad_norm.as_ref().map(|clip| clip.max_norm), Some(1.0));
    assert!(recipe.performance.activation_checkpointing);
    // Pictures of the digits, 2 a batch and 4 a step: passes begin 899 and 898 batches in turn, and their last group may be one.
    let steps = recipe.step_scheduler.resolved(1797, false, 1).max_steps;
    assert_eq!(steps, 2500 * 450 + 2500 * 449);
    let recipe = load(&["step_scheduler.max_steps=2"]).unwrap();
    assert_eq!(train(&recipe, Vec::new(), &AtomicBool::new(false)).unwrap().steps, 2);
    // Its copy in the run folder is a recipe of ours, and means the same.
    let copy = Recipe::load(&run.join("recipe.yaml"), &[]).unwrap();
    assert_eq!(copy.to_json(), recipe.to_json());
    for (setting, part) in [
        ("optim.learning_rate=1", "optim.learning_rate: removed; say `optimizer.lr`"),
        ("step_scheduler.log_every=1", "removed; say `step_scheduler.log_remote_every_steps`"),
        ("fsdp.dp_sise=1", "fsdp.dp_sise: unknown key; did you mean `dp_size`?"),
        ("checkpoint.restore_from=LATEST", "flowtape train --resume RUN"),
        ("optimizer.amsgrad=true", "optimizer.amsgrad: expected false"),
        ("optimizer._target_=torch.optim.Adagrad", "optimizer.name: expected one of adamw"),
        ("model.torch_dtype=float8", "model.torch_dtype: expected float32"),
        ("model.pretrained_model_name_or_path=somebody/nothing", "`hf download somebody/nothing`"),
        ("wandb=1", "wandb: expected a section"),
    ] {
        let error = load(&[setting]).unwrap_err();
        assert!(error.contains(part), "{setting}: {error}");
    }
}

#[test]
fn a_model_starts_from_whatever_holds_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let low = first_weights(&*saved_model(&at("pipeline/transformer_2"), &["seed=2"]));
    let high = first_weights(&*saved_model(&at("pipeline/transformer"), &[]));
    std::fs::write(at("pipeline/model_index.json"), r#"{"boundary_ratio": 0.875}"#).unwrap();
    let hub = at("hub/models--owner--model");
    std::fs::create_dir_all(hub.join("snapshots/0123")).unwrap();
    std::fs::create_dir_all(hub.join("snapshots/4567/transformer")).unwrap();
    std::fs::create_dir_all(hub.join("refs")).unwrap();
    std::fs::write(hub.join("refs/main"), "4567\n").unwrap();
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        std::fs::copy(at("pipeline/transformer").join(file), hub.join("snapshots/4567/transformer").join(file))
            .unwrap();
    }
    let single = at("single.safetensors");
    std::fs::copy(at("pipeline/transformer/diffusion_pytorch_model.safetensors"), &single).unwrap();
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(at("pipeline/transformer/config.json")).unwrap()).unwrap();
    let named = |name: &Path, more: serde_json::Value| {
        let mut model = json!({ "pretrained_model_name_or_path": name });
        model.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        start(model)
    };
    let pipeline = at("pipeline");
    // A transformer alone, a pipeline's, one of two, the hub's, a single file's.
    assert!(named(&at("pipeline/transformer"), json!({})).unwrap().1 == high);
    let (start_high, weights) = named(&pipeline, json!({"stage": "high_noise"})).unwrap();
    assert!(weights == high && start_high.sigmas == Some((0.875, 1.0)));
    let (start_low, weights) = named(&pipeline, json!({"stage": "low_noise", "boundary_ratio": 0.5})).unwrap();
    assert!(weights == low && low != high && start_low.sigmas == Some((0.0, 0.5)));
    let flow = start_low.flow_matching(&FlowMatchingConfig::default());
    assert_eq!((flow.sigma_min, flow.sigma_max), (0.0, 0.5));
    assert!(named(Path::new("owner/model"), json!({"cache_dir": at("hub")})).unwrap().1 == high);
    assert!(named(&single, config.clone()).unwrap().1 == high);
    // Its authors' layout, as ComfyUI ships it.
    let original = at("original.safetensors");
    let model = saved_model(&at("again"), &[]);
    let comfy = |(name, tensor)| (format!("model.diffusion_model.{name}"), tensor);
    let tensors: Vec<_> = original::tensors(&*model).unwrap().into_iter().map(comfy).collect();
    save(&original, &tensors, &BTreeMap::new()).unwrap();
    assert!(named(&original, config.clone()).unwrap().1 == high);
    // New weights of its configuration, with what the recipe says of it.
    let (start, weights) = named(&at("pipeline/transformer"), json!({"mode": "pretrain", "num_layers": 2})).unwrap();
    assert!(start.weights.is_none() && weights != high && start.config["num_layers"] == 2);
    let preset = Start::of(&json!({"pretrained_model_name_or_path": "Qwen/Qwen-Image", "mode": "pretrain"})).unwrap();
    assert_eq!(preset.config["_class_name"], "QwenImageTransformer2DModel");
    // Checkpoints of NeMo's: consolidated or not, the newest one or a certain one.
    let (nemo, saved) = (at("nemo"), at("pipeline/transformer"));
    let weights = saved.join("diffusion_pytorch_model.safetensors");
    for (step, folder, file, metadata) in [
        (3, "model", "shard-00001-model-00001-of-00001.safetensors", ".hf_metadata"),
        (7, "model/consolidated", "model-00001-of-00001.safetensors", "."),
    ] {
        let folder = nemo.join(format!("epoch_0_step_{step}")).join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::create_dir_all(folder.join(metadata)).unwrap();
        std::fs::copy(&weights, folder.join(file)).unwrap();
        std::fs::copy(saved.join("config.json"), folder.join(metadata).join("config.json")).unwrap();
        let names: serde_json::Map<_, _> = model.params().iter().map(|p| (p.path().to_owned(), json!(file))).collect();
        let index = json!({ "metadata": {}, "weight_map": names });
        std::fs::write(folder.join("diffusion_pytorch_model.safetensors.index.json"), index.to_string()).unwrap();
        assert!(named(&nemo.join(format!("epoch_0_step_{step}")), json!({})).unwrap().1 == high, "{step}");
    }
    let newest = nemo.join("epoch_0_step_7/model");
    std::os::unix::fs::symlink("epoch_0_step_7", nemo.join("LATEST")).unwrap();
    assert!(named(&nemo, json!({})).unwrap().1 == high && named(&newest, json!({})).unwrap().1 == high);
    let index = |stem: &str| newest.join(format!("consolidated/{stem}.safetensors.index.json"));
    std::fs::rename(index("diffusion_pytorch_model"), index("model")).unwrap();
    assert!(named(&nemo, json!({})).unwrap().1 == high);
    let shards = nemo.join("epoch_0_step_3/model");
    let second = shards.join("shard-00002-model-00001-of-00001.safetensors");
    std::fs::copy(&weights, second).unwrap();
    let refused = |name: &Path, more: serde_json::Value, parts: &[&str]| {
        let error = named(name, more).unwrap_err();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    refused(&pipeline, json!({}), &["model.stage", "low_noise"]);
    refused(&shards, json!({}), &["2 shards", "consolidate.sh"]);
    refused(&single, json!({}), &["config.json", "_class_name"]);
    refused(&single, json!({"_class_name": "FluxTransformer2DModel"}), &["FluxTransformer2DModel"]);
    refused(Path::new("flux.1-dev"), json!({"mode": "finetune"}), &["without weights", "pretrain"]);
    refused(Path::new("flux.9"), json!({}), &["no file or folder", "flux.1-dev"]);
    refused(
        Path::new("owner/other"),
        json!({"cache_dir": at("hub")}),
        &["hf download owner/other", "models--owner--other"],
    );
    refused(&at("hub"), json!({}), &["transformer/config.json"]);
}

#[test]
fn editors_get_a_schema_that_knows_all_keys() {
    let schema = flowtape_trainer::recipe::schema();
    let known = |path: &str| {
        let pointer = path.split('.').map(|key| format!("/properties/{key}")).collect::<String>();
        let found = schema.pointer(&pointer);
        assert!(found.is_some_and(|found| found["description"].is_string()), "{path}: {found:?}");
    };
    for path in ["seed", "step_scheduler.num_epochs", "model.stage", "flow_matching.flow_shift", "ci"] {
        known(path);
    }
    // Of a section that may be absent.
    let fsdp = schema["properties"]["fsdp"].to_string();
    for key in ["dp_size", "dp_replicate_size", "tp_size", "reduce_dtype", "activation_checkpointing"] {
        assert!(fsdp.contains(&format!("\"{key}\":{{\"")), "{key}: {fsdp}");
    }
    assert_eq!(schema["additionalProperties"], false);
    assert_eq!(
        schema["properties"]["flow_matching"]["properties"]["timestep_sampling"]["oneOf"][0]["const"],
        "uniform"
    );
}
