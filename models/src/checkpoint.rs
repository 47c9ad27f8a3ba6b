//! diffusers' folders: `config.json` + `diffusion_pytorch_model.safetensors`, or shards of it with an index.

use std::path::Path;
use std::sync::Arc;

use flowtape_engine::files::write_whole;
use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::safetensors::Shards;
use flowtape_engine::{DType, Device, Error as EngineError};
use serde_json::Value;

use crate::{Result, Transformer, create_model};

/// The file of the configuration.
pub const CONFIG: &str = "config.json";
/// The name of the weights' file or files, without endings.
pub const WEIGHTS: &str = "diffusion_pytorch_model";
/// The greatest file of weights that is written, in bytes: diffusers' default of 10 GB.
pub const MAX_SHARD_SIZE: usize = 10_000_000_000;

/// Reads a configuration.
///
/// # Errors
/// When the file is missing or not JSON.
pub fn load_config(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(|source| EngineError::Io { path: path.into(), source })?;
    Ok(serde_json::from_slice(&text).map_err(|e| EngineError::Format { path: path.into(), what: e.to_string() })?)
}

/// Opens a folder's weights. A known prefix of all keys, such as `_orig_mod.`, is passed over with a warning.
///
/// # Errors
/// When a file is missing or broken.
pub fn open_weights(folder: &Path) -> Result<Shards> {
    Ok(Shards::open(folder, WEIGHTS)?.without_known_prefix())
}

/// Loads a model, its weights converted to `dtype` one by one: memory holds one tensor above the model.
///
/// # Errors
/// When a file can't be read, the class is unknown, or keys do not fit (one error lists them all).
pub fn load(folder: &Path, dtype: DType, device: &Device) -> Result<Box<dyn Transformer>> {
    let weights = Arc::new(open_weights(folder)?);
    let params = ParamBuilder::from_file(weights.clone(), dtype, device);
    let model = create_model(&load_config(&folder.join(CONFIG))?, &params)?;
    model.params().check_keys(&weights, |name| model.is_ignored_key(name))?;
    Ok(model)
}

/// Writes a model so that diffusers' `from_pretrained` opens it, in files of at most about `max_shard_size` bytes. The
/// weights come first and each file appears whole: a folder with a configuration is complete.
///
/// # Errors
/// When the folder can't be written.
pub fn save(model: &dyn Transformer, folder: &Path, max_shard_size: usize) -> Result<()> {
    let io = |source| EngineError::Io { path: folder.into(), source };
    std::fs::create_dir_all(folder).map_err(io)?;
    model.params().save(folder, WEIGHTS, max_shard_size)?;
    let text = format!("{:#}\n", model.config());
    write_whole(&folder.join(CONFIG), |partial| Ok(std::fs::write(partial, text).map_err(io)?))
}
