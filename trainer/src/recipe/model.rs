//! The `model` section.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What a model starts from. Beside these keys stand those of diffusers' `config.json`: all of them for a model of one's own.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ModelSection {
    /// A checkpoint: a folder of diffusers (a whole pipeline or its transformer), a safetensors file, a name on the Hugging Face
    /// hub that was downloaded before, or a preset such as `flux.1-dev` to train anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pretrained_model_name_or_path: Option<String>,
    /// Whether to go on from the checkpoint's weights, or to train anew with its configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// The folder of the transformer in a pipeline; `transformer` if it is left out, `transformer_2` for low noise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subfolder: Option<String>,
    /// The hub's cache; that which `HF_HUB_CACHE` or `HF_HOME` names if it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<PathBuf>,
    /// Which of Wan 2.2's two transformers is trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    /// The noise from which on the transformer for high noise is asked; the pipeline's own if it is left out.
    #[schemars(range(min = 0, max = 1))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boundary_ratio: Option<f64>,
    /// The keys of `config.json`.
    #[serde(flatten)]
    pub config: Map<String, Value>,
}

/// What is made of a checkpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Its weights are trained on.
    Finetune,
    /// A new model of its configuration is trained.
    Pretrain,
}

/// One of two transformers that share the noise levels.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// σ from the boundary up: `transformer`.
    HighNoise,
    /// σ up to the boundary: `transformer_2`.
    LowNoise,
}

impl ModelSection {
    /// Of a recipe's `model`, which was read by the schema.
    ///
    /// # Errors
    /// When it does not fit that.
    pub fn of(model: &Value) -> Result<Self, String> {
        serde_json::from_value(model.clone()).map_err(|error| error.to_string())
    }
}
