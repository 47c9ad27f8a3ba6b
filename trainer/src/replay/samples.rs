//! Batches on the disk, as they were read: `samples.json` says what they are, `samples.safetensors` has their tensors.

use std::collections::BTreeMap;
use std::path::Path;

use flowtape_data::{BatchPlan, Cursor, Loaded, Media, Pick, Sample, Text, TextEmbeddings};
use flowtape_engine::safetensors::{SafeTensors, save};
use flowtape_engine::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::io;
use crate::{Error, Result};

const LIST: &str = "samples.json";
const TENSORS: &str = "samples.safetensors";

/// A sample, but for its tensors.
#[derive(Serialize, Deserialize)]
struct Stored {
    index: usize,
    place: u64,
    /// Whether it is latents rather than pixels.
    latents: bool,
    /// Its caption, where it has no embeddings.
    caption: Option<String>,
    /// Names of its embeddings, and of what else an adapter reads.
    embeddings: Vec<String>,
    others: Vec<String>,
}

fn key(part: usize, sample: usize, kind: &str, name: &str) -> String {
    format!("{part}.{sample}.{kind}{name}")
}

/// Writes the batches of a step into a folder.
pub(super) fn write(folder: &Path, parts: &[Loaded]) -> Result<()> {
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    let mut list = Vec::new();
    for (p, part) in parts.iter().enumerate() {
        let mut stored = Vec::new();
        for (s, (pick, sample)) in part.plan.picks.iter().zip(&part.samples).enumerate() {
            tensors.push((key(p, s, "media", ""), sample.media.tensor().clone()));
            let (caption, embeddings) = match &sample.text {
                Text::Caption(caption) => (Some(caption.clone()), BTreeMap::new()),
                Text::Embeddings(embeddings) => (None, embeddings.tensors.clone()),
            };
            for (kind, all) in [("text.", &embeddings), ("other.", &sample.tensors)] {
                tensors.extend(all.iter().map(|(name, tensor)| (key(p, s, kind, name), tensor.clone())));
            }
            stored.push(Stored {
                index: pick.index,
                place: pick.place,
                latents: matches!(sample.media, Media::Latents(_)),
                caption,
                embeddings: embeddings.into_keys().collect(),
                others: sample.tensors.keys().cloned().collect(),
            });
        }
        list.push(stored);
    }
    save(folder.join(TENSORS), &tensors, &BTreeMap::new())?;
    let path = folder.join(LIST);
    std::fs::write(&path, format!("{:#}\n", serde_json::json!(list))).map_err(io(&path))
}

/// Reads what [`write`] wrote.
pub(super) fn read(folder: &Path) -> Result<Vec<Loaded>> {
    let path = folder.join(LIST);
    let text = std::fs::read(&path).map_err(io(&path))?;
    let list: Vec<Vec<Stored>> =
        serde_json::from_slice(&text).map_err(|e| Error::Run { path, what: format!("not a bundle's samples: {e}") })?;
    let file = SafeTensors::open(folder.join(TENSORS))?;
    let get = |key: String| file.get(&key, &Device::cpu(), None);
    let sample = |p: usize, s: usize, stored: &Stored| -> Result<Sample> {
        let named = |kind: &str, names: &[String]| -> Result<BTreeMap<String, Tensor>> {
            names.iter().map(|name| Ok((name.clone(), get(key(p, s, kind, name))?))).collect()
        };
        let media = get(key(p, s, "media", ""))?;
        let media = if stored.latents { Media::Latents(media) } else { Media::Pixels(media) };
        let text = match &stored.caption {
            Some(caption) => Text::Caption(caption.clone()),
            None => Text::Embeddings(TextEmbeddings { tensors: named("text.", &stored.embeddings)? }),
        };
        Ok(Sample { tensors: named("other.", &stored.others)?, ..Sample::new(media, text) })
    };
    let part = |(p, part): (usize, &Vec<Stored>)| -> Result<Loaded> {
        let picks = part.iter().map(|stored| Pick { index: stored.index, place: stored.place }).collect();
        let samples = part.iter().enumerate().map(|(s, stored)| sample(p, s, stored)).collect::<Result<_>>()?;
        Ok(Loaded { plan: BatchPlan { picks, next: Cursor::default() }, samples })
    };
    list.iter().enumerate().map(part).collect()
}
