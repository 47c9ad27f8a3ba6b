//! The texts of diffusers' `FluxPipeline`.

use std::collections::BTreeMap;

use flowtape_engine::{Device, Tensor};

use super::part::Part;
use super::{Encoded, PipelineFolder, PromptEncoder};
use crate::{Error, Result};

/// The longest text where T5's tokenizer has no limit.
const MAX_SEQUENCE_LENGTH: usize = 512;

/// CLIP, whose end token stands for the whole text, and T5. Neither is told where a text is padded.
///
/// Gives `text_embeddings` `[T, D]` (T5), `pooled_prompt_embeds` `[P]` and `clip_hidden` `[77, P]` (CLIP: the state
/// before the last), as NeMo stores them.
pub struct FluxPrompts {
    clip: Part,
    t5: Part,
}

impl FluxPrompts {
    /// Loads both text encoders of a pipeline.
    ///
    /// # Errors
    /// When a part is missing or broken.
    pub fn load(folder: &PipelineFolder, device: &Device) -> Result<Self> {
        Ok(Self {
            clip: Part::load(folder, "", 77, device)?,
            t5: Part::load(folder, "_2", MAX_SEQUENCE_LENGTH, device)?,
        })
    }
}

impl PromptEncoder for FluxPrompts {
    fn encode(&self, prompts: &[&str], max_sequence_length: Option<usize>) -> Result<Vec<Encoded>> {
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        let clip = self.clip.run(prompts, self.clip.length)?;
        let pooled = clip.pooler_output;
        let pooled = pooled.ok_or_else(|| Error::config("text_encoder", "a model that pools, such as CLIP", "none"))?;
        let mut all = BTreeMap::from([
            ("pooled_prompt_embeds", pooled),
            ("text_embeddings", self.t5.run(prompts, max_sequence_length.unwrap_or(self.t5.length))?.last_hidden_state),
        ]);
        all.extend(clip.hidden_states.into_iter().nth_back(1).map(|states| ("clip_hidden", states)));
        let row = |row: usize| {
            let one = |(name, tensor): (&&'static str, &Tensor)| Ok((*name, tensor.narrow(0, row, 1)?.squeeze(0)?));
            all.iter().map(one).collect::<Result<BTreeMap<_, _>>>()
        };
        (0..prompts.len()).map(row).collect()
    }
}
