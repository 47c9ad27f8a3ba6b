//! What `flowtape inspect` finds under a name: a preset, a configuration, weights or a run.

use std::fmt::Write;
use std::io::ErrorKind;
use std::path::Path;

use flowtape_engine::files::exists;
use flowtape_engine::printable;
use flowtape_engine::safetensors::{SafeTensors, Shards};
use flowtape_models::checkpoint::{CONFIG, WEIGHTS, load_config, open_weights};
use flowtape_models::presets::{PRESETS, preset};
use flowtape_models::summary::Summary;
use serde::Serialize;

use crate::error::io;
use crate::recipe::suggestion;
use crate::run::RunFolder;
use crate::{Error, Result};

/// What was found, counted.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Inspection {
    /// What was asked for.
    pub name: String,
    /// How many transformers of this kind a published checkpoint has; the counts are of one.
    pub transformers: usize,
    /// What the counts are of, where it is not what one would think, and what is to be known before it is trained.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// The counts.
    #[serde(flatten)]
    pub summary: Summary,
}

/// Inspects a preset, a `config.json`, a diffusers folder, a safetensors file (or an index of several), or a run folder.
/// Weights stay on the disk. Where there are weights, it is they that are counted.
///
/// # Errors
/// When it is none of them, or broken.
pub fn inspect(path: &Path) -> Result<Inspection> {
    let name = path.to_string_lossy().into_owned();
    let found = |summary, notes| Ok(Inspection { name: name.clone(), transformers: 1, notes, summary });
    match std::fs::metadata(path) {
        Ok(is) if is.is_dir() => of_folder(path).and_then(|(summary, notes)| found(summary, notes)),
        Ok(_) => of_file(path).and_then(|summary| found(summary, Vec::new())),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let preset = preset(&name).map_err(|_| {
                let known = suggestion(&name, PRESETS.iter().map(|p| p.name));
                let what = format!("neither a file or folder nor one of the presets{known}");
                Error::Run { path: path.into(), what }
            })?;
            let summary = Summary::of_config(&(preset.config)())?;
            let notes = preset.caution.map(String::from).into_iter().collect();
            Ok(Inspection { name, transformers: preset.transformers, notes, summary })
        }
        Err(error) => Err(io(path)(error)),
    }
}

fn of_file(path: &Path) -> Result<Summary> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if let (Some(stem), Some(folder)) = (name.strip_suffix(".safetensors.index.json"), path.parent()) {
        return Ok(Summary::of_weights(&Shards::open(folder, stem)?.without_known_prefix())?);
    }
    if name.ends_with(".json") {
        return Ok(Summary::of_config(&load_config(path)?)?);
    }
    Ok(Summary::of_weights(&Shards::from(SafeTensors::open(path)?).without_known_prefix())?)
}

fn of_folder(folder: &Path) -> Result<(Summary, Vec<String>)> {
    if exists(&folder.join("recipe.yaml"))? {
        return of_folder(&RunFolder::open(folder)?.0.checkpoints().newest()?);
    }
    // A whole pipeline of diffusers keeps the model in a folder of its own.
    let inner = folder.join("transformer");
    if !exists(&folder.join(CONFIG))? && inner.is_dir() {
        return of_folder(&inner);
    }
    let configured = Summary::of_config(&load_config(&folder.join(CONFIG))?)?;
    let is_there = |end: &str| exists(&folder.join(format!("{WEIGHTS}.safetensors{end}")));
    let (stored, mut notes) = if is_there("")? || is_there(".index.json")? {
        (Summary::of_weights(&open_weights(folder)?)?, Vec::new())
    } else {
        let others = weights_of_other_names(folder)?;
        let Some(variant) = only_variant(&others) else {
            let found = if others.is_empty() { String::new() } else { format!(" (there are {})", others.join(", ")) };
            let note = format!("no {WEIGHTS}.safetensors here{found}: counted is what {CONFIG} describes");
            return Ok((configured, vec![note]));
        };
        let weights = Shards::from(SafeTensors::open(folder.join(variant))?).without_known_prefix();
        (Summary::of_weights(&weights)?, vec![format!("counted is the variant {variant}")])
    };
    if (stored.parameters, stored.tensors) == (configured.parameters, configured.tensors) {
        // The model's own order of modules.
        return Ok((Summary { bytes: stored.bytes, ..configured }, notes));
    }
    notes.push(format!(
        "counted is what is stored; {CONFIG} describes {} parameters in {} tensors",
        grouped(configured.parameters),
        configured.tensors
    ));
    Ok((Summary { class: configured.class, config: configured.config, ..stored }, notes))
}

/// Files of a folder that hold weights by their endings, sorted.
fn weights_of_other_names(folder: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(folder).map_err(io(folder))?;
    let name = |entry: std::io::Result<std::fs::DirEntry>| Ok(entry.map_err(io(folder))?.file_name());
    let names: Vec<String> =
        entries.map(name).collect::<Result<Vec<_>>>()?.into_iter().map(|n| n.to_string_lossy().into_owned()).collect();
    let is_weights = |name: &String| {
        let ends =
            [".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf"];
        ends.iter().any(|end| name.ends_with(end)) || name.contains(".safetensors.index.")
    };
    let mut found: Vec<String> = names.into_iter().filter(is_weights).collect();
    found.sort();
    Ok(found)
}

/// The one file of a variant such as fp16, where it is the only one.
fn only_variant(names: &[String]) -> Option<&String> {
    let is_variant = |name: &&String| {
        let inner = name.strip_prefix(WEIGHTS).and_then(|rest| rest.strip_suffix(".safetensors"));
        inner.is_some_and(|variant| variant.starts_with('.') && !variant.contains("-of-"))
    };
    let mut variants = names.iter().filter(is_variant);
    variants.next().filter(|_| variants.next().is_none())
}

impl std::fmt::Display for Inspection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Summary { class, config, parameters, tensors, bytes, modules } = &self.summary;
        let copies = if self.transformers > 1 { format!(" (one of {})", self.transformers) } else { String::new() };
        writeln!(f, "{}  {}{copies}", self.name, class.as_deref().unwrap_or("weights"))?;
        self.notes.iter().try_for_each(|note| writeln!(f, "note        {}", printable(note)))?;
        writeln!(f, "parameters  {} in {tensors} tensors", grouped(*parameters))?;
        let sizes: Vec<String> =
            bytes.iter().map(|(dtype, bytes)| format!("{dtype} {:.2} GB", *bytes as f64 / 1e9)).collect();
        writeln!(f, "bytes       {}", sizes.join(", "))?;
        writeln!(f, "\n{:<36} {:>7} {:>8} {:>18}", "module", "layers", "tensors", "parameters")?;
        for m in modules {
            let layers = if m.layers > 0 { m.layers.to_string() } else { String::new() };
            writeln!(f, "{:<36} {layers:>7} {:>8} {:>18}", printable(&m.name), m.tensors, grouped(m.parameters))?;
        }
        let settings = config.iter().flat_map(|c| c.as_object()).flatten().filter(|(key, _)| !key.starts_with('_'));
        let mut text = String::new();
        for (key, value) in settings {
            writeln!(text, "{:<36} {value}", printable(key))?;
        }
        if !text.is_empty() {
            write!(f, "\nconfiguration\n{text}")?;
        }
        Ok(())
    }
}

/// Digits in groups of three.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let first = digits.len() % 3;
    let groups = digits.as_bytes()[first..].chunks(3).map(|c| String::from_utf8_lossy(c).into_owned());
    let head = (first > 0).then(|| digits[..first].to_string());
    head.into_iter().chain(groups).collect::<Vec<_>>().join(",")
}
