//! Prompts of pipelines with one text model, which is told what to look for by a template around each prompt.

use flowtape_engine::{DType, Device, Tensor};

use super::{Encoded, PipelineFolder, PromptEncoder};
use crate::text::{TextModel, Tokenizer, stack_layers};
use crate::{Error, Result};

/// What stands around a prompt, and which states are taken.
#[derive(Clone, Copy, Debug)]
pub struct Template {
    /// Before the prompt.
    pub before: &'static str,
    /// After it.
    pub after: &'static str,
    /// What is taken out of prompts: it would stand for a picture.
    pub removed: &'static str,
    /// What is taken of the states.
    pub states: States,
    /// Whether the tokenizer puts the tokens around a text that its model begins with.
    pub special: bool,
    /// The longest text, where none is asked for.
    pub length: usize,
    /// Whether what is led away from stands alone, without the template.
    pub bare_negative: bool,
}

/// What most have in common.
const TEMPLATE: Template = Template {
    before: "",
    after: "",
    removed: "",
    states: States::BeforeLast,
    special: false,
    length: 512,
    bare_negative: false,
};

/// What is taken of a text model's states.
#[derive(Clone, Copy, Debug)]
pub enum States {
    /// The last one of the text alone, without padding, from this token on.
    LastFrom(usize),
    /// Those of three layers side by side, padded to a length; padding is kept as the model leaves it.
    Layers([usize; 3]),
    /// Those before the last layer of the text alone, cut to a length with what stands around it, and a mask that says that
    /// all are valid.
    BeforeLast,
}

/// Qwen-Image's: 34 tokens of the template are left out.
pub const QWEN_IMAGE: Template = Template {
    before: "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial \
             relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    after: "<|im_end|>\n<|im_start|>assistant\n",
    states: States::LastFrom(34),
    ..TEMPLATE
};

/// FLUX.2-dev's, for Mistral; the line break is the reference's.
pub const FLUX2: Template = Template {
    before: "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses focusing on \
             object relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT][INST]",
    after: "[/INST]",
    removed: "[IMG]",
    states: States::Layers([10, 20, 30]),
    ..TEMPLATE
};

/// FLUX.2-klein's, for Qwen3 that is told not to think.
pub const FLUX2_KLEIN: Template = Template {
    before: "<|im_start|>user\n",
    after: "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    states: States::Layers([9, 18, 27]),
    ..TEMPLATE
};

/// Z-Image's, for Qwen3 that may think.
pub const Z_IMAGE: Template =
    Template { before: "<|im_start|>user\n", after: "<|im_end|>\n<|im_start|>assistant\n", ..TEMPLATE };

/// Lumina-Image 2.0's, for Gemma 2.
pub const LUMINA2: Template = Template {
    before: "You are an assistant designed to generate superior images with the superior degree of image-text alignment based on \
             textual prompts or user prompts. <Prompt Start> ",
    special: true,
    length: 256,
    bare_negative: true,
    ..TEMPLATE
};

/// Gives `text_embeddings` `[T, D]`, or of three layers `[T, 3 D]`, and `text_attention_mask` `[T]` where texts stay apart in
/// length.
pub struct LanguagePrompts {
    tokenizer: Tokenizer,
    model: Box<dyn TextModel>,
    template: Template,
    device: Device,
}

impl LanguagePrompts {
    /// Loads the text model of a pipeline.
    ///
    /// # Errors
    /// When a part is missing or broken.
    pub fn load(folder: &PipelineFolder, template: Template, device: &Device) -> Result<Self> {
        Ok(Self {
            tokenizer: folder.tokenizer("tokenizer")?,
            model: folder.text_encoder("text_encoder", None, device)?,
            template,
            device: device.clone(),
        })
    }

    fn embed(&self, template: Template, prompt: &str, length: usize) -> Result<Tensor> {
        let Template { before, after, removed, states, special, .. } = template;
        let prompt = if removed.is_empty() { prompt.to_owned() } else { prompt.replace(removed, "") };
        let text = format!("{before}{prompt}{after}");
        let row = |values: Vec<u32>| {
            let count = values.len();
            Tensor::from_vec(values, &[1, count], &self.device)
        };
        match states {
            States::LastFrom(start) => {
                let mut ids = self.tokenizer.encode(&text, special)?;
                ids.truncate(start + length);
                let count = ids.len();
                let last = self.model.forward(&row(ids)?, None)?.last_hidden_state;
                Ok(last.narrow(1, start.min(count), count.saturating_sub(start))?.squeeze(0)?)
            }
            States::Layers(layers) => {
                let tokens = self.tokenizer.pad(
                    self.tokenizer.encode(&text, special)?,
                    length,
                    self.tokenizer.padding_side(),
                )?;
                let output = self.model.forward(&row(tokens.ids)?, Some(&row(tokens.mask)?))?;
                Ok(stack_layers(&output, &layers)?.squeeze(0)?)
            }
            States::BeforeLast => {
                let mut ids = self.tokenizer.encode(&text, special)?;
                ids.truncate(length);
                let states = self.model.forward(&row(ids)?, None)?.hidden_states;
                let lacking = || Error::config("text_encoder", "at least one layer", states.len());
                Ok(states.iter().nth_back(1).ok_or_else(lacking)?.squeeze(0)?)
            }
        }
    }

    fn encode_as(&self, template: Template, prompts: &[&str], length: Option<usize>) -> Result<Vec<Encoded>> {
        let length = length.unwrap_or(template.length);
        let one = |prompt: &&str| -> Result<Encoded> {
            let text = self.embed(template, prompt, length)?;
            let valid = matches!(template.states, States::BeforeLast);
            let mask = valid.then(|| Tensor::ones(&[text.dim(0)?], DType::F32, &self.device)).transpose()?;
            let mask = mask.map(|mask| ("text_attention_mask", mask));
            Ok([("text_embeddings", text)].into_iter().chain(mask).collect())
        };
        prompts.iter().map(one).collect()
    }
}

impl PromptEncoder for LanguagePrompts {
    fn encode(&self, prompts: &[&str], max_sequence_length: Option<usize>) -> Result<Vec<Encoded>> {
        self.encode_as(self.template, prompts, max_sequence_length)
    }

    fn encode_negative(&self, prompt: &str, max_sequence_length: Option<usize>) -> Result<Encoded> {
        let bare = Template { before: "", after: "", ..self.template };
        let template = if self.template.bare_negative { bare } else { self.template };
        Ok(self.encode_as(template, &[prompt], max_sequence_length)?.into_iter().next().unwrap_or_default())
    }
}
