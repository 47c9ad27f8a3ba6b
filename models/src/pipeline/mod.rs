//! diffusers' pipelines: a folder with `model_index.json` and a part in each of its folders, loaded as a whole or by part.

mod flux;
mod language;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flowtape_engine::files::exists;
use flowtape_engine::{DType, Device, Error as EngineError, Tensor};
use serde_json::Value;

use crate::text::{TextModel, Tokenizer, load};
use crate::{Error, Result};

pub use flux::FluxPrompts;
pub use language::{FLUX2, FLUX2_KLEIN, LanguagePrompts, QWEN_IMAGE, States, Template};

/// The file that lists a pipeline's parts.
pub const MODEL_INDEX: &str = "model_index.json";

/// A pipeline's folder. Opening it loads nothing.
#[derive(Clone, Debug)]
pub struct PipelineFolder {
    path: PathBuf,
    class: String,
    /// The class of each part that is there.
    parts: BTreeMap<String, String>,
}

/// Prompts to what a pipeline's transformer is told: tensors by the names that adapters read, for each prompt without an axis of
/// samples, since texts may differ in length.
pub trait PromptEncoder: Send + Sync {
    /// Embeddings of each prompt. Texts are cut or padded to `max_sequence_length` tokens, or to the pipeline's own length.
    ///
    /// # Errors
    /// When a model fails.
    fn encode(
        &self,
        prompts: &[&str],
        max_sequence_length: Option<usize>,
    ) -> Result<Vec<BTreeMap<&'static str, Tensor>>>;
}

/// Makes the encoder of prompts from a pipeline's folder, on a device.
pub type NewPromptEncoder = fn(&PipelineFolder, &Device) -> Result<Box<dyn PromptEncoder>>;

/// A pipeline that can be loaded.
#[derive(Debug)]
pub struct PipelineKind {
    /// diffusers' class, as in `_class_name` of `model_index.json`.
    pub class: &'static str,
    /// Its parts that make embeddings of prompts.
    pub prompt_parts: &'static [&'static str],
    /// Loads them.
    pub prompts: NewPromptEncoder,
}

/// All pipelines.
pub const PIPELINES: &[PipelineKind] = &[
    PipelineKind {
        class: "FluxPipeline",
        prompt_parts: &["tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"],
        prompts: |folder, device| Ok(Box::new(FluxPrompts::load(folder, device)?)),
    },
    PipelineKind {
        class: "Flux2Pipeline",
        prompt_parts: ONE_MODEL,
        prompts: |folder, device| Ok(Box::new(LanguagePrompts::load(folder, FLUX2, device)?)),
    },
    PipelineKind {
        class: "Flux2KleinPipeline",
        prompt_parts: ONE_MODEL,
        prompts: |folder, device| Ok(Box::new(LanguagePrompts::load(folder, FLUX2_KLEIN, device)?)),
    },
    PipelineKind {
        class: "QwenImagePipeline",
        prompt_parts: ONE_MODEL,
        prompts: |folder, device| Ok(Box::new(LanguagePrompts::load(folder, QWEN_IMAGE, device)?)),
    },
];

const ONE_MODEL: &[&str] = &["tokenizer", "text_encoder"];

impl PipelineFolder {
    /// Reads which parts a folder has.
    ///
    /// # Errors
    /// When it has no `model_index.json`, or that is not one.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(MODEL_INDEX);
        let wrong = |what: &str| Error::from(EngineError::Format { path: path.clone(), what: what.into() });
        if !exists(&path)? {
            return Err(wrong("not there: name the folder of a whole diffusers pipeline, not that of one part"));
        }
        let text = std::fs::read(&path).map_err(|source| EngineError::Io { path: path.clone(), source })?;
        let index: Value = serde_json::from_slice(&text).map_err(|e| wrong(&e.to_string()))?;
        let class = index["_class_name"].as_str().ok_or_else(|| wrong("no _class_name"))?.to_owned();
        let listed = index.as_object().into_iter().flatten();
        // A part is [library, class]; one that is left out is [null, null].
        let part = |(name, value): (&String, &Value)| Some((name.clone(), value.get(1)?.as_str()?.to_owned()));
        let parts = listed.filter(|(name, _)| !name.starts_with('_')).filter_map(part).collect();
        Ok(Self { path: folder.into(), class, parts })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// diffusers' class of the pipeline.
    pub fn class(&self) -> &str {
        &self.class
    }

    /// What we know of its class.
    ///
    /// # Errors
    /// When the class is unknown: the error lists all.
    pub fn kind(&self) -> Result<&'static PipelineKind> {
        let known = PIPELINES.iter().find(|kind| kind.class == self.class);
        known.ok_or_else(|| {
            let names: Vec<_> = PIPELINES.iter().map(|kind| kind.class).collect();
            let what = format!("_class_name: expected one of {}, got {}", names.join(", "), self.class);
            EngineError::Format { path: self.path.join(MODEL_INDEX), what }.into()
        })
    }

    /// The folder of a part, such as `vae`.
    ///
    /// # Errors
    /// When the pipeline does not list it, or it is not there.
    pub fn part(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        if !self.parts.contains_key(name) {
            let parts = self.parts.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let what = format!("{} lists no {name}, but {parts}", self.class);
            return Err(EngineError::Format { path: self.path.join(MODEL_INDEX), what }.into());
        }
        if !exists(&path)? {
            let what = format!("{MODEL_INDEX} lists it, but it is not there: fetch the whole pipeline");
            return Err(EngineError::Format { path, what }.into());
        }
        Ok(path)
    }

    /// A tokenizer among the parts.
    ///
    /// # Errors
    /// When it is missing or broken.
    pub fn tokenizer(&self, name: &str) -> Result<Tokenizer> {
        Tokenizer::open(&self.part(name)?)
    }

    /// A text encoder among the parts; it computes in `dtype`, or in what its weights suggest.
    ///
    /// # Errors
    /// When it is missing or broken.
    pub fn text_encoder(&self, name: &str, dtype: Option<DType>, device: &Device) -> Result<Box<dyn TextModel>> {
        load(&self.part(name)?, dtype, device)
    }

    /// What makes embeddings of prompts; of the parts those alone are loaded that it needs.
    ///
    /// # Errors
    /// When the class is unknown, or a part is missing or broken.
    pub fn prompts(&self, device: &Device) -> Result<Box<dyn PromptEncoder>> {
        (self.kind()?.prompts)(self, device)
    }
}
