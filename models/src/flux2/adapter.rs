//! NeMo's `Flux2Adapter`.

use flowtape_engine::ops::{pointwise, pointwise_to};
use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::config::AXES;
use crate::registry::parse_kwargs;
use crate::{Error, Result};

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
}

/// `[B, C, H, W]` to tokens `[B, H W, C]`.
///
/// # Errors
/// When the rank is not four.
pub fn pack_latents(latents: &Tensor) -> Result<Tensor> {
    match latents.rank() {
        4 => Ok(latents.flatten(2, 3)?.transpose(1, 2)?.contiguous()?),
        _ => Err(Error::batch("latents [B, C, H, W]", format!("{:?}", latents.dims()))),
    }
}

/// The reverse of [`pack_latents`], to latents of these sides.
///
/// # Errors
/// When the tokens are not those of such latents.
pub fn unpack_latents(tokens: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    match *tokens.dims() {
        [batch, len, channels] if len == height * width => {
            Ok(tokens.transpose(1, 2)?.reshape(&[batch, channels, height, width])?)
        }
        _ => Err(Error::batch(format!("{height} x {width} tokens [B, L, C]"), format!("{:?}", tokens.dims()))),
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
        let &[batch, _, height, width] = cx.noisy_latents.dims() else {
            let got = format!("{}-D latents {:?}", cx.noisy_latents.rank(), cx.noisy_latents.dims());
            return Err(Error::adapter("flux2", "4-D patched latents [B, C, H, W]", got));
        };
        let mut text = cx.batch.require("text_embeddings")?.to_dtype(cx.dtype)?;
        let &[_, text_len, _] = text.dims() else {
            return Err(Error::adapter("flux2", "text_embeddings [B, T, D]", format!("{:?}", text.dims())));
        };
        if cx.cfg_dropout_prob > 0.0 {
            let draws = Tensor::from_vec(draws.uniform(batch)?, &[batch, 1, 1], &cx.device)?;
            text = pointwise_to(cx.dtype, [&text, &draws], |[x, u]| u.select_lt(cx.cfg_dropout_prob, 0.0, x))?;
        }
        let guidance = || Tensor::full(&[batch], self.guidance_scale, DType::F32, &cx.device);
        Ok(ModelInputs::new()
            .with("hidden_states", pack_latents(&cx.noisy_latents)?)
            .with("encoder_hidden_states", text)
            .with("timestep", pointwise([&cx.timesteps], |[t]| t / 1000.0)?)
            .with("img_ids", latent_ids(height, width, batch)?)
            .with("txt_ids", text_ids(text_len, batch)?)
            .with_optional("guidance", self.use_guidance_embeds.then(guidance).transpose()?)
            .with("_h_p", height as f64)
            .with("_w_p", width as f64))
    }

    fn forward(&self, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        let tokens = model.forward(inputs)?.sample;
        let side = |name| Ok::<_, Error>(inputs.number(name)? as usize);
        Ok(unpack_latents(&tokens, side("_h_p")?, side("_w_p")?)?.into())
    }
}

#[cfg(test)]
mod tests {
    use flowtape_flowmatch::{Batch, ModelOutput, Recorded, RecordedDraws};

    use super::*;
    use crate::testing::{normal, prepare};

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
        let tensors = ["encoder_hidden_states", "guidance", "hidden_states", "img_ids", "timestep", "txt_ids"];
        assert_eq!(names, [&["_h_p", "_w_p"], &tensors[..]].concat());
        assert_eq!(inputs.tensor("hidden_states").unwrap().dims(), [2, 15, 6]);
        assert_eq!(inputs.tensor("timestep").unwrap().to_vec::<f32>().unwrap(), [0.5; 2]);
        assert_eq!(inputs.tensor("guidance").unwrap().to_vec::<f32>().unwrap(), [3.5; 2]);
        let (image, text) = (inputs.tensor("img_ids").unwrap(), inputs.tensor("txt_ids").unwrap());
        assert_eq!((image.dtype(), text.dtype()), (DType::U32, DType::U32));
        assert_eq!(image.narrow(1, 7, 1).unwrap().to_vec::<u32>().unwrap(), [0, 1, 2, 0, 0, 1, 2, 0]);
        assert_eq!(text.narrow(1, 3, 1).unwrap().to_vec::<u32>().unwrap(), [0, 0, 0, 3, 0, 0, 0, 3]);
        assert_eq!((inputs.number("_h_p").unwrap(), inputs.number("_w_p").unwrap()), (3.0, 5.0));
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
        let inputs = plain(&adapter, &batch(), DType::F32).unwrap();
        let velocity = adapter.forward(&Echo, &inputs).unwrap().velocity;
        assert_eq!(velocity.dims(), [2, 6, 3, 5]);
        assert_eq!(velocity.to_vec::<f32>().unwrap(), batch().latents.to_vec::<f32>().unwrap());
        let error = adapter.forward(&Echo, &inputs.with("_w_p", 4.0)).unwrap_err().to_string();
        assert!(error.contains("3 x 4 tokens"), "{error}");
    }
}
