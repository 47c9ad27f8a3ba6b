//! The adapter of Wan's image-to-video models: diffusers' `WanImageToVideoPipeline`.

use flowtape_engine::Tensor;
use flowtape_flowmatch::{Draws, FlowMatchingContext, ModelAdapter, ModelInputs};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::WanConfig;
use crate::blocks::{drop_samples, text_embeddings, video_dims, with_batch_axis};
use crate::config::parse_kwargs;
use crate::requirements::{Fixed, Requirements, check_prediction};
use crate::{Error, Result};

/// Channels of the mask: the frames of a latent frame.
const MASK: usize = 4;

/// Puts behind the noisy latents, channel by channel, a mask of the frames that are given and the latents of a video in which
/// those alone are there (Wan 2.1 and 2.2 image-to-video, first and last frame).
///
/// Reads of the batch: `condition_latents`, like the latents; `text_embeddings` `[B, T, D]`; and, where the model sees the
/// image besides, `image_embeds` `[B, N, E]`: of first and last frame one behind the other, or `[2 B, N, E]`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WanI2VAdapter {
    /// Whether the last frame is given as well as the first.
    pub last_image: bool,
}

impl WanI2VAdapter {
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
        let channels = Fixed::new("out_channels", config.out_channels());
        let expected = Fixed::new("twice out_channels and 4", 2 * channels.size + MASK);
        check_prediction("in_channels", config.in_channels, expected)?;
        let image = config.image_dim.map(|width| ("image_embeds", Fixed::new("image_dim", width)));
        let text = ("text_embeddings", Fixed::new("text_dim", config.text_dim));
        Ok(Requirements {
            channels,
            patch: config.patch_size.into(),
            widths: [text].into_iter().chain(image).collect(),
        })
    }

    /// `[1, 4, F, 1, 1]`: 1 at the frames that are given. The first latent frame holds one frame alone, the last one four.
    fn mask(&self, frames: usize, like: &Tensor) -> Result<Tensor> {
        let mut mask = vec![0f32; MASK * frames];
        mask.iter_mut().step_by(frames).for_each(|first| *first = 1.0);
        if let Some(last) = mask.last_mut().filter(|_| self.last_image) {
            *last = 1.0;
        }
        Ok(Tensor::from_vec(mask, &[1, MASK, frames, 1, 1], like.device())?.to_dtype(like.dtype())?)
    }
}

impl ModelAdapter for WanI2VAdapter {
    fn name(&self) -> &str {
        "wan_i2v"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        let [batch, _, frames, height, width] = video_dims(cx, self.name())?;
        let noisy = &cx.noisy_latents;
        let condition = with_batch_axis(cx.batch.require("condition_latents")?, 5, cx.dtype)?;
        if condition.dims() != noisy.dims() {
            let expected = format!("`condition_latents` {:?}, like the latents", noisy.dims());
            return Err(Error::adapter(self.name(), expected, format!("{:?}", condition.dims())));
        }
        let mask = self.mask(frames, noisy)?.expand(&[batch, MASK, frames, height, width])?;
        let [text] = drop_samples(cx, [text_embeddings(cx, self.name())?], draws)?;
        let image = cx.batch.get("image_embeds").map(|image| with_batch_axis(image, 3, cx.dtype)).transpose()?;
        Ok(ModelInputs::new()
            .with("hidden_states", Tensor::cat(&[noisy, &mask, &condition], 1)?)
            .with("timestep", cx.timesteps.clone())
            .with("encoder_hidden_states", text)
            .with_optional("encoder_hidden_states_image", image))
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::DType;
    use flowtape_flowmatch::{Batch, RecordedDraws};
    use serde_json::json;

    use super::*;
    use crate::testing::{normal, prepare};

    fn batch() -> Batch {
        Batch::new(normal(&[2, 3, 2, 4, 6]), "video".into())
            .with("text_embeddings", normal(&[2, 5, 7]))
            .with("condition_latents", normal(&[2, 3, 2, 4, 6]))
    }

    #[test]
    fn the_given_frames_are_marked_in_front_of_their_latents() {
        let channels = |last_image: bool| {
            let adapter = WanI2VAdapter { last_image };
            let inputs = prepare(&adapter, &batch(), DType::F32, 0.0, &mut RecordedDraws::default()).unwrap();
            assert!(inputs.get("encoder_hidden_states_image").is_none());
            let parts = inputs.tensor("hidden_states").unwrap().split(&[3, 4, 3], 1).unwrap();
            parts.iter().map(|part| part.to_vec::<f32>().unwrap()).collect::<Vec<_>>()
        };
        let (first, both) = (channels(false), channels(true));
        let of_sample: Vec<f32> = [1.0, 0.0].repeat(4).into_iter().flat_map(|mark| vec![mark; 24]).collect();
        assert_eq!(
            (&first[0], &first[2]),
            (&batch().latents.to_vec().unwrap(), &normal(&[2, 3, 2, 4, 6]).to_vec().unwrap())
        );
        assert_eq!(first[1], of_sample.repeat(2));
        // Of the last latent frame's four frames the last one.
        let last: Vec<f32> = [&of_sample[..7 * 24], &[1.0; 24]].concat();
        assert_eq!(both[1], last.repeat(2));
    }

    #[test]
    fn a_batch_or_a_configuration_that_does_not_fit_is_refused() {
        let refused = |batch: Batch, part: &str| {
            let told = prepare(&WanI2VAdapter::default(), &batch, DType::F32, 0.0, &mut RecordedDraws::default());
            let error = told.unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        refused(Batch { latents: normal(&[2, 3, 4, 6]), ..batch() }, "4-D latents");
        refused(batch().with("condition_latents", normal(&[2, 3, 1, 4, 6])), "`condition_latents` [2, 3, 2, 4, 6]");
        refused(Batch::new(normal(&[2, 3, 2, 4, 6]), "video".into()), "condition_latents");
        let asks = |config: Value| WanI2VAdapter::default().requirements(&WanConfig::from_json(&config).unwrap());
        let error = asks(json!({"in_channels": 16})).unwrap_err().to_string();
        assert!(error.contains("in_channels") && error.contains("36"), "{error}");
        assert_eq!(asks(json!({"in_channels": 36, "image_dim": 1280})).unwrap().widths.len(), 2);
    }
}
