//! The texts of diffusers' `Krea2Pipeline`.

use std::collections::BTreeMap;

use flowtape_engine::{DType, Device, Tensor};

use super::{Encoded, PipelineFolder, PromptEncoder, QWEN_IMAGE};
use crate::text::{TextModel, Tokenizer};
use crate::{Error, Result};

/// Tokens of the template that are left out before a prompt, and those after it, whatever the tokenizer makes of it.
const PREFIX_TOKENS: usize = 34;
const SUFFIX_TOKENS: usize = 5;
/// The longest text, its suffix included.
const MAX_SEQUENCE_LENGTH: usize = 512;
/// The states that are taken where a pipeline does not say so.
const LAYERS: [usize; 12] = [2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35];

/// Qwen3-VL's text model with Qwen-Image's template. The reference pads between a prompt and what stands after it; padding has no
/// position and is not attended to, so here it is left out.
///
/// Gives `text_embeddings` `[T, layers, D]` and `text_attention_mask` `[T]`, which is 1.
pub struct Krea2Prompts {
    tokenizer: Tokenizer,
    model: Box<dyn TextModel>,
    layers: Vec<usize>,
    device: Device,
}

impl Krea2Prompts {
    /// Loads the text model of a pipeline.
    ///
    /// # Errors
    /// When a part is missing or broken.
    pub fn load(folder: &PipelineFolder, device: &Device) -> Result<Self> {
        Ok(Self {
            tokenizer: folder.tokenizer("tokenizer")?,
            model: folder.text_encoder("text_encoder", None, device)?,
            layers: folder.whole_numbers("text_encoder_select_layers").unwrap_or_else(|| LAYERS.to_vec()),
            device: device.clone(),
        })
    }
}

impl PromptEncoder for Krea2Prompts {
    fn encode(&self, prompts: &[&str], max_sequence_length: Option<usize>) -> Result<Vec<Encoded>> {
        let length = max_sequence_length.unwrap_or(MAX_SEQUENCE_LENGTH);
        let one = |prompt: &&str| -> Result<Encoded> {
            let mut ids = self.tokenizer.encode(&format!("{}{prompt}", QWEN_IMAGE.before), false)?;
            ids.truncate((PREFIX_TOKENS + length).saturating_sub(SUFFIX_TOKENS));
            ids.extend(self.tokenizer.encode(QWEN_IMAGE.after, false)?);
            let count = ids.len();
            let states = self.model.forward(&Tensor::from_vec(ids, &[1, count], &self.device)?, None)?.hidden_states;
            let taken: Option<Vec<&Tensor>> = self.layers.iter().map(|layer| states.get(*layer)).collect();
            let lacking = || Error::config("text_encoder", format!("layers {:?}", self.layers), states.len());
            let text = Tensor::stack(&taken.ok_or_else(lacking)?, 2)?.squeeze(0)?;
            let start = PREFIX_TOKENS.min(count);
            let text = text.narrow(0, start, count - start)?;
            let mask = Tensor::ones(&[count - start], DType::F32, &self.device)?;
            Ok(BTreeMap::from([("text_embeddings", text), ("text_attention_mask", mask)]))
        };
        prompts.iter().map(one).collect()
    }
}
