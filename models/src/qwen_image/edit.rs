//! NeMo's `QwenImageEditAdapter`.

use flowtape_engine::Tensor;
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{PATCH, QwenImageConfig};
use crate::Result;
use crate::blocks::{
    ChannelOrder, image_dims, patchify, reference_latents, required_text_mask, text_embeddings, unit_times, unpatchify,
};
use crate::config::parse_kwargs;
use crate::requirements::Requirements;

/// Gives the model the noisy latents and, after them, the clean latents of reference images.
///
/// Reads of the batch: the list `context_latents` of one or more `[B, C, H, W]`, each with sides of its own,
/// `text_embeddings` `[B, T, D]` and `text_attention_mask` `[B, T]`, which is 0 at padding. Guidance dropout has no effect
/// here, as in the reference.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QwenImageEditAdapter {}

impl QwenImageEditAdapter {
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
    pub fn requirements(&self, config: &QwenImageConfig) -> Result<Requirements> {
        config.requirements()
    }
}

impl ModelAdapter for QwenImageEditAdapter {
    fn name(&self) -> &str {
        "qwen_image_edit"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, _: &mut dyn Draws) -> Result<ModelInputs> {
        let [batch, _, height, width] = image_dims(cx, self.name())?;
        let references = reference_latents(cx, self.name(), 2)?;
        let text = text_embeddings(cx, self.name())?;
        let mask = required_text_mask(cx, self.name(), &text)?;
        let (mut shapes, mut tokens) =
            (vec![vec![1, height / 2, width / 2]], vec![patchify(&cx.noisy_latents, &PATCH)?]);
        for reference in &references {
            shapes.push(vec![1, reference.dim(2)? / 2, reference.dim(3)? / 2]);
            tokens.push(patchify(reference, &PATCH)?);
        }
        Ok(ModelInputs::new()
            .with("hidden_states", Tensor::cat(&tokens.iter().collect::<Vec<_>>(), 1)?)
            .with("encoder_hidden_states", text)
            .with("encoder_hidden_states_mask", mask)
            .with("timestep", unit_times(cx)?)
            .with("img_shapes", vec![shapes; batch]))
    }

    /// The model predicts all tokens; those of the references, which come last, are not trained on.
    fn forward(&self, cx: &FlowMatchingContext<'_>, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        let tokens = model.forward(inputs)?.sample;
        let [_, _, height, width] = image_dims(cx, self.name())?;
        let grid = [height / 2, width / 2];
        let target = tokens.narrow(1, 0, grid[0] * grid[1])?;
        Ok(unpatchify(&target, &grid, &PATCH, ChannelOrder::Slowest)?.into())
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::{DType, Device};
    use flowtape_flowmatch::{Batch, ModelOutput, RecordedDraws};

    use super::*;
    use crate::testing::{normal, predict, prepare};

    fn batch() -> Batch {
        Batch::new(normal(&[2, 3, 4, 6]), "image".into())
            .with_list("context_latents", vec![normal(&[2, 3, 2, 6]), normal(&[2, 3, 4, 4])])
            .with("text_embeddings", normal(&[2, 5, 7]))
            .with("text_attention_mask", Tensor::ones(&[2, 5], DType::U32, &Device::cpu()).unwrap())
    }

    fn plain(batch: &Batch, dtype: DType) -> Result<ModelInputs> {
        // Even at probability 1 no caption is dropped, and nothing is drawn.
        prepare(&QwenImageEditAdapter::default(), batch, dtype, 1.0, &mut RecordedDraws::default())
    }

    #[test]
    fn the_target_comes_first_and_references_keep_their_order() {
        let inputs = plain(&batch(), DType::F32).unwrap();
        let packed = [normal(&[2, 3, 4, 6]), normal(&[2, 3, 2, 6]), normal(&[2, 3, 4, 4])];
        let packed = packed.map(|latents| patchify(&latents, &PATCH).unwrap());
        let expected = Tensor::cat(&packed.iter().collect::<Vec<_>>(), 1).unwrap();
        let values = |x: &Tensor| x.to_vec::<f32>().unwrap();
        assert_eq!(values(inputs.tensor("hidden_states").unwrap()), values(&expected));
        let shapes = vec![vec![1, 2, 3], vec![1, 1, 3], vec![1, 2, 2]];
        assert_eq!(inputs.shapes("img_shapes").unwrap(), [shapes.clone(), shapes]);
        assert_eq!(values(inputs.tensor("timestep").unwrap()), [0.5; 2]);
        assert_eq!(values(inputs.tensor("encoder_hidden_states").unwrap()), values(&normal(&[2, 5, 7])));
        assert!(inputs.get("guidance").is_none());
    }

    #[test]
    fn tensors_are_in_the_compute_dtype_but_mask_and_times_keep_theirs() {
        let inputs = plain(&batch(), DType::BF16).unwrap();
        for (name, dtype) in [
            ("hidden_states", DType::BF16),
            ("encoder_hidden_states", DType::BF16),
            ("encoder_hidden_states_mask", DType::U32),
            ("timestep", DType::F32),
        ] {
            assert_eq!(inputs.tensor(name).unwrap().dtype(), dtype, "{name}");
        }
    }

    #[test]
    fn a_batch_that_does_not_fit_is_refused() {
        let refused = |batch: Batch, part: &str| {
            let error = plain(&batch, DType::F32).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        let with = |latents: &[usize]| batch().with_list("context_latents", vec![normal(latents)]);
        refused(Batch { latents: normal(&[2, 3, 1, 4, 6]), ..batch() }, "4-D");
        refused(Batch { latents: normal(&[2, 3, 3, 6]), ..batch() }, "a multiple of [2, 2]");
        refused(batch().with_list("context_latents", vec![]), "context_latents");
        refused(with(&[2, 3, 3, 4]), "context_latents[0]");
        refused(with(&[2, 4, 4, 4]), "[2, 3, H, W]");
        refused(with(&[1, 3, 4, 4]), "[2, 3, H, W]");
        refused(with(&[2, 3, 1, 4, 4]), "context_latents[0]");
        refused(batch().with("text_embeddings", normal(&[5, 7])), "text_embeddings");
        refused(batch().with("text_attention_mask", normal(&[2, 4])), "text_attention_mask");
        let mut unmasked = batch();
        unmasked.tensors.remove("text_attention_mask");
        refused(unmasked, "text_attention_mask");
        let kwargs = serde_json::from_str(r#"{"guidance_scale": 1}"#).unwrap();
        assert!(QwenImageEditAdapter::from_kwargs(&kwargs).unwrap_err().to_string().contains("guidance_scale"));
    }

    struct Echo;

    impl FlowModel for Echo {
        fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput> {
            Ok(inputs.tensor("hidden_states")?.clone().into())
        }
    }

    #[test]
    fn what_is_predicted_for_references_is_left_out() {
        let velocity = predict(&QwenImageEditAdapter::default(), &Echo, &batch()).unwrap().velocity;
        assert_eq!(velocity.to_vec::<f32>().unwrap(), normal(&[2, 3, 4, 6]).to_vec::<f32>().unwrap());
    }
}
