//! What transformers makes of older files: the object of a `tokenizer.json`.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value, json};

use super::{AddedToken, Config};

/// The words of CLIP: special tokens, endings, letters, single digits, other signs.
const CLIP_WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// What CLIP's pieces end with that end a word.
const WORD_END: &str = "</w>";
/// The words of Qwen 2 and 3.
const QWEN_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Written for a space in sentencepiece's vocabularies.
const SPACE: &str = "\u{2581}";

/// The special tokens with their numbers, of `added_tokens_decoder` where that is written, else by their texts.
fn added_tokens(config: &Config, id: impl Fn(&str) -> Option<u64>) -> Vec<Value> {
    let named = [&config.bos_token, &config.eos_token, &config.pad_token, &config.unk_token].into_iter().flatten();
    let listed = config.added_tokens_decoder.iter().filter_map(|(id, token)| Some((id.parse().ok()?, token)));
    let mut all: Vec<(u64, &AddedToken)> = listed.collect();
    for token in named.chain(&config.additional_special_tokens) {
        if let Some(id) = id(&token.content).filter(|id| all.iter().all(|(other, _)| other != id)) {
            all.push((id, token));
        }
    }
    all.sort_by_key(|(id, _)| *id);
    let object = |(id, t): &(u64, &AddedToken)| {
        let AddedToken { content, lstrip, rstrip, single_word, normalized, special } = t;
        json!({
            "id": id, "content": content, "lstrip": lstrip, "rstrip": rstrip, "single_word": single_word,
            "normalized": normalized, "special": special,
        })
    };
    all.iter().map(object).collect()
}

/// Byte-pair encodings of `vocab.json` and `merges.txt`: CLIP's and Qwen's.
pub(super) fn pairs(vocab: Map<String, Value>, merges: &str, config: &Config) -> Result<Value, String> {
    let pairs = merges.lines().filter(|line| !line.starts_with("#version") && !line.trim().is_empty());
    let pairs: Vec<Vec<&str>> = pairs.map(|line| line.split(' ').collect()).collect();
    if let Some(line) = pairs.iter().find(|pair| pair.len() != 2) {
        return Err(format!("merges.txt: expected two pieces in a line, got {line:?}"));
    }
    let id = |token: &str| vocab.get(token).and_then(Value::as_u64);
    let added = added_tokens(config, id);
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let words = |pattern: &str, behavior: &str, invert: bool, bytes: &Value| {
        let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert});
        json!({"type": "Sequence", "pretokenizers": [split, bytes]})
    };
    let model = |end: &str, unknown: Option<&str>| {
        json!({
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": "",
            "end_of_word_suffix": end, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": pairs,
        })
    };
    if config.is("CLIPTokenizer") {
        let token = |token: &Option<AddedToken>, usual: &str| -> Result<(String, u64), String> {
            let text = token.as_ref().map_or(usual, |t| &t.content).to_owned();
            let id = id(&text).ok_or_else(|| format!("vocab.json: no token {text}"))?;
            Ok((text, id))
        };
        let start = token(&config.bos_token, "<|startoftext|>")?;
        let end = token(&config.eos_token, "<|endoftext|>")?;
        let unknown = config.unk_token.as_ref().map_or("<|endoftext|>", |t| &t.content);
        let normalizers = json!([
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]);
        // Its pre-tokeniser looks for words in bytes too; here they are split already.
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        return Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": words(CLIP_WORDS, "Removed", true, &bytes),
            "post_processor": {
                "type": "RobertaProcessing", "sep": end, "cls": start, "trim_offsets": false, "add_prefix_space": false,
            },
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": model(WORD_END, Some(unknown)),
        }));
    }
    if config.is("Qwen2Tokenizer") {
        return Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": words(QWEN_WORDS, "Isolated", false, &bytes),
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": model("", None),
        }));
    }
    Err(format!(
        "tokenizer_class {:?} with vocab.json alone: expected CLIPTokenizer, Qwen2Tokenizer, or a tokenizer.json",
        config.tokenizer_class
    ))
}

/// The unigram model of a `spiece.model`, as T5's tokenizer takes it.
pub(super) fn sentencepiece(file: &[u8], config: &Config) -> Result<Value, String> {
    if !config.is("T5Tokenizer") {
        let class = &config.tokenizer_class;
        return Err(format!(
            "tokenizer_class {class:?} with spiece.model alone: expected T5Tokenizer, or a tokenizer.json"
        ));
    }
    let mut vocab: Vec<(String, f64)> = Vec::new();
    let mut charsmap: &[u8] = &[];
    let mut unknown = 0;
    for (number, value) in fields(file)? {
        match (number, value) {
            (1, Field::Bytes(piece)) => {
                let (mut text, mut score) = (String::new(), 0.0);
                for field in fields(piece)? {
                    match field {
                        (1, Field::Bytes(bytes)) => {
                            text = std::str::from_utf8(bytes).map_err(|e| format!("a piece: {e}"))?.to_owned();
                        }
                        (2, Field::Number(bits)) => score = f64::from(f32::from_bits(bits as u32)),
                        _ => {}
                    }
                }
                vocab.push((text, score));
            }
            (2, Field::Bytes(trainer)) => {
                let id = |(number, value)| match (number, value) {
                    (40, Field::Number(id)) => Some(id),
                    _ => None,
                };
                unknown = fields(trainer)?.into_iter().find_map(id).unwrap_or(0);
            }
            (3, Field::Bytes(normalizer)) => {
                for field in fields(normalizer)? {
                    if let (2, Field::Bytes(map)) = field {
                        charsmap = map;
                    }
                }
            }
            _ => {}
        }
    }
    let extra = config.extra_ids.unwrap_or(100);
    vocab.extend((0..extra).rev().map(|i| (format!("<extra_id_{i}>"), 0.0)));
    let place = |token: &str| vocab.iter().position(|(piece, _)| piece == token).map(|id| id as u64);
    let end = config.eos_token.as_ref().map_or("</s>", |t| &t.content);
    let end_id = place(end).ok_or_else(|| format!("no piece {end}"))?;
    let metaspace = json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": true});
    let normalizer = if charsmap.is_empty() {
        Value::Null
    } else {
        json!({"type": "Precompiled", "precompiled_charsmap": BASE64_STANDARD.encode(charsmap)})
    };
    let template = |ids: &[&str]| -> Vec<Value> {
        let sequence = |id: &&str| {
            [json!({"Sequence": {"id": id, "type_id": 0}}), json!({"SpecialToken": {"id": end, "type_id": 0}})]
        };
        ids.iter().flat_map(sequence).collect()
    };
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added_tokens(config, place),
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": {
            "type": "TemplateProcessing", "single": template(&["A"]), "pair": template(&["A", "B"]),
            "special_tokens": {end: {"id": end, "ids": [end_id], "tokens": [end]}},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": false},
    }))
}

/// A field of a protocol buffer.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message of protocol buffers with their numbers, in order.
fn fields(mut bytes: &[u8]) -> Result<Vec<(u64, Field<'_>)>, String> {
    const CUT: &str = "not a whole sentencepiece model";
    fn take<'a>(bytes: &mut &'a [u8], len: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = bytes.split_at_checked(len).ok_or(CUT)?;
        *bytes = rest;
        Ok(taken)
    }
    fn varint(bytes: &mut &[u8]) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = take(bytes, 1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(CUT.into())
    }
    let little = |bytes: &[u8]| bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let value = match key & 7 {
            0 => Field::Number(varint(&mut bytes)?),
            1 => Field::Number(little(take(&mut bytes, 8)?)),
            2 => {
                let len = varint(&mut bytes)?;
                Field::Bytes(take(&mut bytes, usize::try_from(len).map_err(|_| CUT)?)?)
            }
            5 => Field::Number(little(take(&mut bytes, 4)?)),
            _ => return Err(CUT.into()),
        };
        all.push((key >> 3, value));
    }
    Ok(all)
}

/// What transformers does to decoded text: CLIP's ends of words become spaces, and where the configuration asks for it there is
/// no space before signs and English endings.
pub(super) fn clean_up(text: String, config: &Config) -> String {
    const PAIRS: [(&str, &str); 10] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    if config.is("CLIPTokenizer") {
        return text.replace(WORD_END, " ").trim().to_owned();
    }
    let pairs = PAIRS.iter().filter(|_| config.clean_up_tokenization_spaces);
    pairs.fold(text, |text, (from, to)| text.replace(from, to))
}
