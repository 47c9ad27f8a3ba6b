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
use crate::run::RunFolder;
use crate::{Error, Result};

/// What was found, counted.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Inspection {
    /// What was asked for.
    pub name: String,
    /// How many transformers of this kind a published checkpoint has; the counts are of one.
    pub transformers: usize,
    /// The counts.
    #[serde(flatten)]
    pub summary: Summary,
}

/// Inspects a preset, a `config.json`, a diffusers folder, a safetensors file (or an index of several), or a run folder.
/// Weights stay on the disk.
///
/// # Errors
/// When it is none of them, or broken.
pub fn inspect(target: &str) -> Result<Inspection> {
    let path = Path::new(target);
    let (summary, transformers) = match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => (of_folder(path)?, 1),
        Ok(_) => (of_file(path)?, 1),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let found = preset(target).map_err(|_| {
                let names: Vec<&str> = PRESETS.iter().map(|p| p.name).collect();
                let what = format!("neither a file or folder nor one of the presets {}", names.join(", "));
                Error::Run { path: path.into(), what }
            })?;
            (Summary::of_config(&(found.config)())?, found.transformers)
        }
        Err(error) => return Err(io(path)(error)),
    };
    Ok(Inspection { name: target.into(), transformers, summary })
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

fn of_folder(folder: &Path) -> Result<Summary> {
    if exists(&folder.join("recipe.yaml"))? {
        return of_folder(&RunFolder::open(folder)?.0.checkpoint()?);
    }
    // A whole pipeline of diffusers keeps the model in a folder of its own.
    let inner = folder.join("transformer");
    if !exists(&folder.join(CONFIG))? && inner.is_dir() {
        return of_folder(&inner);
    }
    let configured = Summary::of_config(&load_config(&folder.join(CONFIG))?)?;
    let stored = |end: &str| exists(&folder.join(format!("{WEIGHTS}.safetensors{end}")));
    if !stored("")? && !stored(".index.json")? {
        return Ok(configured);
    }
    let stored = Summary::of_weights(&open_weights(folder)?)?;
    if (stored.parameters, stored.tensors) == (configured.parameters, configured.tensors) {
        // The model's own order of modules.
        return Ok(Summary { bytes: stored.bytes, ..configured });
    }
    Ok(Summary { class: configured.class, config: configured.config, ..stored })
}

impl std::fmt::Display for Inspection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Summary { class, config, parameters, tensors, bytes, modules } = &self.summary;
        let copies = if self.transformers > 1 { format!(" (one of {})", self.transformers) } else { String::new() };
        writeln!(f, "{}  {}{copies}", self.name, class.as_deref().unwrap_or("weights"))?;
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
fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let first = digits.len() % 3;
    let groups = digits.as_bytes()[first..].chunks(3).map(|c| String::from_utf8_lossy(c).into_owned());
    let head = (first > 0).then(|| digits[..first].to_string());
    head.into_iter().chain(groups).collect::<Vec<_>>().join(",")
}
