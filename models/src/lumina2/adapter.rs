//! What trains Lumina-Image 2.0, as diffusers' `Lumina2Pipeline` calls it.

use flowtape_engine::ops::pointwise;
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::Lumina2Config;
use crate::Result;
use crate::blocks::{drop_samples, image_dims, required_text_mask, text_embeddings};
use crate::config::parse_kwargs;
use crate::requirements::{Fixed, Requirements, check_prediction};

/// Hands latents on as they are, with times from 0 for noise to 1 for data, and turns what leads to the data round.
///
/// Reads `text_embeddings` `[B, T, D]` and `text_attention_mask` `[B, T]`, which is 0 at padding, of the batch.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lumina2Adapter {}

impl Lumina2Adapter {
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
    pub fn requirements(&self, config: &Lumina2Config) -> Result<Requirements> {
        let channels = Fixed::new("in_channels", config.in_channels);
        check_prediction("out_channels", config.out_channels(), channels)?;
        Ok(Requirements {
            channels,
            patch: vec![config.patch_size; 2],
            widths: vec![("text_embeddings", Fixed::new("cap_feat_dim", config.cap_feat_dim))],
        })
    }
}

impl ModelAdapter for Lumina2Adapter {
    fn name(&self) -> &str {
        "lumina2"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        image_dims(cx, self.name())?;
        let text = text_embeddings(cx, self.name())?;
        let mask = required_text_mask(cx, self.name(), &text)?;
        let [text] = drop_samples(cx, [text], draws)?;
        Ok(ModelInputs::new()
            .with("hidden_states", cx.noisy_latents.clone())
            .with("encoder_hidden_states", text)
            .with("encoder_attention_mask", mask)
            .with("timestep", pointwise([&cx.timesteps], |[t]| t / -1000.0 + 1.0)?))
    }

    fn forward(&self, _: &FlowMatchingContext<'_>, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        Ok(model.forward(inputs)?.sample.neg()?.into())
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::{DType, Device, Tensor};
    use flowtape_flowmatch::{Batch, ModelOutput, RecordedDraws};

    use super::*;
    use crate::testing::{normal, predict, prepare};

    /// Gives its latents back.
    struct Echo;

    impl FlowModel for Echo {
        fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput> {
            Ok(inputs.tensor("hidden_states")?.clone().into())
        }
    }

    #[test]
    fn times_run_from_noise_to_data_and_what_leads_there_is_turned() {
        let mask = Tensor::ones(&[2, 5], DType::U32, &Device::cpu()).unwrap();
        let batch = Batch::new(normal(&[2, 3, 4, 6]), "image".into()).with("text_embeddings", normal(&[2, 5, 7]));
        let run = |batch: &Batch| prepare(&Lumina2Adapter {}, batch, DType::BF16, 0.0, &mut RecordedDraws::default());
        assert!(run(&batch).unwrap_err().to_string().contains("text_attention_mask"));
        let batch = batch.with("text_attention_mask", mask);
        // The context's time is 500 of 1000.
        let times = run(&batch).unwrap().tensor("timestep").unwrap().clone();
        assert_eq!((times.dtype(), times.to_vec::<f32>().unwrap()), (DType::F32, vec![0.5; 2]));
        let velocity = predict(&Lumina2Adapter {}, &Echo, &batch).unwrap().velocity;
        let turned: Vec<f32> = batch.latents.to_vec::<f32>().unwrap().iter().map(|v| -v).collect();
        assert_eq!((velocity.dims(), velocity.to_vec::<f32>().unwrap()), (&[2, 3, 4, 6][..], turned));
    }
}
