//! PEFT's files: `adapter_model.safetensors` and `adapter_config.json`, as NeMo's checkpoints hold them and peft reads them.

use std::collections::BTreeMap;
use std::path::Path;

use flowtape_engine::files::write_whole;
use flowtape_engine::nn::{AdapterKind, AdapterSpec, Params, Parts, Placement};
use flowtape_engine::safetensors::{SafeTensors, save as save_tensors};
use flowtape_engine::{DType, Device, Error as EngineError};
use serde_json::{Map, Value, json};

use super::{AdapterWeights, ModuleAdapter};
use crate::Result;

/// The file of the configuration.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The file of the weights.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before every key.
const PREFIX: &str = "base_model.model.";
/// Our name of DoRA's lengths, and the file's.
const MAGNITUDE: [&str; 2] = ["lora_magnitude", "lora_magnitude_vector"];

fn wrong(path: &Path, what: impl Into<String>) -> crate::Error {
    EngineError::Format { path: path.into(), what: what.into() }.into()
}

/// PEFT's names of the kinds.
fn peft_type(kind: AdapterKind) -> &'static str {
    match kind {
        AdapterKind::Loha => "LOHA",
        AdapterKind::Lokr { .. } => "LOKR",
        _ => "LORA",
    }
}

/// The alpha that stands in a file: two whole factors of a Kronecker product have no scale with us, but with PEFT.
pub(super) fn alpha(own: &ModuleAdapter) -> f64 {
    if whole(&own.parts) { own.spec.dim as f64 } else { own.spec.alpha }
}

fn whole(parts: &Parts) -> bool {
    parts.contains_key("lokr_w1") && parts.contains_key("lokr_w2")
}

/// The object of `adapter_config.json`. Where layers differ, the most frequent rank and alpha stand for all, and the others are
/// listed.
fn config(weights: &AdapterWeights) -> Value {
    let most = |of: fn(&ModuleAdapter) -> String| {
        let mut counts = BTreeMap::<String, usize>::new();
        weights.0.values().for_each(|own| *counts.entry(of(own)).or_default() += 1);
        counts.into_iter().max_by_key(|(_, n)| *n).map(|(value, _)| value).unwrap_or_default()
    };
    let number = |text: String| serde_json::from_str::<Value>(&text).unwrap_or_default();
    // A whole number stands as one, as in PEFT's own files.
    let alpha = |own: &ModuleAdapter| alpha(own).to_string();
    let dim = |own: &ModuleAdapter| own.spec.dim.to_string();
    let (r, lora_alpha) = (most(dim), most(alpha));
    let others = |of: fn(&ModuleAdapter) -> String, common: &str| -> Map<String, Value> {
        let differs = weights.0.iter().filter(|(_, own)| of(own) != common);
        differs.map(|(module, own)| (module.clone(), number(of(own)))).collect()
    };
    let kind = weights.0.values().next().map_or(AdapterKind::Lora, |own| own.spec.kind);
    let mut config = json!({
        "base_model_name_or_path": "N/A",
        "bias": "none",
        "peft_type": peft_type(kind),
        "r": number(r.clone()),
        "target_modules": weights.0.keys().collect::<Vec<_>>(),
        "task_type": "CAUSAL_LM",
    });
    let is_lora = matches!(kind, AdapterKind::Lora | AdapterKind::Dora);
    config[if is_lora { "lora_alpha" } else { "alpha" }] = number(lora_alpha.clone());
    if is_lora {
        config["use_dora"] = (kind == AdapterKind::Dora).into();
    }
    for (key, others) in [("rank_pattern", others(dim, &r)), ("alpha_pattern", others(alpha, &lora_alpha))] {
        if !others.is_empty() {
            config[key] = others.into();
        }
    }
    config
}

pub(super) fn file_name(name: &str) -> &str {
    if name == MAGNITUDE[0] { MAGNITUDE[1] } else { name }
}

/// Writes the two files into a folder. Each appears whole, the configuration last.
///
/// # Errors
/// When the folder can't be written.
pub fn save(weights: &AdapterWeights, folder: &Path) -> Result<()> {
    let io = |source| EngineError::Io { path: folder.into(), source };
    std::fs::create_dir_all(folder).map_err(io)?;
    let mut tensors = Vec::new();
    for (module, ModuleAdapter { parts, .. }) in &weights.0 {
        let named = |(name, part): (&String, &_)| (format!("{PREFIX}{module}.{}", file_name(name)), Clone::clone(part));
        tensors.extend(parts.iter().map(named));
    }
    save_tensors(folder.join(ADAPTER_WEIGHTS), &tensors, &Params::text())?;
    let text = format!("{:#}\n", config(weights));
    write_whole(&folder.join(ADAPTER_CONFIG), |partial| Ok(std::fs::write(partial, text).map_err(io)?))
}

/// Reads the two files of a folder, tensors in the file's dtype.
///
/// # Errors
/// When a file is missing or broken, or says what we can't compute.
pub fn load(folder: &Path) -> Result<AdapterWeights> {
    let path = folder.join(ADAPTER_CONFIG);
    let text = std::fs::read(&path).map_err(|source| EngineError::Io { path: path.clone(), source })?;
    let config: Value = serde_json::from_slice(&text).map_err(|e| wrong(&path, e.to_string()))?;
    let kind = match config["peft_type"].as_str() {
        Some("LORA") if config["use_dora"] == true => AdapterKind::Dora,
        Some("LORA") => AdapterKind::Lora,
        Some("LOHA") => AdapterKind::Loha,
        Some("LOKR") => AdapterKind::Lokr { factor: None },
        other => return Err(wrong(&path, format!("peft_type: expected LORA, LOHA or LOKR, got {other:?}"))),
    };
    if config["bias"].as_str().is_some_and(|bias| bias != "none") {
        return Err(wrong(&path, format!("bias: expected none, got {}", config["bias"])));
    }
    let all_alpha = config["lora_alpha"].as_f64().or_else(|| config["alpha"].as_f64());
    let all_alpha = all_alpha.ok_or_else(|| wrong(&path, "no number lora_alpha"))?;
    let file = SafeTensors::open(folder.join(ADAPTER_WEIGHTS))?;
    let mut weights = AdapterWeights::default();
    for key in file.names() {
        let inner = key.strip_prefix(PREFIX).unwrap_or(&key);
        let (module, name) =
            split(inner).ok_or_else(|| wrong(file.path(), format!("{key} is no part of an adapter")))?;
        let parts = &mut weights.0.entry(module.to_owned()).or_insert_with(|| ModuleAdapter {
            spec: AdapterSpec { kind, ..AdapterSpec::lora(1, all_alpha, Placement::frozen(DType::F32)) },
            parts: Parts::new(),
        });
        parts.parts.insert(name.to_owned(), file.get(&key, &Device::cpu(), None)?);
    }
    for (module, own) in &mut weights.0 {
        let pattern = |key: &str| {
            let named = config[key].as_object().into_iter().flatten();
            let holds = |pattern: &str| module == pattern || module.ends_with(&format!(".{pattern}"));
            named.into_iter().find(|(pattern, _)| holds(pattern)).and_then(|(_, value)| value.as_f64())
        };
        let stated = pattern("rank_pattern").or_else(|| config["r"].as_f64()).map(|r| r as usize);
        own.spec.dim = rank(&own.parts).or(stated).filter(|dim| *dim > 0).ok_or_else(|| wrong(&path, "no rank r"))?;
        own.spec.alpha = pattern("alpha_pattern").unwrap_or(all_alpha);
        if config["use_rslora"] == true {
            own.spec.alpha *= (own.spec.dim as f64).sqrt();
        }
        if whole(&own.parts) && own.spec.scale() != 1.0 {
            let scaled = own.parts["lokr_w2"].mul_scalar(own.spec.scale())?;
            own.parts.insert("lokr_w2".into(), scaled);
        }
    }
    Ok(weights)
}

/// The rank that tensors show, if they do.
pub(super) fn rank(parts: &Parts) -> Option<usize> {
    let inner = [("lora_A.weight", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)];
    inner.into_iter().find_map(|(name, axis)| parts.get(name)?.dims().get(axis).copied())
}

/// A key as the layer's path and our name of the part.
fn split(key: &str) -> Option<(&str, &str)> {
    // Older files name the adapter, `default`.
    for (end, name) in [("lora_A.default.weight", "lora_A.weight"), ("lora_B.default.weight", "lora_B.weight")] {
        if let Some(module) = key.strip_suffix(end) {
            return Some((module.strip_suffix('.')?, name));
        }
    }
    let names = ["lora_A.weight", "lora_B.weight", MAGNITUDE[1]];
    let lycoris = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"];
    let kronecker = ["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"];
    let name = names.into_iter().chain(lycoris).chain(kronecker).find(|name| key.ends_with(&format!(".{name}")))?;
    let module = key.strip_suffix(name)?.strip_suffix('.')?;
    Some((module, if name == MAGNITUDE[1] { MAGNITUDE[0] } else { name }))
}
