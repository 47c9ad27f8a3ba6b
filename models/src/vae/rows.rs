//! Pictures and clips made some rows at a time: what stands between two convolutions is never whole in memory.

use std::ops::Range;

use flowtape_engine::nn::{Conv, GroupNorm};
use flowtape_engine::ops::{in_parts, in_place_of, repeat_nearest};
use flowtape_engine::{Result, Tensor};

/// Places of a part: packing the weights for each part is little beside so many products.
const PLACES: usize = 1 << 14;
/// Places of one frame in a part, at least: kernels then go about it as they do for all of it, and make the same bits.
const PLACES_OF_A_FRAME: usize = 1 << 10;

/// Rows of a part of `[B, C, .., H, W]` made of x, which has sides that are `scale` times smaller: an even number, since convolutions make two
/// rows at once. All of them where something is recorded.
fn step(x: &Tensor, scale: usize) -> usize {
    let [channels, height, width] = [1, x.rank() - 2, x.rank() - 1].map(|axis| x.dims()[axis].max(1));
    if !x.is_plain() {
        return scale * height;
    }
    let frames = (x.numel() / (channels * height * width)).max(1);
    let places = (PLACES / frames).max(PLACES_OF_A_FRAME);
    (places / (scale * width)).next_multiple_of(2).max(2)
}

/// A picture or clip `[B, C, .., H, W]` made of x, whose sides are `scale` times smaller: what `make` makes for some of its rows.
pub(super) fn in_rows(x: &Tensor, scale: usize, make: impl FnMut(Range<usize>) -> Result<Tensor>) -> Result<Tensor> {
    let down = x.rank() - 2;
    in_parts(down, scale * x.dims()[down], step(x, scale), make)
}

/// The same in the memory of x if it may be had, where `make` takes those rows of x.
pub(super) fn over_rows(x: Tensor, make: impl FnMut(&Tensor, Range<usize>) -> Result<Tensor>) -> Result<Tensor> {
    let (down, step) = (x.rank() - 2, step(&x, 1));
    in_place_of(x, down, step, make)
}

/// Some rows of the convolution of what `make` makes of x, place by place.
pub(super) fn conv_rows(
    conv: &Conv,
    x: &Tensor,
    rows: Range<usize>,
    make: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let down = x.rank() - 2;
    conv.part(conv.axes(), down - 2, x.dims()[down], rows, |seen| make(&x.narrow(down, seen.start, seen.len())?))
}

/// Norm, SiLU and convolution.
pub(super) fn norm_conv(norm: &GroupNorm, conv: &Conv, x: &Tensor) -> Result<Tensor> {
    let norm = norm.silu_of(x)?;
    in_rows(x, 1, |rows| conv_rows(conv, x, rows, &norm))
}

/// The convolution of pictures at twice their sides, each place repeated.
pub(super) fn upsampled(conv: &Conv, x: &Tensor) -> Result<Tensor> {
    in_rows(x, 2, |rows| {
        conv.part(conv.axes(), 0, 2 * x.dims()[2], rows, |seen| {
            let (first, end) = (seen.start / 2, seen.end.div_ceil(2));
            let wide = repeat_nearest(&x.narrow(2, first, end - first)?, &[2, 2])?;
            wide.narrow(2, seen.start - 2 * first, seen.len())
        })
    })
}
