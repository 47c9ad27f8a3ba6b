//! NeMo's recipes: its names for what we call otherwise, and what it knows that has no meaning here.

use serde_json::{Value, json};

use super::node::Node;
use super::problems::{Place, Problem};

/// What becomes of a key of NeMo's.
enum Fate {
    /// It says the same as this one of ours.
    Ours(&'static str),
    /// It concerns PyTorch, a cluster or a service alone.
    Elsewhere,
    /// Only this value can be had.
    Must(&'static str),
    /// It is gone from NeMo too, in favour of this.
    Removed(&'static str),
}
use Fate::{Elsewhere, Must, Ours, Removed};

/// All keys that are not ours. A section stands after its keys.
const KEYS: &[(&str, Fate)] = &[
    ("optim.learning_rate", Removed("optimizer.lr")),
    ("optim.optimizer", Removed("optimizer._target_")),
    ("optim.clip_grad", Removed("clip_grad_norm.max_norm")),
    ("step_scheduler.log_every", Removed("step_scheduler.log_remote_every_steps")),
    ("data.source", Ours("data.builtin")),
    ("model.pipeline_spec.transformer_cls", Ours("model._class_name")),
    ("model.pipeline_spec.subfolder", Ours("model.subfolder")),
    ("model.pipeline_spec.load_full_pipeline", Elsewhere),
    ("model.model_type", Elsewhere),
    ("model.attention_backend", Elsewhere),
    ("model.fuse_qkv_projections", Elsewhere),
    ("model.compact_fused_qkv_projections", Elsewhere),
    ("model.optimize_hunyuan_flash_varlen_mask", Elsewhere),
    ("model.transformer_engine_linear", Elsewhere),
    ("model.transformer_engine_fp8", Elsewhere),
    ("model.transformer_engine_fp8_recipe", Elsewhere),
    ("model.transformer_engine_fp8_amax_history_len", Elsewhere),
    ("model.transformer_engine_fp8_amax_compute_algo", Elsewhere),
    ("optimizer._target_", Ours("optimizer.name")),
    ("optimizer.foreach", Elsewhere),
    ("optimizer.fused", Elsewhere),
    ("optimizer.capturable", Elsewhere),
    ("optimizer.differentiable", Elsewhere),
    ("optimizer.store_param_remainders", Elsewhere),
    ("optimizer.exp_avg_dtype", Must("float32")),
    ("optimizer.exp_avg_sq_dtype", Must("float32")),
    ("optimizer.adam_w_mode", Must("true")),
    ("optimizer.bias_correction", Must("true")),
    ("optimizer.amsgrad", Must("false")),
    ("optimizer.maximize", Must("false")),
    ("performance.grad_clip_foreach", Elsewhere),
    ("step_scheduler.log_remote_every_steps", Elsewhere),
    ("step_scheduler.val_every_steps", Elsewhere),
    ("step_scheduler.gc_every_steps", Elsewhere),
    ("step_scheduler.loss_average_window_steps", Elsewhere),
    ("step_scheduler.preemption_signal", Elsewhere),
    ("step_scheduler.start_step", Must("0")),
    ("step_scheduler.start_epoch", Must("0")),
    ("data.dataloader.cache_dir", Ours("data.cache_dir")),
    ("data.dataloader.base_resolution", Ours("data.base_resolution")),
    ("data.dataloader.dynamic_batch_size", Ours("data.dynamic_batch_size")),
    ("data.dataloader.shuffle", Ours("data.shuffle")),
    ("data.dataloader.drop_last", Ours("data.drop_last")),
    ("data.dataloader.num_workers", Ours("data.num_workers")),
    ("data.dataloader._target_", Elsewhere),
    ("data.dataloader.model_type", Elsewhere),
    ("data.dataloader.pin_memory", Elsewhere),
    ("data.dataloader.prefetch_factor", Elsewhere),
    ("data.dataloader.train_text_encoder", Must("false")),
    ("checkpoint.checkpoint_dir", Ours("run_dir")),
    ("checkpoint.enabled", Must("true")),
    ("checkpoint.restore_from", Must("null")),
    ("checkpoint.model_save_format", Elsewhere),
    ("checkpoint.diffusers_compatible", Elsewhere),
    ("checkpoint.is_async", Elsewhere),
    ("checkpoint.single_rank_consolidation", Elsewhere),
    ("checkpoint.staging_dir", Elsewhere),
    ("checkpoint.cpu_offload", Elsewhere),
    ("checkpoint.consolidation_timeout_minutes", Elsewhere),
    ("checkpoint.best_metric_key", Elsewhere),
    ("fsdp.activation_checkpointing", Ours("performance.activation_checkpointing")),
    ("fsdp.tp_size", Must("1")),
    ("fsdp.pp_size", Must("1")),
    ("fsdp.cpu_offload", Elsewhere),
    ("fsdp.defer_fsdp_grad_sync", Elsewhere),
    ("fsdp.reduce_dtype", Elsewhere),
    ("fsdp.enable_compile", Elsewhere),
    ("fsdp.enable_fsdp2_prefetch", Elsewhere),
    ("fsdp.fsdp2_forward_prefetch_depth", Elsewhere),
    ("fsdp.fsdp2_backward_prefetch_depth", Elsewhere),
    ("fsdp.use_hf_tp_plan", Elsewhere),
    ("fsdp.cp_ring_degree", Must("1")),
    ("fsdp.cp_ulysses_degree", Ours("fsdp.cp_size")),
    ("ddp.activation_checkpointing", Ours("performance.activation_checkpointing")),
    ("ddp.backend", Elsewhere),
    ("ddp.find_unused_parameters", Elsewhere),
    ("wandb.name", Ours("name")),
    ("wandb.enable", Elsewhere),
    ("wandb.project", Elsewhere),
    ("wandb.mode", Elsewhere),
    ("dist_env.backend", Elsewhere),
    ("dist_env.init_method", Elsewhere),
    ("dist_env.timeout_minutes", Elsewhere),
    ("ci", Elsewhere),
];

/// Puts NeMo's keys into ours. What is without effect here is told, in the order of the table.
pub(crate) fn translate(root: &mut Node, problems: &mut Vec<Problem>) -> Vec<&'static str> {
    let mut without_effect = Vec::new();
    let given = |section: &str| root.entry(section).filter(|entry| !entry.value.is_null());
    if let (Some(entry), Some(_)) = (given("ddp"), given("fsdp")) {
        problems.push(Problem::new(&entry.place, "ddp: contradicts `fsdp`: remove one of them"));
    }
    for (path, fate) in KEYS {
        let Some(entry) = root.take(path) else { continue };
        match fate {
            Elsewhere => without_effect.push(*path),
            Must(only) if said(&entry.value) == *only || entry.value.is_null() => {}
            Must(only) => {
                let advice = match *path {
                    "checkpoint.restore_from" => "; resume with `flowtape train --resume RUN`",
                    "fsdp.tp_size" => "; there is no tensor parallelism: all ranks share the data (dp_size)",
                    "fsdp.pp_size" => "; there is no pipeline parallelism: all ranks share the data (dp_size)",
                    "fsdp.cp_ring_degree" => "; ranks share tokens by Ulysses alone (cp_size)",
                    _ => "",
                };
                let what = format!("{path}: expected {only}, got {}{advice}", entry.value.shown());
                problems.push(Problem::new(&entry.value.place, what));
            }
            Removed(ours) => problems.push(Problem::new(&entry.place, format!("{path}: removed; say `{ours}`"))),
            // The name of a run is a suggestion of the service's.
            Ours("name") if root.entry("name").is_some() => without_effect.push(*path),
            Ours(ours) if entry.value.is_null() && root.entry(ours).is_none() => {}
            // A setting counts, whichever name it takes.
            Ours(ours) if root.entry(ours).is_some_and(|there| !overrides(&entry.value, &there.value)) => {
                problems.push(Problem::new(&entry.place, format!("{path}: says the same as `{ours}`: remove one")));
            }
            Ours(ours) => {
                if let Err(what) = root.put(ours, entry.value) {
                    problems.push(Problem::new(&entry.place, format!("{path}: {what}")));
                }
            }
        }
    }
    consolidated(root);
    // What is left in a section of NeMo's is unknown, and told when the recipe is read.
    for section in ["model.pipeline_spec", "data.dataloader", "optim", "checkpoint", "ddp", "wandb", "dist_env"] {
        if root.get(section).is_some_and(|found| {
            found.is_null() || matches!(&found.content, super::node::Content::Section(left) if left.is_empty())
        }) {
            root.take(section);
        }
    }
    rule(root);
    dtype(root, problems);
    without_effect
}

fn overrides(setting: &Node, there: &Node) -> bool {
    matches!(setting.place, Place::Setting(_)) && !matches!(there.place, Place::Setting(_))
}

fn said(node: &Node) -> String {
    match node.boolean() {
        Some(flag) => flag.to_string(),
        None if node.is_none() => "null".into(),
        None => node.text().unwrap_or_default().trim_start_matches("torch.").to_owned(),
    }
}

/// A flag or a name, as one of our names.
fn consolidated(root: &mut Node) {
    const KEY: &str = "checkpoint.save_consolidated";
    let Some(entry) = root.take(KEY).filter(|entry| !entry.value.is_null()) else { return };
    let value = match entry.value.boolean() {
        Some(flag) => Node::plain(&entry.value.place, flag.to_string()),
        None => entry.value,
    };
    // The section is there.
    let _ = root.put(KEY, value);
}

/// An optimiser's class, such as `torch.optim.AdamW`, by our name.
fn rule(root: &mut Node) {
    let Some(name) = root.take("optimizer.name") else { return };
    let class = name.value.text().and_then(|text| text.rsplit('.').next()).unwrap_or_default().to_lowercase();
    let class = if class == "fusedadam" { "adamw".into() } else { class };
    // What no class is called so is told when the recipe is read.
    let _ = root.put("optimizer.name", Node::plain(&name.value.place, class));
}

/// Our `dtype` for the two of NeMo's, that of the weights and that of the activations.
fn dtype(root: &mut Node, problems: &mut Vec<Problem>) {
    let taken = ["model.torch_dtype", "model.compute_dtype"].map(|path| root.take(path));
    let masters = root.take("optimizer.master_weights").and_then(|entry| entry.value.boolean()).unwrap_or(false);
    let nemo = taken.iter().any(Option::is_some) || root.entry("model.pretrained_model_name_or_path").is_some();
    if root.entry("dtype").is_some() || !nemo {
        return;
    }
    let place = taken.iter().flatten().next().map_or(Place::Nowhere, |entry| entry.value.place.clone());
    let names = taken.map(|entry| entry.map_or("bfloat16".into(), |entry| said(&entry.value)));
    let short = names.each_ref().map(|name| match &name[..] {
        "float32" | "fp32" => "f32",
        "bfloat16" | "bf16" => "bf16",
        "float16" | "fp16" | "half" => "f16",
        other => other,
    });
    let ours = match short {
        ["f32", "f32"] => "f32",
        ["bf16", "bf16"] if masters => "mixed",
        ["bf16", "bf16"] => "bf16",
        ["f32", "bf16"] => "mixed",
        ["f32", "f16"] => "mixed_f16",
        _ => {
            let [weights, compute] = names;
            let what = format!(
                "model.torch_dtype: expected float32, or bfloat16 for both it and compute_dtype, got {weights} and {compute}"
            );
            problems.push(Problem::new(&place, what));
            return;
        }
    };
    let _ = root.put("dtype", Node::plain(&place, ours));
}

/// Adds NeMo's keys to the schema of ours, so that editors know them, and so that one that is misspelt is told.
pub(crate) fn extend(schema: &mut Value) {
    let others =
        ["model.torch_dtype", "model.compute_dtype", "optimizer.master_weights"].map(|path| (path, Ours("dtype")));
    for (path, fate) in KEYS.iter().chain(&others) {
        let description = match fate {
            Ours(ours) => format!("NeMo's name of `{ours}`."),
            Elsewhere => "Concerns PyTorch, a cluster or a service: without effect here.".into(),
            Must(only) => format!("Only {only}."),
            Removed(_) => continue,
        };
        add(schema, path, json!({ "description": description }));
    }
}

/// Adds a property at a path, to all alternatives of a section.
fn add(schema: &mut Value, path: &str, property: Value) {
    if let Some(alternatives) = schema.get_mut("oneOf").or(None).and_then(Value::as_array_mut) {
        alternatives.iter_mut().for_each(|alternative| add(alternative, path, property.clone()));
        return;
    }
    if let Some(alternatives) = schema.get_mut("anyOf").and_then(Value::as_array_mut) {
        alternatives.iter_mut().filter(|a| a["type"] == "object").for_each(|a| add(a, path, property.clone()));
        return;
    }
    let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
    let empty = || json!({ "type": "object", "properties": {}, "additionalProperties": false });
    let properties = &mut schema["properties"];
    match rest {
        Some(rest) => {
            if properties.get(first).is_none() {
                properties[first] = empty();
            }
            add(&mut properties[first], rest, property);
        }
        None if properties.get(first).is_none() => properties[first] = property,
        None => {}
    }
}
