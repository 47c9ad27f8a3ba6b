//! The layers of transformers.

use super::adapter::Adapter;
use super::{Init, Operand, Param, ParamBuilder};
use crate::expr::Expr;
use crate::ops::pointwise::pointwise_to;
use crate::ops::{self, RopeLayout, pointwise};
use crate::{DType, Result, Tensor, quant};

/// The value of a parameter that may be missing.
fn value(param: Option<&Param>) -> Result<Option<Tensor>> {
    param.map(Param::value).transpose()
}

/// `x W^T + b`, however the weight is held.
pub(super) fn product(x: &Tensor, weight: &Param, bias: Option<&Tensor>) -> Result<Tensor> {
    match weight.operand()? {
        Operand::Dense(weight) => ops::linear(x, &weight, bias),
        Operand::Quantised(weight) => quant::linear_of(x, weight, bias),
    }
}

/// `x W^T + b` over the last axis; parameters `weight` `[out, in]` and maybe `bias` `[out]`, and those of an adapter where the
/// plan wants one.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Param,
    bias: Option<Param>,
    adapter: Option<Adapter>,
}

impl Linear {
    /// Uniform in +-1/sqrt(in), as PyTorch starts it.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, inputs: usize, outputs: usize, bias: bool) -> Result<Self> {
        let init = Init::Uniform { bound: 1.0 / (inputs as f64).sqrt() };
        Self::with_init(params, inputs, outputs, bias, init, init)
    }

    /// With other starting values.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn with_init(
        params: &ParamBuilder,
        inputs: usize,
        outputs: usize,
        bias: bool,
        weight_init: Init,
        bias_init: Init,
    ) -> Result<Self> {
        let weight = params.quantisable().get("weight", &[outputs, inputs], weight_init)?;
        let bias = if bias { Some(params.get("bias", &[outputs], bias_init)?) } else { None };
        let adapter = params.linear().map(|spec| Adapter::new(spec, params, &weight)).transpose()?;
        Ok(Self { weight, bias, adapter })
    }

    /// x `[.., in]` to `[.., out]`.
    ///
    /// # Errors
    /// When shape or dtype do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = value(self.bias.as_ref())?;
        match &self.adapter {
            Some(adapter) => adapter.forward(x, &self.weight, bias.as_ref()),
            None => product(x, &self.weight, bias.as_ref()),
        }
    }
}

/// Layer normalisation over the last axis; parameters `weight` and `bias` where it is affine.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    affine: Option<(Param, Param)>,
    eps: f64,
}

impl LayerNorm {
    /// Over `width` elements.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, width: usize, eps: f64, affine: bool) -> Result<Self> {
        let make = || Ok((params.get("weight", &[width], Init::Ones)?, params.get("bias", &[width], Init::Zeros)?));
        Ok(Self { affine: affine.then(make).transpose()?, eps })
    }

    /// Any x whose last axis has the layer's width.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = self.affine.as_ref().map_or((None, None), |(w, b)| (Some(w), Some(b)));
        ops::layer_norm(x, value(weight)?.as_ref(), value(bias)?.as_ref(), self.eps)
    }

    /// `forward(x) (1 + scale) + shift` in the dtype of x `[B, L, width]`; shift and scale `[B, 1, width]`, or one per
    /// token.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn modulated(&self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        if self.affine.is_none() {
            return ops::modulated_layer_norm(x, shift, scale, self.eps);
        }
        ops::modulate(&self.forward(x)?, shift, scale)
    }
}

/// Root-mean-square normalisation over the last axis; parameter `weight`, unless it is plain.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Option<Param>,
    /// Whether the factor is 1 + weight.
    from_one: bool,
    eps: f64,
}

impl RmsNorm {
    /// Over `width` elements.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, width: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: Some(params.get("weight", &[width], Init::Ones)?), from_one: false, eps })
    }

    /// Over `width` elements, with a weight that counts from 1: it starts at 0, and the factor, in f32, is 1 more.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn from_one(params: &ParamBuilder, width: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: Some(params.get("weight", &[width], Init::Zeros)?), from_one: true, eps })
    }

    /// Without parameters, over any width.
    pub fn plain(eps: f64) -> Self {
        Self { weight: None, from_one: false, eps }
    }

    /// The factor of each element.
    fn factor(&self) -> Result<Option<Tensor>> {
        match value(self.weight.as_ref())? {
            Some(weight) if self.from_one => {
                pointwise_to(DType::F32.promote(weight.dtype()), [&weight], |[w]| w + 1.0).map(Some)
            }
            weight => Ok(weight),
        }
    }

    /// Any x whose last axis has the layer's width.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(x, self.factor()?.as_ref(), self.eps)
    }

    /// `forward(x)`, rotated: x `[B, L, H, width]`, cosines and sines `[L, width]` or `[B, L, width]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn rotated(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, layout: RopeLayout) -> Result<Tensor> {
        match self.factor()? {
            Some(factor) => ops::rms_norm_rope(x, &factor, self.eps, cos, sin, layout),
            None => ops::rope(&self.forward(x)?, &ops::rope::of_heads(cos)?, &ops::rope::of_heads(sin)?, layout),
        }
    }
}

/// The function between the two products of a feed-forward layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activation {
    /// GELU by its tanh approximation (diffusers' `gelu-approximate`).
    GeluTanh,
    /// Exact GELU (`gelu`).
    Gelu,
    /// x * sigmoid(1.702 x), CLIP's approximation of GELU (`quick_gelu`).
    QuickGelu,
    /// x * sigmoid(x) (`linear-silu`).
    Silu,
    /// The first half times the exact GELU of the second (`geglu`).
    Geglu,
    /// The first half times the silu of the second (`swiglu`).
    Swiglu,
    /// The silu of the first half times the second (FLUX.2's).
    SwigluGateFirst,
}

impl Activation {
    /// Whether the last axis is halved.
    fn is_gated(self) -> bool {
        matches!(self, Self::Geglu | Self::Swiglu | Self::SwigluGateFirst)
    }

    /// Element by element; the gated ones halve the last axis.
    ///
    /// # Errors
    /// When the dtype is not a float, or the last axis can't be halved.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        // Where the value and its gate stand.
        let gated = |[value, gate]: [usize; 2], f: for<'a> fn(Expr<'a>) -> Expr<'a>| {
            let halves = x.chunk(2, x.rank().saturating_sub(1))?;
            pointwise([&halves[value], &halves[gate]], |[x, gate]| x * f(gate))
        };
        match self {
            Self::GeluTanh => pointwise([x], |[x]| x.gelu_tanh()),
            Self::Gelu => pointwise([x], |[x]| x.gelu_erf()),
            Self::QuickGelu => pointwise([x], |[x]| x * (x * 1.702).sigmoid()),
            Self::Silu => pointwise([x], |[x]| x.silu()),
            Self::Geglu => gated([0, 1], |gate| gate.gelu_erf()),
            Self::Swiglu => gated([0, 1], |gate| gate.silu()),
            Self::SwigluGateFirst => gated([1, 0], |gate| gate.silu()),
        }
    }
}

/// diffusers' `FeedForward`: `net.0.proj`, an activation, `net.2`.
#[derive(Clone, Debug)]
pub struct FeedForward {
    input: Linear,
    activation: Activation,
    output: Linear,
}

impl FeedForward {
    /// `width` to `inner` and back.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, width: usize, inner: usize, activation: Activation) -> Result<Self> {
        Self::with_bias(params, width, inner, activation, true)
    }

    /// The same, where the two products may lack a bias.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn with_bias(
        params: &ParamBuilder,
        width: usize,
        inner: usize,
        activation: Activation,
        bias: bool,
    ) -> Result<Self> {
        let net = params.sub("net");
        let wide = if activation.is_gated() { 2 * inner } else { inner };
        let input = Linear::new(&net.sub(0).sub("proj"), width, wide, bias)?;
        Ok(Self { input, activation, output: Linear::new(&net.sub(2), inner, width, bias)? })
    }

    /// Of products that have other names; a gated activation halves what `input` gives.
    pub fn from_parts(input: Linear, activation: Activation, output: Linear) -> Self {
        Self { input, activation, output }
    }

    /// x `[.., width]`.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.output.forward(&self.activation.forward(&self.input.forward(x)?)?)
    }
}
