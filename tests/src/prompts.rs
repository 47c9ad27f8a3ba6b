//! Tokenizers against transformers', and what pipelines make of prompts.

use std::path::Path;

use flowtape_engine::Device;
use flowtape_models::pipeline::{PipelineFolder, clean_prompt, glyph_text};
use flowtape_models::text::{Padding, Tokenizer};
use serde_json::Value;

use crate::Outcome;
use crate::golden::{Any, Golden, exact, relative, text};
use crate::text::compare;

/// What a pipeline makes of prompts, as diffusers and NeMo have it.
pub(crate) fn pipeline(dir: &Path, name: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let case = Golden::open(dir, name)?.json;
    let outputs = Golden::tensors(dir, "outputs")?;
    let encoder = PipelineFolder::open(&dir.join("pipeline"))?.prompts(&Device::cpu())?;
    let mut runs = case["runs"].as_object().ok_or("no runs")?.values();
    let length = runs.find_map(|run| run["max_sequence_length"].as_u64()).map(|length| length as usize);
    for (prefix, key) in [("", "prompt"), ("negative_", "negative_prompt")] {
        let Some(prompt) = case[key].as_str() else { continue };
        let tensors = encoder.encode(&[prompt], length)?;
        let names = [
            ("prompt_embeds", "text_embeddings"),
            ("pooled_prompt_embeds", "pooled_prompt_embeds"),
            ("nemo/prompt_embeds", "text_embeddings"),
            ("nemo/text_embeddings", "text_embeddings"),
            ("connector.text_embeddings", "text_embeddings"),
            ("connector.audio_text_embeddings", "audio_text_embeddings"),
            ("connector.mask", "text_mask"),
            ("prompt_embeds_valid", "text_embeddings"),
            ("nemo/pooled_prompt_embeds", "pooled_prompt_embeds"),
            ("nemo/clip_hidden", "clip_hidden"),
        ];
        for (golden, ours) in names {
            let name = format!("{prefix}{golden}");
            if outputs.has(&name) {
                let got = tensors[0].get(ours).map(|tensor| tensor.unsqueeze(0)).transpose()?;
                // What stands behind more layers has a bound of its own.
                let bound = case["tolerance"]["connector outputs"].as_f64().filter(|_| golden.starts_with("connector"));
                let want = outputs.tensor(&name)?;
                match (got, bound) {
                    (Some(got), Some(bound)) => {
                        out.push(Outcome::measured(name, relative(&got, &want)?, bound, format!("{:?}", want.dims())));
                    }
                    (got, _) => out.push(compare(&name, got, &want)?),
                }
            }
        }
    }
    Ok(())
}

/// Difficult strings, token by token.
pub(crate) fn check(dir: &Path, _: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let case = Golden::open(dir, "case")?.json;
    if dir.join("prompts.json").exists() {
        prompts(dir, out)?;
    }
    for name in case["tokenizers"].as_object().ok_or("no tokenizers")?.keys() {
        let folder = dir.join(name);
        encodings(name, &folder, &folder, out)?;
        // What else a tokenizer can be read from gives the same.
        if folder.join("tokenizer.json").exists()
            && ["spiece.model", "vocab.json"].iter().any(|f| folder.join(f).exists())
        {
            let older = tempfile::tempdir()?;
            for entry in std::fs::read_dir(&folder)? {
                let path = entry?.path();
                if path.file_name().is_some_and(|name| name != "tokenizer.json") {
                    std::fs::copy(&path, older.path().join(path.file_name().unwrap_or_default()))?;
                }
            }
            encodings(&format!("{name} without tokenizer.json"), &folder, older.path(), out)?;
        }
    }
    Ok(())
}

/// What pipelines make of a prompt before it is tokenised: Wan's cleaning where `ftfy` is not installed, HunyuanVideo's quotes.
fn prompts(dir: &Path, out: &mut Vec<Outcome>) -> Any<()> {
    let all = Golden::open(dir, "prompts")?.json;
    let rows = |key: &str| all[key].as_array().cloned().unwrap_or_default();
    let mut wrong = Vec::new();
    for row in rows("clean") {
        let want = row.get("without_ftfy").unwrap_or(&row["with_ftfy"]);
        if want != &Value::from(clean_prompt(text(&row, "text")?)) {
            wrong.push(format!("{}", row["text"]));
        }
    }
    out.push(exact("prompts/clean", wrong.is_empty(), wrong.join(", ")));
    let glyphs = rows("glyph");
    let same =
        |row: &Value| row["glyph_text"].as_str() == glyph_text(row["prompt"].as_str().unwrap_or_default()).as_deref();
    out.push(exact("prompts/glyph", glyphs.iter().all(same), format!("{} prompts", glyphs.len())));
    Ok(())
}

fn encodings(name: &str, goldens: &Path, folder: &Path, out: &mut Vec<Outcome>) -> Any<()> {
    let wanted = Golden::open(goldens, "encodings")?.json;
    let tokenizer = Tokenizer::open(folder)?;
    let length = wanted["max_length"].as_u64().ok_or("no max_length")? as usize;
    let side = match text(&wanted, "padding_side")? {
        "left" => Padding::Left,
        _ => Padding::Right,
    };
    let ids = |value: &Value| -> Option<Vec<u32>> {
        value.as_array()?.iter().map(|id| id.as_u64().map(|id| id as u32)).collect()
    };
    let strings = wanted["strings"].as_array().ok_or("no strings")?;
    let mut wrong: [Vec<String>; 4] = Default::default();
    for string in strings {
        let input = text(string, "text")?;
        let plain = string.get("ids_without_special").unwrap_or(&string["ids"]);
        let padded = tokenizer.encode_padded(input, length, side)?;
        let all = ids(&string["ids"]).ok_or("no ids")?;
        let got = [
            Some(tokenizer.encode(input, true)?) == Some(all.clone()),
            Some(tokenizer.encode(input, false)?) == ids(plain),
            Some(padded.ids) == ids(&string["padded"]) && Some(padded.mask) == ids(&string["mask"]),
            tokenizer.decode(&all)? == text(string, "decoded")?,
        ];
        for (list, _) in wrong.iter_mut().zip(got).filter(|(_, holds)| !holds) {
            list.push(format!("{input:?}"));
        }
    }
    for (what, wrong) in ["ids", "ids without special", "padded", "decoded"].into_iter().zip(&wrong) {
        let detail = if wrong.is_empty() { format!("{} strings", strings.len()) } else { wrong.join(", ") };
        out.push(exact(format!("{name}/{what}"), wrong.is_empty(), detail));
    }
    out.push(exact(format!("{name}/padding side"), tokenizer.padding_side() == side, ""));
    Ok(())
}
