//! Blocks of one stream whose layers are normalised before and after (sandwich norm; Zhuo et al. 2024, Lumina-Next).

use flowtape_engine::nn::{Linear, RmsNorm};
use flowtape_engine::{Result, Tensor};

use super::modulation::equal_parts;
use super::{QkvHeads, RopeTables, SwiGlu, attend, scaled, tanh_gate};

/// The norms of a block, each with a weight.
#[derive(Clone, Debug)]
pub struct SandwichNorms {
    /// Before and after attention.
    pub attention: [RmsNorm; 2],
    /// Before and after the feed-forward layer.
    pub feed_forward: [RmsNorm; 2],
}

/// `x + tanh(gate) norm(attention(norm(x) (1 + scale)))`, and the same with a feed-forward layer. Without a modulation
/// neither scale nor gate.
#[derive(Clone, Debug)]
pub struct SandwichBlock {
    /// Makes scale and gate of attention, then of the feed-forward layer: 4 times as wide as the block.
    pub modulation: Option<Linear>,
    /// The norms.
    pub norms: SandwichNorms,
    /// Queries, keys and values.
    pub qkv: QkvHeads,
    /// What attention ends with.
    pub to_out: Linear,
    /// The feed-forward layer.
    pub feed_forward: SwiGlu,
}

/// `x + tanh(gate) y`, or `x + y`.
fn add(x: &Tensor, gate: Option<&Tensor>, y: &Tensor) -> Result<Tensor> {
    gate.map_or_else(|| x.add(y), |gate| tanh_gate(x, gate, y))
}

impl SandwichBlock {
    /// x `[B, L, dim]`, modulated by what the embedding `[B, E]` becomes in the block's own layer (no function before it), with
    /// the tables' positions; the mask is added to the scores.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        embedding: Option<&Tensor>,
        rope: &RopeTables,
        mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let vectors = self.modulation.as_ref().zip(embedding);
        let vectors = vectors.map(|(linear, e)| equal_parts::<4>(&linear.forward(e)?.unsqueeze(1)?, 2)).transpose()?;
        let scale = |x: Tensor, which: usize| vectors.as_ref().map_or(Ok(x.clone()), |v| scaled(&x, &v[which]));
        let gate = |which: usize| vectors.as_ref().map(|v| &v[which]);
        let [before, after] = &self.norms.attention;
        let h = scale(before.forward(x)?, 0)?;
        let attention = self.to_out.forward(&attend(self.qkv.forward(&h, Some(rope))?, mask)?)?;
        let x = add(x, gate(1), &after.forward(&attention)?)?;
        let [before, after] = &self.norms.feed_forward;
        let h = scale(before.forward(&x)?, 2)?;
        add(&x, gate(3), &after.forward(&self.feed_forward.forward(&h)?)?)
    }
}
