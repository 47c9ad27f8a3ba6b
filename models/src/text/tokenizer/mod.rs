//! Texts to tokens, as transformers reads the files of a `tokenizer` folder.

mod bytes;
mod convert;
#[cfg_attr(not(feature = "tokenizers"), path = "no_pieces.rs")]
mod pieces;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flowtape_engine::Error as EngineError;
use flowtape_engine::files::exists;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::Result;
use bytes::ByteTokenizer;
use pieces::Pieces;

/// On which side of a short text padding stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Padding {
    /// Before it.
    Left,
    /// After it.
    Right,
}

/// A text of a fixed length in tokens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tokens {
    /// The tokens' numbers.
    pub ids: Vec<u32>,
    /// 1 for a token of the text, 0 for padding.
    pub mask: Vec<u32>,
}

/// A tokenizer of a transformers folder.
#[derive(Debug)]
pub struct Tokenizer {
    kind: Kind,
    config: Config,
    pad: Option<u32>,
    folder: PathBuf,
}

#[derive(Debug)]
enum Kind {
    /// What a `tokenizer.json` describes.
    Pieces(Pieces),
    Bytes(ByteTokenizer),
}

/// A token that is not a piece of text, as `tokenizer_config.json` has it: its text alone, or an object.
#[derive(Clone, PartialEq, Debug, Default)]
struct AddedToken {
    content: String,
    lstrip: bool,
    rstrip: bool,
    single_word: bool,
    normalized: bool,
    special: bool,
}

impl<'de> Deserialize<'de> for AddedToken {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Text(String),
            Object {
                content: String,
                #[serde(default)]
                lstrip: bool,
                #[serde(default)]
                rstrip: bool,
                #[serde(default)]
                single_word: bool,
                #[serde(default)]
                normalized: bool,
                #[serde(default)]
                special: bool,
            },
        }
        Ok(match Written::deserialize(deserializer)? {
            Written::Text(content) => Self { content, special: true, ..Self::default() },
            Written::Object { content, lstrip, rstrip, single_word, normalized, special } => {
                Self { content, lstrip, rstrip, single_word, normalized, special }
            }
        })
    }
}

/// The keys of `tokenizer_config.json` that matter.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Config {
    tokenizer_class: String,
    #[serde(deserialize_with = "length")]
    model_max_length: Option<usize>,
    padding_side: Option<Padding>,
    bos_token: Option<AddedToken>,
    eos_token: Option<AddedToken>,
    pad_token: Option<AddedToken>,
    unk_token: Option<AddedToken>,
    extra_ids: Option<usize>,
    additional_special_tokens: Vec<AddedToken>,
    added_tokens_decoder: BTreeMap<String, AddedToken>,
    clean_up_tokenization_spaces: bool,
}

/// transformers writes 10^30 where there is no limit.
fn length<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<usize>, D::Error> {
    Ok(Value::deserialize(deserializer)?.as_u64().and_then(|n| usize::try_from(n).ok()))
}

impl Config {
    /// Whether the class is transformers' of that name, in either of its forms.
    fn is(&self, class: &str) -> bool {
        self.tokenizer_class.trim_end_matches("Fast") == class
    }
}

fn format_error(path: &Path, what: impl ToString) -> EngineError {
    EngineError::Format { path: path.into(), what: what.to_string() }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    Ok(std::fs::read(path).map_err(|source| EngineError::Io { path: path.into(), source })?)
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&read(path)?).map_err(|e| format_error(path, e).into())
}

impl Tokenizer {
    /// Opens a folder: `tokenizer_config.json` beside `tokenizer.json` or, where there is none, `vocab.json` and `merges.txt`
    /// (CLIP's and Qwen's), `spiece.model` (T5's), or nothing (byT5's).
    ///
    /// # Errors
    /// When a file is missing or broken, or the class is not known without its `tokenizer.json`.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer_config.json");
        let mut settings: Map<String, Value> = read_json(&path)?;
        // Null stands for what is not said.
        settings.retain(|_, value| !value.is_null());
        let config = Config::deserialize(Value::Object(settings)).map_err(|e| format_error(&path, e))?;
        let (json, vocab) = (folder.join("tokenizer.json"), folder.join("vocab.json"));
        let pieces = folder.join("spiece.model");
        let described = if exists(&json)? {
            read(&json)?
        } else if exists(&vocab)? {
            let merges = folder.join("merges.txt");
            let text = String::from_utf8(read(&merges)?).map_err(|e| format_error(&merges, e))?;
            let vocab: Map<String, Value> = read_json(&vocab)?;
            convert::pairs(vocab, &text, &config).map_err(|what| format_error(folder, what))?.to_string().into()
        } else if exists(&pieces)? {
            convert::sentencepiece(&read(&pieces)?, &config)
                .map_err(|what| format_error(&pieces, what))?
                .to_string()
                .into()
        } else if config.is("ByT5Tokenizer") {
            let bytes = ByteTokenizer::new(&config).map_err(|what| format_error(folder, what))?;
            let pad = bytes.id("<pad>");
            return Ok(Self { kind: Kind::Bytes(bytes), config, pad, folder: folder.into() });
        } else {
            let what = "no tokenizer: expected tokenizer.json, vocab.json with merges.txt, or spiece.model";
            return Err(format_error(folder, what).into());
        };
        let pieces = Pieces::read(&described).map_err(|what| format_error(folder, what))?;
        let pad = config.pad_token.as_ref().and_then(|token| pieces.id(&token.content));
        Ok(Self { kind: Kind::Pieces(pieces), config, pad, folder: folder.into() })
    }

    /// The longest text that its model takes, in tokens with the special ones, where there is a limit.
    pub fn model_max_length(&self) -> Option<usize> {
        self.config.model_max_length
    }

    /// The token that stands for nothing.
    pub fn pad_id(&self) -> Option<u32> {
        self.pad
    }

    /// The number of a token, if there is one of that text.
    pub fn id(&self, token: &str) -> Option<u32> {
        match &self.kind {
            Kind::Pieces(pieces) => pieces.id(token),
            Kind::Bytes(bytes) => bytes.id(token),
        }
    }

    /// The side on which padding stands, unless it is asked for on another.
    pub fn padding_side(&self) -> Padding {
        let usual = if self.config.is("GemmaTokenizer") { Padding::Left } else { Padding::Right };
        self.config.padding_side.unwrap_or(usual)
    }

    /// The tokens of a text, with those that the model expects around it where `special` says so.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        match &self.kind {
            Kind::Pieces(pieces) => Ok(pieces.encode(text, special).map_err(|what| self.failed(text, &what))?),
            Kind::Bytes(bytes) => Ok(bytes.encode(text, special)),
        }
    }

    /// `length` tokens: the text cut short, so that the special tokens find room, or padded.
    ///
    /// # Errors
    /// When the tokenizer fails, or the text is shorter and there is no token for padding.
    pub fn encode_padded(&self, text: &str, length: usize, side: Padding) -> Result<Tokens> {
        let ids = match &self.kind {
            Kind::Pieces(pieces) => pieces.encode_cut(text, length).map_err(|what| self.failed(text, &what))?,
            Kind::Bytes(bytes) => bytes.encode_cut(text, length),
        };
        self.pad(ids, length, side)
    }

    /// `length` tokens: those of a text, cut short or padded.
    ///
    /// # Errors
    /// When there are fewer, and no token for padding.
    pub fn pad(&self, mut ids: Vec<u32>, length: usize, side: Padding) -> Result<Tokens> {
        ids.truncate(length);
        let missing = length.saturating_sub(ids.len());
        let pad = match self.pad {
            Some(pad) => pad,
            None if missing == 0 => 0,
            None => return Err(format_error(&self.folder, "tokenizer_config.json names no pad_token").into()),
        };
        let (text, padding) = (vec![1; ids.len()], vec![0; missing]);
        let pads = vec![pad; missing];
        Ok(match side {
            Padding::Left => Tokens { ids: [pads, ids].concat(), mask: [padding, text].concat() },
            Padding::Right => Tokens { ids: [ids, pads].concat(), mask: [text, padding].concat() },
        })
    }

    /// The text of tokens, without the special ones.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        match &self.kind {
            Kind::Pieces(pieces) => {
                let text = pieces.decode(ids).map_err(|what| format_error(&self.folder, what))?;
                Ok(convert::clean_up(text, &self.config))
            }
            Kind::Bytes(bytes) => Ok(bytes.decode(ids)),
        }
    }

    fn failed(&self, text: &str, what: &str) -> EngineError {
        format_error(&self.folder, format!("{text:?} can't be tokenised: {what}"))
    }
}
