//! NeMo's `FluxAdapter`.

use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::FluxConfig;
use crate::Result;
use crate::blocks::{
    ChannelOrder, drop_samples, guidance, image_dims, latent_image_ids, patchify, text_embeddings, unit_times,
    unpatchify, with_batch_axis,
};
use crate::config::parse_kwargs;
use crate::requirements::{Fixed, Requirements, check_prediction, packed_channels};

/// Latents of a token: rows and columns.
const PATCH: [usize; 2] = [2, 2];
/// Width of CLIP's pooled embedding, which stands in as zeros where a batch has none.
const POOLED: usize = 768;

/// Packs latents for FLUX, drops captions, and passes a guidance scale.
///
/// Reads `text_embeddings` `[B, T, D]` (or `[T, D]`) and `pooled_prompt_embeds` or `clip_pooled` `[B, P]` of the batch.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FluxAdapter {
    /// The guidance scale that the model is told.
    pub guidance_scale: f64,
    /// Without effect, as in the reference: the model is always told, and one that embeds none passes it over.
    pub use_guidance_embeds: bool,
}

impl Default for FluxAdapter {
    fn default() -> Self {
        Self { guidance_scale: 3.5, use_guidance_embeds: true }
    }
}

impl FluxAdapter {
    /// From a recipe's `adapter_kwargs`.
    ///
    /// # Errors
    /// When an argument is unknown or of another type.
    pub fn from_kwargs(kwargs: &Map<String, Value>) -> Result<Self> {
        parse_kwargs(kwargs)
    }

    /// What a model of this configuration asks of a batch.
    ///
    /// # Errors
    /// When the configuration contradicts the adapter.
    pub fn requirements(&self, config: &FluxConfig) -> Result<Requirements> {
        let outputs = config.patch_size.pow(2) * config.out_channels();
        check_prediction("out_channels", outputs, Fixed::new("in_channels", config.in_channels))?;
        Ok(Requirements {
            channels: packed_channels(config.in_channels)?,
            patch: PATCH.into(),
            widths: vec![
                ("text_embeddings", Fixed::new("joint_attention_dim", config.joint_attention_dim)),
                ("pooled_prompt_embeds", Fixed::new("pooled_projection_dim", config.pooled_projection_dim)),
            ],
        })
    }
}

impl ModelAdapter for FluxAdapter {
    fn name(&self) -> &str {
        "flux"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        let [batch, _, height, width] = image_dims(cx, self.name())?;
        let text = text_embeddings(cx, self.name())?;
        let pooled = match cx.batch.get("pooled_prompt_embeds").or_else(|| cx.batch.get("clip_pooled")) {
            Some(pooled) => with_batch_axis(pooled, 2, cx.dtype)?,
            None => Tensor::zeros(&[batch, POOLED], cx.dtype, &cx.device)?,
        };
        let [text, pooled] = drop_samples(cx, [text, pooled], draws)?;
        let txt_ids = Tensor::zeros(&[batch, text.dim(1)?, 3], DType::F32, &Device::cpu())?;
        Ok(ModelInputs::new()
            .with("hidden_states", patchify(&cx.noisy_latents, &PATCH)?)
            .with("encoder_hidden_states", text)
            .with("pooled_projections", pooled)
            .with("timestep", unit_times(cx)?)
            .with("img_ids", latent_image_ids(height, width)?)
            .with("txt_ids", txt_ids)
            .with("guidance", guidance(cx, self.guidance_scale)?))
    }

    fn forward(&self, cx: &FlowMatchingContext<'_>, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        let tokens = model.forward(inputs)?.sample;
        let [_, _, height, width] = image_dims(cx, self.name())?;
        Ok(unpatchify(&tokens, &[height / 2, width / 2], &PATCH, ChannelOrder::Slowest)?.into())
    }
}
