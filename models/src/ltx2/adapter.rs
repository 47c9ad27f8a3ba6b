//! NeMo's `LTX2Adapter`.

use flowtape_engine::ops::mse;
use flowtape_engine::{DType, Tensor};
use flowtape_flowmatch::{Batch, Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::LTX2Config;
use crate::blocks::{ChannelOrder, patchify, unpatchify};
use crate::config::parse_kwargs;
use crate::requirements::{Fixed, Requirements, check_prediction};
use crate::{Error, Result};

/// The stream of the audio.
const AUDIO: &str = "audio";
/// Latents of a token: frames, rows and columns.
const VIDEO_PATCH: [usize; 3] = [1, 1, 1];
/// Latents of an audio token `[B, C, L, M]`: one in time, all bands.
fn audio_patch(audio: &Tensor) -> Result<[usize; 2]> {
    Ok([1, audio.dim(3)?])
}

/// Trains video and audio together: the audio is noised with the σ of its video and a noise of its own, and its loss is
/// added to the video's.
///
/// Reads `audio_latents` `[B, C, L, M]`, `text_embeddings` `[B, T, D]`, `audio_text_embeddings` `[B, T, E]` and
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

    /// What a model of this configuration asks of a batch.
    ///
    /// # Errors
    /// When the configuration contradicts the adapter.
    pub fn requirements(&self, config: &LTX2Config) -> Result<Requirements> {
        let (video, audio) = (config.video(), config.audio());
        check_prediction("out_channels", video.out_channels, Fixed::new("in_channels", video.in_channels))?;
        check_prediction("audio_out_channels", audio.out_channels, Fixed::new("audio_in_channels", audio.in_channels))?;
        let text = |key, width| match config.use_prompt_embeddings {
            true => Fixed::new("caption_channels", config.caption_channels),
            false => Fixed::new(key, width),
        };
        Ok(Requirements {
            channels: Fixed::new("in_channels", video.in_channels),
            patch: VIDEO_PATCH.into(),
            widths: vec![
                ("text_embeddings", text("cross_attention_dim", video.text_dim)),
                ("audio_text_embeddings", text("audio_cross_attention_dim", audio.text_dim)),
            ],
        })
    }
}

/// A tensor of the batch that must be there.
fn require<'b>(batch: &'b Batch, key: &str) -> Result<&'b Tensor> {
    let got = || format!("the keys {:?}", batch.tensors.keys().collect::<Vec<_>>());
    let expected = format!("`{key}` in the batch (its cache holds audio latents and the text of both streams)");
    batch.get(key).ok_or_else(|| Error::adapter("ltx2", expected, got()))
}

/// Frames, rows and columns of the noisy latents.
fn video_grid(cx: &FlowMatchingContext<'_>) -> Result<[usize; 3]> {
    match *cx.noisy_latents.dims() {
        [_, _, frames, height, width] => Ok([frames, height, width]),
        ref dims => Err(Error::adapter("ltx2", "5-D latents [B, C, F, H, W]", format!("{}-D {dims:?}", dims.len()))),
    }
}

impl ModelAdapter for LTX2Adapter {
    fn name(&self) -> &str {
        "ltx2"
    }

    fn stream_latents<'b>(&self, batch: &'b Batch) -> Result<Vec<(&'static str, &'b Tensor)>> {
        let audio = require(batch, "audio_latents")?;
        match audio.rank() {
            4 => Ok(vec![(AUDIO, audio)]),
            rank => Err(Error::adapter("ltx2", "4-D audio [B, C, L, M]", format!("{rank}-D {:?}", audio.dims()))),
        }
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, _: &mut dyn Draws) -> Result<ModelInputs> {
        let [frames, height, width] = video_grid(cx)?;
        let text = require(cx.batch, "text_embeddings")?.to_dtype(cx.dtype)?;
        let audio_text = require(cx.batch, "audio_text_embeddings")?.to_dtype(cx.dtype)?;
        let mask = require(cx.batch, "text_mask")?;
        let hidden_states = patchify(&cx.noisy_latents, &VIDEO_PATCH)?;
        let audio = &cx.stream(AUDIO)?.noisy_latents;
        let audio_hidden_states = patchify(&audio.to_dtype(cx.dtype)?, &audio_patch(audio)?)?;
        // Stride 0 along the tokens tells the model that they share one time.
        let per_token = |tokens: &Tensor| cx.timesteps.unsqueeze(1)?.expand(&tokens.dims()[..2]);
        Ok(ModelInputs::new()
            .with("timestep", per_token(&hidden_states)?)
            .with("audio_timestep", per_token(&audio_hidden_states)?)
            .with("sigma", cx.timesteps.clone())
            .with("audio_sigma", cx.timesteps.clone())
            .with("num_frames", frames as f64)
            .with("height", height as f64)
            .with("width", width as f64)
            .with("fps", self.fps)
            .with("audio_num_frames", audio_hidden_states.dim(1)? as f64)
            .with("hidden_states", hidden_states)
            .with("audio_hidden_states", audio_hidden_states)
            .with("encoder_hidden_states", text)
            .with("audio_encoder_hidden_states", audio_text)
            .with("encoder_attention_mask", mask.clone())
            .with("audio_encoder_attention_mask", mask.clone()))
    }

    fn forward(&self, cx: &FlowMatchingContext<'_>, model: &dyn FlowModel, inputs: &ModelInputs) -> Result<Prediction> {
        let output = model.forward(inputs)?;
        let [audio] = &output.rest[..] else {
            let got = format!("{} outputs", 1 + output.rest.len());
            return Err(Error::adapter("ltx2", "a model that returns video and audio", got));
        };
        let video = unpatchify(&output.sample, &video_grid(cx)?, &VIDEO_PATCH, ChannelOrder::Slowest)?;
        let mut prediction = Prediction::from(video);
        let patch = audio_patch(&cx.stream(AUDIO)?.noisy_latents)?;
        let audio = unpatchify(audio, &[audio.dim(1)?, 1], &patch, ChannelOrder::Slowest)?;
        prediction.auxiliary.insert(AUDIO.into(), audio);
        Ok(prediction)
    }

    fn auxiliary_losses(&self, cx: &FlowMatchingContext<'_>, prediction: &Prediction) -> Result<Vec<(String, Tensor)>> {
        let Some(audio) = prediction.auxiliary.get(AUDIO) else {
            return Err(Error::adapter("ltx2", "a prediction of the audio", "none"));
        };
        let loss = mse(&audio.to_dtype(DType::F32)?, &cx.stream(AUDIO)?.target)?;
        Ok(vec![("audio_loss".into(), loss.mul_scalar(self.audio_loss_weight)?)])
    }
}
