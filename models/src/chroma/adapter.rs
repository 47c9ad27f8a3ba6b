//! What trains Chroma, as diffusers' `ChromaPipeline` calls it.

use flowtape_engine::ops::pointwise;
use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::ChromaConfig;
use crate::Result;
use crate::blocks::{
    ChannelOrder, drop_samples, image_dims, latent_image_ids, patchify, required_text_mask, text_embeddings,
    unit_times, unpatchify,
};
use crate::config::parse_kwargs;
use crate::requirements::{Fixed, Requirements, check_prediction, packed_channels};

/// Latents of a token: rows and columns.
const PATCH: [usize; 2] = [2, 2];

/// Packs latents as for FLUX.1, drops captions, and keeps all padding but its first token from being attended to.
///
/// Reads `text_embeddings` `[B, T, D]` and `text_attention_mask` `[B, T]`, which is 0 at padding, of the batch.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ChromaAdapter {}

impl ChromaAdapter {
    /// From a recipe's `adapter_kwargs`: there are none.
    ///
    /// # Errors
    /// When there is an argument.
    pub fn from_kwargs(kwargs: &Map<String, Value>) -> Result<Self> {
        parse_kwargs(kwargs)
    }

    /// What a model of this configuration asks of a batch.
    ///
    /// # Errors
    /// When the configuration contradicts the adapter.
    pub fn requirements(&self, config: &ChromaConfig) -> Result<Requirements> {
        let outputs = config.patch_size.pow(2) * config.out_channels();
        check_prediction("out_channels", outputs, Fixed::new("in_channels", config.in_channels))?;
        Ok(Requirements {
            channels: packed_channels(config.in_channels)?,
            patch: PATCH.into(),
            widths: vec![("text_embeddings", Fixed::new("joint_attention_dim", config.joint_attention_dim))],
        })
    }
}

/// f32 `[B, T + tokens]` of a text's mask `[B, T]` with its padding behind: 1 at the text, the first token of its padding and
/// all of the latents.
fn attention_mask(text: &Tensor, tokens: usize) -> Result<Tensor> {
    let (batch, len) = (text.dim(0)?, text.dim(1)?);
    let places = Tensor::from_vec((0..len).map(|i| i as f32).collect(), &[1, len], text.device())?;
    let counts = text.detach().to_dtype(DType::F32)?.sum(&[1], true)?;
    let kept = pointwise([&places, &counts], |[place, count]| (place - count).select_lt(0.5, 1.0, 0.0))?;
    let latents = Tensor::ones(&[batch, tokens], DType::F32, text.device())?;
    Ok(Tensor::cat(&[&kept, &latents], 1)?)
}

impl ModelAdapter for ChromaAdapter {
    fn name(&self) -> &str {
        "chroma"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        let [_, _, height, width] = image_dims(cx, self.name())?;
        let text = text_embeddings(cx, self.name())?;
        let mask = required_text_mask(cx, self.name(), &text)?;
        let [text] = drop_samples(cx, [text], draws)?;
        Ok(ModelInputs::new()
            .with("hidden_states", patchify(&cx.noisy_latents, &PATCH)?)
            .with("timestep", unit_times(cx)?)
            .with("img_ids", latent_image_ids(height, width)?)
            .with("txt_ids", Tensor::zeros(&[text.dim(1)?, 3], DType::F32, &Device::cpu())?)
            .with("attention_mask", attention_mask(&mask, height / 2 * (width / 2))?)
            .with("encoder_hidden_states", text))
    }

    fn forward(&self, cx: &FlowMatchingContext<'_>, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        let tokens = model.forward(inputs)?.sample;
        let [_, _, height, width] = image_dims(cx, self.name())?;
        Ok(unpatchify(&tokens, &[height / 2, width / 2], &PATCH, ChannelOrder::Slowest)?.into())
    }
}

#[cfg(test)]
mod tests {
    use flowtape_flowmatch::{Batch, RecordedDraws};

    use super::*;
    use crate::testing::{normal, prepare};

    #[test]
    fn one_token_of_padding_is_attended_to() {
        let mask = Tensor::from_vec(vec![1u32, 1, 1, 1, 1, 0, 0, 0], &[2, 4], &Device::cpu()).unwrap();
        let batch = Batch::new(normal(&[2, 3, 2, 4]), "image".into()).with("text_embeddings", normal(&[2, 4, 7]));
        let none = &mut RecordedDraws::default();
        let inputs =
            prepare(&ChromaAdapter {}, &batch.clone().with("text_attention_mask", mask), DType::F32, 0.0, none)
                .unwrap();
        let kept = inputs.tensor("attention_mask").unwrap().to_vec::<f32>().unwrap();
        assert_eq!(kept, [[1.0; 6], [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]].concat());
        let refused = |batch: &Batch| {
            prepare(&ChromaAdapter {}, batch, DType::F32, 0.0, &mut RecordedDraws::default()).unwrap_err().to_string()
        };
        assert!(refused(&batch).contains("text_attention_mask"));
        let other = refused(&batch.with("text_attention_mask", normal(&[2, 3])));
        assert!(other.contains("text_attention_mask") && other.contains("[2, 4]"), "{other}");
    }
}
