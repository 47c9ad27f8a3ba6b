//! Prompts that are asked for again and again.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use flowtape_engine::Device;

use super::{Encoded, PipelineFolder, PromptEncoder};
use crate::{Error, Result};

/// A prompt, its length, and whether it is what pictures are led away from.
type Key = (String, Option<usize>, bool);

/// A pipeline's encoder of prompts that remembers what it encoded, on the host: its text encoders are loaded for new prompts alone,
/// and gone afterwards.
#[derive(Debug)]
pub struct KnownPrompts {
    folder: PipelineFolder,
    device: Device,
    known: Mutex<BTreeMap<Key, Encoded>>,
}

impl KnownPrompts {
    /// Loads nothing yet.
    pub fn new(folder: PipelineFolder, device: &Device) -> Self {
        Self { folder, device: device.clone(), known: Mutex::default() }
    }

    /// Where embeddings are given.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The pipeline.
    pub fn folder(&self) -> &PipelineFolder {
        &self.folder
    }

    fn encode_once(&self, prompts: &[&str], length: Option<usize>, negative: bool) -> Result<Vec<Encoded>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let key = |prompt: &str| (prompt.to_owned(), length, negative);
        let mut missing: Vec<&str> =
            prompts.iter().copied().filter(|prompt| !known.contains_key(&key(prompt))).collect();
        missing.sort_unstable();
        missing.dedup();
        let moved = |encoded: &Encoded, device: &Device| -> Result<Encoded> {
            encoded.iter().map(|(name, tensor)| Ok((*name, tensor.to_device(device)?))).collect()
        };
        if !missing.is_empty() {
            let encoder = self.folder.prompts(&self.device)?;
            // One by one, as they are asked for: others beside it would pad it.
            for prompt in missing {
                let encoded = match negative {
                    true => vec![encoder.encode_negative(prompt, length)?],
                    false => encoder.encode(&[prompt], length)?,
                };
                for encoded in encoded {
                    known.insert(key(prompt), moved(&encoded, &Device::cpu())?);
                }
            }
        }
        let there = |prompt: &&str| {
            let encoded = known.get(&key(prompt));
            moved(encoded.ok_or_else(|| Error::config("prompt", "one that was encoded", prompt))?, &self.device)
        };
        prompts.iter().map(there).collect()
    }
}

impl PromptEncoder for KnownPrompts {
    fn encode(&self, prompts: &[&str], max_sequence_length: Option<usize>) -> Result<Vec<Encoded>> {
        self.encode_once(prompts, max_sequence_length, false)
    }

    fn encode_negative(&self, prompt: &str, max_sequence_length: Option<usize>) -> Result<Encoded> {
        Ok(self.encode_once(&[prompt], max_sequence_length, true)?.into_iter().next().unwrap_or_default())
    }
}
