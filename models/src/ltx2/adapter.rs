//! NeMo's `LTX2Adapter`.

use flowtape_engine::ops::mse;
use flowtape_engine::{DType, Tensor};
use flowtape_flowmatch::{
    Draws, FlowMatchingContext, FlowModel, LinearInterpolationSchedule, ModelAdapter, ModelInputs, Prediction,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::registry::parse_kwargs;
use crate::{Error, Result};

/// Mel bins of a latent of LTX-2's audio VAE.
const MEL_BINS: usize = 16;

/// Trains video and audio together: the audio is noised with the σ of its video and a noise of its own, and its loss is
/// added to the video's.
///
/// Reads `audio_latents` `[B, C, L, 16]`, `text_embeddings` `[B, T, D]`, `audio_text_embeddings` `[B, T, E]` and
/// `text_mask` `[B, T]` (1 keeps) of the batch, whose latents are `[B, C, F, H, W]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LTX2Adapter {
    /// Factor of the audio's loss.
    pub audio_loss_weight: f64,
    /// Frames a second of the videos.
    pub fps: f64,
}

impl Default for LTX2Adapter {
    fn default() -> Self {
        Self { audio_loss_weight: 1.0, fps: 24.0 }
    }
}

impl LTX2Adapter {
    /// From a recipe's `adapter_kwargs`.
    ///
    /// # Errors
    /// When an argument is unknown or of another type.
    pub fn from_kwargs(kwargs: &Map<String, Value>) -> Result<Self> {
        parse_kwargs(kwargs)
    }
}

/// Video latents `[B, C, F, H, W]` to tokens `[B, F H W, C]`.
///
/// # Errors
/// When the rank is not five.
pub fn pack_video(latents: &Tensor) -> Result<Tensor> {
    match latents.rank() {
        5 => Ok(latents.flatten(2, 4)?.transpose(1, 2)?),
        rank => Err(Error::adapter("ltx2", "5-D latents [B, C, F, H, W]", format!("{rank}-D {:?}", latents.dims()))),
    }
}

/// The reverse of [`pack_video`], to latents of `F`, `H`, `W`.
///
/// # Errors
/// When the tokens are not those of such latents.
pub fn unpack_video(tokens: &Tensor, [frames, height, width]: [usize; 3]) -> Result<Tensor> {
    let dims = [tokens.dim(0)?, tokens.dim(2)?, frames, height, width];
    Ok(tokens.transpose(1, 2)?.reshape(&dims)?)
}

/// Audio latents `[B, C, L, M]` to tokens `[B, L, C M]`.
///
/// # Errors
/// When the rank is not four.
pub fn pack_audio(latents: &Tensor) -> Result<Tensor> {
    match latents.rank() {
        4 => Ok(latents.transpose(1, 2)?.flatten(2, 3)?),
        rank => Err(Error::adapter("ltx2", "4-D audio [B, C, L, M]", format!("{rank}-D {:?}", latents.dims()))),
    }
}

/// The reverse of [`pack_audio`], to latents of `bins` mel bins.
///
/// # Errors
/// When the width of a token is not a multiple of `bins`.
pub fn unpack_audio(tokens: &Tensor, bins: usize) -> Result<Tensor> {
    let (batch, len, width) = (tokens.dim(0)?, tokens.dim(1)?, tokens.dim(2)?);
    Ok(tokens.reshape(&[batch, len, width / bins, bins])?.transpose(1, 2)?)
}

impl ModelAdapter for LTX2Adapter {
    fn name(&self) -> &str {
        "ltx2"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, draws: &mut dyn Draws) -> Result<ModelInputs> {
        let require = |key: &str| {
            let got = || format!("the keys {:?}", cx.batch.tensors.keys().collect::<Vec<_>>());
            let expected = format!("`{key}` in the batch (its cache holds audio latents and the text of both streams)");
            cx.batch.get(key).ok_or_else(|| Error::adapter("ltx2", expected, got()))
        };
        let audio = require("audio_latents")?.to_dtype(DType::F32)?;
        let text = require("text_embeddings")?.to_dtype(cx.dtype)?;
        let audio_text = require("audio_text_embeddings")?.to_dtype(cx.dtype)?;
        let mask = require("text_mask")?;
        let hidden_states = pack_video(&cx.noisy_latents)?;
        let noise = draws.noise(audio.dims(), &cx.device)?;
        let noisy_audio = LinearInterpolationSchedule.forward(&audio, &noise, &cx.sigma)?;
        let audio_hidden_states = pack_audio(&noisy_audio.to_dtype(cx.dtype)?)?;
        // Stride 0 along the tokens tells the model that they share one time.
        let per_token = |tokens: &Tensor| cx.timesteps.unsqueeze(1)?.expand(&tokens.dims()[..2]);
        let size = |axis| Ok::<_, Error>(cx.noisy_latents.dim(axis)? as f64);
        Ok(ModelInputs::new()
            .with("timestep", per_token(&hidden_states)?)
            .with("audio_timestep", per_token(&audio_hidden_states)?)
            .with("sigma", cx.timesteps.clone())
            .with("audio_sigma", cx.timesteps.clone())
            .with("num_frames", size(2)?)
            .with("height", size(3)?)
            .with("width", size(4)?)
            .with("fps", self.fps)
            .with("audio_num_frames", audio_hidden_states.dim(1)? as f64)
            .with("hidden_states", hidden_states)
            .with("audio_hidden_states", audio_hidden_states)
            .with("encoder_hidden_states", text)
            .with("audio_encoder_hidden_states", audio_text)
            .with("encoder_attention_mask", mask.clone())
            .with("audio_encoder_attention_mask", mask.clone())
            .with("_audio_target", LinearInterpolationSchedule.velocity(&audio, &noise)?))
    }

    fn forward(&self, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        let output = model.forward(inputs)?;
        let [audio] = &output.rest[..] else {
            let got = format!("{} outputs", 1 + output.rest.len());
            return Err(Error::adapter("ltx2", "a model that returns video and audio", got));
        };
        let size = |name: &str| Ok::<_, Error>(inputs.number(name)? as usize);
        let video = unpack_video(&output.sample, [size("num_frames")?, size("height")?, size("width")?])?;
        let mut prediction = Prediction::from(video);
        prediction.auxiliary.insert("audio".into(), unpack_audio(audio, MEL_BINS)?);
        Ok(prediction)
    }

    fn auxiliary_losses(&self, inputs: &ModelInputs, prediction: &Prediction) -> Result<Vec<(String, Tensor)>> {
        let Some(audio) = prediction.auxiliary.get("audio") else {
            return Err(Error::adapter("ltx2", "a prediction of the audio", "none"));
        };
        let loss = mse(&audio.to_dtype(DType::F32)?, inputs.tensor("_audio_target")?)?;
        Ok(vec![("audio_loss".into(), loss.mul_scalar(self.audio_loss_weight)?)])
    }
}
