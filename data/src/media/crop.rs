//! A picture at a bucket's size, as NeMo's `resize_and_crop` makes it.

use super::{Filter, Picture, resize};

/// A picture at the size that was asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cropped {
    /// The picture.
    pub picture: Picture,
    /// Where it begins in the resized one, right and down. It may be -1, where the resized picture is a pixel short.
    pub offset: [i64; 2],
}

/// Resizes a picture, which has pixels, so that it covers `width` x `height`, and cuts out the middle.
///
/// As in the reference sizes are cut off, not rounded: a side may be a pixel short of what is asked for, and then shows black
/// there.
pub fn resize_and_crop(picture: &Picture, width: usize, height: usize) -> Cropped {
    let scale = (width as f64 / picture.width as f64).max(height as f64 / picture.height as f64);
    let scaled = |size: usize| ((size as f64 * scale) as usize).max(1);
    let resized = resize(picture, scaled(picture.width), scaled(picture.height), Filter::Lanczos);
    // Floors, also of what is negative.
    let start = |size: usize, target: usize| (size as i64 - target as i64).div_euclid(2);
    let (left, top) = (start(resized.width, width), start(resized.height, height));
    let mut out = Picture::new(width, height);
    for y in 0..height {
        let Some(row) = usize::try_from(y as i64 + top).ok().filter(|row| *row < resized.height) else { continue };
        let (from, to) = ((-left).max(0) as usize, left.max(0) as usize);
        let count = (width - from.min(width)).min(resized.width - to.min(resized.width)) * 3;
        let source = &resized.rgb[(row * resized.width + to) * 3..][..count];
        out.rgb[(y * width + from) * 3..][..count].copy_from_slice(source);
    }
    Cropped { picture: out, offset: [left, top] }
}
