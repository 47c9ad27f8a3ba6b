//! The texts of diffusers' `HunyuanVideo15Pipeline` and `HunyuanVideo15ImageToVideoPipeline`.

use std::collections::BTreeMap;

use flowtape_engine::{DType, Device, Tensor};

use super::part::Part;
use super::pictures::IMAGE_ENCODER;
use super::{ConditionImage, Encoded, PipelineFolder, PromptEncoder};
use crate::vision::SiglipVisionModel;
use crate::{Error, Result};

/// What stands around a prompt; the runs of spaces are the reference's.
const BEFORE: &str = "<|im_start|>system\nYou are a helpful assistant. Describe the video by detailing the following aspects: \
                      \u{20}       1. The main content and theme of the video. \
                      \u{20}       2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects. \
                      \u{20}       3. Actions, events, behaviors temporal relationships, physical movement changes of the objects. \
                      \u{20}       4. background environment, light, style and atmosphere. \
                      \u{20}       5. camera angles, movements, and transitions used in the video.<|im_end|>\n<|im_start|>user\n";
const AFTER: &str = "<|im_end|>\n<|im_start|>assistant\n";
/// Tokens of the template that are left out, whatever the tokenizer makes of it.
const TEMPLATE_TOKENS: usize = 108;
/// Tokens of a prompt.
const MAX_SEQUENCE_LENGTH: usize = 1000;
/// Tokens of the glyphs.
const GLYPH_LENGTH: usize = 256;
/// Which of the text model's states is taken, from the end.
const STATE_FROM_END: usize = 2;

/// Qwen2.5-VL's text model, of which the state before the last two layers is taken, and byT5, which reads what stands in quotes.
///
/// Gives `text_embeddings` `[T, D]`, `text_mask` `[T]`, `text_embeddings_2` `[T2, D2]` and `text_mask_2` `[T2]`: without padding.
/// Of a prompt without quotes the second text is one token of zeros that is masked out. Of a first frame, which SigLIP sees, it gives
/// `image_embeds` `[N, E]`.
pub struct HunyuanPrompts {
    language: Part,
    glyphs: Part,
    image_encoder: Option<SiglipVisionModel>,
}

impl HunyuanPrompts {
    /// Loads both text encoders of a pipeline, and its image encoder where it has one.
    ///
    /// # Errors
    /// When a part is missing or broken.
    pub fn load(folder: &PipelineFolder, device: &Device) -> Result<Self> {
        let encoder = folder.has(IMAGE_ENCODER).then(|| folder.part(IMAGE_ENCODER)).transpose()?;
        Ok(Self {
            language: Part::load(folder, "", MAX_SEQUENCE_LENGTH, device)?,
            glyphs: Part::load(folder, "_2", GLYPH_LENGTH, device)?,
            image_encoder: encoder.map(|path| SiglipVisionModel::load(&path, None, device)).transpose()?,
        })
    }

    fn prompt(&self, prompt: &str, length: usize) -> Result<Tensor> {
        // An empty message is a space in the reference.
        let text = format!("{BEFORE}{}{AFTER}", if prompt.is_empty() { " " } else { prompt });
        let mut ids = self.language.tokenizer.encode(&text, false)?;
        ids.truncate(TEMPLATE_TOKENS + length);
        let count = ids.len();
        let start = TEMPLATE_TOKENS.min(count.saturating_sub(1));
        // Later tokens do not reach back to earlier ones: padding is left out.
        let states = self.language.model.forward(&self.language.row(ids)?, None)?.hidden_states;
        let state = states.iter().nth_back(STATE_FROM_END);
        let state = state.ok_or_else(|| Error::config("text_encoder", "at least two layers", states.len()))?;
        Ok(state.squeeze(0)?.narrow(0, start, count - start)?)
    }

    fn glyphs(&self, prompt: &str) -> Result<[Tensor; 2]> {
        let text = glyph_text(prompt);
        let (output, valid) = self.glyphs.run_masked(text.as_deref().unwrap_or_default(), GLYPH_LENGTH)?;
        let states = output.last_hidden_state.squeeze(0)?;
        let ones = |count, value: f64| Tensor::full(&[count], value, DType::F32, &self.glyphs.device);
        Ok(match text {
            Some(_) => [states.narrow(0, 0, valid)?, ones(valid, 1.0)?],
            None => [Tensor::zeros(&[1, states.dim(1)?], states.dtype(), states.device())?, ones(1, 0.0)?],
        })
    }
}

/// What byT5 reads of a prompt: each quoted text of one line once, where there is one.
pub fn glyph_text(prompt: &str) -> Option<String> {
    let mut found: Vec<&str> = Vec::new();
    let mut rest = prompt;
    while let Some(at) = rest.find(['"', '“']) {
        let open = rest[at..].chars().next().unwrap_or('"');
        let inner = &rest[at + open.len_utf8()..];
        let end = inner.find(if open == '"' { '"' } else { '”' });
        match end.filter(|end| !inner[..*end].contains('\n')) {
            Some(end) => {
                let text = &inner[..end];
                if !found.contains(&text) {
                    found.push(text);
                }
                let close = inner[end..].chars().next().map_or(0, char::len_utf8);
                rest = &inner[end + close..];
            }
            None => rest = inner,
        }
    }
    let texts: Vec<String> = found.iter().map(|text| format!("Text \"{text}\". ")).collect();
    (!texts.is_empty()).then(|| texts.concat())
}

impl PromptEncoder for HunyuanPrompts {
    fn encode(&self, prompts: &[&str], max_sequence_length: Option<usize>) -> Result<Vec<Encoded>> {
        let length = max_sequence_length.unwrap_or(MAX_SEQUENCE_LENGTH);
        let one = |prompt: &&str| -> Result<Encoded> {
            let text = self.prompt(prompt, length)?;
            let mask = Tensor::ones(&[text.dim(0)?], DType::F32, &self.language.device)?;
            let [glyphs, glyph_mask] = self.glyphs(prompt)?;
            Ok(BTreeMap::from([
                ("text_embeddings", text),
                ("text_mask", mask),
                ("text_embeddings_2", glyphs),
                ("text_mask_2", glyph_mask),
            ]))
        };
        prompts.iter().map(one).collect()
    }

    fn image_embeds(&self, images: &[ConditionImage]) -> Result<Tensor> {
        let [image] = images else {
            return Err(Error::config("image", "the first frame of the film alone", images.len()));
        };
        let model = self.image_encoder.as_ref().zip(image.seen.as_ref());
        let (model, seen) = model.ok_or_else(|| Error::config(IMAGE_ENCODER, "a part of the pipeline", "none"))?;
        let pixels = seen.values.to_device(&self.language.device)?.unsqueeze(0)?;
        Ok(model.forward(&pixels)?.last_hidden_state.squeeze(0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_texts_are_read_once_and_only_within_a_line() {
        let cases = [
            ("a poster that says \"OPEN 24 HOURS\"", Some("Text \"OPEN 24 HOURS\". ")),
            ("mixed \"straight\" and “curly” and \"straight\"", Some("Text \"straight\". Text \"curly\". ")),
            ("empty \"\" quotes", Some("Text \"\". ")),
            ("nested \"outer “inner” outer\"", Some("Text \"outer “inner” outer\". ")),
            ("newline \"a\nb\" inside", None),
            ("unbalanced \"quote", None),
        ];
        for (prompt, expected) in cases {
            assert_eq!(glyph_text(prompt).as_deref(), expected, "{prompt}");
        }
    }
}
