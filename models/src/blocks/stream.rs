//! One stream of a double block, as FLUX.1 and HunyuanVideo have it.

use flowtape_engine::nn::{Activation, FeedForward, LayerNorm, Linear, ParamBuilder};
use flowtape_engine::{Error, Result, Tensor};

use super::{ADDED_QKV, Modulation, QKV, QkvConfig, QkvHeads, gate, modulate};

/// Which stream of a double block: it decides the parameters' names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StreamKind {
    /// The latents: `norm1`, `attn.to_q`, `ff`, …
    Latents,
    /// The text: `norm1_context`, `attn.add_q_proj`, `ff_context`, …
    Context,
}

/// A stream with weights of its own: modulation, projections, feed-forward. Attention, which joins the streams, runs
/// between its two halves.
#[derive(Clone, Debug)]
pub struct Stream {
    modulation: Modulation,
    norm: LayerNorm,
    qkv: QkvHeads,
    to_out: Linear,
    ff: FeedForward,
}

/// What a stream sets aside until attention has run.
#[derive(Clone, Debug)]
pub struct Modulated {
    /// Queries, keys and values `[B, H, L, D]`.
    pub qkv: [Tensor; 3],
    gate_msa: Tensor,
    mlp: [Tensor; 3],
}

impl Stream {
    /// A stream of width `dim`, its feed-forward `inner` wide.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, kind: StreamKind, dim: usize, heads: usize, inner: usize) -> Result<Self> {
        let attn = params.sub("attn");
        let (norm1, qkv, out, ff) = match kind {
            StreamKind::Latents => ("norm1", QKV, attn.sub("to_out").sub(0), "ff"),
            StreamKind::Context => ("norm1_context", ADDED_QKV, attn.sub("to_add_out"), "ff_context"),
        };
        let config = QkvConfig::joint(dim, heads);
        Ok(Self {
            modulation: Modulation::new(&params.sub(norm1).sub("linear"), dim, 6)?,
            norm: LayerNorm::new(params, dim, config.eps, false)?,
            qkv: QkvHeads::new(&attn, qkv, config)?,
            to_out: Linear::new(&out, dim, dim, true)?,
            ff: FeedForward::new(&params.sub(ff), dim, inner, Activation::GeluTanh)?,
        })
    }

    /// Queries, keys and values of x `[B, L, dim]`, modulated by `temb` `[B, dim]`.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn before_attention(&self, x: &Tensor, temb: &Tensor) -> Result<Modulated> {
        let mut parts = self.modulation.forward(temb)?.into_iter();
        let mut next = || parts.next().ok_or_else(|| Error::argument("modulation", "six parts", "fewer"));
        let (shift_msa, scale_msa, gate_msa) = (next()?, next()?, next()?);
        let qkv = self.qkv.forward(&modulate(&self.norm.forward(x)?, &shift_msa, &scale_msa)?)?;
        Ok(Modulated { qkv, gate_msa, mlp: [next()?, next()?, next()?] })
    }

    /// The stream after its part of the attention, both `[B, L, dim]`.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn after_attention(&self, x: &Tensor, attention: &Tensor, m: &Modulated) -> Result<Tensor> {
        let x = gate(x, &m.gate_msa, &self.to_out.forward(attention)?)?;
        let [shift, scale, gate_mlp] = &m.mlp;
        gate(&x, gate_mlp, &self.ff.forward(&modulate(&self.norm.forward(&x)?, shift, scale)?)?)
    }
}
