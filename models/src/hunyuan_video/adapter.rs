//! NeMo's `HunyuanAdapter`.

use flowtape_engine::Tensor;
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction, TaskType};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::HunyuanVideo15Config;
use crate::blocks::with_batch_axis;
use crate::config::{check_sizes, parse_kwargs};
use crate::requirements::{Fixed, Requirements, check_prediction};
use crate::{Error, Result};

/// Cuts text to its valid tokens, and gives the model condition latents and image embeddings.
///
/// Reads of the batch: `text_embeddings` `[B, T, D]` (or `[T, D]`), and, where they are there, `text_mask` `[B, T]`,
/// `text_embeddings_2` `[B, T2, D2]`, `text_mask_2` `[B, T2]` and, for image-to-video, `image_embeds` `[B, N, E]`. A mask
/// holds 1 for a token and 0 for padding, which comes last. Guidance dropout has no effect here, as in the reference.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HunyuanAdapter {
    /// Tokens and width of the zeros that stand for image embeddings where there are none.
    pub default_image_embed_shape: [usize; 2],
    /// Whether the condition latents follow the noisy ones on the channel axis.
    pub use_condition_latents: bool,
}

impl Default for HunyuanAdapter {
    fn default() -> Self {
        Self { default_image_embed_shape: [729, 1152], use_condition_latents: true }
    }
}

impl HunyuanAdapter {
    /// From a recipe's `adapter_kwargs`.
    ///
    /// # Errors
    /// When an argument is unknown, of another type, or a size out of bounds.
    pub fn from_kwargs(kwargs: &Map<String, Value>) -> Result<Self> {
        let adapter: Self = parse_kwargs(kwargs)?;
        check_sizes(adapter.default_image_embed_shape.map(|size| ("default_image_embed_shape", size)))?;
        Ok(adapter)
    }

    /// What a model of this configuration asks of a batch.
    ///
    /// # Errors
    /// When the configuration contradicts the adapter.
    pub fn requirements(&self, config: &HunyuanVideo15Config) -> Result<Requirements> {
        let inputs = config.in_channels;
        let channels = match self.use_condition_latents {
            true if inputs.is_multiple_of(2) || inputs < 3 => {
                let expected = "an odd number of at least 3: noisy latents, condition latents and their mask";
                return Err(Error::config("in_channels", expected, inputs));
            }
            true => Fixed::new("in_channels / 2", inputs / 2),
            false => Fixed::new("in_channels", inputs),
        };
        check_prediction("out_channels", config.out_channels(), channels)?;
        let [_, width] = self.default_image_embed_shape;
        if width != config.image_embed_dim {
            let expected = format!("{width}, as adapter_kwargs.default_image_embed_shape says");
            return Err(Error::config("image_embed_dim", expected, config.image_embed_dim));
        }
        Ok(Requirements {
            channels,
            patch: config.patch().into(),
            widths: vec![
                ("text_embeddings", Fixed::new("text_embed_dim", config.text_embed_dim)),
                ("text_embeddings_2", Fixed::new("text_embed_2_dim", config.text_embed_2_dim)),
                ("image_embeds", Fixed::new("image_embed_dim", config.image_embed_dim)),
            ],
        })
    }
}

/// What the model is told of clean latents `[B, C, F, H, W]`: `[B, C + 1, F, H, W]`, zero but for image-to-video, where
/// the first frame is there and the last channel marks it with 1.
///
/// # Errors
/// When the latents are not 5-D or have no frame.
pub fn condition_latents(latents: &Tensor, task_type: TaskType) -> Result<Tensor> {
    let &[b, c, f @ 1..=usize::MAX, h, w] = latents.dims() else {
        return Err(wrong_latents(latents));
    };
    let (dtype, device) = (latents.dtype(), latents.device());
    match task_type {
        TaskType::T2V => Ok(Tensor::zeros(&[b, c + 1, f, h, w], dtype, device)?),
        TaskType::I2V => {
            let marks = Tensor::ones(&[b, 1, 1, h, w], dtype, device)?;
            let first = Tensor::cat(&[&latents.narrow(2, 0, 1)?, &marks], 1)?;
            Ok(first.pad(2, 0, f - 1)?)
        }
    }
}

fn wrong_latents(latents: &Tensor) -> Error {
    Error::adapter(
        "hunyuan",
        "5-D latents [B, C, F, H, W]",
        format!("{}-D latents {:?}", latents.rank(), latents.dims()),
    )
}

/// A tensor of the batch, where it is there; a single sample may lack its batch axis.
fn read(cx: &FlowMatchingContext<'_>, name: &str, rank: usize) -> Result<Option<Tensor>> {
    let tensor = cx.batch.get(name).map(|tensor| with_batch_axis(tensor, rank, cx.dtype)).transpose()?;
    match tensor.as_ref().filter(|t| t.rank() != rank) {
        Some(wrong) => {
            Err(Error::adapter("hunyuan", format!("`{name}` of rank {rank}"), format!("{:?}", wrong.dims())))
        }
        None => Ok(tensor),
    }
}

/// A text `[B, T, D]` and its mask `[B, T]`, each where it is there, cut to the longest caption of the batch (to one token
/// where there is none).
fn valid_tokens(cx: &FlowMatchingContext<'_>, text_name: &str, mask_name: &str) -> Result<[Option<Tensor>; 2]> {
    let (text, mask) = (read(cx, text_name, 3)?, read(cx, mask_name, 2)?);
    if let (Some(text), Some(mask)) = (&text, &mask)
        && text.dims()[..2] != *mask.dims()
    {
        let expected = format!("`{mask_name}` of shape {:?}, as `{text_name}` has tokens", &text.dims()[..2]);
        return Err(Error::adapter("hunyuan", expected, format!("{:?}", mask.dims())));
    }
    let valid = match &mask {
        // The batch is the host's: no device waits for this.
        Some(mask) => {
            let (marks, tokens) = (mask.to_vec::<f32>()?, mask.dim(1)?.max(1));
            let longest = marks.chunks(tokens).map(|row| row.iter().sum::<f32>()).fold(0.0, f32::max);
            Some((longest as usize).clamp(1, tokens))
        }
        None => None,
    };
    let cut = |tensor: Option<Tensor>| match (tensor, valid) {
        (Some(tensor), Some(valid)) => tensor.narrow(1, 0, valid).map(Some),
        (tensor, _) => Ok(tensor),
    };
    Ok([cut(text)?, cut(mask)?])
}

impl ModelAdapter for HunyuanAdapter {
    fn name(&self) -> &str {
        "hunyuan"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, _: &mut dyn Draws) -> Result<ModelInputs> {
        let &[batch, _, _, _, _] = cx.noisy_latents.dims() else {
            return Err(wrong_latents(&cx.noisy_latents));
        };
        cx.batch.require("text_embeddings")?;
        let [text, text_mask] = valid_tokens(cx, "text_embeddings", "text_mask")?;
        let [text_2, text_mask_2] = valid_tokens(cx, "text_embeddings_2", "text_mask_2")?;
        let image_embeds = match read(cx, "image_embeds", 3)? {
            Some(embeds) if cx.task_type == TaskType::I2V => embeds,
            _ => {
                let [tokens, width] = self.default_image_embed_shape;
                Tensor::zeros(&[batch, tokens, width], cx.dtype, &cx.device)?
            }
        };
        let latents = if self.use_condition_latents {
            Tensor::cat(&[&cx.noisy_latents, &condition_latents(&cx.latents, cx.task_type)?], 1)?
        } else {
            cx.noisy_latents.clone()
        };
        Ok(ModelInputs::new()
            .with("latents", latents)
            // The reference casts to the compute dtype, which moves timesteps in bf16 by up to 2: kept in f32 here.
            .with("timesteps", cx.timesteps.clone())
            .with_optional("encoder_hidden_states", text)
            .with_optional("encoder_attention_mask", text_mask)
            .with_optional("encoder_hidden_states_2", text_2)
            .with_optional("encoder_attention_mask_2", text_mask_2)
            .with("image_embeds", image_embeds))
    }

    /// The model's own names differ in two places: `hidden_states` and `timestep`.
    fn forward(&self, _: &FlowMatchingContext<'_>, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        let mut inputs = inputs.clone();
        for (name, own) in [("latents", "hidden_states"), ("timesteps", "timestep")] {
            if let Some(input) = inputs.remove(name) {
                inputs.insert(own, input);
            }
        }
        Ok(model.forward(&inputs)?.sample.into())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use flowtape_engine::{DType, Device, Philox};
    use flowtape_flowmatch::{Batch, RecordedDraws};

    use super::*;

    fn normal(dims: &[usize]) -> Tensor {
        Philox::new(dims.iter().sum::<usize>() as u64).normal(dims, &Device::cpu()).unwrap()
    }

    fn prepare(adapter: &HunyuanAdapter, batch: &Batch, task_type: TaskType, dtype: DType) -> Result<ModelInputs> {
        let latents = batch.latents.to_dtype(dtype)?;
        let sigma = Tensor::full(&[latents.dim(0)?], 0.5, DType::F32, &Device::cpu())?;
        let cx = FlowMatchingContext {
            noisy_latents: latents.mul_scalar(2.0)?,
            latents,
            timesteps: Tensor::full(&[batch.size()?], 601.5, DType::F32, &Device::cpu())?,
            sigma,
            task_type,
            data_type: "video".into(),
            device: Device::cpu(),
            dtype,
            cfg_dropout_prob: 1.0,
            streams: BTreeMap::new(),
            batch,
        };
        // Draws that hold nothing: none may be asked for.
        adapter.prepare_inputs(&cx, &mut RecordedDraws::default())
    }

    fn batch() -> Batch {
        Batch::new(normal(&[2, 3, 2, 4, 4]), "video".into()).with("text_embeddings", normal(&[2, 6, 5]))
    }

    #[test]
    fn a_plain_batch_needs_neither_masks_nor_a_second_text() {
        let inputs = prepare(&HunyuanAdapter::default(), &batch(), TaskType::T2V, DType::F32).unwrap();
        let names: Vec<&str> = inputs.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["encoder_hidden_states", "image_embeds", "latents", "timesteps"]);
        let image = inputs.tensor("image_embeds").unwrap();
        assert_eq!(image.dims(), [2, 729, 1152]);
        assert!(image.to_vec::<f32>().unwrap().iter().all(|v| *v == 0.0));
        assert_eq!(inputs.tensor("latents").unwrap().dims(), [2, 7, 2, 4, 4]);
        assert_eq!(inputs.tensor("timesteps").unwrap().to_vec::<f32>().unwrap(), [601.5; 2]);
    }

    #[test]
    fn tensors_are_in_the_compute_dtype_but_times_in_f32() {
        let masked = batch()
            .with("text_mask", Tensor::ones(&[2, 6], DType::U32, &Device::cpu()).unwrap())
            .with("text_embeddings_2", normal(&[2, 4, 3]))
            .with("image_embeds", normal(&[2, 3, 2]));
        let inputs = prepare(&HunyuanAdapter::default(), &masked, TaskType::I2V, DType::BF16).unwrap();
        for (name, _) in inputs.iter() {
            let expected = if name == "timesteps" { DType::F32 } else { DType::BF16 };
            assert_eq!(inputs.tensor(name).unwrap().dtype(), expected, "{name}");
        }
        // Without a mask of its own the second text keeps its length.
        assert_eq!(inputs.tensor("encoder_hidden_states_2").unwrap().dims(), [2, 4, 3]);
    }

    #[test]
    fn one_sample_may_lack_its_batch_axis() {
        let mask = Tensor::from_vec(vec![1.0f32, 1.0, 0.0, 0.0], &[4], &Device::cpu()).unwrap();
        let single = Batch::new(normal(&[1, 3, 2, 4, 4]), "video".into())
            .with("text_embeddings", normal(&[4, 5]))
            .with("text_mask", mask);
        let inputs = prepare(&HunyuanAdapter::default(), &single, TaskType::T2V, DType::F32).unwrap();
        assert_eq!(inputs.tensor("encoder_hidden_states").unwrap().dims(), [1, 2, 5]);
        assert_eq!(inputs.tensor("encoder_attention_mask").unwrap().to_vec::<f32>().unwrap(), [1.0, 1.0]);
    }

    #[test]
    fn image_to_video_conditions_on_the_first_clean_frame() {
        let inputs = prepare(&HunyuanAdapter::default(), &batch(), TaskType::I2V, DType::F32).unwrap();
        let parts = inputs.tensor("latents").unwrap().split(&[3, 3, 1], 1).unwrap();
        let values = |x: &Tensor, frame| x.narrow(2, frame, 1).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(values(&parts[1], 0), values(&batch().latents, 0));
        assert!(values(&parts[2], 0).iter().all(|v| *v == 1.0));
        assert!(values(&parts[1], 1).iter().chain(&values(&parts[2], 1)).all(|v| *v == 0.0));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let refused = |batch: Batch, parts: &[&str]| {
            let error = prepare(&HunyuanAdapter::default(), &batch, TaskType::I2V, DType::F32).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        };
        refused(Batch::new(normal(&[2, 3, 4, 4]), "image".into()), &["5-D latents", "[2, 3, 4, 4]"]);
        refused(Batch::new(normal(&[2, 3, 2, 4, 4]), "video".into()), &["'text_embeddings'"]);
        refused(batch().with("text_mask", normal(&[2, 5])), &["`text_mask`", "[2, 6]", "[2, 5]"]);
        refused(batch().with("image_embeds", normal(&[2])), &["`image_embeds` of rank 3", "[2]"]);
        let kwargs = Map::from_iter([("default_image_embed_shape".into(), serde_json::json!([729]))]);
        assert!(HunyuanAdapter::from_kwargs(&kwargs).unwrap_err().to_string().contains("default_image_embed_shape"));
        assert!(condition_latents(&normal(&[1, 2, 0, 4, 4]), TaskType::I2V).is_err());
    }
}
