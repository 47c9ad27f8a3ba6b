//! diffusers' folders: `config.json` + `diffusion_pytorch_model.safetensors`.

use std::path::Path;

use flowtape_engine::files::write_whole;
use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::safetensors::SafeTensors;
use flowtape_engine::{DType, Device, Error as EngineError};
use serde_json::Value;

use crate::{Result, Transformer, create_model};

/// The file of the configuration.
pub const CONFIG: &str = "config.json";
/// The file of the weights.
pub const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

/// Reads a folder's configuration.
///
/// # Errors
/// When the file is missing or not JSON.
pub fn load_config(folder: &Path) -> Result<Value> {
    let path = folder.join(CONFIG);
    let text = std::fs::read(&path).map_err(|source| EngineError::Io { path: path.clone(), source })?;
    Ok(serde_json::from_slice(&text).map_err(|e| EngineError::Format { path, what: e.to_string() })?)
}

/// Loads a model, its weights converted to `dtype`.
///
/// # Errors
/// When a file can't be read, the class is unknown, or keys do not fit (one error lists them all).
pub fn load(folder: &Path, dtype: DType, device: &Device) -> Result<Box<dyn Transformer>> {
    let model = create_model(&load_config(folder)?, &ParamBuilder::new(0, dtype, device))?;
    model.params().load(&SafeTensors::open(folder.join(WEIGHTS))?)?;
    Ok(model)
}

/// Writes a model so that diffusers' `from_pretrained` opens it. The weights come first and each file appears whole: a
/// folder with a configuration is complete.
///
/// # Errors
/// When the folder can't be written.
pub fn save(model: &dyn Transformer, folder: &Path) -> Result<()> {
    let io = |source| EngineError::Io { path: folder.into(), source };
    std::fs::create_dir_all(folder).map_err(io)?;
    model.params().save(folder.join(WEIGHTS))?;
    let text = format!("{:#}\n", model.config());
    write_whole(&folder.join(CONFIG), |partial| Ok(std::fs::write(partial, text).map_err(io)?))
}
