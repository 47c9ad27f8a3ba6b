//! diffusers' folders: `config.json` + `diffusion_pytorch_model.safetensors`, or shards of it with an index.

use std::path::Path;
use std::sync::Arc;

use flowtape_engine::files::write_whole;
use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::safetensors::Shards;
use flowtape_engine::{DType, Device, Error as EngineError, Tensor};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};
use tracing::warn;

use crate::registry::ConfigReader;
use crate::{Error, ModelKind, Result, Transformer, create_model};

/// The file of the configuration.
pub const CONFIG: &str = "config.json";
/// The name of the weights' file or files, without endings.
pub const WEIGHTS: &str = "diffusion_pytorch_model";
/// The greatest file of weights that is written, in bytes: diffusers' default of 10 GB.
pub const MAX_SHARD_SIZE: u64 = 10_000_000_000;

/// The keys and values of a JSON object, repeated keys too.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Entries;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// Reads a configuration as diffusers does, complete and checked: of a key that is repeated the last value counts, and a key
/// that the class does not know is passed over. Both are warned of.
///
/// # Errors
/// When the file is missing or not JSON, the class is unknown, a value does not fit, or the weights are quantised. The error
/// names the file.
pub fn load_config(path: &Path) -> Result<Value> {
    read_config(path, |class| Ok(ModelKind::of_class(class)?.config))
}

/// The same for a part of any kind: `reader_of` says how the configurations of a class are read.
pub(crate) fn read_config(path: &Path, reader_of: impl Fn(&str) -> Result<ConfigReader>) -> Result<Value> {
    let text = std::fs::read(path).map_err(|source| EngineError::Io { path: path.into(), source })?;
    let wrong = |what: String| Error::from(EngineError::Format { path: path.into(), what });
    let Entries(entries) = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
    let mut config = Map::new();
    for (key, value) in entries {
        if let Some(before) = config.insert(key.clone(), value) {
            warn!("{}: the key `{key}` is repeated; its last value counts, not {before}", path.display());
        }
    }
    let class = config.get("_class_name").and_then(Value::as_str).unwrap_or("no _class_name");
    let reader = reader_of(class).map_err(|e| wrong(e.to_string()))?;
    for key in reader.unknown_keys(&config) {
        config.remove(&key);
        warn!("{}: the key `{key}` is unknown and passed over", path.display());
    }
    reader.complete(&Value::Object(config)).map_err(|e| wrong(e.to_string()))
}

/// Opens a folder's weights. A known prefix of all keys, such as `_orig_mod.`, is passed over with a warning.
///
/// # Errors
/// When a file is missing or broken.
pub fn open_weights(folder: &Path) -> Result<Shards> {
    // NeMo names the index of what diffusers is not to open as transformers does.
    let named = |stem: &str| folder.join(format!("{stem}.safetensors.index.json"));
    let single = folder.join(format!("{WEIGHTS}.safetensors"));
    let plain = named("model").exists() && !named(WEIGHTS).exists() && !single.exists();
    Ok(Shards::open(folder, if plain { "model" } else { WEIGHTS })?.without_known_prefix())
}

/// Loads a model, its weights converted to `dtype` one by one: memory holds one tensor above the model.
///
/// # Errors
/// When a file can't be read, the class is unknown, or keys do not fit (one error names the class and counts them).
pub fn load(folder: &Path, dtype: DType, device: &Device) -> Result<Box<dyn Transformer>> {
    load_with(folder, ParamBuilder::new(0, dtype, device))
}

/// The same with parameters as a builder's plan wants them held. What adapters it adds are new.
///
/// # Errors
/// When a file can't be read, the class is unknown, or keys do not fit (one error names the class and counts them).
pub fn load_with(folder: &Path, params: ParamBuilder) -> Result<Box<dyn Transformer>> {
    load_weights(Arc::new(open_weights(folder)?), &load_config(&folder.join(CONFIG))?, params)
}

/// The same from weights and a configuration, wherever they come from.
///
/// # Errors
/// When weights can't be read, the class is unknown, or keys do not fit (one error names the class and counts them).
pub fn load_weights(weights: Arc<Shards>, config: &Value, params: ParamBuilder) -> Result<Box<dyn Transformer>> {
    let params = params.reading(weights.clone());
    let model = create_model(config, &params)?;
    model.params().base().check_keys(&weights, |name| model.is_ignored_key(name)).map_err(|error| {
        let class = model.config()["_class_name"].as_str().unwrap_or("model").to_owned();
        Error::Model { model: class, source: Box::new(error) }
    })?;
    params.finish_codes();
    Ok(model)
}

/// Writes a model, without adapters, so that diffusers' `from_pretrained` opens it, in files of at most about `max_shard_size`
/// bytes. The weights come first and each file appears whole: a folder with a configuration is complete.
///
/// # Errors
/// When the folder can't be written.
pub fn save(model: &dyn Transformer, folder: &Path, max_shard_size: u64) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|source| EngineError::Io { path: folder.into(), source })?;
    model.params().base().save(folder, WEIGHTS, max_shard_size)?;
    save_config(model, folder)
}

/// A model's tensors under diffusers' names, without adapters.
///
/// # Errors
/// When the device fails.
pub fn tensors(model: &dyn Transformer) -> Result<Vec<(String, Tensor)>> {
    Ok(model.params().base().tensors()?)
}

/// Writes a model's configuration beside weights that are there.
///
/// # Errors
/// When it can't be written.
pub fn save_config(model: &dyn Transformer, folder: &Path) -> Result<()> {
    let io = |source| EngineError::Io { path: folder.into(), source };
    let text = format!("{:#}\n", model.config());
    write_whole(&folder.join(CONFIG), |partial| Ok(std::fs::write(partial, text).map_err(io)?))
}
