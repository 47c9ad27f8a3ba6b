//! The adapter of Z-Image: diffusers' training script and pipeline.

use flowtape_engine::ops::pointwise;
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::ZImageConfig;
use super::config::PATCH;
use crate::Result;
use crate::blocks::{drop_samples, image_dims, text_attention_mask, text_embeddings};
use crate::config::parse_kwargs;
use crate::requirements::{Fixed, Requirements};

/// Gives the model a film of one frame, the time from noise to data, and the caption's tokens; what it predicts leads to the
/// data, so its sign is turned.
///
/// Reads of the batch: `text_embeddings` `[B, T, D]` and, where it is there, `text_attention_mask` `[B, T]`, which is 0 at
/// padding.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZImageAdapter {}

impl ZImageAdapter {
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
    /// None: all that could contradict is checked with the configuration.
    pub fn requirements(&self, config: &ZImageConfig) -> Result<Requirements> {
        Ok(Requirements {
            channels: Fixed::new("in_channels", config.in_channels),
            patch: vec![PATCH.0; 2],
            widths: vec![("text_embeddings", Fixed::new("cap_feat_dim", config.cap_feat_dim))],
        })
    }
}

impl ModelAdapter for ZImageAdapter {
    fn name(&self) -> &str {
        "z_image"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        image_dims(cx, self.name())?;
        let [text] = drop_samples(cx, [text_embeddings(cx, self.name())?], draws)?;
        Ok(ModelInputs::new()
            .with("hidden_states", cx.noisy_latents.unsqueeze(2)?)
            .with("timestep", pointwise([&cx.timesteps], |[t]| (1000.0 - t) / 1000.0)?)
            .with_optional("encoder_attention_mask", text_attention_mask(cx, self.name(), &text)?)
            .with("encoder_hidden_states", text))
    }

    fn forward(&self, _: &FlowMatchingContext<'_>, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        Ok(model.forward(inputs)?.sample.squeeze(2)?.neg()?.into())
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::{DType, Device, Tensor};
    use flowtape_flowmatch::{Batch, ModelOutput, Recorded, RecordedDraws};

    use super::*;
    use crate::testing::{normal, predict, prepare};

    fn batch() -> Batch {
        Batch::new(normal(&[2, 3, 4, 6]), "image".into())
            .with("text_embeddings", normal(&[2, 5, 7]))
            .with("text_attention_mask", Tensor::ones(&[2, 5], DType::U32, &Device::cpu()).unwrap())
    }

    #[test]
    fn inputs_are_a_film_of_one_frame_and_the_time_from_noise() {
        let inputs = prepare(&ZImageAdapter {}, &batch(), DType::BF16, 0.0, &mut RecordedDraws::default()).unwrap();
        assert_eq!(inputs.tensor("hidden_states").unwrap().dims(), [2, 3, 1, 4, 6]);
        for (name, dtype) in [
            ("hidden_states", DType::BF16),
            ("encoder_hidden_states", DType::BF16),
            ("encoder_attention_mask", DType::U32),
            ("timestep", DType::F32),
        ] {
            assert_eq!(inputs.tensor(name).unwrap().dtype(), dtype, "{name}");
        }
        // The context's time is 500 of 1000.
        assert_eq!(inputs.tensor("timestep").unwrap().to_vec::<f32>().unwrap(), [0.5; 2]);
        let mut draws = RecordedDraws::new([Recorded::Uniform(vec![0.1, 0.9])]);
        let dropped = prepare(&ZImageAdapter {}, &batch(), DType::F32, 0.5, &mut draws).unwrap();
        let text = dropped.tensor("encoder_hidden_states").unwrap().to_vec::<f32>().unwrap();
        assert_eq!(text, [vec![0.0; 35], normal(&[2, 5, 7]).to_vec::<f32>().unwrap()[35..].to_vec()].concat());
    }

    /// Gives its latents back.
    struct Echo;

    impl FlowModel for Echo {
        fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput> {
            Ok(inputs.tensor("hidden_states")?.clone().into())
        }
    }

    #[test]
    fn what_leads_to_the_data_is_turned() {
        let velocity = predict(&ZImageAdapter {}, &Echo, &batch()).unwrap().velocity;
        let turned: Vec<f32> = batch().latents.to_vec::<f32>().unwrap().iter().map(|v| -v).collect();
        assert_eq!((velocity.dims(), velocity.to_vec::<f32>().unwrap()), (&[2, 3, 4, 6][..], turned));
    }

    #[test]
    fn a_batch_that_does_not_fit_is_refused() {
        let refused = |batch: Batch, part: &str| {
            let told = prepare(&ZImageAdapter {}, &batch, DType::F32, 0.0, &mut RecordedDraws::default());
            let error = told.unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        refused(Batch { latents: normal(&[2, 3, 1, 4, 6]), ..batch() }, "5-D");
        refused(batch().with("text_attention_mask", normal(&[2, 4])), "`text_attention_mask` [2, 5]");
        refused(Batch::new(normal(&[2, 3, 4, 6]), "image".into()), "text_embeddings");
        let kwargs = Map::from_iter([("guidance_scale".into(), Value::from(1.0))]);
        assert!(ZImageAdapter::from_kwargs(&kwargs).is_err());
    }
}
