//! What a model starts from: a configuration with new weights, or a checkpoint.

use std::path::{Path, PathBuf};

use flowtape_engine::files::exists;
use flowtape_engine::nn::ParamBuilder;
use flowtape_models::checkpoint::{CONFIG, load_config, load_with};
use flowtape_models::{Transformer, create_model};
use serde_json::Value;

use crate::run::RunFolder;
use crate::{Error, Result};

/// The key of a recipe's section `model` that names a checkpoint.
pub const PRETRAINED: &str = "pretrained_model_name_or_path";

/// What the section `model` of a recipe comes to.
#[derive(Clone, PartialEq, Debug)]
pub struct Start {
    /// The object of `config.json`.
    pub config: Value,
    /// The folder of the weights; new ones where there is none.
    pub weights: Option<PathBuf>,
}

impl Start {
    /// Of a section: the object of `config.json`, or the name of a checkpoint (a folder of diffusers, of a whole pipeline or of its
    /// transformer, or a run folder).
    ///
    /// # Errors
    /// When the checkpoint is not there or its configuration does not fit.
    pub fn of(model: &Value) -> Result<Self> {
        let Some(name) = model[PRETRAINED].as_str() else { return Ok(Self { config: model.clone(), weights: None }) };
        let folder = transformer_folder(Path::new(name))?;
        Ok(Self { config: load_config(&folder.join(CONFIG))?, weights: Some(folder) })
    }

    /// The model, its parameters held as the builder's plan says.
    ///
    /// # Errors
    /// When weights can't be read or do not fit.
    pub fn model(&self, params: ParamBuilder) -> Result<Box<dyn Transformer>> {
        Ok(match &self.weights {
            Some(folder) => load_with(folder, params)?,
            None => create_model(&self.config, &params)?,
        })
    }
}

/// The folder that holds a transformer's configuration.
fn transformer_folder(named: &Path) -> Result<PathBuf> {
    if exists(&named.join("recipe.yaml"))? {
        return RunFolder::open(named)?.0.checkpoint();
    }
    for folder in [named.to_path_buf(), named.join("transformer")] {
        if exists(&folder.join(CONFIG))? {
            return Ok(folder);
        }
    }
    let what = format!(
        "no checkpoint to start from: expected a folder with {CONFIG} or transformer/{CONFIG}, or a run folder"
    );
    Err(Error::Run { path: named.into(), what })
}
