//! Checkpoints and adapters on their way into other files: merged, in another dtype, extracted.

use std::path::{Path, PathBuf};

use flowtape_engine::nn::{ParamBuilder, Params, Placement};
use flowtape_engine::safetensors::{self, SafeTensors, Shards};
use flowtape_engine::{DType, Device};
use flowtape_models::checkpoint::{self, open_weights};
use flowtape_models::peft::{self, Extracted, load_any, save_as};
use flowtape_models::{Transformer, original};
use serde_json::json;

pub use flowtape_models::checkpoint::MAX_SHARD_SIZE;
pub use flowtape_models::peft::SaveFormat;

use crate::start::{PRETRAINED, Start};
use crate::{Error, Result};

/// How a checkpoint is written: as a folder of diffusers, or where the name ends in `.safetensors` as one file.
#[derive(Clone, Copy, Debug)]
pub struct Written {
    /// The dtype of its weights; the one that they have where none is given.
    pub dtype: Option<DType>,
    /// Whether matrices become floats of eight bits (e4m3); in one file alone.
    pub float8: bool,
    /// Whether it has its authors' names, as ComfyUI ships it, and not diffusers'; in one file alone.
    pub original: bool,
    /// About the most bytes of one file of a folder.
    pub max_shard_size: u64,
}

impl Default for Written {
    fn default() -> Self {
        Self { dtype: None, float8: false, original: false, max_shard_size: MAX_SHARD_SIZE }
    }
}

impl Written {
    /// Whether what is written is one file; refuses what can't be written so.
    fn is_file(&self, out: &Path) -> Result<bool> {
        let file = out.extension().is_some_and(|end| end == "safetensors");
        if !file && (self.float8 || self.original) {
            let what = if self.original { "the original layout" } else { "weights of eight bits" };
            return refused(out, format!("{what} is that of one file: name one that ends in .safetensors"));
        }
        if out.join(checkpoint::CONFIG).exists() || (file && out.exists()) {
            let kind = if file { "there is a file of that name already" } else { "holds a checkpoint already" };
            return refused(out, format!("{kind}: choose another name"));
        }
        Ok(file)
    }

    fn write(&self, model: &dyn Transformer, out: &Path) -> Result<()> {
        if !self.is_file(out)? {
            return Ok(checkpoint::save(model, out, self.max_shard_size)?);
        }
        let (tensors, text) = match self.original {
            true => (original::tensors(model)?, original::text(model)),
            false => (checkpoint::tensors(model)?, Params::text()),
        };
        let save = if self.float8 { safetensors::save_float8 } else { safetensors::save };
        Ok(save(out, &tensors, &text)?)
    }
}

fn refused<T>(path: &Path, what: impl Into<String>) -> Result<T> {
    Err(Error::Run { path: path.into(), what: what.into() })
}

/// A checkpoint (a folder of diffusers, of a pipeline or of its transformer, or a run folder), in the dtype of its first weights or
/// another.
fn open(named: &Path, dtype: Option<DType>) -> Result<Box<dyn Transformer>> {
    let start = Start::of(&json!({ PRETRAINED: named }))?;
    let Some(path) = &start.weights else { return refused(named, "no weights") };
    let stored = || -> Result<DType> {
        let weights = if path.is_dir() { open_weights(path)? } else { Shards::from(SafeTensors::open(path)?) };
        let first = weights.names().next().and_then(|name| weights.dtype_name(name)).unwrap_or_default();
        Ok(match &*first {
            "BF16" | "F8_E4M3" | "F8_E5M2" => DType::BF16,
            "F16" => DType::F16,
            _ => DType::F32,
        })
    };
    let placement = Placement::frozen(dtype.map_or_else(stored, Ok)?);
    start.model(ParamBuilder::with_plan(0, placement, &Device::cpu()))
}

/// Writes a checkpoint anew: in another dtype, layout, or number of files.
///
/// # Errors
/// When it can't be read or written.
pub fn convert(from: &Path, out: &Path, written: &Written) -> Result<()> {
    written.is_file(out)?;
    written.write(&*open(from, written.dtype)?, out)
}

/// Folds adapters into a checkpoint, each with its factor. Keys that are of no use are an error unless they are allowed; those are
/// returned.
///
/// # Errors
/// When something can't be read or written, or does not fit.
pub fn merge(
    base: &Path,
    adapters: &[(PathBuf, f64)],
    out: &Path,
    written: &Written,
    allow_unused: bool,
) -> Result<Vec<String>> {
    written.is_file(out)?;
    let model = open(base, written.dtype)?;
    let mut all_unused = Vec::new();
    for (path, factor) in adapters {
        let (weights, unused) = load_any(path, model.params(), &model.class())?;
        check_used(path, &unused, weights.0.is_empty(), allow_unused)?;
        weights.merge_into(model.params(), *factor)?;
        all_unused.extend(unused);
    }
    written.write(&*model, out)?;
    Ok(all_unused)
}

/// Keys of an adapter's file that a model has no use for.
pub(crate) fn check_used(path: &Path, unused: &[String], nothing: bool, allow_unused: bool) -> Result<()> {
    if nothing {
        return refused(path, format!("no adapter of this model: none of {} keys is known", unused.len()));
    }
    if unused.is_empty() || allow_unused {
        return Ok(());
    }
    let first: Vec<&str> = unused.iter().take(5).map(String::as_str).collect();
    let rest = if unused.len() > first.len() { ", …" } else { "" };
    refused(
        path,
        format!(
            "{} keys are of no use to this model: {}{rest}; --allow-unused passes them over",
            unused.len(),
            first.join(", ")
        ),
    )
}

/// Adapters of what tells two checkpoints of one model apart, written into a folder in some forms.
///
/// # Errors
/// When something can't be read or written, or the two are not of one model.
pub fn extract(base: &Path, tuned: &Path, rank: usize, out: &Path, forms: &[SaveFormat]) -> Result<Extracted> {
    if rank == 0 {
        return refused(out, "--rank: expected at least 1, got 0");
    }
    let (base, tuned) = (open(base, Some(DType::F32))?, open(tuned, Some(DType::F32))?);
    let found = peft::extract(base.params(), tuned.params(), rank)?;
    if found.weights.0.is_empty() {
        return refused(out, "the two checkpoints have the same linear layers: there is nothing to extract");
    }
    for form in forms {
        save_as(*form, &found.weights, base.params(), &base.class(), out)?;
    }
    Ok(found)
}
