//! The texts of diffusers' `WanPipeline` and `WanImageToVideoPipeline`.

use std::collections::BTreeMap;

use flowtape_engine::{Device, Tensor};

use super::part::Part;
use super::pictures::IMAGE_ENCODER;
use super::{ConditionImage, Encoded, PipelineFolder, PromptEncoder};
use crate::vision::CLIPVisionModel;
use crate::{Error, Result};

/// The length of texts where none is asked for.
const MAX_SEQUENCE_LENGTH: usize = 512;

/// UMT5, which is told where a text ends; what stands after it is zero, and the transformer attends to it.
///
/// Gives `text_embeddings` `[T, D]`, and of the given frames that CLIP sees (Wan 2.1) `image_embeds` `[N, E]`: its states before the last
/// layer, one frame behind the other.
pub struct WanPrompts {
    text: Part,
    image_encoder: Option<CLIPVisionModel>,
}

impl WanPrompts {
    /// Loads the text encoder of a pipeline, and its image encoder where it has one.
    ///
    /// # Errors
    /// When a part is missing or broken.
    pub fn load(folder: &PipelineFolder, device: &Device) -> Result<Self> {
        let encoder = folder.has(IMAGE_ENCODER).then(|| folder.part(IMAGE_ENCODER)).transpose()?;
        Ok(Self {
            text: Part::load(folder, "", MAX_SEQUENCE_LENGTH, device)?,
            image_encoder: encoder.map(|path| CLIPVisionModel::load(&path, None, device)).transpose()?,
        })
    }
}

/// A prompt as Wan's pipelines clean it where `ftfy` is not installed: character references resolved twice, runs of white space
/// one space.
pub fn clean_prompt(prompt: &str) -> String {
    let unescaped = htmlize::unescape(prompt);
    let unescaped = htmlize::unescape(&*unescaped);
    // Python counts the separators of ASCII among white space.
    let space = |c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c);
    unescaped.split(space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

impl PromptEncoder for WanPrompts {
    fn encode(&self, prompts: &[&str], max_sequence_length: Option<usize>) -> Result<Vec<Encoded>> {
        let length = max_sequence_length.unwrap_or(MAX_SEQUENCE_LENGTH);
        let one = |prompt: &&str| -> Result<Encoded> {
            let (output, valid) = self.text.run_masked(&clean_prompt(prompt), length)?;
            let text = output.last_hidden_state.squeeze(0)?.narrow(0, 0, valid)?;
            Ok(BTreeMap::from([("text_embeddings", text.pad(0, 0, length - valid)?)]))
        };
        prompts.iter().map(one).collect()
    }

    fn image_embeds(&self, images: &[ConditionImage]) -> Result<Tensor> {
        let model = self.image_encoder.as_ref();
        let model = model.ok_or_else(|| Error::config(IMAGE_ENCODER, "a part of the pipeline", "none"))?;
        let seen = images.iter().filter_map(|image| image.seen.as_ref());
        let values = seen.map(|image| image.values.to_device(&self.text.device));
        let values = values.collect::<flowtape_engine::Result<Vec<Tensor>>>()?;
        let states = model.forward(&Tensor::stack(&values.iter().collect::<Vec<_>>(), 0)?)?;
        let state = states.iter().nth_back(1).ok_or_else(|| Error::config(IMAGE_ENCODER, "at least one layer", 0))?;
        Ok(state.flatten(0, 1)?)
    }
}
