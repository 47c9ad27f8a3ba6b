//! Prompts that are asked for again and again.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use flowtape_engine::Device;

use super::{Encoded, PipelineFolder, PromptEncoder};
use crate::{Error, Result};

/// A pipeline's encoder of prompts that remembers what it encoded, on the host: its text encoders are loaded for new prompts alone,
/// and gone afterwards.
#[derive(Debug)]
pub struct KnownPrompts {
    folder: PipelineFolder,
    device: Device,
    known: Mutex<BTreeMap<(String, Option<usize>), Encoded>>,
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
}

impl PromptEncoder for KnownPrompts {
    fn encode(&self, prompts: &[&str], max_sequence_length: Option<usize>) -> Result<Vec<Encoded>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let key = |prompt: &str| (prompt.to_owned(), max_sequence_length);
        let mut missing: Vec<&str> =
            prompts.iter().copied().filter(|prompt| !known.contains_key(&key(prompt))).collect();
        missing.sort_unstable();
        missing.dedup();
        if !missing.is_empty() {
            let encoder = self.folder.prompts(&self.device)?;
            // One by one, as they are asked for: others beside it would pad it.
            for prompt in missing {
                for encoded in encoder.encode(&[prompt], max_sequence_length)? {
                    let on_host =
                        |(name, tensor): (_, flowtape_engine::Tensor)| Ok((name, tensor.to_device(&Device::cpu())?));
                    let encoded = encoded.into_iter().map(on_host).collect::<Result<Encoded>>()?;
                    known.insert(key(prompt), encoded);
                }
            }
        }
        let there = |prompt: &&str| {
            let encoded =
                known.get(&key(prompt)).ok_or_else(|| Error::config("prompt", "one that was encoded", prompt))?;
            let back = |(name, tensor): (&&'static str, &flowtape_engine::Tensor)| {
                Ok((*name, tensor.to_device(&self.device)?))
            };
            encoded.iter().map(back).collect()
        };
        prompts.iter().map(there).collect()
    }
}
