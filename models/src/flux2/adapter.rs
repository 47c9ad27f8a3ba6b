//! NeMo's `Flux2Adapter`.

use flowtape_engine::{Device, Tensor};
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::Flux2Config;
use super::config::AXES;
use crate::Result;
use crate::blocks::{
    ChannelOrder, drop_samples, guidance, image_dims, patchify, text_embeddings, unit_times, unpatchify,
};
use crate::config::parse_kwargs;
use crate::requirements::{Fixed, Requirements, check_prediction};

/// Latents of a token, rows and columns: the autoencoder's cache is patched already.
pub(super) const PATCH: [usize; 2] = [1, 1];

/// How far reference images are apart on the axis of time.
const REFERENCE_TIME: u32 = 10;

/// Lines up the latents of FLUX.2, which the cache holds patched and normalised, drops captions, and passes a guidance
/// scale.
///
/// Reads `text_embeddings` `[B, T, D]` of the batch.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Flux2Adapter {
    /// The guidance scale that the model is told.
    pub guidance_scale: f64,
    /// Whether it is told one.
    pub use_guidance_embeds: bool,
}

impl Default for Flux2Adapter {
    fn default() -> Self {
        Self { guidance_scale: 3.5, use_guidance_embeds: true }
    }
}

impl Flux2Adapter {
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
        let outputs = config.patch_size.pow(2) * config.out_channels();
        check_prediction("out_channels", outputs, Fixed::new("in_channels", config.in_channels))?;
        Ok(Requirements {
            channels: Fixed::new("in_channels", config.in_channels),
            patch: PATCH.into(),
            widths: vec![("text_embeddings", Fixed::new("joint_attention_dim", config.joint_attention_dim))],
        })
    }
}

/// Positions `(0, y, x, 0)` of the tokens of latents with these sides: u32 `[B, H W, 4]` on the host, alike in all
/// samples.
///
/// # Errors
/// When memory runs out.
pub fn latent_ids(height: usize, width: usize, batch: usize) -> Result<Tensor> {
    ids((0..height * width).map(|i| [0, (i / width) as u32, (i % width) as u32, 0]), batch)
}

/// Positions `(T, y, x, 0)` of the tokens of a reference image with these sides, where T is 10, 20, … for the first, the second
/// and so on: u32 `[B, H W, 4]` on the host, alike in all samples.
///
/// # Errors
/// When memory runs out.
pub fn reference_ids(index: usize, height: usize, width: usize, batch: usize) -> Result<Tensor> {
    let time = REFERENCE_TIME * (index + 1) as u32;
    ids((0..height * width).map(|i| [time, (i / width) as u32, (i % width) as u32, 0]), batch)
}

/// Positions `(0, 0, 0, i)` of text tokens: u32 `[B, len, 4]` on the host, alike in all samples.
///
/// # Errors
/// When memory runs out.
pub fn text_ids(len: usize, batch: usize) -> Result<Tensor> {
    ids((0..len).map(|i| [0, 0, 0, i as u32]), batch)
}

/// Positions are read where rotary tables are made, which is the host: there they stay.
fn ids(positions: impl Iterator<Item = [u32; AXES]>, batch: usize) -> Result<Tensor> {
    let positions: Vec<u32> = positions.flatten().collect();
    let len = positions.len() / AXES;
    Ok(Tensor::from_vec(positions, &[1, len, AXES], &Device::cpu())?.expand(&[batch, len, AXES])?)
}

impl ModelAdapter for Flux2Adapter {
    fn name(&self) -> &str {
        "flux2"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        let [batch, _, height, width] = image_dims(cx, self.name())?;
        let [text] = drop_samples(cx, [text_embeddings(cx, self.name())?], draws)?;
        let told = self.use_guidance_embeds.then(|| guidance(cx, self.guidance_scale)).transpose()?;
        Ok(ModelInputs::new()
            .with("hidden_states", patchify(&cx.noisy_latents, &PATCH)?.contiguous()?)
            .with("timestep", unit_times(cx)?)
            .with("img_ids", latent_ids(height, width, batch)?)
            .with("txt_ids", text_ids(text.dim(1)?, batch)?)
            .with("encoder_hidden_states", text)
            .with_optional("guidance", told))
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
    use flowtape_flowmatch::{Batch, ModelOutput, Recorded, RecordedDraws};

    use super::*;
    use crate::testing::{normal, predict, prepare};

    fn batch() -> Batch {
        Batch::new(normal(&[2, 6, 3, 5]), "image".into()).with("text_embeddings", normal(&[2, 4, 7]))
    }

    fn plain(adapter: &Flux2Adapter, batch: &Batch, dtype: DType) -> Result<ModelInputs> {
        // Draws that hold nothing: none may be asked for.
        prepare(adapter, batch, dtype, 0.0, &mut RecordedDraws::default())
    }

    #[test]
    fn inputs_are_tokens_times_positions_and_a_guidance() {
        let inputs = plain(&Flux2Adapter::default(), &batch(), DType::F32).unwrap();
        let names: Vec<&str> = inputs.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["encoder_hidden_states", "guidance", "hidden_states", "img_ids", "timestep", "txt_ids"]);
        assert_eq!(inputs.tensor("hidden_states").unwrap().dims(), [2, 15, 6]);
        assert_eq!(inputs.tensor("timestep").unwrap().to_vec::<f32>().unwrap(), [0.5; 2]);
        assert_eq!(inputs.tensor("guidance").unwrap().to_vec::<f32>().unwrap(), [3.5; 2]);
        let (image, text) = (inputs.tensor("img_ids").unwrap(), inputs.tensor("txt_ids").unwrap());
        assert_eq!((image.dtype(), text.dtype()), (DType::U32, DType::U32));
        assert_eq!(image.narrow(1, 7, 1).unwrap().to_vec::<u32>().unwrap(), [0, 1, 2, 0, 0, 1, 2, 0]);
        assert_eq!(text.narrow(1, 3, 1).unwrap().to_vec::<u32>().unwrap(), [0, 0, 0, 3, 0, 0, 0, 3]);
    }

    #[test]
    fn tensors_are_in_the_compute_dtype_but_times_and_guidance_in_f32() {
        let inputs = plain(&Flux2Adapter::default(), &batch(), DType::BF16).unwrap();
        for (name, dtype) in [
            ("hidden_states", DType::BF16),
            ("encoder_hidden_states", DType::BF16),
            ("timestep", DType::F32),
            ("guidance", DType::F32),
        ] {
            assert_eq!(inputs.tensor(name).unwrap().dtype(), dtype, "{name}");
        }
    }

    #[test]
    fn each_sample_drops_its_caption_by_its_own_draw() {
        let adapter = Flux2Adapter::default();
        for (dtype, drawn, kept) in [(DType::F32, [0.29, 0.3], [false, true]), (DType::BF16, [0.5, 0.0], [true, false])]
        {
            let mut draws = RecordedDraws::new([Recorded::Uniform(drawn.to_vec())]);
            let inputs = prepare(&adapter, &batch(), dtype, 0.3, &mut draws).unwrap();
            let text = inputs.tensor("encoder_hidden_states").unwrap();
            assert_eq!(text.dtype(), dtype);
            let given = batch().tensors["text_embeddings"].to_dtype(dtype).unwrap();
            for (i, kept) in kept.into_iter().enumerate() {
                let sample = |x: &Tensor| x.narrow(0, i, 1).unwrap().to_vec::<f32>().unwrap();
                let expected = if kept { sample(&given) } else { vec![0.0; 28] };
                assert_eq!(sample(text), expected, "sample {i}");
            }
        }
    }

    #[test]
    fn arguments_reach_the_adapter_and_unknown_ones_are_named() {
        let kwargs = |text| serde_json::from_str::<Map<String, Value>>(text).unwrap();
        let adapter = Flux2Adapter::from_kwargs(&kwargs(r#"{"guidance_scale": 7}"#)).unwrap();
        let inputs = plain(&adapter, &batch(), DType::F32).unwrap();
        assert_eq!(inputs.tensor("guidance").unwrap().to_vec::<f32>().unwrap(), [7.0; 2]);
        let adapter = Flux2Adapter::from_kwargs(&kwargs(r#"{"use_guidance_embeds": false}"#)).unwrap();
        assert!(plain(&adapter, &batch(), DType::F32).unwrap().get("guidance").is_none());
        let error = Flux2Adapter::from_kwargs(&kwargs(r#"{"guidance": 1}"#)).unwrap_err().to_string();
        assert!(error.contains("guidance_scale"), "{error}");
    }

    #[test]
    fn a_batch_that_does_not_fit_is_refused() {
        let adapter = Flux2Adapter::default();
        let refused = |batch: Batch| plain(&adapter, &batch, DType::F32).unwrap_err().to_string();
        let video = Batch { latents: normal(&[2, 6, 1, 3, 5]), ..batch() };
        assert!(refused(video).contains("5-D"));
        let without = Batch::new(normal(&[2, 6, 3, 5]), "image".into());
        assert!(refused(without).contains("text_embeddings"));
        assert!(refused(batch().with("text_embeddings", normal(&[4, 7]))).contains("[B, T, D]"));
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
        let adapter = Flux2Adapter::default();
        let velocity = predict(&adapter, &Echo, &batch()).unwrap().velocity;
        assert_eq!(velocity.dims(), [2, 6, 3, 5]);
        assert_eq!(velocity.to_vec::<f32>().unwrap(), batch().latents.to_vec::<f32>().unwrap());
    }
}
