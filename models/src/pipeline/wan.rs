//! The texts of diffusers' `WanPipeline`.

use std::collections::BTreeMap;

use flowtape_engine::Device;

use super::part::Part;
use super::{Encoded, PipelineFolder, PromptEncoder};
use crate::Result;

/// The length of texts where none is asked for.
const MAX_SEQUENCE_LENGTH: usize = 512;

/// UMT5, which is told where a text ends; what stands after it is zero, and the transformer attends to it.
///
/// Gives `text_embeddings` `[T, D]`.
pub struct WanPrompts(Part);

impl WanPrompts {
    /// Loads the text encoder of a pipeline.
    ///
    /// # Errors
    /// When a part is missing or broken.
    pub fn load(folder: &PipelineFolder, device: &Device) -> Result<Self> {
        Ok(Self(Part::load(folder, "", MAX_SEQUENCE_LENGTH, device)?))
    }
}

/// A prompt as Wan's pipelines clean it where `ftfy` is not installed: character references resolved twice, runs of white space
/// one space.
pub fn clean_prompt(prompt: &str) -> String {
    let unescaped = htmlize::unescape(prompt);
    let unescaped = htmlize::unescape(&*unescaped);
    unescaped.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl PromptEncoder for WanPrompts {
    fn encode(&self, prompts: &[&str], max_sequence_length: Option<usize>) -> Result<Vec<Encoded>> {
        let length = max_sequence_length.unwrap_or(MAX_SEQUENCE_LENGTH);
        let one = |prompt: &&str| -> Result<Encoded> {
            let (output, valid) = self.0.run_masked(&clean_prompt(prompt), length)?;
            let text = output.last_hidden_state.squeeze(0)?.narrow(0, 0, valid)?;
            Ok(BTreeMap::from([("text_embeddings", text.pad(0, 0, length - valid)?)]))
        };
        prompts.iter().map(one).collect()
    }
}
