//! Double blocks (Esser et al. 2024, MMDiT): text and latents have weights of their own and attend to each other. Single blocks
//! (FLUX.1): one sequence of both, in which attention and the feed-forward layer stand side by side.

use flowtape_engine::nn::{Activation, FeedForward, LayerNorm, Linear, ParamBuilder};
use flowtape_engine::{Result, Tensor};
use flowtape_flowmatch::ModelInputs;

use super::modulation::equal_parts;
use super::{ADDED_QKV, Modulation, QKV, QkvConfig, QkvHeads, RopeTables, Tokens, gate};

/// Added to the variance in a single block.
const EPS: f64 = 1e-6;

/// A text and latents that attend to each other as one sequence, the text first: their tokens, of which this rank may have a part, with
/// their positions, and what is added to the scores.
#[derive(Clone, Debug)]
pub struct JointTokens {
    tokens: Tokens,
    rope: RopeTables,
    mask: Option<Tensor>,
    /// This rank's tokens of each.
    lens: [usize; 2],
}

impl JointTokens {
    /// Those of a text and latents `[B, L, dim]`, and what this rank has of both. Tables and mask are those of all tokens.
    ///
    /// # Errors
    /// When the lengths differ, or a rank would have none of a stream.
    pub fn new(
        inputs: &ModelInputs,
        [text, latents]: [Tensor; 2],
        rope: &RopeTables,
        mask: Option<Tensor>,
    ) -> Result<(Self, [Tensor; 2])> {
        let tokens = Tokens::of(inputs, &[text.dim(1)?, latents.dim(1)?])?;
        let streams = [tokens.sequence(0).part(&text, 1)?, tokens.sequence(1).part(&latents, 1)?];
        let lens = [streams[0].dim(1)?, streams[1].dim(1)?];
        Ok((Self { rope: tokens.rope(rope)?, tokens, mask, lens }, streams))
    }

    /// The positions of this rank's tokens.
    pub fn rope(&self) -> &RopeTables {
        &self.rope
    }

    /// Attention of this rank's tokens, queries and keys rotated; see [`attend`](super::attend).
    ///
    /// # Errors
    /// When the shapes do not fit, there are heads that can't be shared out, or a rank has failed.
    pub fn attend(&self, qkv: [Tensor; 3]) -> Result<Tensor> {
        self.tokens.attend(qkv, self.mask.as_ref())
    }

    /// This rank's latents in x `[B, L, dim]`, text and latents in one.
    ///
    /// # Errors
    /// When x has another length.
    pub fn latents(&self, x: &Tensor) -> Result<Tensor> {
        x.narrow(1, self.lens[0], self.lens[1])
    }

    /// All latents on all ranks, from this rank's.
    ///
    /// # Errors
    /// When the shape does not fit, or a rank has failed.
    pub fn gather(&self, latents: &Tensor) -> Result<Tensor> {
        self.tokens.sequence(1).gather(latents)
    }

    /// What belongs to latents, such as marks along an axis, of this rank's.
    ///
    /// # Errors
    /// When the axis has another length.
    pub fn part_of_latents(&self, x: &Tensor, axis: usize) -> Result<Tensor> {
        self.tokens.sequence(1).part(x, axis)
    }
}

/// Which stream of a double block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StreamKind {
    /// The text: `attn.add_q_proj`, …, `attn.to_add_out`.
    Text,
    /// The latents: `attn.to_q`, …, `attn.to_out.0`.
    Latents,
}

/// Shift, scale and gate of a stream, each `[B, 1, dim]` or one per token `[B, L, dim]`.
#[derive(Clone, Debug)]
struct Vectors {
    attention: [Tensor; 3],
    feed_forward: [Tensor; 3],
}

impl Vectors {
    /// Of all six side by side: those of attention, then those of the feed-forward layer.
    fn new(modulation: &Tensor) -> Result<Self> {
        let [shift, scale, gate, ff_shift, ff_scale, ff_gate] = equal_parts(modulation, 2)?;
        Ok(Self { attention: [shift, scale, gate], feed_forward: [ff_shift, ff_scale, ff_gate] })
    }
}

/// One stream: its share of the attention and its feed-forward layer.
#[derive(Clone, Debug)]
struct Stream {
    norm: LayerNorm,
    qkv: QkvHeads,
    to_out: Linear,
    feed_forward: FeedForward,
}

impl Stream {
    fn new(params: &ParamBuilder, kind: StreamKind, config: QkvConfig, feed_forward: FeedForward) -> Result<Self> {
        let attn = params.sub("attn");
        let (qkv, out) = match kind {
            StreamKind::Text => (ADDED_QKV, attn.sub("to_add_out")),
            StreamKind::Latents => (QKV, attn.sub("to_out").sub(0)),
        };
        Ok(Self {
            norm: LayerNorm::new(params, config.query_dim, config.eps, false)?,
            qkv: QkvHeads::new(&attn, qkv, config)?,
            to_out: Linear::new(&out, config.inner_dim(), config.query_dim, config.bias)?,
            feed_forward,
        })
    }

    fn modulated(&self, x: &Tensor, [shift, scale, _]: &[Tensor; 3]) -> Result<Tensor> {
        self.norm.modulated(x, shift, scale)
    }

    fn before_attention(&self, x: &Tensor, vectors: &Vectors, rope: &RopeTables) -> Result<[Tensor; 3]> {
        self.qkv.forward(&self.modulated(x, &vectors.attention)?, Some(rope))
    }

    fn after_attention(&self, x: &Tensor, attention: &Tensor, vectors: &Vectors) -> Result<Tensor> {
        let x = gate(x, &vectors.attention[2], &self.to_out.forward(attention)?)?;
        let h = self.modulated(&x, &vectors.feed_forward)?;
        gate(&x, &vectors.feed_forward[2], &self.feed_forward.forward(&h)?)
    }
}

/// Both streams of a double block. What modulates them comes from outside.
#[derive(Clone, Debug)]
pub struct DoubleStream {
    text: Stream,
    latents: Stream,
}

impl DoubleStream {
    /// Attention of this configuration under `attn`, and a feed-forward layer for each stream.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(
        params: &ParamBuilder,
        config: QkvConfig,
        feed_forward: impl Fn(StreamKind) -> Result<FeedForward>,
    ) -> Result<Self> {
        let stream = |kind| Stream::new(params, kind, config, feed_forward(kind)?);
        Ok(Self { text: stream(StreamKind::Text)?, latents: stream(StreamKind::Latents)? })
    }

    /// Text `[B, T, dim]` and latents `[B, L, dim]`, each with its modulation `[B, 1, 6 dim]` or one per token: shift, scale
    /// and gate of attention, then of the feed-forward layer. Returns both streams.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward(
        &self,
        [text, latents]: [&Tensor; 2],
        modulation: [&Tensor; 2],
        joint: &JointTokens,
    ) -> Result<[Tensor; 2]> {
        let [m_text, m_latents] = [Vectors::new(modulation[0])?, Vectors::new(modulation[1])?];
        let ([t, l], rope) = (joint.lens, &joint.rope);
        let of_text = self.text.before_attention(text, &m_text, &rope.narrow(0, t)?)?;
        let of_latents = self.latents.before_attention(latents, &m_latents, &rope.narrow(t, l)?)?;
        let join = |i: usize| Tensor::cat(&[&of_text[i], &of_latents[i]], 2);
        let parts = joint.attend([join(0)?, join(1)?, join(2)?])?.split(&joint.lens, 1)?;
        Ok([
            self.text.after_attention(text, &parts[0], &m_text)?,
            self.latents.after_attention(latents, &parts[1], &m_latents)?,
        ])
    }
}

/// The feed-forward layer of a stream in FLUX.1 and what follows it: `ff_context` or `ff`, `inner` wide, with GELU.
///
/// # Errors
/// When a parameter can't be made.
pub fn gelu_feed_forward(params: &ParamBuilder, kind: StreamKind, dim: usize, inner: usize) -> Result<FeedForward> {
    let name = if kind == StreamKind::Text { "ff_context" } else { "ff" };
    FeedForward::new(&params.sub(name), dim, inner, Activation::GeluTanh)
}

/// diffusers' `JointTransformerBlock` (FLUX.1's and HunyuanVideo's double block): each stream is modulated by an embedding
/// through a layer of its own.
#[derive(Clone, Debug)]
pub struct JointTransformerBlock {
    modulation: [Modulation; 2],
    streams: DoubleStream,
}

impl JointTransformerBlock {
    /// A block of this attention, its feed-forward layers `inner` wide.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, config: QkvConfig, inner: usize) -> Result<Self> {
        let dim = config.query_dim;
        let modulation = |name| Modulation::new(&params.sub(name).sub("linear"), dim, 6);
        let feed_forward = |kind| gelu_feed_forward(params, kind, dim, inner);
        Ok(Self {
            modulation: [modulation("norm1_context")?, modulation("norm1")?],
            streams: DoubleStream::new(params, config, feed_forward)?,
        })
    }

    /// Text and latents `[B, L, dim]`, with the embedding `temb` `[B, dim]`; returns both.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward(&self, streams: [&Tensor; 2], temb: &Tensor, joint: &JointTokens) -> Result<[Tensor; 2]> {
        let [m_text, m_latents] = &self.modulation;
        self.streams.forward(streams, [&m_text.together(temb)?, &m_latents.together(temb)?], joint)
    }
}

/// A single block: text and latents as one sequence, attention and feed-forward side by side. What modulates it comes from
/// outside.
#[derive(Clone, Debug)]
pub struct SingleStream {
    norm: LayerNorm,
    qkv: QkvHeads,
    proj_mlp: Linear,
    proj_out: Linear,
}

impl SingleStream {
    /// A block of width `dim`.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, dim: usize, heads: usize) -> Result<Self> {
        Ok(Self {
            norm: LayerNorm::new(params, dim, EPS, false)?,
            qkv: QkvHeads::new(&params.sub("attn"), QKV, QkvConfig::joint(dim, heads))?,
            proj_mlp: Linear::new(&params.sub("proj_mlp"), dim, 4 * dim, true)?,
            proj_out: Linear::new(&params.sub("proj_out"), 5 * dim, dim, true)?,
        })
    }

    /// x `[B, L, dim]`, text first, with its modulation `[B, 1, 3 dim]`: shift, scale and gate.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward(&self, x: &Tensor, modulation: &Tensor, joint: &JointTokens) -> Result<Tensor> {
        let [shift, scale, of_gate] = equal_parts(modulation, 2)?;
        let h = self.norm.modulated(x, &shift, &scale)?;
        let mlp = Activation::GeluTanh.forward(&self.proj_mlp.forward(&h)?)?;
        let attention = joint.attend(self.qkv.forward(&h, Some(&joint.rope))?)?;
        gate(x, &of_gate, &self.proj_out.forward(&Tensor::cat(&[&attention, &mlp], 2)?)?)
    }
}
