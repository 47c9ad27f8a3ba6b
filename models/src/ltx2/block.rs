//! A block: a video and an audio stream with weights of their own, which attend to their texts and to each other.

use flowtape_engine::nn::{FeedForward, Linear, ParamBuilder, RmsNorm};
use flowtape_engine::ops::{modulate, pointwise};
use flowtape_engine::{Result, Tensor};

use super::LTX2Config;
use super::config::StreamConfig;
use super::rope::rotate;
use crate::blocks::{QKV, QkNorm, QkvConfig, QkvHeads, RopeTables, ScaleShiftTable, Tokens, gate};

/// The norms of queries and keys have an epsilon of their own.
const QK_EPS: f64 = 1e-6;

/// Attention to the same or another sequence, each head with a gate where the model has them.
#[derive(Clone, Debug)]
pub(super) struct Attention {
    qkv: QkvHeads,
    to_gate_logits: Option<Linear>,
    to_out: Linear,
}

impl Attention {
    /// `own` says what queries are made of and what comes out, `context_dim` what keys and values are made of; `inner`
    /// is the number of heads and their width.
    pub(super) fn new(
        params: &ParamBuilder,
        config: &LTX2Config,
        own: &StreamConfig,
        context_dim: usize,
        inner: &StreamConfig,
    ) -> Result<Self> {
        let (heads, head_dim) = (inner.heads, inner.head_dim);
        let (query_dim, bias, norm) = (own.dim(), config.attention_bias, QkNorm::AcrossHeads);
        let qkv = QkvConfig { query_dim, context_dim, heads, kv_heads: heads, head_dim, bias, norm, eps: QK_EPS };
        let gate = || Linear::new(&params.sub("to_gate_logits"), query_dim, heads, true);
        let out = params.sub("to_out").sub(0);
        Ok(Self {
            qkv: QkvHeads::new(params, QKV, qkv)?,
            to_gate_logits: own.gated.then(gate).transpose()?,
            to_out: Linear::new(&out, inner.dim(), query_dim, config.attention_out_bias)?,
        })
    }

    /// x `[B, L, dim]` without looking around: each token takes its own values.
    fn own_values(&self, x: &Tensor) -> Result<Tensor> {
        let [_, values] = self.qkv.keys_values(x, None)?;
        self.out(x, values.transpose(1, 2)?.flatten(2, 3)?)
    }

    /// x `[B, L, dim]` attends to a context `[B, T, context_dim]`; `tokens` and `rope` are those of both.
    pub(super) fn forward(
        &self,
        [x, context]: [&Tensor; 2],
        [of_x, of_context]: [&Tokens; 2],
        rope: Option<[&RopeTables; 2]>,
        mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (mut q, [mut k, v]) = (self.qkv.queries(x, None)?, self.qkv.keys_values(context, None)?);
        if let Some([of_x, of_context]) = rope {
            (q, k) = (rotate(&q, of_x)?, rotate(&k, of_context)?);
        }
        self.out(x, of_x.attend_to(of_context, [q, k, v], mask)?)
    }

    fn out(&self, x: &Tensor, mut attention: Tensor) -> Result<Tensor> {
        if let Some(linear) = &self.to_gate_logits {
            let logits = linear.forward(x)?.unsqueeze(3)?;
            let (batch, len, heads) = (logits.dim(0)?, logits.dim(1)?, logits.dim(2)?);
            let split = attention.reshape(&[batch, len, heads, attention.dim(2)? / heads])?;
            attention = pointwise([&split, &logits], |[y, logit]| y * logit.sigmoid() * 2.0)?.flatten(2, 3)?;
        }
        self.to_out.forward(&attention)
    }
}

/// What the embeddings of the time give the blocks of one stream, and its text; `T` is 1 or the number of tokens.
///
/// In this order: modulation of self-attention, feed-forward and perhaps the text's queries `[B, T, 6 or 9, dim]`, of the
/// attention between the streams `[B, T, 4, dim]`, its gate `[B, T, 1, dim]`, modulation of the text `[B, 1, 2, dim]`, and
/// the text `[B, S, text_dim]`.
pub(super) type Signals<'a> = [&'a Tensor; 5];

/// What is the same for all blocks and gets no gradient.
#[derive(Clone, Debug)]
pub(super) struct Constants {
    /// The stream's tokens, and which of them are here.
    pub(super) tokens: Tokens,
    /// Added to the scores of the text's tokens: `[B, 1, 1, S]` f32.
    pub(super) mask: Option<Tensor>,
    /// Positions within the stream.
    pub(super) rope: RopeTables,
    /// Positions in time, which both streams share.
    pub(super) time_rope: RopeTables,
}

/// What is left out of a forward pass whose prediction guidance leads away from.
#[derive(Clone, Debug, Default)]
pub(super) struct Perturbation {
    /// Blocks in which no token looks at others of its stream (spatio-temporal guidance, Hyung et al. 2024).
    pub(super) blocks: Vec<u32>,
    /// Whether the streams do not see each other.
    pub(super) isolated: bool,
}

/// One stream of a block.
#[derive(Clone, Debug)]
struct Stream {
    norms: [RmsNorm; 3],
    attn1: Attention,
    attn2: Attention,
    ff: FeedForward,
    scale_shift_table: ScaleShiftTable,
    prompt_table: Option<ScaleShiftTable>,
    /// Norm of the attention between the streams, and the attention of this one to the other.
    cross: (RmsNorm, Attention),
    cross_table: ScaleShiftTable,
    /// Where `cross_table` has scale and shift for this stream's queries, and for its keys in the other's attention.
    cross_rows: [usize; 2],
}

impl Stream {
    fn new(
        params: &ParamBuilder,
        config: &LTX2Config,
        own: &StreamConfig,
        other: &StreamConfig,
    ) -> crate::Result<Self> {
        let dim = own.dim();
        let sub = |name: &str| params.sub(own.name(name));
        let norm = |params: ParamBuilder| match config.norm_elementwise_affine {
            true => RmsNorm::new(&params, dim, config.norm_eps),
            false => Ok(RmsNorm::plain(config.norm_eps)),
        };
        let table = |name: String, rows, std| ScaleShiftTable::new(params, &name, &[rows, dim], std);
        let (cross, rows) = if own.is_audio { ("video_to_audio", [2, 0]) } else { ("audio_to_video", [0, 2]) };
        let audio = if own.is_audio { own } else { other };
        let prompt = || table(own.name("prompt_scale_shift_table"), 2, 1.0);
        let kind = if own.is_audio { "audio" } else { "video" };
        Ok(Self {
            norms: [norm(sub("norm1"))?, norm(sub("norm2"))?, norm(sub("norm3"))?],
            attn1: Attention::new(&sub("attn1"), config, own, dim, own)?,
            attn2: Attention::new(&sub("attn2"), config, own, own.text_dim, own)?,
            ff: FeedForward::with_bias(&sub("ff"), dim, 4 * dim, config.activation()?, own.ff_bias)?,
            scale_shift_table: table(own.name("scale_shift_table"), own.modulations(), (dim as f64).powf(-0.5))?,
            prompt_table: config.modulates_text().then(prompt).transpose()?,
            cross: (
                norm(params.sub(format!("{cross}_norm")))?,
                Attention::new(&params.sub(format!("{cross}_attn")), config, own, other.dim(), audio)?,
            ),
            cross_table: table(format!("{kind}_a2v_cross_attn_scale_shift_table"), 5, 1.0)?,
            cross_rows: rows,
        })
    }

    /// Self-attention, then attention to the text.
    fn attend(
        &self,
        x: &Tensor,
        parts: &[Tensor],
        [.., prompt, text]: Signals<'_>,
        c: &Constants,
        perturbed: bool,
    ) -> Result<Tensor> {
        let h = modulate(&self.norms[0].forward(x)?, &parts[0], &parts[1])?;
        let attended = match perturbed {
            true => self.attn1.own_values(&h)?,
            false => self.attn1.forward([&h; 2], [&c.tokens; 2], Some([&c.rope; 2]), None)?,
        };
        let x = gate(x, &parts[2], &attended)?;
        let text = match &self.prompt_table {
            Some(table) => {
                let parts = table.forward(prompt)?;
                modulate(text, &parts[0], &parts[1])?
            }
            None => text.clone(),
        };
        // All ranks have the whole text.
        let (h, all) = (self.norms[1].forward(&x)?, Tokens::whole());
        match parts.get(6..) {
            Some([shift, scale, gate_text]) => {
                let h = modulate(&h, shift, scale)?;
                gate(&x, gate_text, &self.attn2.forward([&h, &text], [&all; 2], None, c.mask.as_ref())?)
            }
            _ => x.add(&self.attn2.forward([&h, &text], [&all; 2], None, c.mask.as_ref())?),
        }
    }

    /// For the attention between the streams: x as queries, x as the other's keys, and the gate.
    fn cross_inputs(&self, x: &Tensor, [_, cross, cross_gate, ..]: Signals<'_>) -> Result<[Tensor; 3]> {
        let (parts, gates) = (self.cross_table.part(0..4, cross)?, self.cross_table.part(4..5, cross_gate)?);
        let h = self.cross.0.forward(x)?;
        // Here, unlike elsewhere, the scale comes first.
        let [queries, keys] = self.cross_rows.map(|row| modulate(&h, &parts[row + 1], &parts[row]));
        Ok([queries?, keys?, gates[0].clone()])
    }

    fn feed_forward(&self, x: &Tensor, parts: &[Tensor]) -> Result<Tensor> {
        let h = modulate(&self.norms[2].forward(x)?, &parts[3], &parts[4])?;
        gate(x, &parts[5], &self.ff.forward(&h)?)
    }
}

/// A block of LTX-2.
#[derive(Clone, Debug)]
pub struct LTX2VideoTransformerBlock {
    index: usize,
    video: Stream,
    audio: Stream,
}

impl LTX2VideoTransformerBlock {
    /// A block of the configuration's sizes, with its place among all.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, config: &LTX2Config, index: usize) -> crate::Result<Self> {
        let (video, audio) = (config.video(), config.audio());
        Ok(Self {
            index,
            video: Stream::new(params, config, &video, &audio)?,
            audio: Stream::new(params, config, &audio, &video)?,
        })
    }

    /// Video `[B, L, dim]` and audio `[B, M, dim]`; returns both.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub(super) fn forward(
        &self,
        [video, audio]: [&Tensor; 2],
        [sv, sa]: [Signals<'_>; 2],
        [cv, ca]: &[Constants; 2],
        without: &Perturbation,
    ) -> Result<[Tensor; 2]> {
        let perturbed = without.blocks.contains(&(self.index as u32));
        let parts_v = self.video.scale_shift_table.forward(sv[0])?;
        let parts_a = self.audio.scale_shift_table.forward(sa[0])?;
        let video = self.video.attend(video, &parts_v, sv, cv, perturbed)?;
        let audio = self.audio.attend(audio, &parts_a, sa, ca, perturbed)?;
        if without.isolated {
            return Ok([self.video.feed_forward(&video, &parts_v)?, self.audio.feed_forward(&audio, &parts_a)?]);
        }
        let [queries_v, keys_v, gate_v] = self.video.cross_inputs(&video, sv)?;
        let [queries_a, keys_a, gate_a] = self.audio.cross_inputs(&audio, sa)?;
        let (time_v, time_a) = (&cv.time_rope, &ca.time_rope);
        let (tokens_v, tokens_a) = (&cv.tokens, &ca.tokens);
        let from_audio =
            self.video.cross.1.forward([&queries_v, &keys_a], [tokens_v, tokens_a], Some([time_v, time_a]), None)?;
        let from_video =
            self.audio.cross.1.forward([&queries_a, &keys_v], [tokens_a, tokens_v], Some([time_a, time_v]), None)?;
        let (video, audio) = (gate(&video, &gate_v, &from_audio)?, gate(&audio, &gate_a, &from_video)?);
        Ok([self.video.feed_forward(&video, &parts_v)?, self.audio.feed_forward(&audio, &parts_a)?])
    }
}
