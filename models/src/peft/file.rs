//! Adapters in one file, with the keys of diffusers or of ComfyUI; read from whatever names other programs use.

use std::collections::BTreeMap;
use std::path::Path;

use flowtape_engine::nn::{AdapterKind, AdapterSpec, Params, Parts, Placement};
use flowtape_engine::safetensors::{SafeTensors, save as save_tensors};
use flowtape_engine::{DType, Device, Error as EngineError, Tensor};
use serde::{Deserialize, Serialize};

use super::format::rank;
use super::names::{ForComfyui, Names, Part, Piece, comfyui, rows, split};
use super::{AdapterWeights, ModuleAdapter, format};
use crate::{Result, original};

/// A form in which adapters are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SaveFormat {
    /// PEFT's two files, which NeMo's checkpoints hold: peft opens them.
    Peft,
    /// One file for diffusers' `load_lora_weights`.
    Diffusers,
    /// One file for ComfyUI, with alphas.
    Comfyui,
}

impl SaveFormat {
    /// The file of a form within a folder.
    pub fn file(self) -> &'static str {
        match self {
            Self::Peft => format::ADAPTER_WEIGHTS,
            Self::Diffusers => "pytorch_lora_weights.safetensors",
            Self::Comfyui => "comfyui_lora.safetensors",
        }
    }
}

/// How much of a change may be lost on the way into a file and back, of its largest element: a scale that was folded in rounds.
const ROUNDING: f64 = 1e-6;

fn refused<T>(what: &str, module: &str) -> Result<T> {
    Err(EngineError::argument("adapter file", what, module).into())
}

/// Sizes `[out, in]` of a model's linear layers, by path.
fn sizes(params: &Params) -> Result<Vec<(String, [usize; 2])>> {
    let size = |module: &String| -> Result<Option<(String, [usize; 2])>> {
        let weight = params.get(&format!("{module}.weight"));
        weight.map(|w| Ok((module.clone(), [w.dim(0)?, w.dim(1)?]))).transpose()
    };
    params.linears().iter().filter_map(|module| size(module).transpose()).collect()
}

/// Writes adapters into a folder in a form, reads them back, and compares what they change: only then the file counts as saved.
/// `params` are those of the model (weights are not read) and `class` its class of diffusers. The path of what was written.
///
/// # Errors
/// When the folder can't be written, or the form can't hold such adapters.
pub fn save_as(
    form: SaveFormat,
    weights: &AdapterWeights,
    params: &Params,
    class: &str,
    folder: &Path,
) -> Result<std::path::PathBuf> {
    let path = folder.join(form.file());
    let tensors = match form {
        SaveFormat::Peft => {
            format::save(weights, folder)?;
            check(weights, &format::load(folder)?, params, &path)?;
            return Ok(path);
        }
        SaveFormat::Diffusers => for_diffusers(weights)?,
        SaveFormat::Comfyui => for_comfyui(weights, params, class)?,
    };
    std::fs::create_dir_all(folder).map_err(|source| EngineError::Io { path: folder.into(), source })?;
    save_tensors(&path, &tensors, &Params::text())?;
    let (read, _) = load_file(&path, params, class)?;
    check(weights, &read, params, &path)?;
    Ok(path)
}

/// diffusers takes the scale from no key: it is folded into `B`.
fn for_diffusers(weights: &AdapterWeights) -> Result<Vec<(String, Tensor)>> {
    let mut tensors = Vec::new();
    for (module, ModuleAdapter { spec, parts }) in &weights.0 {
        if !matches!(spec.kind, AdapterKind::Lora | AdapterKind::Dora) {
            return refused("LoRA or DoRA, which is all that diffusers loads; write peft or comfyui instead", module);
        }
        for (name, part) in parts {
            let key = format!("transformer.{module}.{}", format::file_name(name));
            let folded = name == "lora_B.weight" && spec.scale() != 1.0;
            let part = if folded { part.to_dtype(DType::F32)?.mul_scalar(spec.scale())? } else { part.clone() };
            tensors.push((key, part));
        }
    }
    Ok(tensors)
}

fn for_comfyui(weights: &AdapterWeights, params: &Params, class: &str) -> Result<Vec<(String, Tensor)>> {
    let Some(layers) = comfyui(class, params) else {
        return refused("a class whose layers ComfyUI's loader is known to find; write diffusers' keys instead", class);
    };
    let mut tensors = Vec::new();
    let mut write = |layer: &str, own: &ModuleAdapter| -> Result<()> {
        if own.spec.kind == AdapterKind::Dora {
            return refused("no DoRA, which ComfyUI computes with the length of the unchanged weight", layer);
        }
        for (name, part) in &own.parts {
            let end = match &**name {
                "lora_A.weight" => "lora_down.weight",
                "lora_B.weight" => "lora_up.weight",
                other => other,
            };
            tensors.push((format!("{layer}.{end}"), part.clone()));
        }
        let alpha = Tensor::full(&[], format::alpha(own), DType::F32, &Device::cpu())?;
        tensors.push((format!("{layer}.alpha"), alpha));
        Ok(())
    };
    for layer in layers {
        match layer {
            ForComfyui::One(name, module) => weights.0.get(&module).map_or(Ok(()), |own| write(&name, own))?,
            ForComfyui::Fused(name, layer) => {
                if let Some(own) = fused(weights, params, &layer)? {
                    write(&name, &own)?;
                }
            }
        }
    }
    Ok(tensors)
}

/// The LoRAs of layers that are rows of one as a LoRA of that one: their ranks side by side, each with the rows that are its own.
fn fused(weights: &AdapterWeights, params: &Params, layer: &original::Layer) -> Result<Option<ModuleAdapter>> {
    let outputs: usize = layer.modules.iter().map(|module| rows(params, module)).sum();
    let (mut a, mut b, mut start) = (Vec::new(), Vec::new(), 0);
    for module in &layer.modules {
        let count = rows(params, module);
        if let Some(own) = weights.0.get(module) {
            if own.spec.kind != AdapterKind::Lora {
                return refused("LoRA for a layer that is one with others in ComfyUI; write peft instead", module);
            }
            let part = |name: &str| {
                let part = own.parts.get(name).map(|part| part.to_dtype(DType::F32)).transpose()?;
                part.ok_or_else(|| EngineError::argument("adapter file", name, module))
            };
            let up = part("lora_B.weight")?.mul_scalar(own.spec.scale())?;
            let zeros = |n: usize| Tensor::zeros(&[n, up.dim(1)?], DType::F32, &Device::cpu());
            a.push(part("lora_A.weight")?);
            b.push(Tensor::cat(&[&zeros(start)?, &up, &zeros(outputs - start - count)?], 0)?);
        }
        start += count;
    }
    if a.is_empty() {
        return Ok(None);
    }
    let (a, b) = (Tensor::cat(&a.iter().collect::<Vec<_>>(), 0)?, Tensor::cat(&b.iter().collect::<Vec<_>>(), 1)?);
    let b = if layer.swapped { halves_swapped(&b)? } else { b };
    let dim = a.dim(0)?;
    let spec = AdapterSpec::lora(dim, dim as f64, Placement::frozen(DType::F32));
    Ok(Some(ModuleAdapter { spec, parts: [("lora_A.weight".into(), a), ("lora_B.weight".into(), b)].into() }))
}

fn halves_swapped(rows: &Tensor) -> Result<Tensor> {
    let halves = rows.chunk(2, 0)?;
    Ok(Tensor::cat(&[&halves[1], &halves[0]], 0)?)
}

/// Whether what was read changes each layer as what was written.
fn check(written: &AdapterWeights, read: &AdapterWeights, params: &Params, path: &Path) -> Result<()> {
    let sizes: BTreeMap<String, [usize; 2]> = sizes(params)?.into_iter().collect();
    let wrong = |what: String| EngineError::Format { path: path.into(), what };
    // A layer that holds several is written for all of them: what no adapter was for is unchanged.
    let others = read.0.keys().filter(|module| !written.0.contains_key(*module));
    for module in written.0.keys().chain(others) {
        let size = sizes.get(module).ok_or_else(|| wrong(format!("{module} is no linear layer of the model")))?;
        let change = |of: &AdapterWeights| -> Result<Option<Vec<f64>>> {
            of.0.get(module).map(|own| Ok(own.change(*size)?.to_vec()?)).transpose()
        };
        let got = change(read)?.ok_or_else(|| wrong("does not hold the layers that were written".into()))?;
        let want = change(written)?.unwrap_or_else(|| vec![0.0; got.len()]);
        let most = want.iter().fold(0.0, |most: f64, v| most.max(v.abs()));
        let off = want
            .iter()
            .zip(&got)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, |off: f64, d| if d > off || d.is_nan() { d } else { off });
        if off.is_nan() || off > ROUNDING * most {
            return Err(
                wrong(format!("{module}: the change that was read differs from what was written by {off:e}")).into()
            );
        }
    }
    Ok(())
}

impl ModuleAdapter {
    /// The change of a weight `[out, in]`, f32; with DoRA before the lengths.
    ///
    /// # Errors
    /// When the parts do not fit.
    pub fn change(&self, size: [usize; 2]) -> Result<Tensor> {
        let kind = if self.spec.kind == AdapterKind::Dora { AdapterKind::Lora } else { self.spec.kind };
        let zero = Tensor::zeros(&size, DType::F32, &Device::cpu())?;
        Ok(AdapterSpec { kind, ..self.spec.clone() }.merged(&zero, &self.parts)?)
    }
}

/// Reads adapters for a model of a class of diffusers from a file of any of the known names, or from PEFT's folder: the adapters, and
/// the keys that were of no use.
///
/// # Errors
/// When the file can't be read, or a layer's tensors do not belong together.
pub fn load_any(path: &Path, params: &Params, class: &str) -> Result<(AdapterWeights, Vec<String>)> {
    if path.is_dir() {
        for form in [SaveFormat::Peft, SaveFormat::Diffusers, SaveFormat::Comfyui] {
            if form == SaveFormat::Peft && path.join(format::ADAPTER_CONFIG).exists() {
                return Ok((format::load(path)?, Vec::new()));
            }
            if path.join(form.file()).exists() {
                return load_file(&path.join(form.file()), params, class);
            }
        }
        let what = format!(
            "no adapter in this folder: name its file, a folder with {}, or RUN/checkpoints/LATEST of a run",
            format::ADAPTER_CONFIG
        );
        return Err(EngineError::Format { path: path.into(), what }.into());
    }
    // PEFT's file has its alpha in the configuration beside it.
    let folder = path.parent().unwrap_or(Path::new("."));
    if path.file_name().is_some_and(|name| name == format::ADAPTER_WEIGHTS)
        && folder.join(format::ADAPTER_CONFIG).exists()
    {
        return Ok((format::load(folder)?, Vec::new()));
    }
    load_file(path, params, class)
}

/// Tensors of one layer of a file.
#[derive(Default)]
struct Layer {
    parts: Parts,
    alpha: Option<f64>,
}

fn load_file(path: &Path, params: &Params, class: &str) -> Result<(AdapterWeights, Vec<String>)> {
    let file = SafeTensors::open(path)?;
    let names = Names::of(class, params);
    let (mut layers, mut unused) = (BTreeMap::<String, Layer>::new(), Vec::new());
    for key in file.names() {
        let Some((text, part)) = split(&key).filter(|(text, _)| names.find(text).is_some()) else {
            unused.push(key);
            continue;
        };
        let layer = layers.entry(text.to_owned()).or_default();
        let tensor = file.get(&key, &Device::cpu(), None)?;
        match part {
            Part::Alpha => layer.alpha = Some(tensor.reshape(&[])?.item()?),
            Part::Tensor(name) => drop(layer.parts.insert(name.to_owned(), tensor)),
        }
    }
    let mut weights = AdapterWeights::default();
    for (text, layer) in layers {
        let pieces = names.find(&text).unwrap_or_default();
        let whole = layer.read(&text)?;
        for piece in pieces {
            weights.0.insert(piece.module.clone(), whole.piece(piece)?);
        }
    }
    Ok((weights, unused))
}

impl Layer {
    fn read(mut self, text: &str) -> Result<ModuleAdapter> {
        let has = |start: &str| self.parts.keys().any(|name| name.starts_with(start));
        let kind = match (has("lora_A"), has("hada_"), has("lokr_"), has("lora_magnitude")) {
            (true, false, false, false) => AdapterKind::Lora,
            (true, false, false, true) => AdapterKind::Dora,
            (false, true, false, false) => AdapterKind::Loha,
            (false, false, true, false) => AdapterKind::Lokr { factor: None },
            _ => return refused("the tensors of one kind of adapter for each layer", text),
        };
        if let Some(magnitude) = self.parts.remove("lora_magnitude") {
            let flat = magnitude.reshape(&[magnitude.numel()])?;
            self.parts.insert("lora_magnitude".into(), flat);
        }
        let dim = rank(&self.parts).unwrap_or(1);
        let spec = AdapterSpec::lora(dim, self.alpha.unwrap_or(dim as f64), Placement::frozen(DType::F32));
        Ok(ModuleAdapter { spec: AdapterSpec { kind, ..spec }, parts: self.parts })
    }
}

impl ModuleAdapter {
    /// What of it belongs to a layer of diffusers.
    fn piece(&self, piece: &Piece) -> Result<Self> {
        if piece.rows.is_none() && !piece.swapped {
            return Ok(self.clone());
        }
        if self.spec.kind != AdapterKind::Lora {
            return refused("LoRA for a layer that is several in diffusers", &piece.module);
        }
        let mut own = self.clone();
        let b = own.parts.get("lora_B.weight").cloned();
        let b = b.ok_or_else(|| EngineError::argument("adapter file", "lora_B", &piece.module))?;
        let rows = match piece.rows {
            Some((start, count)) => b.narrow(0, start, count)?.contiguous()?,
            None => halves_swapped(&b)?,
        };
        own.parts.insert("lora_B.weight".into(), rows);
        Ok(own)
    }
}
