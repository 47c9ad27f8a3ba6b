//! NeMo's `QwenImage21Adapter`, and the same with images to edit.

use flowtape_engine::Tensor;
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::QwenImage21Config;
use crate::blocks::{
    ChannelOrder, drop_samples, image_dims, patchify, required_text_mask, text_embeddings, unit_times, unpatchify,
};
use crate::config::parse_kwargs;
use crate::requirements::{Fixed, Requirements, check_prediction};
use crate::{Error, Result};

/// Latents of a token, rows and columns.
const PATCH: [usize; 2] = [1, 1];

/// Lines up latents, after those of images to edit where it edits.
///
/// Reads of the batch `text_embeddings` `[B, T, D]` and `text_attention_mask` `[B, T]`, which is 0 at padding. Where it edits, also
/// the list `context_latents` of one or more `[B, C, H, W]`, each with even sides of its own, and `image_pad_mask` `[B, T]`, which
/// marks the text's tokens in whose place they stand; captions are then dropped by nobody, since they hold these places.
#[derive(Clone, Copy, Debug)]
pub struct QwenImage21Adapter {
    edits: bool,
}

/// An adapter without arguments.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct NoKwargs {}

impl QwenImage21Adapter {
    /// From a recipe's `adapter_kwargs`: there are none.
    ///
    /// # Errors
    /// When there is an argument.
    pub fn from_kwargs(kwargs: &Map<String, Value>, edits: bool) -> Result<Self> {
        parse_kwargs::<NoKwargs>(kwargs)?;
        Ok(Self { edits })
    }

    /// What a model of this configuration asks of a batch.
    ///
    /// # Errors
    /// When the configuration contradicts the adapter.
    pub fn requirements(&self, config: &QwenImage21Config) -> Result<Requirements> {
        check_prediction("out_channels", config.out_channels, Fixed::new("in_channels", config.in_channels))?;
        Ok(Requirements {
            channels: Fixed::new("in_channels", config.in_channels),
            // A token of a text stands for four.
            patch: vec![2, 2],
            widths: vec![("text_embeddings", Fixed::new("context_in_dim", config.context_in_dim))],
        })
    }

    /// The tokens of the images to edit, and their shapes.
    fn references(&self, cx: &FlowMatchingContext<'_>) -> Result<(Vec<Tensor>, Vec<Vec<usize>>)> {
        let [batch, channels, ..] = image_dims(cx, self.name())?;
        let references = cx.batch.list("context_latents");
        if references.is_empty() {
            let expected = "a list of one or more `context_latents` in the batch";
            return Err(Error::adapter(self.name(), expected, "none"));
        }
        let (mut tokens, mut shapes) = (Vec::new(), Vec::new());
        for (i, reference) in references.iter().enumerate() {
            match *reference.dims() {
                [b, c, h, w] if [b, c] == [batch, channels] && h % 2 == 0 && w % 2 == 0 => {
                    shapes.push(vec![1, h, w]);
                    tokens.push(patchify(&reference.to_dtype(cx.dtype)?, &PATCH)?);
                }
                _ => {
                    let expected = format!("`context_latents[{i}]` [{batch}, {channels}, H, W] with even sides");
                    return Err(Error::adapter(self.name(), expected, format!("{:?}", reference.dims())));
                }
            }
        }
        Ok((tokens, shapes))
    }
}

impl ModelAdapter for QwenImage21Adapter {
    fn name(&self) -> &str {
        if self.edits { "qwen_image_21_edit" } else { "qwen_image_21" }
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        let [batch, _, height, width] = image_dims(cx, self.name())?;
        let mut text = text_embeddings(cx, self.name())?;
        let mask = required_text_mask(cx, self.name(), &text)?;
        let (mut tokens, mut shapes, mut slots) = (Vec::new(), Vec::new(), None);
        if self.edits {
            (tokens, shapes) = self.references(cx)?;
            slots = Some(cx.batch.require("image_pad_mask")?.clone());
        } else {
            [text] = drop_samples(cx, [text], draws)?;
        }
        tokens.push(patchify(&cx.noisy_latents, &PATCH)?);
        shapes.push(vec![1, height, width]);
        Ok(ModelInputs::new()
            .with("hidden_states", Tensor::cat(&tokens.iter().collect::<Vec<_>>(), 1)?)
            .with("encoder_hidden_states", text)
            .with("encoder_hidden_states_mask", mask)
            .with_optional("image_pad_mask", slots)
            .with("timestep", unit_times(cx)?)
            .with("img_shapes", vec![shapes; batch]))
    }

    fn forward(&self, cx: &FlowMatchingContext<'_>, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        let tokens = model.forward(inputs)?.sample;
        let [_, _, height, width] = image_dims(cx, self.name())?;
        Ok(unpatchify(&tokens, &[height, width], &PATCH, ChannelOrder::Slowest)?.into())
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::{DType, Device};
    use flowtape_flowmatch::{Batch, RecordedDraws};

    use super::*;
    use crate::testing::{normal, prepare};

    fn batch() -> Batch {
        let mark = |marks: &[u32]| Tensor::from_slice(marks, &[2, 5], &Device::cpu()).unwrap();
        Batch::new(normal(&[2, 3, 4, 6]), "image".into())
            .with("text_embeddings", normal(&[2, 5, 7]))
            .with("text_attention_mask", mark(&[1, 1, 1, 1, 1, 1, 1, 1, 1, 0]))
            .with("image_pad_mask", mark(&[0, 1, 1, 0, 0, 1, 1, 0, 0, 0]))
            .with_list("context_latents", vec![normal(&[2, 3, 2, 4])])
    }

    fn run(edits: bool, batch: &Batch) -> Result<ModelInputs> {
        prepare(&QwenImage21Adapter { edits }, batch, DType::F32, 0.0, &mut RecordedDraws::default())
    }

    #[test]
    fn images_to_edit_come_first_and_are_needed_there_alone() {
        let values = |x: &Tensor| x.to_vec::<f32>().unwrap();
        let (made, edited) = (run(false, &batch()).unwrap(), run(true, &batch()).unwrap());
        assert_eq!(made.shapes("img_shapes").unwrap(), vec![vec![vec![1, 4, 6]]; 2]);
        assert_eq!(edited.shapes("img_shapes").unwrap(), vec![vec![vec![1, 2, 4], vec![1, 4, 6]]; 2]);
        assert!(made.get("image_pad_mask").is_none() && edited.get("image_pad_mask").is_some());
        let tokens = edited.tensor("hidden_states").unwrap();
        assert_eq!(values(&tokens.narrow(1, 8, 24).unwrap()), values(made.tensor("hidden_states").unwrap()));
        let reference = patchify(&normal(&[2, 3, 2, 4]), &PATCH).unwrap();
        assert_eq!(values(&tokens.narrow(1, 0, 8).unwrap()), values(&reference));
    }

    #[test]
    fn a_batch_that_does_not_fit_is_refused() {
        let refused = |edits: bool, batch: Batch, part: &str| {
            let error = run(edits, &batch).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        let with = |latents: &[usize]| batch().with_list("context_latents", vec![normal(latents)]);
        let without = |name: &str| {
            let mut batch = batch();
            batch.tensors.remove(name);
            batch
        };
        refused(true, batch().with_list("context_latents", vec![]), "context_latents");
        refused(true, with(&[2, 3, 3, 4]), "even sides");
        refused(true, with(&[2, 4, 4, 4]), "[2, 3, H, W]");
        refused(true, without("image_pad_mask"), "image_pad_mask");
        refused(false, without("text_attention_mask"), "text_attention_mask");
        let kwargs = serde_json::from_str(r#"{"guidance_scale": 1}"#).unwrap();
        let error = QwenImage21Adapter::from_kwargs(&kwargs, true).unwrap_err().to_string();
        assert!(error.contains("guidance_scale"), "{error}");
    }
}
