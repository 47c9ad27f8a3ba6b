//! Convolution whose stride equals its kernel: a view and a matmul.

use crate::gradcheck::{Case, Sample};
use crate::{Error, Result, Tensor, ops::linear};

/// Patchify convolution in n dimensions: x `[B, C, s...]`, weight `[out, C, k...]`, bias `[out]`, stride = kernel.
/// Result `[B, out, s/k...]`.
///
/// # Errors
/// When a size is no multiple of its kernel or the shapes do not fit.
pub fn patchify_conv(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let n = weight.rank().saturating_sub(2);
    let fits = n > 0
        && x.rank() == weight.rank()
        && x.dims()[1] == weight.dims()[1]
        && (2..x.rank()).all(|a| weight.dims()[a] > 0 && x.dims()[a].is_multiple_of(weight.dims()[a]));
    if !fits {
        return Err(Error::shape(
            "patchify_conv",
            "x [B, C, s..] and weight [out, C, k..] with s a multiple of k",
            (x.dims(), weight.dims()),
        ));
    }
    let (batch, channels, out) = (x.dims()[0], x.dims()[1], weight.dims()[0]);
    let kernel = &weight.dims()[2..];
    let grid: Vec<usize> = (0..n).map(|i| x.dims()[i + 2] / kernel[i]).collect();
    // [B, C, g0, k0, g1, k1, ..] -> [B, g0, g1, .., C, k0, k1, ..]
    let mut dims = vec![batch, channels];
    (0..n).for_each(|i| dims.extend([grid[i], kernel[i]]));
    let axes: Vec<usize> =
        [0].into_iter().chain((0..n).map(|i| 2 + 2 * i)).chain([1]).chain((0..n).map(|i| 3 + 2 * i)).collect();
    let width = channels * kernel.iter().product::<usize>();
    let tokens: usize = grid.iter().product();
    let patches = x.reshape(&dims)?.permute(&axes)?.reshape(&[batch, tokens, width])?;
    let y = linear(&patches, &weight.on_tape_of(x).reshape(&[out, width])?, bias)?;
    y.transpose(1, 2)?.reshape(&[&[batch, out], &grid[..]].concat())
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[Case {
    name: "patchify convolution in two and three dimensions",
    make: |draw| {
        let n = draw.size(2, 3);
        let patch: Vec<usize> = (0..n).map(|_| draw.size(1, 2)).collect();
        let size: Vec<usize> = patch.iter().map(|p| p * draw.size(1, 3)).collect();
        let (channels, out) = (draw.size(1, 3), draw.size(1, 4));
        let x = draw.standard(&[&[2, channels], &size[..]].concat())?;
        let weight = draw.standard(&[&[out, channels], &patch[..]].concat())?;
        let bias = draw.standard(&[out])?;
        Sample::new(vec![x, weight, bias], |xs| patchify_conv(&xs[0], &xs[1], Some(&xs[2])))
    },
}];
