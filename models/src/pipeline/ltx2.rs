//! The texts of diffusers' `LTX2Pipeline`.

use std::collections::BTreeMap;

use flowtape_engine::Device;

use super::part::Part;
use super::{Encoded, PipelineFolder, PromptEncoder};
use crate::Result;
use crate::ltx2::LTX2TextConnectors;

/// The length of texts where none is asked for.
const MAX_SEQUENCE_LENGTH: usize = 1024;

/// Gemma 3, all of whose states the connectors take.
///
/// Gives `text_embeddings` `[T, D]`, `audio_text_embeddings` `[T, E]` and `text_mask` `[T]`.
pub struct LTX2Prompts {
    gemma: Part,
    connectors: LTX2TextConnectors,
}

impl LTX2Prompts {
    /// Loads the text encoder and the connectors of a pipeline.
    ///
    /// # Errors
    /// When a part is missing or broken.
    pub fn load(folder: &PipelineFolder, device: &Device) -> Result<Self> {
        Ok(Self {
            gemma: Part::load(folder, "", MAX_SEQUENCE_LENGTH, device)?,
            connectors: LTX2TextConnectors::load(&folder.part("connectors")?, None, device)?,
        })
    }
}

impl PromptEncoder for LTX2Prompts {
    fn encode(&self, prompts: &[&str], max_sequence_length: Option<usize>) -> Result<Vec<Encoded>> {
        let length = max_sequence_length.unwrap_or(MAX_SEQUENCE_LENGTH);
        let one = |prompt: &&str| -> Result<Encoded> {
            let tokens = self.gemma.tokens(prompt.trim(), length)?;
            let (ids, mask) = (self.gemma.row(tokens.ids)?, self.gemma.row(tokens.mask)?);
            let states = self.gemma.model.forward(&ids, Some(&mask))?.hidden_states;
            let text = self.connectors.forward(&states, &mask)?;
            Ok(BTreeMap::from([
                ("text_embeddings", text.text_embeddings.squeeze(0)?),
                ("audio_text_embeddings", text.audio_text_embeddings.squeeze(0)?),
                ("text_mask", text.text_mask.squeeze(0)?),
            ]))
        };
        prompts.iter().map(one).collect()
    }
}
