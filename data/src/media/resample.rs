//! Resizing with Pillow's filters, bit for bit (`Image.resize` of 8-bit pictures): weights in fixed point, each pass
//! rounded.

use super::Picture;

/// Bits behind the point of a weight.
const BITS: u32 = 22;

/// How new pixels are made of old ones, by Pillow's names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Filter {
    /// The old pixel at the new one's centre.
    Nearest,
    /// The mean of what a pixel covers.
    Box,
    /// A triangle.
    Bilinear,
    /// Keys' cubic with a = -0.5.
    Bicubic,
    /// A windowed sinc over three lobes.
    Lanczos,
}

impl Filter {
    /// How far it reaches.
    fn support(self) -> f64 {
        match self {
            Self::Nearest => 0.0,
            Self::Box => 0.5,
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
        let distance = x.abs();
        match self {
            Self::Nearest => 1.0,
            Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Self::Bilinear => (1.0 - distance).max(0.0),
            Self::Bicubic if distance < 1.0 => ((A + 2.0) * distance - (A + 3.0)) * distance * distance + 1.0,
            Self::Bicubic if distance < 2.0 => (((distance - 5.0) * distance + 8.0) * distance - 4.0) * A,
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Bicubic | Self::Lanczos => 0.0,
        }
    }
}

/// Of one new pixel: the first old one, and the weights from there on.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

/// Of `to` new pixels from the part of `from` old ones that begins at `start` and is `length` long.
fn windows(filter: Filter, from: usize, to: usize, start: f64, length: f64) -> Vec<Window> {
    let scale = length / to as f64;
    let wide = scale.max(1.0);
    let support = filter.support() * wide;
    let window = |at: usize| {
        let centre = start + (at as f64 + 0.5) * scale;
        let first = (centre - support + 0.5).max(0.0) as usize;
        let last = ((centre + support + 0.5) as usize).min(from);
        let weights = (first..last).map(|i| filter.weight((i as f64 - centre + 0.5) * (1.0 / wide)));
        let weights: Vec<f64> = weights.collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: &f64| {
            let share = if sum == 0.0 { *weight } else { weight / sum };
            (share * f64::from(1u32 << BITS) + 0.5f64.copysign(share)) as i32
        };
        Window { first, weights: weights.iter().map(fixed).collect() }
    };
    (0..to).map(window).collect()
}

/// The weighted sum of some bytes, `step` apart, rounded to a byte.
fn weighted(values: &[u8], step: usize, weights: &[i32]) -> u8 {
    let terms = values.iter().step_by(step).zip(weights).map(|(value, weight)| i32::from(*value) * weight);
    let sum: i32 = terms.fold(1 << (BITS - 1), i32::wrapping_add);
    (sum >> BITS).clamp(0, 255) as u8
}

/// A picture at another size, which is not 0. Columns come before rows; where more than twice as many rows as columns go, rows come
/// first, as Pillow 13 does it.
pub fn resize(picture: &Picture, width: usize, height: usize, filter: Filter) -> Picture {
    if filter == Filter::Nearest {
        return nearest(picture, width, height);
    }
    let fewer = |from: usize, to: usize| from as i64 - to as i64;
    if height < picture.height && fewer(picture.height, height) > 2 * fewer(picture.width, width) {
        return with_width(with_height(picture.clone(), height, filter), width, filter);
    }
    with_height(with_width(picture.clone(), width, filter), height, filter)
}

/// Columns of an edge, one like the other: the right one where `last`, else the left one. Pillow makes them where it resizes a part
/// without width.
pub(super) fn edge_columns(picture: &Picture, width: usize, last: bool) -> Picture {
    let start = if last { picture.width as f64 } else { 0.0 };
    widened(picture, &windows(Filter::Bicubic, picture.width, width, start, 0.0))
}

/// Rows of the lower edge where `last`, else of the upper one.
pub(super) fn edge_rows(picture: &Picture, height: usize, last: bool) -> Picture {
    let start = if last { picture.height as f64 } else { 0.0 };
    heightened(picture, &windows(Filter::Bicubic, picture.height, height, start, 0.0))
}

fn with_width(picture: Picture, width: usize, filter: Filter) -> Picture {
    if width == picture.width {
        return picture;
    }
    widened(&picture, &windows(filter, picture.width, width, 0.0, picture.width as f64))
}

fn widened(picture: &Picture, windows: &[Window]) -> Picture {
    let row = |row: &[u8]| -> Vec<u8> {
        let pixel = |w: &Window| -> [u8; 3] {
            std::array::from_fn(|channel| weighted(&row[w.first * 3 + channel..], 3, &w.weights))
        };
        windows.iter().flat_map(pixel).collect()
    };
    Picture {
        width: windows.len(),
        height: picture.height,
        rgb: picture.rgb.chunks(picture.width * 3).flat_map(row).collect(),
    }
}

fn with_height(picture: Picture, height: usize, filter: Filter) -> Picture {
    if height == picture.height {
        return picture;
    }
    heightened(&picture, &windows(filter, picture.height, height, 0.0, picture.height as f64))
}

fn heightened(picture: &Picture, windows: &[Window]) -> Picture {
    let line = picture.width * 3;
    let mut rgb = Vec::with_capacity(line * windows.len());
    for window in windows {
        let start = window.first * line;
        rgb.extend((0..line).map(|i| weighted(&picture.rgb[start + i..], line, &window.weights)));
    }
    Picture { width: picture.width, height: windows.len(), rgb }
}

fn nearest(picture: &Picture, width: usize, height: usize) -> Picture {
    // Places are added up one by one, as Pillow does.
    let places = |from: usize, to: usize| -> Vec<usize> {
        let step = from as f64 / to as f64;
        let mut at = step * 0.5;
        let next = |_| {
            let place = (at as usize).min(from - 1);
            at += step;
            place
        };
        (0..to).map(next).collect()
    };
    let (rows, columns) = (places(picture.height, height), places(picture.width, width));
    let at = |y: usize, x: usize| &picture.rgb[(y * picture.width + x) * 3..][..3];
    let rgb = rows.iter().flat_map(|y| columns.iter().flat_map(|x| at(*y, *x))).copied().collect();
    Picture { width, height, rgb }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Fingerprint;

    /// Hashes of what Pillow 13.0.0 makes of the same pictures, on both sides of its rule.
    #[test]
    fn the_order_of_rows_and_columns_is_that_of_pillow() {
        let cases = [
            ([51, 33], [42, 15], 0xc225_b9d7_4814_c857_u64),
            ([53, 39], [44, 20], 0xf698_0da4_e7c6_da67_u64),
            ([39, 59], [12, 4], 0xa5de_f778_0712_f9c1_u64),
            ([18, 55], [16, 46], 0xfb12_4e68_48d9_c6b6_u64),
            ([60, 20], [51, 7], 0x0bf9_2563_9e61_9fee_u64),
            ([16, 44], [59, 56], 0x05da_dc84_d82c_df0e_u64),
            ([20, 30], [28, 22], 0x8498_fc7f_68a7_1a54_u64),
        ];
        for ([width, height], [to_width, to_height], hash) in cases {
            let value = |y: usize, x: usize, channel: usize| ((7 * y + 13 * x + 29 * channel).pow(2) % 251) as u8;
            let pixel = |i: usize| (0..3).map(move |channel| value(i / width, i % width, channel));
            let picture = Picture { width, height, rgb: (0..height * width).flat_map(pixel).collect() };
            let resized = resize(&picture, to_width, to_height, Filter::Lanczos);
            assert_eq!(Fingerprint::of(&resized.rgb).bits(), hash, "{width} x {height} to {to_width} x {to_height}");
        }
    }
}
