//! The texts of diffusers' `QwenImageEditPlusPipeline`, in which pictures stand.

use std::collections::BTreeMap;

use flowtape_engine::{DType, Device, Tensor};

use super::{ConditionImage, Encoded, PipelineFolder, PromptEncoder, SeenImage};
use crate::text::Tokenizer;
use crate::vision::{Positions, Qwen25VL};
use crate::{Error, Result};

/// What stands around the pictures and the prompt.
const BEFORE: &str = "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, \
                      background), then explain how the user's text instruction should alter or modify the image. Generate a \
                      new image that meets the user's requirements while maintaining consistency with the original input where \
                      appropriate.<|im_end|>\n<|im_start|>user\n";
const AFTER: &str = "<|im_end|>\n<|im_start|>assistant\n";
/// Tokens of the template that are left out, whatever the tokenizer makes of it.
const TEMPLATE_TOKENS: usize = 64;
/// The text of the token that stands for a part of a picture.
const IMAGE_PAD: &str = "<|image_pad|>";

/// Qwen2.5-VL with its vision tower.
///
/// Gives `text_embeddings` `[T, D]` and `text_attention_mask` `[T]`.
pub struct QwenImageEditPrompts {
    tokenizer: Tokenizer,
    model: Qwen25VL,
    device: Device,
}

impl QwenImageEditPrompts {
    /// Loads the text encoder of a pipeline.
    ///
    /// # Errors
    /// When a part is missing or broken.
    pub fn load(folder: &PipelineFolder, device: &Device) -> Result<Self> {
        Ok(Self {
            tokenizer: folder.tokenizer("tokenizer")?,
            model: Qwen25VL::load(&folder.part("text_encoder")?, None, device)?,
            device: device.clone(),
        })
    }

    /// The tokens of a prompt after its pictures; each picture is as many tokens as the vision tower makes of it.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn tokens(&self, prompt: &str, images: &[ConditionImage]) -> Result<Vec<u32>> {
        let merge = self.model.visual().merge_size().pow(2);
        let picture = |(i, image): (usize, &SeenImage)| {
            let pads = IMAGE_PAD.repeat(image.grid.iter().product::<usize>() / merge);
            format!("Picture {}: <|vision_start|>{pads}<|vision_end|>", i + 1)
        };
        let pictures: String = images.iter().filter_map(|image| image.seen.as_ref()).enumerate().map(picture).collect();
        self.tokenizer.encode(&format!("{BEFORE}{pictures}{prompt}{AFTER}"), false)
    }
}

impl PromptEncoder for QwenImageEditPrompts {
    fn encode(&self, _: &[&str], _: Option<usize>) -> Result<Vec<Encoded>> {
        Err(Error::config("image", "at least one picture to edit", "none"))
    }

    /// The length has no effect, as in the reference.
    fn encode_with_images(
        &self,
        prompts: &[&str],
        images: &[ConditionImage],
        _: Option<usize>,
    ) -> Result<Vec<Encoded>> {
        let seen: Vec<&SeenImage> = images.iter().filter_map(|image| image.seen.as_ref()).collect();
        if seen.is_empty() {
            return self.encode(prompts, None).map(|_| Vec::new());
        }
        let patches: Vec<Tensor> =
            seen.iter().map(|image| image.values.to_device(&self.device)).collect::<flowtape_engine::Result<_>>()?;
        let grids: Vec<_> = seen.iter().map(|image| image.grid).collect();
        let tokens = self.model.visual().forward(&Tensor::cat(&patches.iter().collect::<Vec<_>>(), 0)?, &grids)?;
        let one = |prompt: &&str| -> Result<Encoded> {
            let ids = self.tokens(prompt, images)?;
            let states = self.model.forward(&ids, &tokens.merged, &grids, Positions::Plain)?.last_hidden_state;
            let start = TEMPLATE_TOKENS.min(ids.len());
            let text = states.squeeze(0)?.narrow(0, start, ids.len() - start)?;
            let mask = Tensor::ones(&[text.dim(0)?], DType::F32, &self.device)?;
            Ok(BTreeMap::from([("text_embeddings", text), ("text_attention_mask", mask)]))
        };
        prompts.iter().map(one).collect()
    }
}
