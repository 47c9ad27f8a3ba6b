//! What a model is made of, without its weights in memory.

use std::collections::{BTreeMap, HashMap, HashSet};

use flowtape_engine::meta::Meta;
use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::safetensors::Shards;
use flowtape_engine::{DType, Result as EngineResult};
use serde::Serialize;
use serde_json::Value;

use crate::{Result, create_model};

/// A model's tensors, counted.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Summary {
    /// diffusers' class, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// The whole configuration, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<Value>,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes by dtype: as stored or, for a configuration, what it would take in each.
    pub bytes: BTreeMap<String, u64>,
    /// Parts by their place in the model.
    pub modules: Vec<Module>,
}

/// Tensors under one name; those of numbered layers together.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Module {
    /// The first part of the tensors' names.
    pub name: String,
    /// Number of numbered layers, or 0.
    pub layers: usize,
    /// Elements of all its tensors.
    pub parameters: u64,
    /// Number of tensors.
    pub tensors: usize,
}

impl Summary {
    /// Of a model of this configuration.
    ///
    /// # Errors
    /// When the class is unknown or a value does not fit.
    pub fn of_config(config: &Value) -> Result<Self> {
        let model = create_model(config, &ParamBuilder::new(0, DType::F32, &Meta::default().device()))?;
        let config = model.config();
        let tensors = model.params().iter().map(|p| (p.path(), p.numel() as u64));
        let mut summary = Self::of_tensors(tensors);
        let sizes =
            [DType::F32, DType::BF16].map(|dtype| (dtype.to_string(), summary.parameters * dtype.size() as u64));
        summary.bytes = sizes.into();
        summary.class = config["_class_name"].as_str().map(String::from);
        summary.config = Some(config);
        Ok(summary)
    }

    /// Of stored weights.
    ///
    /// # Errors
    /// When a name that the file lists is not in it.
    pub fn of_weights(weights: &Shards) -> EngineResult<Self> {
        let numel = |name| weights.dims(name).map_or(0, |dims: &[usize]| dims.iter().map(|d| *d as u64).product());
        let mut summary = Self::of_tensors(weights.names().map(|name| (name, numel(name))));
        for name in weights.names() {
            let dtype = weights.dtype_name(name).unwrap_or_default();
            *summary.bytes.entry(dtype.to_lowercase()).or_default() += weights.bytes(name)? as u64;
        }
        Ok(summary)
    }

    fn of_tensors<'a>(tensors: impl Iterator<Item = (&'a str, u64)>) -> Self {
        let mut modules = Vec::<Module>::new();
        // Place of a module in that list, and its numbered layers.
        let mut known = HashMap::<&str, (usize, HashSet<&str>)>::new();
        for (path, numel) in tensors {
            let mut parts = path.split('.');
            let name = parts.next().unwrap_or_default();
            let (index, numbers) = known.entry(name).or_insert_with(|| {
                modules.push(Module { name: name.into(), layers: 0, parameters: 0, tensors: 0 });
                (modules.len() - 1, HashSet::new())
            });
            let module = &mut modules[*index];
            module.parameters += numel;
            module.tensors += 1;
            if let Some(number) = parts.next().filter(|p| p.parse::<usize>().is_ok()) {
                numbers.insert(number);
                module.layers = numbers.len();
            }
        }
        Self {
            class: None,
            config: None,
            parameters: modules.iter().map(|m| m.parameters).sum(),
            tensors: modules.iter().map(|m| m.tensors).sum(),
            bytes: BTreeMap::new(),
            modules,
        }
    }
}
