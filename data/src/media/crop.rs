//! A picture at a bucket's size, as NeMo's `resize_and_crop` makes it.

use super::resample::{edge_columns, edge_rows};
use super::{Filter, Interpolation, Picture, interpolate, resize};

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
    cropped(picture, width, height, |width, height| resize(picture, width, height, Filter::Lanczos))
}

/// The same for a frame of a film, which NeMo resizes with OpenCV (`INTER_LINEAR` where nothing else is asked for).
pub fn resize_and_crop_frame(frame: &Picture, width: usize, height: usize, by: Interpolation) -> Cropped {
    cropped(frame, width, height, |width, height| interpolate(frame, width, height, by))
}

fn cropped(picture: &Picture, width: usize, height: usize, resized: impl Fn(usize, usize) -> Picture) -> Cropped {
    let scale = (width as f64 / picture.width as f64).max(height as f64 / picture.height as f64);
    let scaled = |size: usize| ((size as f64 * scale) as usize).max(1);
    cut_out(&resized(scaled(picture.width), scaled(picture.height)), width, height)
}

/// The middle of a picture; black where it has not as many pixels.
pub fn center_crop(picture: &Picture, width: usize, height: usize) -> Picture {
    cut_out(picture, width, height).picture
}

fn cut_out(picture: &Picture, width: usize, height: usize) -> Cropped {
    // Floors, also of what is negative.
    let start = |size: usize, target: usize| (size as i64 - target as i64).div_euclid(2);
    let (left, top) = (start(picture.width, width), start(picture.height, height));
    let mut out = Picture::new(width, height);
    paste(&mut out, picture, [-left, -top]);
    Cropped { picture: out, offset: [left, top] }
}

/// Copies a picture into another, `at` right and down of its corner; what lies outside is left out.
fn paste(onto: &mut Picture, picture: &Picture, at: [i64; 2]) {
    let inside = |at: i64, size: usize, of: usize| {
        let (from, to) = (at.clamp(0, of as i64), (at + size as i64).clamp(0, of as i64));
        from as usize..to as usize
    };
    let (columns, rows) = (inside(at[0], picture.width, onto.width), inside(at[1], picture.height, onto.height));
    for y in rows {
        let from = (y as i64 - at[1]) as usize * picture.width + (columns.start as i64 - at[0]) as usize;
        let count = columns.len() * 3;
        onto.rgb[(y * onto.width + columns.start) * 3..][..count].copy_from_slice(&picture.rgb[from * 3..][..count]);
    }
}

/// What becomes of a picture whose sides are not in the proportion that is asked for: `resize_mode` of diffusers' `VaeImageProcessor`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ResizeMode {
    /// It is stretched.
    Default,
    /// It fits in, and its edges fill what is left.
    Fill,
    /// It covers, and its middle is cut out.
    Crop,
}

/// A picture with pixels at exactly a size, through Pillow's Lanczos filter.
pub fn resize_to(picture: &Picture, width: usize, height: usize, mode: ResizeMode) -> Picture {
    let by_height = (picture.width * height / picture.height).max(1);
    let by_width = (picture.height * width / picture.width).max(1);
    let wider = picture.width * height > width * picture.height;
    let (w, h) = match mode {
        ResizeMode::Default => (width, height),
        ResizeMode::Fill => (if wider { width } else { by_height }, if wider { by_width } else { height }),
        ResizeMode::Crop => (if wider { by_height } else { width }, if wider { height } else { by_width }),
    };
    let resized = resize(picture, w, h, Filter::Lanczos);
    let mut out = Picture::new(width, height);
    let (left, top) = (width as i64 / 2 - w as i64 / 2, height as i64 / 2 - h as i64 / 2);
    paste(&mut out, &resized, [left, top]);
    if mode == ResizeMode::Fill && left > 0 {
        for last in [false, true] {
            let at = if last { left + w as i64 } else { 0 };
            paste(&mut out, &edge_columns(&resized, left as usize, last), [at, 0]);
        }
    }
    if mode == ResizeMode::Fill && top > 0 {
        for last in [false, true] {
            let at = if last { top + h as i64 } else { 0 };
            paste(&mut out, &edge_rows(&resized, top as usize, last), [0, at]);
        }
    }
    out
}
