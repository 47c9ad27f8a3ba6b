//! Recipes: YAML with NeMo's names where it has them.
//!
//! A file is read to nodes with their places (`yaml`, `node`), settings are put into them, and `read` makes values of
//! them by the JSON Schema of [`Recipe`]: so all problems are told at once, with their places, and an editor that is given the
//! schema knows what we know. What a schema can't say is checked by `check`.

mod check;
mod data;
mod dtype;
mod model;
mod nemo;
mod node;
mod peft;
mod problems;
mod ranks;
mod read;
mod sampling;
mod steps;
mod yaml;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use flowtape_engine::optim::{DecayStyle, EmaConfig, LossScaleConfig, LrScheduler, LrSchedulerConfig, OptimizerConfig};
use flowtape_flowmatch::FlowMatchingConfig;
use flowtape_models::ModelKind;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use self::node::Node;
use crate::checkpoints::CheckpointConfig;
use crate::error::io;
use crate::validation::ValidationConfig;
use crate::{Error, Result};

pub use self::data::{CacheConfig, DataConfig, SourceName};
pub use self::dtype::Dtype;
pub use self::model::{Mode, ModelSection, Stage};
pub use self::peft::{Algorithm, KeptDtype, PeftConfig};
pub use self::problems::{Place, Problem, suggestion};
pub use self::ranks::Fsdp;
pub(crate) use self::ranks::Sharing;
pub use self::sampling::{ReportConfig, SamplingConfig};
pub use self::steps::{ClipGradNorm, NonFinite, Performance, StepScheduler};

/// Everything that a run is made of. The run folder keeps it resolved: all defaults written out.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The first part of the run folder's name; the file's if it is left out.
    #[serde(default = "unnamed")]
    pub name: String,
    /// The run folder; `runs/<name>-<number>` if none is given.
    #[serde(default)]
    pub run_dir: Option<PathBuf>,
    /// All random numbers follow from it.
    #[serde(default)]
    #[schemars(range(max = u64::MAX))]
    pub seed: u64,
    /// What flows where: `f32`, `bf16` (weights and moments too), `bf16_stochastic` or `bf16_kahan` (weights in bf16 that lose no small
    /// steps, moments in f32), or `mixed` or `mixed_f16` (bf16 or f16 with weights and moments kept in f32).
    #[serde(default)]
    pub dtype: Dtype,
    /// Where it runs: `cpu`, `cuda`, `cuda:<number>`, `wgpu` or `wgpu:<number>`, as `flowtape devices` lists them.
    #[serde(default = "cpu")]
    pub device: String,
    /// What is trained on.
    pub data: DataConfig,
    /// The checkpoint to start from, or the object of diffusers' `config.json`, whose `_class_name` says which model.
    #[schemars(with = "model::ModelSection")]
    pub model: serde_json::Value,
    /// How a new model starts.
    #[serde(default)]
    pub init: Init,
    /// What is trained instead of the model's own weights, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peft: Option<PeftConfig>,
    /// The pipeline.
    #[serde(default)]
    pub flow_matching: FlowMatchingConfig,
    /// The optimiser.
    pub optimizer: OptimizerConfig,
    /// Learning rate by step; constant if the section is absent.
    #[serde(default)]
    pub lr_scheduler: Option<LrSchedulerConfig>,
    /// Gradient clipping: to a norm of 1 if the section is absent, as in the reference; none where it is null.
    #[serde(default = "ClipGradNorm::reference")]
    pub clip_grad_norm: Option<ClipGradNorm>,
    /// What becomes of a step whose loss or gradients are not finite; with a scaled loss it is always left out.
    #[serde(default)]
    pub non_finite: NonFinite,
    /// How the factor of the loss moves, for `mixed_f16` alone.
    #[serde(default)]
    pub loss_scale: LossScaleConfig,
    /// How long, in which batches.
    pub step_scheduler: StepScheduler,
    /// The average of the weights that is kept, saved and sampled with; none if the section is absent.
    #[serde(default)]
    pub ema: Option<EmaConfig>,
    /// Validation; none if the section is absent.
    #[serde(default)]
    pub validation: Option<ValidationConfig>,
    /// Which checkpoints are kept.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// What is traded for time.
    #[serde(default)]
    pub performance: Performance,
    /// What several ranks share out; nothing if the section is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fsdp: Option<Fsdp>,
    /// Sample grids.
    #[serde(default)]
    pub sampling: SamplingConfig,
    /// The report at the end; none if the section is absent.
    #[serde(default)]
    pub report: Option<ReportConfig>,
}

fn unnamed() -> String {
    "run".into()
}

fn cpu() -> String {
    "cpu".into()
}

/// Starting values of a new model.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// As diffusers: PyTorch's linear initialisation everywhere.
    #[default]
    Diffusers,
    /// The same, but modulations, gates and the output projection start at zero, as in DiT.
    AdalnZero,
}

/// The JSON Schema of what a YAML file holds.
fn schema_of<T: JsonSchema>() -> serde_json::Value {
    let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
    settings.into_generator().into_root_schema_for::<T>().to_value()
}

/// The JSON Schema of a recipe.
static SCHEMA: LazyLock<serde_json::Value> = LazyLock::new(|| {
    let mut schema = schema_of::<Recipe>();
    nemo::extend(&mut schema);
    schema
});

/// The JSON Schema of a recipe, for editors.
pub fn schema() -> &'static serde_json::Value {
    &SCHEMA
}

/// Another kind of file from its content, read as a recipe is: errors name it `path`.
///
/// # Errors
/// For everything that is wrong with it.
pub(crate) fn read_yaml<T: JsonSchema + DeserializeOwned>(path: &Path, bytes: &[u8], settings: &[String]) -> Result<T> {
    let refused = |problems| Error::Recipe { path: path.into(), problems };
    let text = yaml::decode(bytes).map_err(|problem| refused(vec![problem]))?;
    let mut root = yaml::parse(text).map_err(refused)?;
    let mut problems: Vec<Problem> = settings.iter().filter_map(|setting| root.set(setting).err()).collect();
    let value = read::read(&root, &schema_of::<T>(), &mut problems);
    match serde_path_to_error::deserialize(value) {
        Ok(read) if problems.is_empty() => Ok(read),
        Err(error) if problems.is_empty() => {
            let path = error.path().to_string();
            let what = format!("{path}: {}", error.into_inner());
            Err(refused(vec![Problem::new(&root.place_of(&path), what)]))
        }
        _ => Err(refused(problems)),
    }
}

/// The text at a path of a recipe, whatever the rest of it says; nothing where it is no YAML.
pub(crate) fn text_at(bytes: &[u8], path: &str) -> Option<String> {
    let root = yaml::parse(yaml::decode(bytes).ok()?).ok()?;
    root.get(path)?.text().map(str::to_owned)
}

impl Recipe {
    /// Reads a file and applies settings `a.b=value`.
    ///
    /// # Errors
    /// When the file can't be read, or for everything that is wrong with it: keys that are unknown (with the nearest one) or
    /// missing, values that do not fit, settings that are malformed.
    pub fn load(path: &Path, settings: &[String]) -> Result<Self> {
        Self::from_yaml(path, &std::fs::read(path).map_err(io(path))?, settings)
    }

    /// The same from the content of a file; errors name it `path`.
    ///
    /// # Errors
    /// As above.
    pub fn from_yaml(path: &Path, bytes: &[u8], settings: &[String]) -> Result<Self> {
        let refused = |problems| Error::Recipe { path: path.into(), problems };
        let text = yaml::decode(bytes).map_err(|problem| refused(vec![problem]))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let (recipe, without_effect) = Self::parse(text, settings, &name).map_err(refused)?;
        if !without_effect.is_empty() {
            let keys = without_effect.join(", ");
            tracing::warn!(
                "{}: these keys concern PyTorch or a cluster and have no effect here: {keys}",
                path.display()
            );
        }
        Ok(recipe)
    }

    /// From the object that a file would hold, for programs with data of their own: `data` may be left out.
    ///
    /// # Errors
    /// When a key is unknown or a value does not fit.
    pub fn from_json(object: serde_json::Value) -> Result<Self> {
        Self::without_data(Node::from_json(object))
    }

    /// The same from the text that a file would hold.
    ///
    /// # Errors
    /// When it is not YAML (or JSON), a key is unknown or a value does not fit.
    pub fn for_own_data(text: &str) -> Result<Self> {
        Self::without_data(yaml::parse(text).map_err(|problems| Error::Recipe { path: "recipe".into(), problems })?)
    }

    /// The shortest recipe that trains a model of a diffusers configuration (the object of its `config.json`, with `_class_name`) on data
    /// of one's own: AdamW with a constant learning rate, the flow-matching defaults of the class's first adapter.
    ///
    /// # Errors
    /// When the class is unknown or the configuration does not fit.
    pub fn of_model(config: serde_json::Value, lr: f64) -> Result<Self> {
        let class = config["_class_name"].as_str().unwrap_or_default();
        let adapter = ModelKind::of_class(class)?.adapter;
        Self::from_json(serde_json::json!({
            "model": config,
            "flow_matching": { "adapter_type": adapter },
            "optimizer": { "lr": lr },
            "step_scheduler": { "local_batch_size": 1, "max_steps": 1u64 << 53 },
        }))
    }

    fn without_data(mut root: Node) -> Result<Self> {
        let refused = |problems| Error::Recipe { path: "recipe".into(), problems };
        if !root.entries().is_empty() && root.entry("data").is_none() {
            // Something must stand there; it is never read.
            let nothing = Node::from_json(serde_json::json!({ "builtin": "digits", "text_dim": 1 }));
            let _ = root.put("data", nothing);
        }
        Self::of(root, false, Vec::new()).map(|(recipe, _)| recipe).map_err(refused)
    }

    /// From a file's text, and the keys in it that have no effect; `name` is the file's.
    fn parse(text: &str, settings: &[String], name: &str) -> Result<(Self, Vec<&'static str>), Vec<Problem>> {
        let mut root = yaml::parse(text)?;
        let wrong: Vec<Problem> = settings.iter().filter_map(|setting| root.set(setting).err()).collect();
        if !root.entries().is_empty() && root.entry("name").is_none() && root.entry("wandb.name").is_none() {
            let _ = root.put("name", Node::plain(&Place::Nowhere, name));
        }
        Self::of(root, true, wrong)
    }

    /// `own_data` if it trains on what the recipe names, so that the two are compared; `problems` if there are some already.
    fn of(
        mut root: Node,
        own_data: bool,
        mut problems: Vec<Problem>,
    ) -> Result<(Self, Vec<&'static str>), Vec<Problem>> {
        let without_effect = nemo::translate(&mut root, &mut problems);
        let value = read::read(&root, schema(), &mut problems);
        let recipe: Self = match serde_path_to_error::deserialize(value) {
            Ok(recipe) => recipe,
            // It is missing, or was told of already.
            Err(_) if !problems.is_empty() => return Err(problems),
            Err(error) => {
                let path = error.path().to_string();
                let what = format!("{path}: {}", error.into_inner());
                return Err(vec![Problem::new(&root.place_of(&path), what)]);
            }
        };
        recipe.check(&root, own_data, &mut problems);
        if problems.is_empty() { Ok((recipe, without_effect)) } else { Err(problems) }
    }

    /// Samples of an optimiser step.
    pub fn global_batch_size(&self) -> usize {
        self.step_scheduler.global_batch_size()
    }

    /// Learning rate and weight decay by step.
    ///
    /// # Errors
    /// When the section does not fit.
    pub fn schedule(&self) -> flowtape_engine::Result<LrScheduler> {
        let constant = LrSchedulerConfig {
            lr_decay_style: DecayStyle::Constant,
            lr_warmup_steps: Some(0),
            ..LrSchedulerConfig::default()
        };
        let OptimizerConfig { lr, weight_decay, .. } = self.optimizer;
        let config = self.lr_scheduler.as_ref().unwrap_or(&constant);
        LrScheduler::new(config, lr, weight_decay, self.step_scheduler.max_steps)
    }

    /// With what a recipe may leave open as it is used: a run that is made longer later keeps its schedule.
    fn resolved(&self) -> Self {
        let mut out = self.clone();
        out.step_scheduler.global_batch_size = Some(self.global_batch_size());
        if let (Some(config), Ok(schedule)) = (&mut out.lr_scheduler, self.schedule()) {
            *config = schedule.config();
        }
        out
    }

    /// The resolved recipe as YAML.
    pub fn to_yaml(&self) -> String {
        serde_saphyr::to_string(&self.resolved()).unwrap_or_default()
    }

    /// The resolved recipe as an object.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self.resolved()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
