//! What trains Krea 2, as diffusers' `Krea2Pipeline` calls it.

use flowtape_engine::{Device, Tensor};
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::Krea2Config;
use crate::blocks::{
    ChannelOrder, drop_samples, grid_positions, image_dims, patchify, required_text_mask, unit_times, unpatchify,
};
use crate::config::parse_kwargs;
use crate::requirements::{Fixed, Requirements, packed_channels};
use crate::{Error, Result};

/// Latents of a token: rows and columns.
const PATCH: [usize; 2] = [2, 2];

/// Packs latents as for FLUX.1, and drops captions.
///
/// Reads of the batch `text_embeddings` `[B, T, layers, D]`, the states of several layers of the text model, and
/// `text_attention_mask` `[B, T]`, which is 0 at padding: that may stand inside of the text.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Krea2Adapter {}

impl Krea2Adapter {
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
    pub fn requirements(&self, config: &Krea2Config) -> Result<Requirements> {
        Ok(Requirements {
            channels: packed_channels(config.in_channels)?,
            patch: PATCH.into(),
            widths: vec![("text_embeddings", Fixed::new("text_hidden_dim", config.text_hidden_dim))],
        })
    }
}

impl ModelAdapter for Krea2Adapter {
    fn name(&self) -> &str {
        "krea2"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        let [batch, _, height, width] = image_dims(cx, self.name())?;
        let text = cx.batch.require("text_embeddings")?.to_dtype(cx.dtype)?;
        if text.rank() != 4 || text.dim(0)? != batch {
            let expected = format!("`text_embeddings` [B, T, layers, D] of {batch} samples: states of several layers");
            return Err(Error::adapter(self.name(), expected, format!("{:?}", text.dims())));
        }
        let mask = required_text_mask(cx, self.name(), &text)?;
        let [text] = drop_samples(cx, [text], draws)?;
        // The text stands at 0, whatever the place in it.
        let mut positions = vec![0.0; 3 * text.dim(1)?];
        positions.extend(grid_positions(&[1, height / 2, width / 2]));
        let rows = positions.len() / 3;
        Ok(ModelInputs::new()
            .with("hidden_states", patchify(&cx.noisy_latents, &PATCH)?)
            .with("encoder_hidden_states", text)
            .with("encoder_attention_mask", mask)
            .with("timestep", unit_times(cx)?)
            .with("position_ids", Tensor::from_vec(positions, &[rows, 3], &Device::cpu())?))
    }

    fn forward(&self, cx: &FlowMatchingContext<'_>, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        let tokens = model.forward(inputs)?.sample;
        let [_, _, height, width] = image_dims(cx, self.name())?;
        Ok(unpatchify(&tokens, &[height / 2, width / 2], &PATCH, ChannelOrder::Slowest)?.into())
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::DType;
    use flowtape_flowmatch::{Batch, RecordedDraws};

    use super::*;
    use crate::testing::{normal, prepare};

    #[test]
    fn a_text_has_states_of_several_layers() {
        let batch = Batch::new(normal(&[2, 3, 4, 2]), "image".into()).with("text_attention_mask", normal(&[2, 5]));
        let run = |text: &[usize]| {
            let batch = batch.clone().with("text_embeddings", normal(text));
            prepare(&Krea2Adapter {}, &batch, DType::F32, 0.0, &mut RecordedDraws::default())
        };
        let inputs = run(&[2, 5, 3, 7]).unwrap();
        assert_eq!(inputs.tensor("encoder_hidden_states").unwrap().dims(), [2, 5, 3, 7]);
        let ids = inputs.tensor("position_ids").unwrap().to_vec::<f32>().unwrap();
        assert_eq!(ids, [&[0.0; 15][..], &[0., 0., 0., 0., 1., 0.]].concat());
        assert!(run(&[2, 5, 7]).unwrap_err().to_string().contains("[B, T, layers, D]"));
        assert!(run(&[2, 4, 3, 7]).unwrap_err().to_string().contains("text_attention_mask"));
    }
}
