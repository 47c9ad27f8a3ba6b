//! The adapter of Wan 2.2 TI2V: diffusers' Wan pipelines with `expand_timesteps`.

use flowtape_engine::ops::{pointwise, pointwise_to};
use flowtape_engine::{DType, Tensor};
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction, TaskType};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::WanConfig;
use crate::blocks::{drop_samples, text_embeddings, video_dims};
use crate::config::parse_kwargs;
use crate::requirements::{Fixed, Requirements, check_prediction};
use crate::{Error, Result};

/// Sides of a patch of every published model: frames, rows, columns.
const PATCH: [usize; 3] = [1, 2, 2];

/// Gives each token a time of its own. For image-to-video the first latent frame is the clean one, at time 0.
///
/// Reads `text_embeddings` `[B, T, D]` of the batch.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WanTI2VAdapter {
    /// Whether what the model makes of a clean first frame counts in the loss, as in NeMo's step. There is nothing to learn: if
    /// not, it is replaced by what leads to the clean frame from any noise, and no gradient comes from it.
    pub train_first_frame: bool,
}

impl Default for WanTI2VAdapter {
    fn default() -> Self {
        Self { train_first_frame: true }
    }
}

impl WanTI2VAdapter {
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
    pub fn requirements(&self, config: &WanConfig) -> Result<Requirements> {
        check_prediction("out_channels", config.out_channels(), Fixed::new("in_channels", config.in_channels))?;
        if config.patch_size != PATCH {
            let expected = format!("{PATCH:?}: the adapter wan_ti2v gives a time to each token of these");
            return Err(Error::config("patch_size", expected, config.patch_size));
        }
        Ok(Requirements {
            channels: Fixed::new("in_channels", config.in_channels),
            patch: PATCH.into(),
            widths: vec![("text_embeddings", Fixed::new("text_dim", config.text_dim))],
        })
    }
}

/// A film with another first frame.
fn with_first(first: &Tensor, film: &Tensor) -> Result<Tensor> {
    Ok(Tensor::cat(&[first, &film.narrow(2, 1, film.dim(2)? - 1)?], 2)?)
}

impl ModelAdapter for WanTI2VAdapter {
    fn name(&self) -> &str {
        "wan_ti2v"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        let [batch, _, frames, height, width] = video_dims(cx, self.name())?;
        let animated = cx.task_type == TaskType::I2V;
        let of_frame = height / PATCH[1] * (width / PATCH[2]);
        let tokens = frames * of_frame;
        // 1 at tokens that are noisy.
        let marks = (0..tokens).map(|i| f32::from(u8::from(!animated || i >= of_frame))).collect();
        let marks = Tensor::from_vec(marks, &[1, tokens], &cx.device)?;
        let times = pointwise([&cx.timesteps.reshape(&[batch, 1])?, &marks], |[t, mark]| t * mark)?;
        let latents = match animated {
            true => with_first(&cx.latents.narrow(2, 0, 1)?.to_dtype(cx.dtype)?, &cx.noisy_latents)?,
            false => cx.noisy_latents.clone(),
        };
        let [text] = drop_samples(cx, [text_embeddings(cx, self.name())?], draws)?;
        Ok(ModelInputs::new()
            .with("hidden_states", latents)
            .with("timestep", times)
            .with("encoder_hidden_states", text))
    }

    fn forward(&self, cx: &FlowMatchingContext<'_>, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        let velocity = model.forward(inputs)?.sample;
        if self.train_first_frame || cx.task_type != TaskType::I2V {
            return Ok(velocity.into());
        }
        let first = |x: &Tensor| x.narrow(2, 0, 1)?.detach().to_dtype(DType::F32);
        let sigma = cx.sigma.reshape(&[cx.sigma.numel(), 1, 1, 1, 1])?;
        // At noise level 0 the frame is there already.
        const LEAST: f64 = f32::MIN_POSITIVE as f64;
        let to_clean = pointwise_to(
            velocity.dtype(),
            [&first(&cx.noisy_latents)?, &first(&cx.latents)?, &sigma],
            |[noisy, clean, sigma]| (noisy - clean) / sigma.select_lt(LEAST, LEAST, sigma),
        )?;
        Ok(with_first(&to_clean, &velocity)?.into())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use flowtape_engine::Device;
    use flowtape_flowmatch::{Batch, ModelOutput, RecordedDraws};
    use serde_json::json;

    use super::*;
    use crate::testing::normal;

    /// Gives its latents back.
    struct Echo;

    impl FlowModel for Echo {
        fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput> {
            Ok(inputs.tensor("hidden_states")?.clone().into())
        }
    }

    fn values(x: &Tensor) -> Vec<f32> {
        x.to_vec().unwrap()
    }

    #[test]
    fn a_clean_first_frame_has_time_0_and_need_not_be_learnt() {
        let batch = Batch::new(normal(&[2, 3, 2, 4, 6]), "video".into()).with("text_embeddings", normal(&[2, 5, 7]));
        let each = |value: f64| Tensor::full(&[2], value, DType::F32, &Device::cpu()).unwrap();
        let noise = normal(&[2, 3, 2, 4, 6]).mul_scalar(3.0).unwrap();
        let cx = |task_type| FlowMatchingContext {
            // Half of both.
            noisy_latents: batch.latents.add(&noise).unwrap().mul_scalar(0.5).unwrap(),
            latents: batch.latents.clone(),
            timesteps: each(500.0),
            sigma: each(0.5),
            task_type,
            data_type: "video".into(),
            device: Device::cpu(),
            dtype: DType::F32,
            cfg_dropout_prob: 0.0,
            streams: BTreeMap::new(),
            batch: &batch,
        };
        let prepare = |adapter: &WanTI2VAdapter, task| {
            let (cx, mut draws) = (cx(task), RecordedDraws::default());
            let inputs = adapter.prepare_inputs(&cx, &mut draws).unwrap();
            let velocity = adapter.forward(&cx, &Echo, &inputs).unwrap().velocity;
            (values(inputs.tensor("timestep").unwrap()), inputs.tensor("hidden_states").unwrap().clone(), velocity)
        };
        let (times, latents, _) = prepare(&WanTI2VAdapter::default(), TaskType::T2V);
        assert_eq!((times, values(&latents)), (vec![500.0; 2 * 12], values(&cx(TaskType::T2V).noisy_latents)));
        let (times, latents, velocity) = prepare(&WanTI2VAdapter::default(), TaskType::I2V);
        assert_eq!(times, [[0.0; 6], [500.0; 6]].concat().repeat(2));
        let frame = |x: &Tensor, i| values(&x.narrow(2, i, 1).unwrap());
        assert_eq!(frame(&latents, 0), frame(&batch.latents, 0));
        assert_eq!(frame(&latents, 1), frame(&cx(TaskType::I2V).noisy_latents, 1));
        assert_eq!(values(&velocity), values(&latents));
        // What leads from the clean frame to the noise, and so back.
        let (_, _, velocity) = prepare(&WanTI2VAdapter { train_first_frame: false }, TaskType::I2V);
        let difference = noise.sub(&batch.latents).unwrap();
        let worst = frame(&velocity, 0).iter().zip(frame(&difference, 0)).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst < 1e-5, "{worst}");
        assert_eq!(frame(&velocity, 1), frame(&latents, 1));
    }

    #[test]
    fn a_configuration_of_other_patches_is_refused() {
        let config = json!({"in_channels": 3, "out_channels": 3, "patch_size": [2, 2, 2]});
        let told = WanTI2VAdapter::default().requirements(&WanConfig::from_json(&config).unwrap());
        assert!(told.unwrap_err().to_string().contains("patch_size"));
        let kwargs = Map::from_iter([("train_first_frames".into(), Value::from(true))]);
        assert!(WanTI2VAdapter::from_kwargs(&kwargs).unwrap_err().to_string().contains("train_first_frame"));
    }
}
