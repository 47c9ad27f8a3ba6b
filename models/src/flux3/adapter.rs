//! What trains FLUX.3, as diffusers' `Flux3Pipeline` calls it.

use flowtape_engine::{Device, Tensor};
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::Flux3Config;
use super::config::AXES;
use crate::blocks::{ChannelOrder, drop_samples, image_dims, patchify, text_embeddings, unit_times, unpatchify};
use crate::config::parse_kwargs;
use crate::requirements::{Fixed, Requirements};
use crate::{Error, Result};

/// Latents of a token, rows and columns: the autoencoder's cache is patched already, as FLUX.2's.
const PATCH: [usize; 2] = [1, 1];

/// Lines up latents, which the cache holds patched and normalised, and those of reference images, and drops captions.
///
/// Reads `text_embeddings` `[B, T, D]` of the batch, whose padding is attended to, and maybe the list `context_latents` of
/// `[B, C, H, W]`, each with sides of its own.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Flux3Adapter {}

impl Flux3Adapter {
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
    /// When the model is the distilled one.
    pub fn requirements(&self, config: &Flux3Config) -> Result<Requirements> {
        if config.flow_map {
            let expected = "false: the distilled model steps from one time to another, which training on single times undoes; \
                            train the base model, and use its LoRA on this one";
            return Err(Error::config("flow_map", expected, true));
        }
        Ok(Requirements {
            channels: Fixed::new("in_channels", config.in_channels),
            patch: PATCH.into(),
            widths: vec![("text_embeddings", Fixed::new("joint_attention_dim", config.joint_attention_dim))],
        })
    }
}

/// Positions `(0, y / 2, x / 2, last)` of the tokens of latents with these sides.
fn image_ids(height: usize, width: usize, last: f32) -> impl Iterator<Item = f32> {
    (0..height * width).flat_map(move |i| [0.0, (i / width) as f32 / 2.0, (i % width) as f32 / 2.0, last])
}

/// Positions are read where rotary tables are made, which is the host: there they stay, f32 `[L, 4]`.
fn ids(positions: impl Iterator<Item = f32>) -> Result<Tensor> {
    let positions: Vec<f32> = positions.collect();
    let len = positions.len() / AXES;
    Ok(Tensor::from_vec(positions, &[len, AXES], &Device::cpu())?)
}

impl ModelAdapter for Flux3Adapter {
    fn name(&self) -> &str {
        "flux3"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        let [batch, _, height, width] = image_dims(cx, self.name())?;
        let [text] = drop_samples(cx, [text_embeddings(cx, self.name())?], draws)?;
        let mut inputs = ModelInputs::new()
            .with("hidden_states", patchify(&cx.noisy_latents, &PATCH)?.contiguous()?)
            .with("timestep", unit_times(cx)?)
            .with("img_ids", ids(image_ids(height, width, 0.0))?)
            .with("txt_ids", ids((0..text.dim(1)?).flat_map(|i| [0.0, 0.0, 0.0, i as f32]))?)
            .with("encoder_hidden_states", text);
        let (mut tokens, mut positions) = (Vec::new(), Vec::new());
        for (i, reference) in cx.batch.list("context_latents").iter().enumerate() {
            let &[samples, _, height, width] = reference.dims() else {
                let expected = format!("`context_latents[{i}]` [{batch}, C, H, W]");
                return Err(Error::adapter(self.name(), expected, format!("{:?}", reference.dims())));
            };
            if samples != batch {
                let expected = format!("`context_latents[{i}]` of {batch} samples");
                return Err(Error::adapter(self.name(), expected, samples));
            }
            tokens.push(patchify(&reference.to_dtype(cx.dtype)?, &PATCH)?);
            positions.extend(image_ids(height, width, -((i + 1) as f32)));
        }
        if !tokens.is_empty() {
            inputs.insert("image_cond_hidden_states", Tensor::cat(&tokens.iter().collect::<Vec<_>>(), 1)?);
            inputs.insert("image_cond_ids", ids(positions.into_iter())?);
        }
        Ok(inputs)
    }

    fn forward(&self, cx: &FlowMatchingContext<'_>, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        let tokens = model.forward(inputs)?.sample;
        let [_, _, height, width] = image_dims(cx, self.name())?;
        Ok(unpatchify(&tokens, &[height, width], &PATCH, ChannelOrder::Slowest)?.into())
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::DType;
    use flowtape_flowmatch::{Batch, RecordedDraws};
    use serde_json::json;

    use super::*;
    use crate::testing::{normal, prepare};

    #[test]
    fn references_are_numbered_and_may_be_missing() {
        let batch = Batch::new(normal(&[2, 6, 1, 3]), "image".into()).with("text_embeddings", normal(&[2, 2, 7]));
        let run = |batch: &Batch| prepare(&Flux3Adapter {}, batch, DType::F32, 0.0, &mut RecordedDraws::default());
        assert!(run(&batch).unwrap().get("image_cond_hidden_states").is_none());
        let with = |references| batch.clone().with_list("context_latents", references);
        let inputs = run(&with(vec![normal(&[2, 6, 2, 1]), normal(&[2, 6, 1, 1])])).unwrap();
        assert_eq!(inputs.tensor("image_cond_hidden_states").unwrap().dims(), [2, 3, 6]);
        let ids = |name| inputs.tensor(name).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(ids("image_cond_ids"), [0., 0., 0., -1., 0., 0.5, 0., -1., 0., 0., 0., -2.]);
        assert_eq!(ids("img_ids"), [0., 0., 0., 0., 0., 0., 0.5, 0., 0., 0., 1., 0.]);
        assert_eq!(ids("txt_ids"), [0., 0., 0., 0., 0., 0., 0., 1.]);
        for wrong in [normal(&[6, 2, 1]), normal(&[1, 6, 2, 1])] {
            let error = run(&with(vec![wrong])).unwrap_err().to_string();
            assert!(error.contains("context_latents[0]"), "{error}");
        }
    }

    #[test]
    fn the_distilled_model_is_not_trained() {
        let config = Flux3Config::from_json(&json!({"flow_map": true})).unwrap();
        let error = Flux3Adapter {}.requirements(&config).unwrap_err().to_string();
        assert!(error.contains("flow_map") && error.contains("train the base model"), "{error}");
    }
}
