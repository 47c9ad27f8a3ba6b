//! Every model by name.

use flowtape_engine::nn::ParamBuilder;
use flowtape_flowmatch::{FlowMatchingConfig, FlowMatchingPipeline, ModelAdapter};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::flux::{FluxAdapter, FluxConfig, FluxTransformer2DModel};
use crate::flux2::{Flux2Adapter, Flux2Config, Flux2Transformer2DModel};
use crate::hunyuan_video::{self, HunyuanAdapter, HunyuanVideo15Config, HunyuanVideo15Transformer3DModel};
use crate::ltx2::{LTX2Adapter, LTX2Config, LTX2VideoTransformer3DModel};
use crate::qwen_image::{QwenImageAdapter, QwenImageConfig, QwenImageEditAdapter, QwenImageTransformer2DModel};
use crate::wan::{SimpleAdapter, WanConfig, WanTransformer3DModel};
use crate::{Error, Result, Transformer};

/// Makes an adapter from its `adapter_kwargs`.
pub type NewAdapter = fn(&Map<String, Value>) -> Result<Box<dyn ModelAdapter>>;
/// Makes a model from the object of `config.json`.
pub type NewModel = fn(&Value, &ParamBuilder) -> Result<Box<dyn Transformer>>;

/// A model, its adapter and how both are made.
#[derive(Debug)]
pub struct ModelKind {
    /// The adapter's name in recipes.
    pub adapter: &'static str,
    /// diffusers' class, as in `_class_name` of `config.json`.
    pub class: &'static str,
    /// Makes the adapter.
    pub new_adapter: NewAdapter,
    /// Makes the model.
    pub new_model: NewModel,
}

/// All models. Adapters of one class share its model.
pub const MODELS: &[ModelKind] = &[
    ModelKind {
        adapter: "simple",
        class: "WanTransformer3DModel",
        new_adapter: |kwargs| Ok(Box::new(SimpleAdapter::from_kwargs(kwargs)?)),
        new_model: |config, params| Ok(Box::new(WanTransformer3DModel::new(WanConfig::from_json(config)?, params)?)),
    },
    ModelKind {
        adapter: "flux",
        class: "FluxTransformer2DModel",
        new_adapter: |kwargs| Ok(Box::new(FluxAdapter::from_kwargs(kwargs)?)),
        new_model: |config, params| Ok(Box::new(FluxTransformer2DModel::new(FluxConfig::from_json(config)?, params)?)),
    },
    ModelKind {
        adapter: "flux2",
        class: "Flux2Transformer2DModel",
        new_adapter: |kwargs| Ok(Box::new(Flux2Adapter::from_kwargs(kwargs)?)),
        new_model: |config, params| {
            Ok(Box::new(Flux2Transformer2DModel::new(Flux2Config::from_json(config)?, params)?))
        },
    },
    ModelKind {
        adapter: "hunyuan",
        class: hunyuan_video::CLASS,
        new_adapter: |kwargs| Ok(Box::new(HunyuanAdapter::from_kwargs(kwargs)?)),
        new_model: |config, params| {
            Ok(Box::new(HunyuanVideo15Transformer3DModel::new(HunyuanVideo15Config::from_json(config)?, params)?))
        },
    },
    ModelKind {
        adapter: "ltx2",
        class: "LTX2VideoTransformer3DModel",
        new_adapter: |kwargs| Ok(Box::new(LTX2Adapter::from_kwargs(kwargs)?)),
        new_model: |config, params| {
            Ok(Box::new(LTX2VideoTransformer3DModel::new(LTX2Config::from_json(config)?, params)?))
        },
    },
    ModelKind {
        adapter: "qwen_image",
        class: "QwenImageTransformer2DModel",
        new_adapter: |kwargs| Ok(Box::new(QwenImageAdapter::from_kwargs(kwargs)?)),
        new_model: new_qwen_image,
    },
    ModelKind {
        adapter: "qwen_image_edit",
        class: "QwenImageTransformer2DModel",
        new_adapter: |kwargs| Ok(Box::new(QwenImageEditAdapter::from_kwargs(kwargs)?)),
        new_model: new_qwen_image,
    },
];

fn new_qwen_image(config: &Value, params: &ParamBuilder) -> Result<Box<dyn Transformer>> {
    Ok(Box::new(QwenImageTransformer2DModel::new(QwenImageConfig::from_json(config)?, params)?))
}

/// All of these names, each once.
fn names(name: fn(&ModelKind) -> &'static str) -> String {
    let mut names: Vec<_> = MODELS.iter().map(name).collect();
    names.dedup();
    names.join(", ")
}

/// The adapter of that name.
///
/// # Errors
/// When there is none (the error lists all), or an argument does not fit.
pub fn create_adapter(name: &str, kwargs: &Map<String, Value>) -> Result<Box<dyn ModelAdapter>> {
    match MODELS.iter().find(|m| m.adapter == name) {
        Some(kind) => (kind.new_adapter)(kwargs),
        None => Err(Error::config("adapter_type", format!("one of {}", names(|m| m.adapter)), name)),
    }
}

/// A pipeline with the adapter that its configuration names.
///
/// # Errors
/// When the adapter is unknown (the error lists all), or an argument or a value does not fit.
pub fn create_pipeline(config: FlowMatchingConfig) -> Result<FlowMatchingPipeline> {
    let adapter = create_adapter(&config.adapter_type, &config.adapter_kwargs)?;
    FlowMatchingPipeline::new(config, adapter)
}

/// A model of the object of `config.json`, whose `_class_name` says which.
///
/// # Errors
/// When the class is unknown (the error lists all), or a value does not fit.
pub fn create_model(config: &Value, params: &ParamBuilder) -> Result<Box<dyn Transformer>> {
    let class = config["_class_name"].as_str().unwrap_or("no _class_name");
    match MODELS.iter().find(|m| m.class == class) {
        Some(kind) => (kind.new_model)(config, params),
        None => Err(Error::config("_class_name", format!("one of {}", names(|m| m.class)), class)),
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_unknown_ones_are_listed() {
        for (i, a) in MODELS.iter().enumerate() {
            assert!(MODELS[..i].iter().all(|b| b.adapter != a.adapter));
            assert_eq!(create_adapter(a.adapter, &Map::new()).unwrap().name(), a.adapter);
            let config = FlowMatchingConfig { adapter_type: a.adapter.into(), ..FlowMatchingConfig::default() };
            assert_eq!(create_pipeline(config).unwrap().adapter().name(), a.adapter);
        }
        let Err(error) = create_adapter("fluxx", &Map::new()) else { panic!("an unknown adapter was made") };
        assert!(error.to_string().contains("flux") && error.to_string().contains("fluxx"), "{error}");
        let kwargs = Map::from_iter([("guidance".into(), Value::from(1.0))]);
        let Err(error) = create_adapter("flux", &kwargs) else { panic!("an unknown argument was taken") };
        assert!(error.to_string().contains("guidance_scale"), "{error}");
    }
}
