//! NeMo's `SimpleAdapter`.

use flowtape_flowmatch::{Draws, FlowMatchingContext, ModelAdapter, ModelInputs};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::WanConfig;
use crate::Result;
use crate::blocks::text_embeddings;
use crate::config::parse_kwargs;
use crate::requirements::{Fixed, Requirements, check_prediction};

/// Hands latents, timesteps and text on as they are: models such as Wan. It takes no arguments and never drops captions.
///
/// Reads `text_embeddings` `[B, T, D]` (or `[T, D]`) of the batch.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimpleAdapter {}

impl SimpleAdapter {
    /// From a recipe's `adapter_kwargs`.
    ///
    /// # Errors
    /// When there is any argument.
    pub fn from_kwargs(kwargs: &Map<String, Value>) -> Result<Self> {
        parse_kwargs(kwargs)
    }

    /// What a model of this configuration asks of a batch.
    ///
    /// # Errors
    /// When the configuration contradicts the adapter.
    pub fn requirements(&self, config: &WanConfig) -> Result<Requirements> {
        check_prediction("out_channels", config.out_channels(), Fixed::new("in_channels", config.in_channels))?;
        Ok(Requirements {
            channels: Fixed::new("in_channels", config.in_channels),
            patch: config.patch_size.into(),
            widths: vec![("text_embeddings", Fixed::new("text_dim", config.text_dim))],
        })
    }
}

impl ModelAdapter for SimpleAdapter {
    fn name(&self) -> &str {
        "simple"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, _: &mut dyn Draws) -> Result<ModelInputs> {
        Ok(ModelInputs::new()
            .with("hidden_states", cx.noisy_latents.clone())
            // The reference casts to the compute dtype, which moves timesteps in bf16 by up to 2: kept in f32 here.
            .with("timestep", cx.timesteps.clone())
            .with("encoder_hidden_states", text_embeddings(cx, self.name())?))
    }
}
