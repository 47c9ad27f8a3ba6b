//! What a model starts from: a configuration with new weights, or a checkpoint.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use flowtape_engine::files::exists;
use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::safetensors::{SafeTensors, Shards};
use flowtape_flowmatch::FlowMatchingConfig;
use flowtape_models::checkpoint::{CONFIG, load_config, load_weights, open_weights};
use flowtape_models::presets::{PRESETS, Preset, of_checkpoint};
use flowtape_models::{Transformer, create_model, original};
use serde_json::Value;

use crate::error::io;
use crate::recipe::{Mode, ModelSection, Stage};
use crate::run::RunFolder;
use crate::{Error, Result};

/// The key of a recipe's section `model` that names a checkpoint.
pub const PRETRAINED: &str = "pretrained_model_name_or_path";
/// The file that makes a folder a whole pipeline of diffusers.
const PIPELINE: &str = "model_index.json";
/// The folders of a checkpoint of NeMo's.
const NEMO_MODEL: &str = "model";
const CONSOLIDATED: &str = "consolidated";
const HF_METADATA: &str = ".hf_metadata";

/// What the section `model` of a recipe comes to.
#[derive(Clone, PartialEq, Debug)]
pub struct Start {
    /// The object of `config.json`.
    pub config: Value,
    /// The folder or file of the weights; new ones where there is none.
    pub weights: Option<PathBuf>,
    /// The noise levels that the transformer is trained on, where it shares them with another.
    pub sigmas: Option<(f64, f64)>,
    /// What training takes away from the checkpoint, and what people do instead: where it is distilled.
    pub caution: Option<&'static str>,
}

/// The same of a pipeline that says of itself that it is distilled.
const DISTILLED: &str = "the checkpoint is distilled to a few steps without guidance (is_distilled in its model_index.json), which \
                         plain flow matching undoes: samples in few steps turn soft. Train the base model that it was made of, whose \
                         adapters it takes";

/// What a name stands for.
enum Found {
    Path(PathBuf),
    Preset(&'static Preset),
}

impl Start {
    /// Of a section. No weights are read.
    ///
    /// # Errors
    /// When the checkpoint is not there (it is said where it was looked for) or its configuration does not fit.
    pub fn of(model: &Value) -> Result<Self> {
        let refused = |what: String| Error::Run { path: "model".into(), what };
        let section = ModelSection::of(model).map_err(refused)?;
        let Some(name) = &section.pretrained_model_name_or_path else {
            return Ok(Self { config: Value::Object(section.config), weights: None, sigmas: None, caution: None });
        };
        let mut caution = of_checkpoint(name).and_then(|preset| preset.caution);
        let (config, weights, sigmas) = match find(name, &section)? {
            Found::Preset(preset) if section.mode == Some(Mode::Finetune) => {
                let what = "a preset is a configuration without weights: say `mode: pretrain`, or name a checkpoint";
                return Err(Error::Run { path: preset.name.into(), what: what.into() });
            }
            Found::Preset(preset) => ((preset.config)(), None, sigmas(&section, None)?),
            Found::Path(path) if path.is_dir() && nemo_model(&path).is_some() => {
                let (config, weights) = nemo_checkpoint(&nemo_model(&path).unwrap_or(path))?;
                (config, Some(weights), sigmas(&section, None)?)
            }
            Found::Path(path) if path.is_dir() => {
                let index = pipeline_index(&path)?;
                if index["is_distilled"].as_bool() == Some(true) {
                    caution = caution.or(Some(DISTILLED));
                }
                let folder = transformer_folder(&path, &section)?;
                let boundary = index["boundary_ratio"].as_f64();
                (load_config(&folder.join(CONFIG))?, Some(folder), sigmas(&section, boundary)?)
            }
            Found::Path(path) => (config_of_file(&path, &section)?, Some(path), sigmas(&section, None)?),
        };
        let weights = weights.filter(|_| section.mode != Some(Mode::Pretrain));
        // What the recipe says of the configuration counts.
        let mut config = config;
        if let Value::Object(keys) = &mut config {
            keys.extend(section.config);
        }
        // New weights know no distillation, nor does a transformer that stands beside the pipeline's own.
        let own = section.subfolder.as_deref().is_none_or(|folder| folder == "transformer");
        let caution = caution.filter(|_| weights.is_some() && own);
        Ok(Self { config, weights, sigmas, caution })
    }

    /// The model, its parameters held as the builder's plan says.
    ///
    /// # Errors
    /// When weights can't be read or do not fit.
    pub fn model(&self, params: ParamBuilder) -> Result<Box<dyn Transformer>> {
        let weights = match &self.weights {
            None => return Ok(create_model(&self.config, &params)?),
            Some(path) if path.is_dir() => open_weights(path)?,
            Some(path) => original::as_diffusers(open_file(path)?, &self.config)?,
        };
        Ok(load_weights(Arc::new(weights), &self.config, params)?)
    }

    /// The pipeline's section with the noise levels that the transformer is trained on.
    pub fn flow_matching(&self, config: &FlowMatchingConfig) -> FlowMatchingConfig {
        let mut config = config.clone();
        if let Some((least, most)) = self.sigmas {
            (config.sigma_min, config.sigma_max) = (least, most);
        }
        config
    }
}

/// The folder of a whole pipeline: one on the disk, or a name on the hub that was downloaded before.
///
/// # Errors
/// When it is not there: it is said where it was looked for.
pub fn pipeline_folder(name: &str) -> Result<PathBuf> {
    match find(name, &ModelSection::default())? {
        Found::Path(path) => Ok(path),
        Found::Preset(preset) => Err(missing(preset.name.as_ref(), "a preset has no pipeline: name its folder".into())),
    }
}

/// The folder of trained weights in diffusers' form: itself, one inside, or a run's newest checkpoint.
///
/// # Errors
/// When there are none.
pub fn trained_folder(path: &Path) -> Result<PathBuf> {
    transformer_folder(path, &ModelSection::default())
}

fn open_file(path: &Path) -> Result<Shards> {
    Ok(Shards::from(SafeTensors::open(path)?).without_known_prefix())
}

fn missing(path: &Path, what: String) -> Error {
    Error::Run { path: path.into(), what }
}

/// A file or folder of that name, a preset, or a name on the hub that was downloaded before.
fn find(name: &str, section: &ModelSection) -> Result<Found> {
    let path = Path::new(name);
    if exists(path)? {
        return Ok(Found::Path(path.into()));
    }
    if let Some(preset) = PRESETS.iter().find(|preset| preset.name == name) {
        return Ok(Found::Preset(preset));
    }
    let presets = PRESETS.iter().map(|preset| preset.name).collect::<Vec<_>>().join(", ");
    let Some((owner, model)) = name.split_once('/').filter(|(owner, model)| is_hub_part(owner) && is_hub_part(model))
    else {
        let what = format!("no file or folder of that name, nor one of the presets {presets}");
        return Err(missing(path, what));
    };
    let cache = section.cache_dir.clone().unwrap_or_else(hub_cache);
    let repository = cache.join(format!("models--{owner}--{model}"));
    if let Some(snapshot) = snapshot(&repository)? {
        return Ok(Found::Path(snapshot));
    }
    // Its configuration is known, and no more is asked for.
    let known = PRESETS.iter().find(|preset| preset.hub.contains(&name));
    if let Some(preset) = known.filter(|_| section.mode == Some(Mode::Pretrain)) {
        return Ok(Found::Preset(preset));
    }
    let what = format!(
        "not found: no file or folder of that name, no preset ({presets}), and no snapshot in {}; fetch it with \
         `hf download {name}`",
        repository.display()
    );
    Err(missing(path, what))
}

/// Whether a text may be an owner or a model of the hub's.
fn is_hub_part(part: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !part.is_empty() && !part.starts_with('.') && part.chars().all(fits)
}

/// The folder that Hugging Face's tools download to.
pub fn hub_cache() -> PathBuf {
    let folder = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || folder("HOME").or_else(|| folder("USERPROFILE")).unwrap_or_default();
    let cache = || folder("XDG_CACHE_HOME").unwrap_or_else(|| home().join(".cache"));
    let hf_home = || folder("HF_HOME").unwrap_or_else(|| cache().join("huggingface"));
    folder("HF_HUB_CACHE").unwrap_or_else(|| hf_home().join("hub"))
}

/// The files of a repository in the hub's cache: those of `main`, or the only ones.
fn snapshot(repository: &Path) -> Result<Option<PathBuf>> {
    let snapshots = repository.join("snapshots");
    let reference = repository.join("refs").join("main");
    if exists(&reference)? {
        let commit = std::fs::read_to_string(&reference).map_err(io(&reference))?;
        if is_hub_part(commit.trim()) && exists(&snapshots.join(commit.trim()))? {
            return Ok(Some(snapshots.join(commit.trim())));
        }
    }
    let Ok(entries) = std::fs::read_dir(&snapshots) else { return Ok(None) };
    let all: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    Ok(if let [only] = &all[..] { Some(only.clone()) } else { None })
}

/// The folder `model` of a checkpoint of NeMo's: that of `epoch_0_step_3`, or of the folder of checkpoints, whose `LATEST` is taken.
fn nemo_model(named: &Path) -> Option<PathBuf> {
    let models = [named.join("LATEST").join(NEMO_MODEL), named.join(NEMO_MODEL), named.into()];
    models.into_iter().find(|model| model.join(CONSOLIDATED).is_dir() || model.join(HF_METADATA).is_dir())
}

/// Its configuration and weights: the consolidated ones, or the shard of a run of one process, which holds whole tensors.
fn nemo_checkpoint(model: &Path) -> Result<(Value, PathBuf)> {
    let consolidated = model.join(CONSOLIDATED);
    if exists(&consolidated.join(CONFIG))? {
        return Ok((load_config(&consolidated.join(CONFIG))?, consolidated));
    }
    let entries = std::fs::read_dir(model).map_err(io(model))?;
    let names = entries.map(|entry| Ok(entry.map_err(io(model))?.path())).collect::<Result<Vec<_>>>()?;
    let is_shard = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("shard-") && name.ends_with(".safetensors")
    };
    let shards: Vec<PathBuf> = names.into_iter().filter(is_shard).collect();
    match &shards[..] {
        [only] => Ok((load_config(&model.join(HF_METADATA).join(CONFIG))?, only.clone())),
        _ => {
            let what = format!(
                "a checkpoint of NeMo's in {} shards: put them together with its consolidate.sh, which makes {CONSOLIDATED}/{CONFIG}",
                shards.len()
            );
            Err(missing(model, what))
        }
    }
}

/// The folder that holds a transformer's configuration.
fn transformer_folder(named: &Path, section: &ModelSection) -> Result<PathBuf> {
    if exists(&named.join("recipe.yaml"))? {
        return RunFolder::open(named)?.0.checkpoints().newest_whole();
    }
    if exists(&named.join(CONFIG))? && section.subfolder.is_none() {
        return Ok(named.into());
    }
    if section.stage.is_none() && section.subfolder.is_none() && exists(&named.join("transformer_2").join(CONFIG))? {
        let what = "a pipeline of two transformers: say `model.stage: high_noise` or `low_noise`";
        return Err(missing(named, what.into()));
    }
    let stage = if section.stage == Some(Stage::LowNoise) { "transformer_2" } else { "transformer" };
    let subfolder = section.subfolder.as_deref().unwrap_or(stage);
    let inside = named.join(subfolder);
    if exists(&inside.join(CONFIG))? {
        return Ok(inside);
    }
    let what = format!(
        "no checkpoint to start from: expected a folder with {CONFIG} or {subfolder}/{CONFIG}, or a run folder"
    );
    Err(missing(named, what))
}

/// What a pipeline says of itself; null where the folder is none.
fn pipeline_index(folder: &Path) -> Result<Value> {
    let path = folder.join(PIPELINE);
    if !exists(&path)? {
        return Ok(Value::Null);
    }
    let text = std::fs::read(&path).map_err(io(&path))?;
    serde_json::from_slice(&text).map_err(|e| missing(&path, format!("not JSON: {e}")))
}

/// The noise levels of a stage.
fn sigmas(section: &ModelSection, pipeline: Option<f64>) -> Result<Option<(f64, f64)>> {
    let Some(stage) = section.stage else { return Ok(None) };
    let boundary =
        section.boundary_ratio.or(pipeline).filter(|boundary| (0.0..=1.0).contains(boundary)).ok_or_else(|| {
            missing(
                Path::new("model.stage"),
                "expected model.boundary_ratio, from 0 to 1, since the pipeline names none".into(),
            )
        })?;
    Ok(Some(match stage {
        Stage::HighNoise => (boundary, 1.0),
        Stage::LowNoise => (0.0, boundary),
    }))
}

/// The configuration of a single file's model: the recipe's, that of the folder that it lies in, or what its sizes tell.
fn config_of_file(path: &Path, section: &ModelSection) -> Result<Value> {
    if section.config.contains_key("_class_name") {
        return Ok(Value::Object(section.config.clone()));
    }
    let beside = path.with_file_name(CONFIG);
    if exists(&beside)? {
        return Ok(load_config(&beside)?);
    }
    original::config(&open_file(path)?).ok_or_else(|| {
        let what = "a file of weights, whose sizes do not tell its configuration";
        missing(path, format!("{what}: put {CONFIG} beside it, or its keys (`_class_name` and others) into `model`"))
    })
}
