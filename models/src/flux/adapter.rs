//! NeMo's `FluxAdapter`.

use flowtape_engine::ops::pointwise;
use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::{Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::blocks::with_batch_axis;
use crate::registry::parse_kwargs;
use crate::{Error, Result};

/// Width of CLIP's pooled embedding, which stands in as zeros where a batch has none.
const POOLED: usize = 768;

/// Packs latents for FLUX, drops captions, and passes a guidance scale.
///
/// Reads `text_embeddings` `[B, T, D]` (or `[T, D]`) and `pooled_prompt_embeds` or `clip_pooled` `[B, P]` of the batch.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FluxAdapter {
    /// The guidance scale that the model is told.
    pub guidance_scale: f64,
    /// Taken for the reference's sake and without effect, as there: a guidance is always passed to a model.
    pub use_guidance_embeds: bool,
}

impl Default for FluxAdapter {
    fn default() -> Self {
        Self { guidance_scale: 3.5, use_guidance_embeds: true }
    }
}

impl FluxAdapter {
    /// From a recipe's `adapter_kwargs`.
    ///
    /// # Errors
    /// When an argument is unknown or of another type.
    pub fn from_kwargs(kwargs: &Map<String, Value>) -> Result<Self> {
        parse_kwargs(kwargs)
    }
}

/// `[B, C, H, W]` to tokens `[B, H/2 W/2, 4 C]`, channel slowest inside a 2 x 2 patch.
///
/// # Errors
/// When a side is odd or the rank is not four.
pub fn pack_latents(latents: &Tensor) -> Result<Tensor> {
    match *latents.dims() {
        [b, c, h, w] if h % 2 == 0 && w % 2 == 0 => {
            let patches = latents.reshape(&[b, c, h / 2, 2, w / 2, 2])?.permute(&[0, 2, 4, 1, 3, 5])?;
            Ok(patches.reshape(&[b, h / 2 * (w / 2), 4 * c])?)
        }
        _ => Err(Error::batch("latents [B, C, H, W] with even sides", format!("{:?}", latents.dims()))),
    }
}

/// The reverse of [`pack_latents`], to latents of `dims`.
///
/// # Errors
/// When the tokens are not those of such latents.
pub fn unpack_latents(tokens: &Tensor, dims: &[usize]) -> Result<Tensor> {
    let &[b, c, h, w] = dims else {
        return Err(Error::batch("latents [B, C, H, W]", format!("{dims:?}")));
    };
    let patches = tokens.reshape(&[b, h / 2, w / 2, c, 2, 2])?.permute(&[0, 3, 1, 4, 2, 5])?;
    Ok(patches.reshape(&[b, c, h, w])?)
}

/// Positions `(0, y, x)` of the tokens of latents with these sides: f32 `[H/2 W/2, 3]` on the host, where they are read.
///
/// # Errors
/// When memory runs out.
pub fn latent_image_ids(height: usize, width: usize) -> Result<Tensor> {
    let (rows, cols) = (height / 2, width / 2);
    let ids = (0..rows * cols).flat_map(|i| [0.0, (i / cols) as f32, (i % cols) as f32]).collect();
    Ok(Tensor::from_vec(ids, &[rows * cols, 3], &Device::cpu())?)
}

impl ModelAdapter for FluxAdapter {
    fn name(&self) -> &str {
        "flux"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        let &[batch, _, height, width] = cx.noisy_latents.dims() else {
            let got = format!("{}-D latents {:?}", cx.noisy_latents.rank(), cx.noisy_latents.dims());
            return Err(Error::adapter("flux", "4-D latents [B, C, H, W]", got));
        };
        let mut text = with_batch_axis(cx.batch.require("text_embeddings")?, 3, cx.dtype)?;
        let mut pooled = match cx.batch.get("pooled_prompt_embeds").or_else(|| cx.batch.get("clip_pooled")) {
            Some(pooled) => with_batch_axis(pooled, 2, cx.dtype)?,
            None => Tensor::zeros(&[batch, POOLED], cx.dtype, &cx.device)?,
        };
        if cx.cfg_dropout_prob > 0.0 {
            let keep = |draw: f32| if f64::from(draw) < cx.cfg_dropout_prob { 0.0 } else { 1.0 };
            let keep: Vec<f32> = draws.uniform(batch)?.into_iter().map(keep).collect();
            let keep = Tensor::from_vec(keep, &[batch, 1], &cx.device)?.to_dtype(cx.dtype)?;
            text = text.mul(&keep.unsqueeze(2)?)?;
            pooled = pooled.mul(&keep)?;
        }
        let txt_ids = Tensor::zeros(&[batch, text.dim(1)?, 3], DType::F32, &Device::cpu())?;
        Ok(ModelInputs::new()
            .with("hidden_states", pack_latents(&cx.noisy_latents)?)
            .with("encoder_hidden_states", text)
            .with("pooled_projections", pooled)
            .with("timestep", pointwise([&cx.timesteps], |[t]| t / 1000.0)?)
            .with("img_ids", latent_image_ids(height, width)?)
            .with("txt_ids", txt_ids)
            .with("guidance", Tensor::full(&[batch], self.guidance_scale, DType::F32, &cx.device)?)
            .with("_original_shape", cx.noisy_latents.dims().to_vec()))
    }

    fn forward(&self, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        let tokens = model.forward(inputs)?.sample;
        Ok(unpack_latents(&tokens, inputs.shape("_original_shape")?)?.into())
    }
}
