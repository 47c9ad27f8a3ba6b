//! LoRA: a product of two thin matrices beside a weight (Hu et al. 2021), as NeMo's `LinearLoRA` starts and computes it.

use super::{AdapterSpec, LoraInit, Parts, part};
use crate::nn::{Init, Param, ParamBuilder};
use crate::ops::linear;
use crate::{Result, Tensor};

const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";

/// `A` `[dim, in]` and `B` `[out, dim]`.
pub(super) fn make(spec: &AdapterSpec, params: &ParamBuilder, [outputs, inputs]: [usize; 2]) -> Result<Vec<Param>> {
    let init = match spec.init {
        LoraInit::Xavier => Init::Normal { std: (2.0 / (inputs + spec.dim) as f64).sqrt() },
        LoraInit::Uniform => Init::Uniform { bound: 1.0 / (inputs as f64).sqrt() },
    };
    Ok(vec![params.get(A, &[spec.dim, inputs], init)?, params.get(B, &[outputs, spec.dim], Init::Zeros)?])
}

/// `scale B A x`.
pub(super) fn apply(x: &Tensor, parts: &Parts, scale: f64) -> Result<Tensor> {
    linear(&linear(x, part(parts, A)?, None)?.mul_scalar(scale)?, part(parts, B)?, None)
}

/// `B A`.
pub(super) fn delta(parts: &Parts) -> Result<Tensor> {
    part(parts, B)?.matmul(part(parts, A)?)
}
