//! The configuration of diffusers' `LTX2VideoTransformer3DModel`.

use flowtape_engine::nn::Activation;
use flowtape_engine::ops::RopeLayout;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{Config, check_layers, check_sizes, product, read, truth, whole, wholes};
use crate::{Error, Result};

/// `config.json`, with diffusers' defaults. Fields of the audio stream have `audio_` before the name.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LTX2Config {
    /// Channels of a video token.
    pub in_channels: usize,
    /// Channels of the video prediction; `in_channels` if none.
    pub out_channels: Option<usize>,
    /// Side of a patch, for the positions alone: tokens come packed.
    #[serde(deserialize_with = "whole")]
    pub patch_size: usize,
    /// Frames of a patch.
    #[serde(deserialize_with = "whole")]
    pub patch_size_t: usize,
    /// Video heads.
    pub num_attention_heads: usize,
    /// Width of a video head.
    pub attention_head_dim: usize,
    /// Width of the text that the video attends to.
    pub cross_attention_dim: usize,
    /// Frames, rows and columns of the pixels behind a latent.
    #[serde(deserialize_with = "wholes")]
    pub vae_scale_factors: [usize; 3],
    /// Seconds at which the time axis of the rotary embedding ends.
    #[serde(deserialize_with = "whole")]
    pub pos_embed_max_pos: usize,
    /// Rows at which the second axis ends, in pixels.
    #[serde(deserialize_with = "whole")]
    pub base_height: usize,
    /// Columns at which the third axis ends, in pixels.
    #[serde(deserialize_with = "whole")]
    pub base_width: usize,
    /// Whether each video head has a gate of its own.
    #[serde(deserialize_with = "truth")]
    pub gated_attn: bool,
    /// Whether the time modulates the attention of video to text (LTX-2.3).
    #[serde(deserialize_with = "truth")]
    pub cross_attn_mod: bool,
    /// Channels of an audio token.
    pub audio_in_channels: usize,
    /// Channels of the audio prediction; `audio_in_channels` if none.
    pub audio_out_channels: Option<usize>,
    /// Without effect, as in the reference.
    #[serde(deserialize_with = "whole")]
    pub audio_patch_size: usize,
    /// Latent frames of an audio token.
    #[serde(deserialize_with = "whole")]
    pub audio_patch_size_t: usize,
    /// Audio heads, also those of the attention between audio and video.
    pub audio_num_attention_heads: usize,
    /// Width of an audio head.
    pub audio_attention_head_dim: usize,
    /// Width of the text that the audio attends to; the width of the audio stream.
    pub audio_cross_attention_dim: usize,
    /// Spectrogram frames behind a latent frame.
    #[serde(deserialize_with = "whole")]
    pub audio_scale_factor: usize,
    /// Seconds at which the audio's time axis ends.
    #[serde(deserialize_with = "whole")]
    pub audio_pos_embed_max_pos: usize,
    /// Samples a second.
    #[serde(deserialize_with = "whole")]
    pub audio_sampling_rate: usize,
    /// Samples between two spectrogram frames.
    #[serde(deserialize_with = "whole")]
    pub audio_hop_length: usize,
    /// Whether each audio head has a gate of its own.
    #[serde(deserialize_with = "truth")]
    pub audio_gated_attn: bool,
    /// Whether the time modulates the attention of audio to text.
    #[serde(deserialize_with = "truth")]
    pub audio_cross_attn_mod: bool,
    /// Blocks.
    pub num_layers: usize,
    /// Activation of the feed-forward layers.
    pub activation_fn: String,
    /// `rms_norm_across_heads`, the only one.
    pub qk_norm: String,
    /// Whether the blocks' norms have weights.
    #[serde(deserialize_with = "truth")]
    pub norm_elementwise_affine: bool,
    /// Epsilon of the blocks' norms.
    pub norm_eps: f64,
    /// Width of the text before `caption_projection`.
    pub caption_channels: usize,
    /// Whether queries, keys and values have biases.
    #[serde(deserialize_with = "truth")]
    pub attention_bias: bool,
    /// Whether the attention's output has a bias.
    #[serde(deserialize_with = "truth")]
    pub attention_out_bias: bool,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Whether the rotary frequencies are made in f64.
    #[serde(deserialize_with = "truth")]
    pub rope_double_precision: bool,
    /// Frames that the VAE's first latent frame stands for.
    #[serde(deserialize_with = "whole")]
    pub causal_offset: usize,
    /// Factor between σ and a timestep.
    #[serde(deserialize_with = "whole")]
    pub timestep_scale_multiplier: usize,
    /// The same for the gates between audio and video.
    #[serde(deserialize_with = "whole")]
    pub cross_attn_timestep_scale_multiplier: usize,
    /// `interleaved` or `split`: which columns the rotary embedding pairs.
    pub rope_type: String,
    /// Whether text goes through `caption_projection` (LTX-2.0).
    #[serde(deserialize_with = "truth")]
    pub use_prompt_embeddings: bool,
    /// Whether guidance may perturb attention when sampling; without effect here.
    #[serde(deserialize_with = "truth")]
    pub perturbed_attn: bool,
    /// Whether the video's feed-forward layers have biases.
    #[serde(deserialize_with = "truth")]
    pub ff_bias: bool,
    /// Whether the audio's do.
    #[serde(deserialize_with = "truth")]
    pub audio_ff_bias: bool,
    /// Whether the time modulates keys and values of the text, where it modulates the queries.
    #[serde(deserialize_with = "truth")]
    pub use_prompt_adaln_single: bool,
    /// Whether there is an embedding of keyframes, which NeMo's training does not use.
    #[serde(deserialize_with = "truth")]
    pub use_keyframes_abs_pos_embedding: bool,
}

impl Default for LTX2Config {
    fn default() -> Self {
        Self {
            in_channels: 128,
            out_channels: Some(128),
            patch_size: 1,
            patch_size_t: 1,
            num_attention_heads: 32,
            attention_head_dim: 128,
            cross_attention_dim: 4096,
            vae_scale_factors: [8, 32, 32],
            pos_embed_max_pos: 20,
            base_height: 2048,
            base_width: 2048,
            gated_attn: false,
            cross_attn_mod: false,
            audio_in_channels: 128,
            audio_out_channels: Some(128),
            audio_patch_size: 1,
            audio_patch_size_t: 1,
            audio_num_attention_heads: 32,
            audio_attention_head_dim: 64,
            audio_cross_attention_dim: 2048,
            audio_scale_factor: 4,
            audio_pos_embed_max_pos: 20,
            audio_sampling_rate: 16_000,
            audio_hop_length: 160,
            audio_gated_attn: false,
            audio_cross_attn_mod: false,
            num_layers: 48,
            activation_fn: "gelu-approximate".into(),
            qk_norm: "rms_norm_across_heads".into(),
            norm_elementwise_affine: false,
            norm_eps: 1e-6,
            caption_channels: 3840,
            attention_bias: true,
            attention_out_bias: true,
            rope_theta: 10_000.0,
            rope_double_precision: true,
            causal_offset: 1,
            timestep_scale_multiplier: 1000,
            cross_attn_timestep_scale_multiplier: 1000,
            rope_type: "interleaved".into(),
            use_prompt_embeddings: true,
            perturbed_attn: false,
            ff_bias: true,
            audio_ff_bias: true,
            use_prompt_adaln_single: true,
            use_keyframes_abs_pos_embedding: false,
        }
    }
}

impl Config for LTX2Config {
    const CLASS: &'static str = "LTX2VideoTransformer3DModel";
    const NULLABLE: &'static [&'static str] = &[
        "patch_size",
        "patch_size_t",
        "base_height",
        "base_width",
        "audio_patch_size",
        "audio_patch_size_t",
        "causal_offset",
        "timestep_scale_multiplier",
        "cross_attn_timestep_scale_multiplier",
        "norm_eps",
        "rope_theta",
    ];

    fn check(&self) -> Result<()> {
        let (video, audio) = (self.video(), self.audio());
        check_sizes([
            ("in_channels", video.in_channels),
            ("out_channels", video.out_channels),
            ("patch_size", self.patch_size),
            ("patch_size_t", self.patch_size_t),
            ("num_attention_heads times attention_head_dim", video.dim()),
            ("cross_attention_dim", video.text_dim),
            ("audio_in_channels", audio.in_channels),
            ("audio_out_channels", audio.out_channels),
            ("audio_patch_size_t", self.audio_patch_size_t),
            ("audio_num_attention_heads times audio_attention_head_dim", audio.dim()),
            ("caption_channels", self.caption_channels),
            ("timestep_scale_multiplier", self.timestep_scale_multiplier),
            ("cross_attn_timestep_scale_multiplier", self.cross_attn_timestep_scale_multiplier.max(1)),
            ("vae_scale_factors", product(&self.vae_scale_factors)),
            ("pos_embed_max_pos", self.pos_embed_max_pos),
            ("base_height", self.base_height),
            ("base_width", self.base_width),
            ("audio_scale_factor", self.audio_scale_factor),
            ("audio_pos_embed_max_pos", self.audio_pos_embed_max_pos),
            ("audio_sampling_rate", self.audio_sampling_rate),
            ("audio_hop_length", self.audio_hop_length),
            ("causal_offset", self.causal_offset.max(1)),
        ])?;
        check_layers(0, [("num_layers", self.num_layers)])?;
        self.activation()?;
        if self.qk_norm != "rms_norm_across_heads" {
            return Err(Error::config("qk_norm", "rms_norm_across_heads", &self.qk_norm));
        }
        if !["split", "interleaved"].contains(&&*self.rope_type) {
            return Err(Error::config("rope_type", "interleaved or split", &self.rope_type));
        }
        if audio.text_dim != audio.dim() {
            let expected = format!("the width of the audio stream, {}", audio.dim());
            return Err(Error::config("audio_cross_attention_dim", expected, audio.text_dim));
        }
        if (self.modulates_text() || self.use_prompt_embeddings) && video.text_dim != video.dim() {
            let expected = format!("the width of the video stream, {}", video.dim());
            return Err(Error::config("cross_attention_dim", expected, video.text_dim));
        }
        // Rotary embeddings pair the columns of a head, or those of all heads.
        let heads = |own: &StreamConfig| if self.rope_type == "split" { own.heads } else { 1 };
        for (key, own) in [("num_attention_heads", &video), ("audio_num_attention_heads", &audio)] {
            if [own.dim(), audio.dim()].iter().any(|dim| dim % (2 * heads(own)) != 0) {
                let expected = format!("a divisor of half of {} and {}", own.dim(), audio.dim());
                return Err(Error::config(key, expected, own.heads));
            }
        }
        Ok(())
    }
}

impl LTX2Config {
    /// Reads and checks the object of `config.json`.
    ///
    /// # Errors
    /// When a key is unknown or a value does not fit.
    pub fn from_json(value: &Value) -> Result<Self> {
        read(value)
    }

    /// The video stream.
    pub(super) fn video(&self) -> StreamConfig {
        StreamConfig {
            is_audio: false,
            in_channels: self.in_channels,
            out_channels: self.out_channels.filter(|channels| *channels > 0).unwrap_or(self.in_channels),
            heads: self.num_attention_heads,
            head_dim: self.attention_head_dim,
            text_dim: self.cross_attention_dim,
            gated: self.gated_attn,
            modulated: self.cross_attn_mod,
            ff_bias: self.ff_bias,
        }
    }

    /// The audio stream.
    pub(super) fn audio(&self) -> StreamConfig {
        StreamConfig {
            is_audio: true,
            in_channels: self.audio_in_channels,
            out_channels: self.audio_out_channels.filter(|channels| *channels > 0).unwrap_or(self.audio_in_channels),
            heads: self.audio_num_attention_heads,
            head_dim: self.audio_attention_head_dim,
            text_dim: self.audio_cross_attention_dim,
            gated: self.audio_gated_attn,
            modulated: self.audio_cross_attn_mod,
            ff_bias: self.audio_ff_bias,
        }
    }

    /// Whether text is modulated before it is attended to.
    pub(super) fn modulates_text(&self) -> bool {
        self.cross_attn_mod || self.audio_cross_attn_mod
    }

    /// Which columns the rotary embedding pairs.
    pub(super) fn rope_layout(&self) -> RopeLayout {
        if self.rope_type == "split" { RopeLayout::Split } else { RopeLayout::Interleaved }
    }

    /// Activation of the feed-forward layers.
    pub(super) fn activation(&self) -> Result<Activation> {
        match &*self.activation_fn {
            "gelu-approximate" => Ok(Activation::GeluTanh),
            "gelu" => Ok(Activation::Gelu),
            "linear-silu" => Ok(Activation::Silu),
            "geglu" => Ok(Activation::Geglu),
            "swiglu" => Ok(Activation::Swiglu),
            other => Err(Error::config("activation_fn", "gelu-approximate, gelu, linear-silu, geglu or swiglu", other)),
        }
    }
}

/// Sizes and options of one stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct StreamConfig {
    pub(super) is_audio: bool,
    pub(super) in_channels: usize,
    pub(super) out_channels: usize,
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    pub(super) text_dim: usize,
    pub(super) gated: bool,
    pub(super) modulated: bool,
    pub(super) ff_bias: bool,
}

impl StreamConfig {
    /// Width of the stream.
    pub(super) fn dim(&self) -> usize {
        product(&[self.heads, self.head_dim])
    }

    /// Vectors by which the time modulates a block, but for the attention between the streams.
    pub(super) fn modulations(&self) -> usize {
        if self.modulated { 9 } else { 6 }
    }

    /// This stream's name of a parameter or an input.
    pub(super) fn name(&self, name: &str) -> String {
        if self.is_audio { format!("audio_{name}") } else { name.to_owned() }
    }
}
