//! A text encoder of a pipeline, with its tokenizer.

use flowtape_engine::{Device, Tensor};

use super::PipelineFolder;
use crate::Result;
use crate::text::{TextModel, TextModelOutput, Tokenizer, Tokens};

/// A text encoder, its tokenizer, and the length of texts where none is asked for.
pub(super) struct Part {
    pub(super) tokenizer: Tokenizer,
    pub(super) model: Box<dyn TextModel>,
    pub(super) length: usize,
    pub(super) device: Device,
}

impl Part {
    /// The parts `tokenizer` and `text_encoder` with a suffix. Texts are as long as the tokenizer says, else `length` tokens.
    pub(super) fn load(folder: &PipelineFolder, suffix: &str, length: usize, device: &Device) -> Result<Self> {
        let tokenizer = folder.tokenizer(&format!("tokenizer{suffix}"))?;
        let length = tokenizer.model_max_length().unwrap_or(length);
        let model = folder.text_encoder(&format!("text_encoder{suffix}"), None, device)?;
        Ok(Self { tokenizer, model, length, device: device.clone() })
    }

    /// The tokens of a text, cut or padded.
    pub(super) fn tokens(&self, text: &str, length: usize) -> Result<Tokens> {
        self.tokenizer.encode_padded(text, length, self.tokenizer.padding_side())
    }

    /// A row of numbers `[1, T]`.
    pub(super) fn row(&self, values: Vec<u32>) -> Result<Tensor> {
        let count = values.len();
        Ok(Tensor::from_vec(values, &[1, count], &self.device)?)
    }

    /// What the model makes of several texts that is not told where they are padded.
    pub(super) fn run(&self, prompts: &[&str], length: usize) -> Result<TextModelOutput> {
        let mut ids = Vec::new();
        for prompt in prompts {
            ids.extend(self.tokens(prompt, length)?.ids);
        }
        self.model.forward(&Tensor::from_vec(ids, &[prompts.len(), length], &self.device)?, None)
    }

    /// What the model makes of one text's tokens, and how many stand there that are no padding: they come first.
    pub(super) fn run_masked(&self, text: &str, length: usize) -> Result<(TextModelOutput, usize)> {
        let tokens = self.tokens(text, length)?;
        let valid = tokens.mask.iter().sum::<u32>() as usize;
        Ok((self.model.forward(&self.row(tokens.ids)?, Some(&self.row(tokens.mask)?))?, valid))
    }
}
