//! NeMo's `QwenImageAdapter`.

use flowtape_engine::Tensor;
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{PATCH, QwenImageConfig};
use crate::Result;
use crate::blocks::{ChannelOrder, guidance, image_dims, patchify, text_embeddings, unit_times, unpatchify};
use crate::config::parse_kwargs;
use crate::requirements::Requirements;

/// Packs latents as for FLUX.1 and drops the captions of a whole batch at once.
///
/// Reads `text_embeddings` `[B, T, D]` (or `[T, D]`) of the batch. Padding of the text is attended to, as in the reference.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QwenImageAdapter {
    /// The guidance scale that the model is told.
    pub guidance_scale: f64,
    /// Whether it is told one. Qwen-Image's transformer refuses it.
    pub use_guidance_embeds: bool,
}

impl Default for QwenImageAdapter {
    fn default() -> Self {
        Self { guidance_scale: 3.5, use_guidance_embeds: false }
    }
}

impl QwenImageAdapter {
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
    pub fn requirements(&self, config: &QwenImageConfig) -> Result<Requirements> {
        config.requirements()
    }
}

impl ModelAdapter for QwenImageAdapter {
    fn name(&self) -> &str {
        "qwen_image"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        let [batch, _, height, width] = image_dims(cx, self.name())?;
        let mut text = text_embeddings(cx, self.name())?;
        if cx.cfg_dropout_prob > 0.0 && draws.decision()? < cx.cfg_dropout_prob {
            text = Tensor::zeros(text.dims(), cx.dtype, &cx.device)?;
        }
        let told = self.use_guidance_embeds.then(|| guidance(cx, self.guidance_scale)).transpose()?;
        Ok(ModelInputs::new()
            .with("hidden_states", patchify(&cx.noisy_latents, &PATCH)?)
            .with("encoder_hidden_states", text)
            .with("timestep", unit_times(cx)?)
            .with("img_shapes", vec![vec![vec![1, height / 2, width / 2]]; batch])
            .with_optional("guidance", told))
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
    use flowtape_flowmatch::{Batch, ModelOutput, Recorded, RecordedDraws};

    use super::*;
    use crate::testing::{normal, predict, prepare};

    fn batch() -> Batch {
        Batch::new(normal(&[2, 3, 4, 6]), "image".into()).with("text_embeddings", normal(&[2, 5, 7]))
    }

    fn plain(adapter: &QwenImageAdapter, batch: &Batch, dtype: DType) -> Result<ModelInputs> {
        // Draws that hold nothing: none may be asked for.
        prepare(adapter, batch, dtype, 0.0, &mut RecordedDraws::default())
    }

    #[test]
    fn inputs_are_packed_latents_text_times_and_shapes() {
        let inputs = plain(&QwenImageAdapter::default(), &batch(), DType::BF16).unwrap();
        let names: Vec<&str> = inputs.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["encoder_hidden_states", "hidden_states", "img_shapes", "timestep"]);
        assert_eq!(inputs.tensor("hidden_states").unwrap().dims(), [2, 6, 12]);
        assert_eq!(inputs.shapes("img_shapes").unwrap(), vec![vec![vec![1, 2, 3]]; 2]);
        assert_eq!(inputs.tensor("timestep").unwrap().to_vec::<f32>().unwrap(), [0.5; 2]);
        for (name, dtype) in
            [("hidden_states", DType::BF16), ("encoder_hidden_states", DType::BF16), ("timestep", DType::F32)]
        {
            assert_eq!(inputs.tensor(name).unwrap().dtype(), dtype, "{name}");
        }
    }

    #[test]
    fn one_draw_decides_for_the_whole_batch() {
        for (draw, kept) in [(0.29, false), (0.3, true)] {
            let mut draws = RecordedDraws::new([Recorded::Decision(draw)]);
            let inputs = prepare(&QwenImageAdapter::default(), &batch(), DType::F32, 0.3, &mut draws).unwrap();
            let text = inputs.tensor("encoder_hidden_states").unwrap().to_vec::<f32>().unwrap();
            assert_eq!(text.iter().all(|v| *v == 0.0), !kept, "{draw}");
        }
    }

    #[test]
    fn a_guidance_is_given_when_asked_for() {
        let kwargs = serde_json::from_str(r#"{"use_guidance_embeds": true, "guidance_scale": 7.5}"#).unwrap();
        let inputs = plain(&QwenImageAdapter::from_kwargs(&kwargs).unwrap(), &batch(), DType::F32).unwrap();
        assert_eq!(inputs.tensor("guidance").unwrap().to_vec::<f32>().unwrap(), [7.5; 2]);
        let kwargs = serde_json::from_str(r#"{"guidance": 1}"#).unwrap();
        assert!(QwenImageAdapter::from_kwargs(&kwargs).unwrap_err().to_string().contains("guidance_scale"));
    }

    #[test]
    fn a_batch_that_does_not_fit_is_refused() {
        let refused = |batch: Batch| plain(&QwenImageAdapter::default(), &batch, DType::F32).unwrap_err().to_string();
        assert!(refused(Batch { latents: normal(&[2, 3, 1, 4, 6]), ..batch() }).contains("5-D"));
        assert!(refused(Batch { latents: normal(&[2, 3, 5, 6]), ..batch() }).contains("a multiple of [2, 2]"));
        assert!(refused(Batch::new(normal(&[2, 3, 4, 6]), "image".into())).contains("text_embeddings"));
    }

    /// Gives its tokens back, and another output beside.
    struct Echo;

    impl FlowModel for Echo {
        fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput> {
            Ok(ModelOutput { sample: inputs.tensor("hidden_states")?.clone(), rest: vec![normal(&[1])] })
        }
    }

    #[test]
    fn the_first_output_comes_back_in_the_shape_of_the_latents() {
        // One sample may lack its text's batch axis.
        let one = Batch::new(normal(&[1, 3, 4, 6]), "image".into()).with("text_embeddings", normal(&[5, 7]));
        let adapter = QwenImageAdapter::default();
        let inputs = plain(&adapter, &one, DType::F32).unwrap();
        assert_eq!(inputs.tensor("encoder_hidden_states").unwrap().dims(), [1, 5, 7]);
        let velocity = predict(&adapter, &Echo, &one).unwrap().velocity;
        assert_eq!(velocity.to_vec::<f32>().unwrap(), one.latents.to_vec::<f32>().unwrap());
    }
}
