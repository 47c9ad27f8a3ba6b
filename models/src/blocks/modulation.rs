//! Modulation by an embedding: adaptive layer normalisation and gates (Peebles and Xie, DiT).

use std::ops::Range;

use flowtape_engine::nn::{Init, LayerNorm, Linear, Param, ParamBuilder};
use flowtape_engine::ops::{pointwise, pointwise_to};
use flowtape_engine::{DType, Error, Result, Tensor};

/// `linear(silu(embedding))` in equal parts: the `linear` of diffusers' AdaLayerNorms.
#[derive(Clone, Debug)]
pub struct Modulation {
    linear: Linear,
    parts: usize,
}

impl Modulation {
    /// `parts` vectors of `dim` from an embedding of `dim`; `params` is the linear layer's own path.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, dim: usize, parts: usize) -> Result<Self> {
        Self::with(params, dim, parts, true)
    }

    /// With or without a bias.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn with(params: &ParamBuilder, dim: usize, parts: usize, bias: bool) -> Result<Self> {
        Ok(Self { linear: Linear::new(&params.zero_init(), dim, parts * dim, bias)?, parts })
    }

    /// The parts `[B, 1, dim]` of an embedding `[B, dim]`.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn forward(&self, embedding: &Tensor) -> Result<Vec<Tensor>> {
        self.together(embedding)?.chunk(self.parts, 2)
    }

    /// The parts side by side, `[B, 1, parts dim]`: one tensor to hand to the blocks that share it.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn together(&self, embedding: &Tensor) -> Result<Tensor> {
        self.linear.forward(&pointwise([embedding], |[x]| x.silu())?)?.unsqueeze(1)
    }
}

/// A learned table of vectors, to which an embedding of time is added (Chen et al., PixArt-alpha).
#[derive(Clone, Debug)]
pub struct ScaleShiftTable {
    table: Param,
    rows: usize,
}

impl ScaleShiftTable {
    /// A parameter of shape `[.., rows, dim]`, normal with deviation `std`.
    ///
    /// # Errors
    /// When the parameter can't be made.
    pub fn new(params: &ParamBuilder, name: &str, dims: &[usize], std: f64) -> Result<Self> {
        let table = params.zero_init().get(name, dims, Init::Normal { std })?;
        Ok(Self { rows: table.dim(dims.len().saturating_sub(2))?, table })
    }

    /// The sums `[B, L, dim]`, f32, of all rows with an embedding `[B, L, rows, dim]` or `[B, L, 1, dim]`, where L is 1 or
    /// the tokens.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn forward(&self, embedding: &Tensor) -> Result<Vec<Tensor>> {
        self.part(0..self.rows, embedding)
    }

    /// The same of some of the rows.
    ///
    /// # Errors
    /// When there are no such rows, or the shape does not fit.
    pub fn part(&self, rows: Range<usize>, embedding: &Tensor) -> Result<Vec<Tensor>> {
        let (axis, count) = (self.table.dims().len().saturating_sub(2), rows.len());
        let table = self.table.value()?.narrow(axis, rows.start, count)?;
        let all = pointwise_to(DType::F32.promote(embedding.dtype()), [&table, embedding], |[t, e]| t + e)?;
        all.chunk(count, 2)?.iter().map(|part| part.squeeze(2)).collect()
    }
}

/// diffusers' `AdaLayerNormContinuous`, the norm before an output projection.
#[derive(Clone, Debug)]
pub struct AdaLayerNormContinuous {
    modulation: Modulation,
    norm: LayerNorm,
}

impl AdaLayerNormContinuous {
    /// Over `dim` elements, modulated by an embedding of `dim` through `linear`, with or without a bias.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, dim: usize, eps: f64, bias: bool) -> Result<Self> {
        let modulation = Modulation::with(&params.sub("linear"), dim, 2, bias)?;
        Ok(Self { modulation, norm: LayerNorm::new(params, dim, eps, false)? })
    }

    /// x `[B, L, dim]` and the embedding `[B, dim]`.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward(&self, x: &Tensor, embedding: &Tensor) -> Result<Tensor> {
        // Here, unlike in the blocks, the scale comes first.
        let [scale, shift] = equal_parts(&self.modulation.together(embedding)?, 2)?;
        self.norm.modulated(x, &shift, &scale)
    }
}

/// Equal parts along an axis.
pub(crate) fn equal_parts<const N: usize>(x: &Tensor, axis: usize) -> Result<[Tensor; N]> {
    x.chunk(N, axis)?.try_into().map_err(|parts: Vec<Tensor>| Error::argument("chunk", N, parts.len()))
}

/// `x (1 + scale)` in the dtype of x `[B, L, dim]`; the scale `[B, 1, dim]`, or one per token.
///
/// # Errors
/// When the shapes do not fit.
pub fn scaled(x: &Tensor, scale: &Tensor) -> Result<Tensor> {
    pointwise_to(x.dtype(), [x, scale], |[x, scale]| x * (scale + 1.0))
}

/// `residual + tanh(gate) y` in the dtype of the residual `[B, L, dim]`; the gate `[B, 1, dim]`.
///
/// # Errors
/// When the shapes do not fit.
pub fn tanh_gate(residual: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    pointwise_to(residual.dtype(), [residual, gate, y], |[residual, gate, y]| residual + gate.tanh() * y)
}

/// `residual + gate y` in the dtype of the residual `[B, L, dim]`; the gate `[B, 1, dim]`, or one per token.
///
/// # Errors
/// When the shapes do not fit.
pub fn gate(residual: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    pointwise_to(residual.dtype(), [residual, gate, y], |[residual, gate, y]| residual + gate * y)
}
