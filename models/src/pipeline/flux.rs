//! The texts of diffusers' `FluxPipeline`.

use std::collections::BTreeMap;

use flowtape_engine::{Device, Tensor};

use super::{PipelineFolder, PromptEncoder};
use crate::text::{TextModel, TextModelOutput, Tokenizer};
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

/// A text encoder and its tokenizer.
struct Part {
    tokenizer: Tokenizer,
    model: Box<dyn TextModel>,
    length: usize,
    device: Device,
}

impl Part {
    fn load(folder: &PipelineFolder, suffix: &str, length: usize, device: &Device) -> Result<Self> {
        let tokenizer = folder.tokenizer(&format!("tokenizer{suffix}"))?;
        let length = tokenizer.model_max_length().unwrap_or(length);
        let model = folder.text_encoder(&format!("text_encoder{suffix}"), None, device)?;
        Ok(Self { tokenizer, model, length, device: device.clone() })
    }

    fn run(&self, prompts: &[&str], length: usize) -> Result<TextModelOutput> {
        let mut ids = Vec::new();
        for prompt in prompts {
            ids.extend(self.tokenizer.encode_padded(prompt, length, self.tokenizer.padding_side())?.ids);
        }
        self.model.forward(&Tensor::from_vec(ids, &[prompts.len(), length], &self.device)?, None)
    }
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
    fn encode(
        &self,
        prompts: &[&str],
        max_sequence_length: Option<usize>,
    ) -> Result<Vec<BTreeMap<&'static str, Tensor>>> {
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
