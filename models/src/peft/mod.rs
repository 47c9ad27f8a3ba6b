//! Adapters outside a model: their weights by layer, and the files that hold them.

mod extract;
mod file;
mod format;
mod names;

use std::collections::BTreeMap;
use std::path::Path;

use flowtape_engine::meta::Meta;
use flowtape_engine::nn::{AdapterSpec, ParamBuilder, Params, Parts};
use flowtape_engine::{DType, Device, Error as EngineError};
use serde_json::Value;

use crate::{Result, create_model};

pub use extract::{Extracted, extract};
pub use file::{SaveFormat, load_any, save_as};
pub use format::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, load, save};

/// The adapter of one linear layer.
#[derive(Clone, Debug)]
pub struct ModuleAdapter {
    /// What it computes.
    pub spec: AdapterSpec,
    /// With what.
    pub parts: Parts,
}

/// The weights of a model's adapters, whatever file they came from, by the paths of their layers.
#[derive(Clone, Debug, Default)]
pub struct AdapterWeights(pub BTreeMap<String, ModuleAdapter>);

/// The paths of a model's linear layers, from the object of its `config.json`: what adapters can stand beside.
///
/// # Errors
/// When the class is unknown or a value does not fit.
pub fn linears(config: &Value) -> Result<Vec<String>> {
    let model = create_model(config, &ParamBuilder::new(0, DType::F32, &Meta::default().device()))?;
    Ok(model.params().linears().to_vec())
}

impl AdapterWeights {
    /// Those of a model whose plan had these adapters.
    ///
    /// # Errors
    /// When a parameter is not resident.
    pub fn of(params: &Params, adapters: &BTreeMap<String, AdapterSpec>) -> Result<Self> {
        let mut all = Self::default();
        for (module, spec) in adapters {
            all.0.insert(module.clone(), ModuleAdapter { spec: spec.clone(), parts: Parts::new() });
        }
        for param in params.adapters().iter() {
            let owner = all
                .0
                .iter_mut()
                .find_map(|(module, own)| Some((param.path().strip_prefix(&**module)?.strip_prefix('.')?, own)));
            if let Some((name, own)) = owner {
                own.parts.insert(name.to_owned(), param.kept()?);
            }
        }
        Ok(all)
    }

    /// Every tensor with its path in a model.
    pub fn tensors(&self) -> impl Iterator<Item = (String, &flowtape_engine::Tensor)> {
        self.0
            .iter()
            .flat_map(|(module, own)| own.parts.iter().map(move |(name, part)| (format!("{module}.{name}"), part)))
    }

    /// Overwrites the adapters of a model.
    ///
    /// # Errors
    /// When names or shapes differ: one error lists all, and nothing is changed. `source` names the file in it.
    pub fn load_into(&self, params: &Params, source: &Path) -> Result<()> {
        let adapters = params.adapters();
        let given: BTreeMap<String, _> = self.tensors().collect();
        let missing = adapters.iter().map(|p| p.path()).filter(|path| !given.contains_key(*path));
        let missing: Vec<String> = missing.map(str::to_owned).collect();
        let (mut unexpected, mut mismatched) = (Vec::new(), Vec::new());
        for (path, tensor) in &given {
            match adapters.get(path) {
                None => unexpected.push(path.clone()),
                Some(param) if param.dims() != tensor.dims() => {
                    mismatched.push(format!("{path} expected {:?}, got {:?}", param.dims(), tensor.dims()));
                }
                Some(_) => {}
            }
        }
        if missing.len() + unexpected.len() + mismatched.len() > 0 {
            return Err(EngineError::Keys { path: source.into(), missing, unexpected, mismatched }.into());
        }
        for param in adapters.iter() {
            param.copy_from(&given[param.path()].to_device(param.device())?)?;
        }
        Ok(())
    }

    /// What a plan needs to hold them.
    pub fn specs(&self) -> BTreeMap<String, AdapterSpec> {
        self.0.iter().map(|(module, own)| (module.clone(), own.spec.clone())).collect()
    }

    /// Folds them into a model's own weights, their changes multiplied with `factor`.
    ///
    /// # Errors
    /// When a layer is not the model's, or shapes do not fit.
    pub fn merge_into(&self, params: &Params, factor: f64) -> Result<()> {
        for (module, ModuleAdapter { spec, parts }) in &self.0 {
            let own = || EngineError::argument("merge", "adapters of the model's own layers", module);
            let weight = params.get(&format!("{module}.weight")).ok_or_else(own)?;
            let before = weight.kept()?.to_device(&Device::cpu())?;
            let before = before.to_dtype(DType::F32.promote(before.dtype()))?;
            let after = spec.merged(&before, parts)?;
            let after = if factor == 1.0 { after } else { before.add(&after.sub(&before)?.mul_scalar(factor)?)? };
            weight.copy_from(&after.to_device(weight.device())?)?;
        }
        Ok(())
    }
}
