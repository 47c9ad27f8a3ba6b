//! What the configurations of all models and adapters share: how they are read, checked and written.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Reads the object of `config.json`. Keys that start with `_` say where it came from, and are passed over.
pub(crate) fn parse_config<T: DeserializeOwned>(value: &Value) -> Result<T> {
    let mut value = value.clone();
    if let Some(object) = value.as_object_mut() {
        object.retain(|key, _| !key.starts_with('_'));
    }
    parse("config.json", value)
}

/// The object of `config.json` for a configuration of a class.
pub(crate) fn config_json(class: &str, config: &impl Serialize) -> Value {
    let mut value = serde_json::json!(config);
    value["_class_name"] = class.into();
    value
}

/// Checks that each of these sizes of a configuration is at least 1.
pub(crate) fn check_sizes<const N: usize>(sizes: [(&'static str, usize); N]) -> Result<()> {
    match sizes.into_iter().find(|(_, size)| *size == 0) {
        Some((key, size)) => Err(Error::config(key, "at least 1", size)),
        None => Ok(()),
    }
}

/// Checks that the axes of a rotary embedding, `N` of them, are even and fill a head.
pub(crate) fn check_rope_axes<const N: usize>(key: &'static str, axes: &[usize], head_dim: usize) -> Result<()> {
    if axes.len() == N && axes.iter().all(|axis| axis % 2 == 0) && axes.iter().sum::<usize>() == head_dim {
        return Ok(());
    }
    Err(Error::config(key, format!("{N} even numbers with the sum {head_dim}"), axes))
}

/// Reads an adapter's arguments from a recipe's `adapter_kwargs`.
pub(crate) fn parse_kwargs<T: DeserializeOwned>(kwargs: &Map<String, Value>) -> Result<T> {
    parse("adapter_kwargs", Value::Object(kwargs.clone()))
}

fn parse<T: DeserializeOwned>(section: &'static str, value: Value) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|e| Error::Config {
        key: section,
        expected: "known keys and values that fit".into(),
        got: e.to_string(),
    })
}
