//! diffusers' `LTX2VideoTransformer3DModel`.

use flowtape_engine::nn::{
    Activation, Blocks, Init, LayerNorm, Linear, Param, ParamBuilder, Params, TimestepEmbedding, TimestepProjection,
};
use flowtape_engine::ops::{pointwise, pointwise_to};
use flowtape_engine::{DType, Result, Tensor};
use flowtape_flowmatch::{FlowModel, ModelInputs, ModelOutput};

use super::LTX2Config;
use super::block::{Constants, LTX2VideoTransformerBlock, Perturbation};
use super::config::StreamConfig;
use super::rope::{Axis, tables};
use crate::blocks::{CHANNELS, RopeTables, ScaleShiftTable, TOKEN, Tokens, time_proj};
use crate::config::config_json;
use crate::{Error, Transformer};

/// A parameter that is read where keyframes are marked.
const KEYFRAMES: &str = "keyframes_abs_pos_embedding";
/// Epsilon of the norm before the output.
const EPS: f64 = 1e-6;
/// What is added to the score of a text token that is masked out.
const MASKED: f64 = -10_000.0;

/// diffusers' `LTX2AdaLayerNormSingle`: an embedding of the time, and from it vectors that modulate.
#[derive(Clone, Debug)]
struct AdaLayerNormSingle {
    time_proj: String,
    embedder: TimestepEmbedding,
    linear: Linear,
}

impl AdaLayerNormSingle {
    fn new(root: &ParamBuilder, name: &str, dim: usize, parts: usize) -> Result<Self> {
        let params = root.sub(name);
        Ok(Self {
            time_proj: format!("{name}.emb.time_proj"),
            embedder: TimestepEmbedding::new(&params.sub("emb").sub("timestep_embedder"), CHANNELS, dim)?,
            linear: Linear::new(&params.sub("linear").zero_init(), dim, parts * dim, true)?,
        })
    }

    /// Vectors `[B, T, parts, dim]` and the embedding `[B, T, 1, dim]` of times `[B, T]`.
    fn forward(&self, times: &Tensor, dtype: DType) -> Result<[Tensor; 2]> {
        let batch = times.dim(0)?;
        let projection = time_proj(&self.time_proj, &times.flatten(0, 1)?, &TimestepProjection::new(CHANNELS))?;
        let embedded = self.embedder.forward(&projection.to_dtype(dtype)?)?;
        let vectors = self.linear.forward(&pointwise([&embedded], |[x]| x.silu())?)?;
        let (tokens, dim) = (embedded.dim(0)? / batch, embedded.dim(1)?);
        let split = |x: &Tensor| x.reshape(&[batch, tokens, x.dim(1)? / dim, dim]);
        Ok([split(&vectors)?, split(&embedded)?])
    }
}

/// Times `[B]`, or `[B, L]` for each token, as `[B, T]`. Tokens that share one number in memory are one: T is 1.
fn per_token(times: &Tensor) -> Result<Tensor> {
    match times.rank() {
        1 => times.unsqueeze(1),
        2 if times.layout().strides[1] == 0 => times.narrow(1, 0, 1),
        _ => Ok(times.clone()),
    }
}

/// What one stream has outside the blocks.
#[derive(Clone, Debug)]
struct Ends {
    config: StreamConfig,
    proj_in: Linear,
    caption_projection: Option<TimestepEmbedding>,
    time_embed: AdaLayerNormSingle,
    cross_scale_shift: AdaLayerNormSingle,
    cross_gate: AdaLayerNormSingle,
    prompt_adaln: Option<AdaLayerNormSingle>,
    scale_shift_table: ScaleShiftTable,
    norm_out: LayerNorm,
    proj_out: Linear,
}

/// What [`Ends`] makes of a stream's inputs.
struct Begun {
    x: Tensor,
    signals: [Tensor; 5],
    embedded: Tensor,
    mask: Option<Tensor>,
}

impl Begun {
    /// What this rank has of it.
    fn here(self, tokens: &Tokens) -> Result<Self> {
        let [temb, cross, cross_gate, rest @ ..] = self.signals;
        let [prompt, text] = rest;
        let part = |x: &Tensor| tokens.part(x, 1);
        let signals = [part(&temb)?, part(&cross)?, part(&cross_gate)?, prompt, text];
        Ok(Self { x: part(&self.x)?, signals, embedded: part(&self.embedded)?, mask: self.mask })
    }
}

impl Ends {
    fn new(root: &ParamBuilder, config: &LTX2Config, own: StreamConfig) -> Result<Self> {
        let (dim, kind) = (own.dim(), if own.is_audio { "audio" } else { "video" });
        let gate = if own.is_audio { "v2a" } else { "a2v" };
        let linear = |name: &str, from, to| Linear::new(&root.sub(own.name(name)), from, to, true);
        let last = Linear::new(&root.sub(own.name("proj_out")).zero_init(), dim, own.out_channels, true)?;
        let single = |name: &str, parts| AdaLayerNormSingle::new(root, name, dim, parts);
        let caption = || {
            let params = root.sub(own.name("caption_projection"));
            TimestepEmbedding::with(&params, config.caption_channels, dim, Activation::GeluTanh, true)
        };
        let std = (dim as f64).powf(-0.5);
        let prompt = config.modulates_text() && config.use_prompt_adaln_single;
        Ok(Self {
            proj_in: linear("proj_in", own.in_channels, dim)?,
            caption_projection: config.use_prompt_embeddings.then(caption).transpose()?,
            time_embed: single(&own.name("time_embed"), own.modulations())?,
            cross_scale_shift: single(&format!("av_cross_attn_{kind}_scale_shift"), 4)?,
            cross_gate: single(&format!("av_cross_attn_{kind}_{gate}_gate"), 1)?,
            prompt_adaln: prompt.then(|| single(&own.name("prompt_adaln"), 2)).transpose()?,
            scale_shift_table: ScaleShiftTable::new(root, &own.name("scale_shift_table"), &[2, dim], std)?,
            norm_out: LayerNorm::new(&root.sub(own.name("norm_out")), dim, EPS, false)?,
            proj_out: last,
            config: own,
        })
    }

    fn begin(&self, inputs: &ModelInputs, gate_factor: f64) -> crate::Result<Begun> {
        let name = |name: &str| self.config.name(name);
        // Without times of its own the audio has the video's.
        let own = |of: &str| match inputs.optional(&name(of)) {
            Some(times) => Ok::<_, Error>(per_token(times)?),
            None => Ok(per_token(inputs.tensor(of)?)?),
        };
        let x = self.proj_in.forward(inputs.tensor(&name("hidden_states"))?)?;
        let text = inputs.tensor(&name("encoder_hidden_states"))?;
        let text = self.caption_projection.as_ref().map_or_else(|| Ok(text.clone()), |layer| layer.forward(text))?;
        let (times, dtype) = (own("timestep")?, x.dtype());
        let [temb, embedded] = self.time_embed.forward(&times, dtype)?;
        let [cross, _] = self.cross_scale_shift.forward(&times, dtype)?;
        let [cross_gate, _] = self.cross_gate.forward(&times.mul_scalar(gate_factor)?, dtype)?;
        let prompt = match &self.prompt_adaln {
            Some(single) => {
                let [prompt, _] = single.forward(&own("sigma")?, dtype)?;
                prompt
            }
            None => Tensor::zeros(&[1, 1, 1, self.config.dim()], dtype, x.device())?.on_tape_of(&x),
        };
        let bias = |mask: &Tensor| {
            let mask = mask.to_dtype(DType::F32)?.unsqueeze(1)?.unsqueeze(1)?;
            pointwise([&mask], |[keep]| (1.0 - keep) * MASKED)
        };
        let mask = inputs.optional(&name("encoder_attention_mask")).map(bias).transpose()?;
        Ok(Begun { x, signals: [temb, cross, cross_gate, prompt, text], embedded, mask })
    }

    fn end(&self, x: &Tensor, embedded: &Tensor) -> Result<Tensor> {
        let parts = self.scale_shift_table.forward(embedded)?;
        self.proj_out.forward(&self.norm_out.modulated(x, &parts[0], &parts[1])?)
    }
}

/// An input `[B, F H W, 1]`: above 0 at the video's tokens whose latent frame stands for one frame alone, where the model has an
/// embedding of these (LTX-2.5).
pub const VIDEO_KEYFRAMES_MASK: &str = "video_keyframes_mask";
/// An input that is there where video and audio are not to see each other, for guidance.
pub const ISOLATE_MODALITIES: &str = "isolate_modalities";
/// An input with the blocks, u32, in which no token is to look at others of its stream, for guidance.
pub const PERTURBED_BLOCKS: &str = "spatio_temporal_guidance_blocks";

/// The transformer of LTX-2 (Lightricks, 2025): video and audio together.
///
/// Inputs, with the reference's names: `hidden_states` `[B, F H W, in_channels]`, `encoder_hidden_states` `[B, S, D]`,
/// `encoder_attention_mask` `[B, S]` (1 keeps; optional), `timestep` `[B]` or `[B, F H W]` (0 to 1000) and `sigma` `[B]`
/// (the same range), each of them again with `audio_` before the name for the audio (`[B, L, ..]`; its times default to
/// the video's); the numbers `num_frames`, `height`, `width`, `fps` and `audio_num_frames` give the positions;
/// [`VIDEO_KEYFRAMES_MASK`] marks keyframes; [`ISOLATE_MODALITIES`] and [`PERTURBED_BLOCKS`] leave something out. Result
/// `[B, F H W, out_channels]` and `[B, L, audio_out_channels]`.
#[derive(Debug)]
pub struct LTX2VideoTransformer3DModel {
    config: LTX2Config,
    params: Params,
    keyframes_abs_pos_embedding: Option<Param>,
    ends: [Ends; 2],
    transformer_blocks: Blocks<LTX2VideoTransformerBlock>,
}

impl LTX2VideoTransformer3DModel {
    /// A model with diffusers' starting values.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(config: LTX2Config, root: &ParamBuilder) -> crate::Result<Self> {
        let keyframes = || root.get(KEYFRAMES, &[1, config.video().dim()], Init::Zeros);
        let keyframes = config.use_keyframes_abs_pos_embedding.then(keyframes).transpose()?;
        let block = |params: &ParamBuilder, i| LTX2VideoTransformerBlock::new(params, &config, i);
        Ok(Self {
            keyframes_abs_pos_embedding: keyframes,
            ends: [Ends::new(root, &config, config.video())?, Ends::new(root, &config, config.audio())?],
            transformer_blocks: Blocks::new(&root.sub("transformer_blocks"), config.num_layers, block)?,
            params: root.params(),
            config,
        })
    }

    /// Masks and positions of video and audio.
    fn constants(&self, inputs: &ModelInputs, masks: [Option<Tensor>; 2]) -> crate::Result<[Constants; 2]> {
        let (config, device) = (&self.config, inputs.tensor("hidden_states")?.device());
        let size = |name: &str| Ok::<_, Error>(inputs.number(name)? as usize);
        let sizes = [size("num_frames")?, size("height")?, size("width")?];
        let [t, y, x] = Axis::video(config, sizes, inputs.number("fps")? as f32);
        let audio_t = Axis::audio(config, size("audio_num_frames")?);
        let (pixels, end) = (y.len() * x.len(), config.pos_embed_max_pos.max(config.audio_pos_embed_max_pos));
        let dim = config.audio_cross_attention_dim;
        let make = |own: StreamConfig, mask, axes: &[Axis], repeat| {
            let time = axes[0].ending_at(end);
            let tokens = Tokens::of(inputs, &[axes.iter().map(Axis::len).product()])?;
            let own_rows = |RopeTables { cos, sin, layout }| {
                Ok::<_, flowtape_engine::Error>(RopeTables {
                    cos: tokens.part(&cos, 0)?,
                    sin: tokens.part(&sin, 0)?,
                    layout,
                })
            };
            Ok::<_, flowtape_engine::Error>(Constants {
                mask,
                rope: own_rows(tables(config, axes, 1, own.dim(), own.heads, device)?)?,
                time_rope: own_rows(tables(config, &[time], repeat, dim, own.heads, device)?)?,
                tokens,
            })
        };
        let [video_mask, audio_mask] = masks;
        Ok([make(config.video(), video_mask, &[t, y, x], pixels)?, make(config.audio(), audio_mask, &[audio_t], 1)?])
    }
}

impl FlowModel for LTX2VideoTransformer3DModel {
    fn forward(&self, inputs: &ModelInputs) -> crate::Result<ModelOutput> {
        let config = &self.config;
        let factor = config.cross_attn_timestep_scale_multiplier as f64 / config.timestep_scale_multiplier as f64;
        let [video, audio] = &self.ends;
        let (mut v, mut a) = (video.begin(inputs, factor)?, audio.begin(inputs, factor)?);
        if let Some((embedding, mask)) =
            self.keyframes_abs_pos_embedding.as_ref().zip(inputs.optional(VIDEO_KEYFRAMES_MASK))
        {
            let mask = mask.detach().to_dtype(v.x.dtype())?;
            v.x = pointwise_to(v.x.dtype(), [&mask, &v.x, &embedding.value()?], |[mask, x, embedding]| {
                mask.select_lt(TOKEN, x, x + embedding)
            })?;
        }
        let constants = self.constants(inputs, [v.mask.take(), a.mask.take()])?;
        let [of_video, of_audio] = constants.each_ref().map(|of| of.tokens.clone());
        let (v, a) = (v.here(&of_video)?, a.here(&of_audio)?);
        let ([v1, v2, v3, v4, v5], [a1, a2, a3, a4, a5]) = (&v.signals, &a.signals);
        let signals = [v1, v2, v3, v4, v5, a1, a2, a3, a4, a5];
        let blocks = inputs.optional(PERTURBED_BLOCKS).map(Tensor::to_vec::<u32>).transpose()?.unwrap_or_default();
        let without = Perturbation { blocks, isolated: inputs.get(ISOLATE_MODALITIES).is_some() };
        let [x, y] = self.transformer_blocks.run([v.x, a.x], signals, move |block, streams, signals| {
            let [v1, v2, v3, v4, v5, of_audio @ ..] = signals;
            block.forward(streams, [[v1, v2, v3, v4, v5], of_audio], &constants, &without)
        })?;
        let (sample, sound) = (video.end(&x, &v.embedded)?, audio.end(&y, &a.embedded)?);
        Ok(ModelOutput { sample: of_video.gather(&sample)?, rest: vec![of_audio.gather(&sound)?] })
    }
}

impl Transformer for LTX2VideoTransformer3DModel {
    fn params(&self) -> &Params {
        &self.params
    }

    fn config(&self) -> serde_json::Value {
        config_json(&self.config)
    }

    /// The embedding of keyframes without any.
    fn paths_without_gradient(&self, inputs: &ModelInputs) -> Vec<String> {
        let without = inputs.get(VIDEO_KEYFRAMES_MASK).is_none();
        without.then(|| KEYFRAMES.into()).into_iter().collect()
    }

    fn shares_tokens(&self) -> bool {
        true
    }

    fn set_gradient_checkpointing(&mut self, on: bool) {
        self.transformer_blocks.set_checkpointing(on);
    }
}
