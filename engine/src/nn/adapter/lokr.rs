//! LoKr: a Kronecker product, whose larger factor may be a product of thin matrices (Yeh et al. 2023), as LyCORIS starts and
//! computes it.

use super::{AdapterSpec, Parts, part};
use crate::nn::{Init, Param, ParamBuilder};
use crate::ops::linear;
use crate::{Error, Result, Tensor};

const W1: &str = "lokr_w1";
const W2: &str = "lokr_w2";

/// A size as a product of two, the smaller first: LyCORIS' `factorization`. Without a factor they are as near as can be; else the
/// smaller one is the factor or, where that does not divide the size, the greatest that does below it.
pub(super) fn factorization(size: usize, factor: Option<usize>) -> (usize, usize) {
    let ordered = |m: usize, n: usize| (m.min(n), m.max(n));
    if let Some(factor) = factor.filter(|f| *f > 0 && size.is_multiple_of(*f)) {
        return ordered(factor, size / factor);
    }
    let most = factor.unwrap_or(size);
    let divisors = (1..=most.min(size)).take_while(|m| m * m <= size).filter(|m| size.is_multiple_of(*m));
    divisors.last().map_or((1, size), |m| ordered(m, size / m))
}

/// `w1` `[out_l, in_m]` and `w2` `[out_k, in_n]`, or its factors `w2_a` `[out_k, dim]` and `w2_b` `[dim, in_n]` where these
/// are smaller.
pub(super) fn make(
    spec: &AdapterSpec,
    params: &ParamBuilder,
    factor: Option<usize>,
    [outputs, inputs]: [usize; 2],
) -> Result<Vec<Param>> {
    let ((out_l, out_k), (in_m, in_n)) = (factorization(outputs, factor), factorization(inputs, factor));
    let kaiming = |fan_in: usize| Init::Uniform { bound: 1.0 / (fan_in as f64).sqrt() };
    let mut parts = vec![params.get(W1, &[out_l, in_m], kaiming(in_m))?];
    if 2 * spec.dim < out_k.max(in_n) {
        parts.push(params.get("lokr_w2_a", &[out_k, spec.dim], kaiming(spec.dim))?);
        parts.push(params.get("lokr_w2_b", &[spec.dim, in_n], Init::Zeros)?);
    } else {
        parts.push(params.get(W2, &[out_k, in_n], Init::Zeros)?);
    }
    Ok(parts)
}

/// `scale dW x`, without `dW`: with x as a matrix `[in_m, in_n]` it is `w1 x w2^T`. Two whole factors have no scale.
pub(super) fn apply(x: &Tensor, parts: &Parts, scale: f64) -> Result<Tensor> {
    let w1 = part(parts, W1)?;
    let (dims, in_m) = (x.dims(), w1.dim(1)?);
    let (rows, width) =
        (dims[..dims.len().saturating_sub(1)].iter().product::<usize>(), dims.last().copied().unwrap_or(0));
    let matrices = x.reshape(&[rows, in_m, width / in_m.max(1)])?;
    let right = match parts.get(W2) {
        Some(w2) => linear(&matrices, w2, None)?,
        None => linear(&linear(&matrices, part(parts, "lokr_w2_b")?, None)?, part(parts, "lokr_w2_a")?, None)?,
    };
    let out = w1.matmul(&right)?.mul_scalar(effective(parts, scale))?;
    let outputs = out.dim(1)? * out.dim(2)?;
    out.reshape(&[&dims[..dims.len() - 1], &[outputs]].concat())
}

/// The scale, which two whole factors do not have.
pub(super) fn effective(parts: &Parts, scale: f64) -> f64 {
    if parts.contains_key(W1) && parts.contains_key(W2) { 1.0 } else { scale }
}

/// The Kronecker product of `w1` and `w2`. Files of other programs may have factors of `w1` too.
pub(super) fn delta(parts: &Parts) -> Result<Tensor> {
    let factor = |whole: &str, a: &str, b: &str| match parts.get(whole) {
        Some(whole) => Ok(whole.clone()),
        None => part(parts, a)?.matmul(part(parts, b)?),
    };
    let (w1, w2) = (factor(W1, "lokr_w1_a", "lokr_w1_b")?, factor(W2, "lokr_w2_a", "lokr_w2_b")?);
    let ([l, m], [k, n]) = (size(&w1)?, size(&w2)?);
    let product = w1.reshape(&[l, 1, m, 1])?.mul(&w2.reshape(&[1, k, 1, n])?)?;
    product.reshape(&[l * k, m * n])
}

fn size(matrix: &Tensor) -> Result<[usize; 2]> {
    matrix.dims().try_into().map_err(|_| Error::shape("lokr", "a matrix", matrix.dims()))
}

#[cfg(test)]
mod tests {
    use super::factorization;

    #[test]
    fn sizes_are_factored_as_lycoris_says() {
        // The table in LyCORIS' documentation of `factorization`, but for 360, where its own loop finds better ones.
        let table = [
            (127, [(1, 127); 5]),
            (128, [(8, 16), (2, 64), (4, 32), (8, 16), (8, 16)]),
            (250, [(10, 25), (2, 125), (2, 125), (5, 50), (10, 25)]),
            (360, [(18, 20), (2, 180), (4, 90), (8, 45), (15, 24)]),
            (512, [(16, 32), (2, 256), (4, 128), (8, 64), (16, 32)]),
            (1024, [(32, 32), (2, 512), (4, 256), (8, 128), (16, 64)]),
        ];
        for (size, wanted) in table {
            for (factor, wanted) in [None, Some(2), Some(4), Some(8), Some(16)].into_iter().zip(wanted) {
                assert_eq!(factorization(size, factor), wanted, "{size} {factor:?}");
            }
        }
    }
}
