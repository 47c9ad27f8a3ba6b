//! The adapter of FLUX.2 with reference images: NeMo's `Flux2Adapter`, and diffusers' training script of klein.

use flowtape_engine::Tensor;
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::adapter::PATCH;
use super::{Flux2Adapter, Flux2Config, reference_ids};
use crate::Result;
use crate::blocks::{ChannelOrder, image_dims, patchify, reference_latents, unpatchify};
use crate::config::parse_kwargs;
use crate::requirements::Requirements;

/// Gives the model the noisy latents and, after them, the clean latents of reference images at times of their own.
///
/// Reads of the batch what [`Flux2Adapter`] does, with the same arguments, and the list `context_latents` of one or more
/// `[B, C, H, W]`, each with sides of its own, patched and normalised as the latents are.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(transparent)]
pub struct Flux2EditAdapter(Flux2Adapter);

impl Flux2EditAdapter {
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
    pub fn requirements(&self, config: &Flux2Config) -> Result<Requirements> {
        self.0.requirements(config)
    }
}

impl ModelAdapter for Flux2EditAdapter {
    fn name(&self) -> &str {
        "flux2_edit"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        let [batch, ..] = image_dims(cx, self.name())?;
        let references = reference_latents(cx, self.name(), 1)?;
        let mut inputs = self.0.prepare_inputs(cx, draws)?;
        let (mut tokens, mut ids) = (Vec::new(), Vec::new());
        for (i, reference) in references.iter().enumerate() {
            tokens.push(patchify(reference, &PATCH)?.contiguous()?);
            ids.push(reference_ids(i, reference.dim(2)?, reference.dim(3)?, batch)?);
        }
        for (name, more) in [("hidden_states", tokens), ("img_ids", ids)] {
            let all: Vec<&Tensor> = std::iter::once(inputs.tensor(name)?).chain(&more).collect();
            let all = Tensor::cat(&all, 1)?;
            inputs.insert(name, all);
        }
        Ok(inputs)
    }

    /// The model predicts all tokens; those of the references, which come last, are not trained on.
    fn forward(&self, cx: &FlowMatchingContext<'_>, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        let tokens = model.forward(inputs)?.sample;
        let [_, _, height, width] = image_dims(cx, self.name())?;
        let target = tokens.narrow(1, 0, height * width)?;
        Ok(unpatchify(&target, &[height, width], &PATCH, ChannelOrder::Slowest)?.into())
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::DType;
    use flowtape_flowmatch::{Batch, ModelOutput, RecordedDraws};

    use super::*;
    use crate::testing::{normal, predict, prepare};

    fn batch() -> Batch {
        Batch::new(normal(&[2, 6, 3, 5]), "image".into())
            .with("text_embeddings", normal(&[2, 4, 7]))
            .with_list("context_latents", vec![normal(&[2, 6, 2, 2]), normal(&[2, 6, 1, 3])])
    }

    #[test]
    fn references_follow_the_target_at_times_of_their_own() {
        let prepared = prepare(&Flux2EditAdapter::default(), &batch(), DType::F32, 0.0, &mut RecordedDraws::default());
        let inputs = prepared.unwrap();
        let (tokens, ids) = (inputs.tensor("hidden_states").unwrap(), inputs.tensor("img_ids").unwrap());
        assert_eq!((tokens.dims(), ids.dims()), (&[2, 15 + 4 + 3, 6][..], &[2, 22, 4][..]));
        let at = |i: usize| ids.narrow(0, 1, 1).unwrap().narrow(1, i, 1).unwrap().to_vec::<u32>().unwrap();
        assert_eq!([at(14), at(15), at(18), at(21)], [[0, 2, 4, 0], [10, 0, 0, 0], [10, 1, 1, 0], [20, 0, 2, 0]]);
        let last = tokens.narrow(1, 19, 3).unwrap().transpose(1, 2).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(last, normal(&[2, 6, 1, 3]).to_vec::<f32>().unwrap());
        // The scale of guidance is the other adapter's argument.
        assert_eq!(inputs.tensor("guidance").unwrap().to_vec::<f32>().unwrap(), [3.5; 2]);
    }

    #[test]
    fn a_batch_without_references_is_refused() {
        let refused = |batch: Batch, part: &str| {
            let adapter = Flux2EditAdapter::default();
            let told = prepare(&adapter, &batch, DType::F32, 0.0, &mut RecordedDraws::default());
            let error = told.unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        refused(batch().with_list("context_latents", vec![]), "context_latents");
        refused(batch().with_list("context_latents", vec![normal(&[2, 5, 2, 2])]), "`context_latents[0]` [2, 6, H, W]");
        let kwargs = Map::from_iter([("guidance".into(), Value::from(1.0))]);
        assert!(Flux2EditAdapter::from_kwargs(&kwargs).unwrap_err().to_string().contains("guidance_scale"));
    }

    /// Gives its tokens back.
    struct Echo;

    impl FlowModel for Echo {
        fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput> {
            Ok(inputs.tensor("hidden_states")?.clone().into())
        }
    }

    #[test]
    fn what_is_predicted_for_references_is_left_out() {
        let velocity = predict(&Flux2EditAdapter::default(), &Echo, &batch()).unwrap().velocity;
        assert_eq!(velocity.to_vec::<f32>().unwrap(), batch().latents.to_vec::<f32>().unwrap());
    }
}
