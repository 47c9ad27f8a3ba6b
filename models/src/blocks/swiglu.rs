//! Gated feed-forward layers whose gate is a product of its own (Shazeer 2020).

use flowtape_engine::nn::{Linear, ParamBuilder};
use flowtape_engine::ops::pointwise;
use flowtape_engine::{Result, Tensor};

/// `out(silu(gate x) value(x))`, without biases.
#[derive(Clone, Debug)]
pub struct SwiGlu {
    gate: Linear,
    value: Linear,
    out: Linear,
}

impl SwiGlu {
    /// `dim` to `inner` and back; the names are those of gate, value and output.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, [gate, value, out]: [&str; 3], dim: usize, inner: usize) -> Result<Self> {
        let linear = |name, inputs, outputs| Linear::new(&params.sub(name), inputs, outputs, false);
        Ok(Self { gate: linear(gate, dim, inner)?, value: linear(value, dim, inner)?, out: linear(out, inner, dim)? })
    }

    /// x `[.., dim]`.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (gate, value) = (self.gate.forward(x)?, self.value.forward(x)?);
        self.out.forward(&pointwise([&gate, &value], |[gate, value]| gate.silu() * value)?)
    }
}
