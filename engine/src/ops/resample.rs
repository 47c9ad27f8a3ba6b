//! Resampling along axes, as PyTorch's `interpolate`.

use crate::gradcheck::{Case, Sample};
use crate::{Error, Result, Tensor};

/// Each place of x `[B, C, s..]` repeated `factors` times along the axes s (`nearest` and `nearest-exact` for whole factors).
/// The channels lie innermost in the result's memory.
///
/// # Errors
/// When there is not one factor of at least 1 for each axis s.
pub fn repeat_nearest(x: &Tensor, factors: &[usize]) -> Result<Tensor> {
    if x.rank() != factors.len() + 2 || factors.contains(&0) {
        let expected = format!("x [B, C, s..] with {} axes s, and factors of at least 1", factors.len());
        return Err(Error::shape("repeat_nearest", expected, (x.dims(), factors)));
    }
    let n = factors.len();
    // [B, C, s..] -> [B, s, 1, .., C] -> [B, s, f, .., C] -> [B, s f, .., C] -> [B, C, s f, ..]
    let last: Vec<usize> = [0].into_iter().chain(2..n + 2).chain([1]).collect();
    let first: Vec<usize> = [0, n + 1].into_iter().chain(1..n + 1).collect();
    let (mut thin, mut wide, mut whole) = (vec![x.dims()[0]], vec![x.dims()[0]], vec![x.dims()[0]]);
    for (size, factor) in x.dims()[2..].iter().zip(factors) {
        thin.extend([*size, 1]);
        wide.extend([*size, *factor]);
        whole.push(size * factor);
    }
    [&mut thin, &mut wide, &mut whole].into_iter().for_each(|dims| dims.push(x.dims()[1]));
    x.permute(&last)?.reshape(&thin)?.expand(&wide)?.reshape(&whole)?.permute(&first)
}

/// x `[B, C, s..]` at other sizes by linear interpolation along each axis s: pixels' centres are half a pixel from the ends
/// (`align_corners=False`), without antialiasing.
///
/// # Errors
/// When there is not one size of at least 1 for each axis s, or x has an empty one.
pub fn resize_linear(x: &Tensor, sizes: &[usize]) -> Result<Tensor> {
    if x.rank() != sizes.len() + 2 || sizes.contains(&0) || x.dims()[2..].contains(&0) {
        let expected = format!("x [B, C, s..] with {} axes s that are not empty", sizes.len());
        return Err(Error::shape("resize_linear", expected, (x.dims(), sizes)));
    }
    let mut out = x.clone();
    for (axis, size) in sizes.iter().enumerate().map(|(i, size)| (i + 2, *size)) {
        let from = x.dims()[axis];
        if from == size {
            continue;
        }
        // In f32, as PyTorch computes it.
        let scale = from as f32 / size as f32;
        let places: Vec<f32> = (0..size).map(|i| (scale * (i as f32 + 0.5) - 0.5).max(0.0)).collect();
        let low: Vec<u32> = places.iter().map(|p| (*p as u32).min(from as u32 - 1)).collect();
        let high: Vec<u32> = low.iter().map(|i| (i + 1).min(from as u32 - 1)).collect();
        let share: Vec<f32> = places.iter().zip(&low).map(|(p, i)| p - *i as f32).collect();
        let index = |places: &[u32]| out.index_select(axis, &Tensor::from_slice(places, &[size], x.device())?);
        let (a, b) = (index(&low)?, index(&high)?);
        let mut dims = vec![1; x.rank()];
        dims[axis] = size;
        let share = Tensor::from_slice(&share, &dims, x.device())?.to_dtype(x.dtype())?;
        out = crate::ops::pointwise([&a, &b, &share], |[a, b, t]| a * (1.0 - t) + b * t)?;
    }
    Ok(out)
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[
    Case {
        name: "repeat_nearest",
        make: |draw| {
            let n = draw.size(1, 3);
            let factors: Vec<usize> = (0..n).map(|_| draw.size(1, 3)).collect();
            let dims = draw.dims(n + 2);
            Sample::new(vec![draw.standard(&dims)?], move |xs| repeat_nearest(&xs[0], &factors)?.square())
        },
    },
    Case {
        name: "resize_linear",
        make: |draw| {
            let n = draw.size(1, 3);
            let sizes = draw.dims(n);
            let dims = draw.dims(n + 2);
            Sample::new(vec![draw.standard(&dims)?], move |xs| resize_linear(&xs[0], &sizes)?.square())
        },
    },
];
