//! Convolution whose stride equals its kernel: a view and a matmul.

use crate::gradcheck::{Case, Sample};
use crate::{Error, Result, Tensor, ops::linear};

/// Patches as tokens: x `[B, C, s..]` to `[B, L, C k..]`, the grid's last axis fastest, a patch's channel slowest.
///
/// # Errors
/// When the ranks differ or a size is no multiple of its kernel.
pub fn patchify(x: &Tensor, kernel: &[usize]) -> Result<Tensor> {
    let n = kernel.len();
    let fits = n > 0
        && x.rank() == n + 2
        && kernel.iter().zip(&x.dims()[2..]).all(|(k, size)| *k > 0 && size.is_multiple_of(*k));
    if !fits {
        let expected = format!("x [B, C, s..] with s a multiple of {kernel:?}");
        return Err(Error::shape("patchify", expected, x.dims()));
    }
    let (batch, channels) = (x.dims()[0], x.dims()[1]);
    let grid: Vec<usize> = (0..n).map(|i| x.dims()[i + 2] / kernel[i]).collect();
    // [B, C, g0, k0, g1, k1, ..] -> [B, g0, g1, .., C, k0, k1, ..]
    let mut dims = vec![batch, channels];
    (0..n).for_each(|i| dims.extend([grid[i], kernel[i]]));
    let axes: Vec<usize> =
        [0].into_iter().chain((0..n).map(|i| 2 + 2 * i)).chain([1]).chain((0..n).map(|i| 3 + 2 * i)).collect();
    let width = channels * kernel.iter().product::<usize>();
    x.reshape(&dims)?.permute(&axes)?.reshape(&[batch, grid.iter().product(), width])
}

/// Patchify convolution in n dimensions: x `[B, C, s..]`, weight `[out, C, k..]`, bias `[out]`, stride = kernel. The
/// result is tokens `[B, L, out]`, the grid's last axis fastest.
///
/// # Errors
/// When a size is no multiple of its kernel or the shapes do not fit.
pub fn patchify_conv(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let kernel = weight.dims().get(2..).unwrap_or_default();
    if x.dims().get(1) != weight.dims().get(1) {
        return Err(Error::shape("patchify_conv", "x [B, C, s..] and weight [out, C, k..]", (x.dims(), weight.dims())));
    }
    let patches = patchify(x, kernel)?;
    linear(&patches, &weight.reshape(&[weight.dims()[0], patches.dims()[2]])?, bias)
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
