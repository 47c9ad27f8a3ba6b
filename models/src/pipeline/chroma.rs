//! The texts of diffusers' `ChromaPipeline`.

use std::collections::BTreeMap;

use flowtape_engine::{DType, Device, Tensor};

use super::part::Part;
use super::{Encoded, PipelineFolder, PromptEncoder};
use crate::Result;

/// The length of texts where none is asked for.
const MAX_SEQUENCE_LENGTH: usize = 512;

/// T5, which is told where a text ends, unlike FLUX.1's.
///
/// Gives `text_embeddings` `[T, D]` and `text_attention_mask` `[T]`, 0 at padding.
pub struct ChromaPrompts(Part);

impl ChromaPrompts {
    /// Loads the text encoder of a pipeline.
    ///
    /// # Errors
    /// When a part is missing or broken.
    pub fn load(folder: &PipelineFolder, device: &Device) -> Result<Self> {
        Ok(Self(Part::load(folder, "", MAX_SEQUENCE_LENGTH, device)?))
    }
}

impl PromptEncoder for ChromaPrompts {
    fn encode(&self, prompts: &[&str], max_sequence_length: Option<usize>) -> Result<Vec<Encoded>> {
        let length = max_sequence_length.unwrap_or(MAX_SEQUENCE_LENGTH);
        let one = |prompt: &&str| -> Result<Encoded> {
            let (output, valid) = self.0.run_masked(prompt, length)?;
            let mask = Tensor::ones(&[valid], DType::F32, &self.0.device)?.pad(0, 0, length - valid)?;
            Ok(BTreeMap::from([
                ("text_embeddings", output.last_hidden_state.squeeze(0)?),
                ("text_attention_mask", mask),
            ]))
        };
        prompts.iter().map(one).collect()
    }
}
