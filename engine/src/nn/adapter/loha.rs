//! LoHa: the product, element by element, of two products of thin matrices (Hyeon-Woo et al. 2021), as LyCORIS starts and
//! computes it.

use super::{AdapterSpec, Parts, part};
use crate::nn::{Init, Param, ParamBuilder};
use crate::ops::linear;
use crate::{Result, Tensor};

/// `w1_a`, `w2_a` `[out, dim]` and `w1_b`, `w2_b` `[dim, in]`.
pub(super) fn make(spec: &AdapterSpec, params: &ParamBuilder, [outputs, inputs]: [usize; 2]) -> Result<Vec<Param>> {
    let (one, tenth) = (Init::Normal { std: 1.0 }, Init::Normal { std: 0.1 });
    let (left, right) = ([outputs, spec.dim], [spec.dim, inputs]);
    Ok(vec![
        params.get("hada_w1_a", &left, tenth)?,
        params.get("hada_w1_b", &right, one)?,
        params.get("hada_w2_a", &left, Init::Zeros)?,
        params.get("hada_w2_b", &right, one)?,
    ])
}

/// `scale dW x`.
pub(super) fn apply(x: &Tensor, parts: &Parts, scale: f64) -> Result<Tensor> {
    linear(x, &delta(parts)?.mul_scalar(scale)?, None)
}

/// `(w1_a w1_b) * (w2_a w2_b)`.
pub(super) fn delta(parts: &Parts) -> Result<Tensor> {
    let product = |a, b| part(parts, a)?.matmul(part(parts, b)?);
    product("hada_w1_a", "hada_w1_b")?.mul(&product("hada_w2_a", "hada_w2_b")?)
}
