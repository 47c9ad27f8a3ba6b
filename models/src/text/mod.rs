//! Text encoders, with transformers' names and checkpoints, and tokenizers.
//!
//! | module | what it holds |
//! |---|---|
//! | [`tokenizer`] | [`Tokenizer`]: texts to tokens, from the files of a `tokenizer` folder |
//! | [`clip`] | [`CLIPTextModel`] |
//! | [`decoder`] | [`DecoderModel`]: the text models of Qwen2.5-VL, Qwen3, Mistral 3 and Gemma 3 |
//! | [`t5`] | [`T5EncoderModel`]: T5 v1.1, byT5 and UMT5 |

pub mod clip;
pub mod decoder;
pub mod t5;
pub mod tokenizer;

use std::path::Path;
use std::sync::Arc;

use flowtape_engine::nn::{Activation, Init, Param, ParamBuilder, Params, Placement};
use flowtape_engine::safetensors::Shards;
use flowtape_engine::{DType, Device, Error as EngineError, Tensor};
use serde_json::Value;

use crate::checkpoint::CONFIG;
use crate::{Error, Result};

pub use clip::{CLIPTextConfig, CLIPTextModel};
use decoder::PLAIN;
pub use decoder::{DecoderConfig, DecoderModel, Family, stack_layers};
pub use t5::{T5Config, T5EncoderModel};
pub use tokenizer::{Padding, Tokenizer, Tokens};

/// transformers' name of the weights' file or files, without endings.
pub const WEIGHTS: &str = "model";

/// What a text encoder makes of tokens.
#[derive(Clone, Debug)]
pub struct TextModelOutput {
    /// `[B, T, D]`: the embeddings, then what each layer gives. Whether the last has gone through the final norm differs as in
    /// transformers.
    pub hidden_states: Vec<Tensor>,
    /// `[B, T, D]`, after the final norm.
    pub last_hidden_state: Tensor,
    /// `[B, D]`, where the model pools.
    pub pooler_output: Option<Tensor>,
}

/// A text encoder with parameters of transformers' names.
pub trait TextModel: Send + Sync {
    /// All parameters.
    fn params(&self) -> &Params;

    /// States of tokens u32 `[B, T]`. A mask `[B, T]` of any dtype is 0 where nothing is attended to.
    ///
    /// # Errors
    /// When a shape does not fit, or a token is unknown.
    fn forward(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<TextModelOutput>;

    /// Whether a key of a checkpoint is of no use to the model and may be there.
    fn is_ignored_key(&self, key: &str) -> bool {
        let _ = key;
        false
    }
}

/// A text encoder and how it is made.
#[derive(Debug)]
pub struct TextModelKind {
    /// transformers' class, as in `architectures` of `config.json`.
    pub class: &'static str,
    /// What may stand before every key of a published file.
    pub prefix: &'static str,
    /// Makes the model from the object of `config.json`.
    pub new: fn(&Value, &ParamBuilder) -> Result<Box<dyn TextModel>>,
}

/// The models of [`decoder`].
pub(crate) const QWEN25_VL: Family = Family { class: "Qwen2_5_VLForConditionalGeneration", qkv_bias: true, ..PLAIN };
const QWEN3: Family = Family { class: "Qwen3ForCausalLM", qk_norm: true, ..PLAIN };
const QWEN3_VL: Family = Family { class: "Qwen3VLForConditionalGeneration", ..QWEN3 };
const MISTRAL3: Family = Family { class: "Mistral3ForConditionalGeneration", ..PLAIN };
const GEMMA2: Family = Family { class: "Gemma2Model", gemma: true, full_every: Some(2), softcap: Some(50.0), ..PLAIN };
const GEMMA3: Family =
    Family { class: "Gemma3ForConditionalGeneration", qk_norm: true, gemma: true, full_every: Some(6), ..PLAIN };

fn decoder(config: &Value, family: Family, params: &ParamBuilder) -> Result<Box<dyn TextModel>> {
    Ok(Box::new(DecoderModel::new(DecoderConfig::from_json(config, family)?, family, params)?))
}

/// All text encoders.
pub const TEXT_MODELS: &[TextModelKind] = &[
    TextModelKind {
        class: "CLIPTextModel",
        prefix: "text_model.",
        new: |config, params| Ok(Box::new(CLIPTextModel::new(CLIPTextConfig::from_json(config)?, params)?)),
    },
    TextModelKind {
        class: "T5EncoderModel",
        prefix: "",
        new: |config, params| Ok(Box::new(T5EncoderModel::new(T5Config::from_json(config)?, false, params)?)),
    },
    TextModelKind {
        class: "UMT5EncoderModel",
        prefix: "",
        new: |config, params| Ok(Box::new(T5EncoderModel::new(T5Config::from_json(config)?, true, params)?)),
    },
    TextModelKind { class: QWEN25_VL.class, prefix: "", new: |config, params| decoder(config, QWEN25_VL, params) },
    TextModelKind {
        class: "Qwen2_5_VLTextModel",
        prefix: "",
        new: |config, params| decoder(config, QWEN25_VL, params),
    },
    TextModelKind { class: QWEN3.class, prefix: "", new: |config, params| decoder(config, QWEN3, params) },
    TextModelKind { class: QWEN3_VL.class, prefix: "", new: |config, params| decoder(config, QWEN3_VL, params) },
    TextModelKind { class: "Qwen3VLModel", prefix: "", new: |config, params| decoder(config, QWEN3_VL, params) },
    TextModelKind { class: MISTRAL3.class, prefix: "", new: |config, params| decoder(config, MISTRAL3, params) },
    TextModelKind { class: GEMMA2.class, prefix: "", new: |config, params| decoder(config, GEMMA2, params) },
    TextModelKind { class: "Gemma2ForCausalLM", prefix: "", new: |config, params| decoder(config, GEMMA2, params) },
    TextModelKind { class: GEMMA3.class, prefix: "", new: |config, params| decoder(config, GEMMA3, params) },
];

impl TextModelKind {
    /// The text encoder of that class of transformers.
    ///
    /// # Errors
    /// When there is none: the error lists all.
    pub fn of_class(class: &str) -> Result<&'static Self> {
        let names: Vec<_> = TEXT_MODELS.iter().map(|kind| kind.class).collect();
        let found = TEXT_MODELS.iter().find(|kind| kind.class == class);
        found.ok_or_else(|| Error::config("architectures", format!("one of {}", names.join(", ")), class))
    }
}

/// What frozen weights of a file are computed with in: bf16 stays, all else becomes f32. T5 overflows in f16, which no CPU
/// multiplies faster.
pub fn compute_dtype(weights: &Shards) -> DType {
    let first = weights.names().next().and_then(|name| weights.dtype_name(name));
    if first.as_deref() == Some("BF16") { DType::BF16 } else { DType::F32 }
}

/// Opens a transformers folder: `config.json`, the weights (`model.safetensors` or shards of it) without what may stand before every
/// key, and a builder that reads them, frozen, in `dtype` or in what [`compute_dtype`] finds.
pub(crate) fn open(
    folder: &Path,
    prefix: &str,
    dtype: Option<DType>,
    device: &Device,
) -> Result<(Value, Arc<Shards>, ParamBuilder)> {
    let config = read_config(folder)?;
    let weights = Arc::new(Shards::open(folder, WEIGHTS)?.without_prefix(prefix));
    let placement = Placement::frozen(dtype.unwrap_or_else(|| compute_dtype(&weights)));
    let params = ParamBuilder::with_plan(0, placement, device).reading(weights.clone());
    Ok((config, weights, params))
}

fn read_config(folder: &Path) -> Result<Value> {
    let path = folder.join(CONFIG);
    let text = std::fs::read(&path).map_err(|source| EngineError::Io { path: path.clone(), source })?;
    Ok(serde_json::from_slice(&text).map_err(|e| EngineError::Format { path, what: e.to_string() })?)
}

/// Loads a text encoder of a transformers folder, frozen: `config.json` and `model.safetensors` or shards of it. It computes in
/// `dtype`, or in what [`compute_dtype`] finds.
///
/// # Errors
/// When a file can't be read, the class is unknown, or keys do not fit.
pub fn load(folder: &Path, dtype: Option<DType>, device: &Device) -> Result<Box<dyn TextModel>> {
    let wrong = |error: Error| EngineError::Format { path: folder.join(CONFIG), what: error.to_string() };
    let config = read_config(folder)?;
    let class = config["architectures"][0].as_str().unwrap_or("no architectures");
    let kind = TextModelKind::of_class(class).map_err(wrong)?;
    let (_, weights, params) = open(folder, kind.prefix, dtype, device)?;
    let model = (kind.new)(&config, &params).map_err(wrong)?;
    model
        .params()
        .check_keys(&weights, |name| model.is_ignored_key(name))
        .map_err(|error| Error::Model { model: class.to_owned(), source: Box::new(error) })?;
    Ok(model)
}

/// A table of embeddings; parameter `weight` `[rows, width]`.
#[derive(Clone, Debug)]
pub(crate) struct Table(Param);

impl Table {
    pub(crate) fn new(params: &ParamBuilder, rows: usize, width: usize) -> flowtape_engine::Result<Self> {
        Self::with_init(params, rows, width, Init::Normal { std: 0.02 })
    }

    fn with_init(params: &ParamBuilder, rows: usize, width: usize, init: Init) -> flowtape_engine::Result<Self> {
        Ok(Self(params.get("weight", &[rows, width], init)?))
    }

    pub(crate) fn value(&self) -> flowtape_engine::Result<Tensor> {
        self.0.value()
    }
}

/// The function that transformers' configurations call by this name.
pub(crate) fn activation(name: &str) -> Result<Activation> {
    match name {
        "quick_gelu" => Ok(Activation::QuickGelu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "silu" => Ok(Activation::Silu),
        _ => Err(Error::config("hidden_act", "quick_gelu, gelu, gelu_new, gelu_pytorch_tanh or silu", name)),
    }
}

/// What is added to attention's scores so that no token attends to what comes after it: f32 `[1, 1, T, T]`.
fn causal_mask(length: usize, device: &Device) -> flowtape_engine::Result<Tensor> {
    let place = |i: usize| if i % length > i / length { f32::NEG_INFINITY } else { 0.0 };
    Tensor::from_vec((0..length * length).map(place).collect::<Vec<f32>>(), &[1, 1, length, length], device)
}
