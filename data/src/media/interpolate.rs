//! Resizing as OpenCV's `resize` of 8-bit pictures: without smoothing what becomes smaller, but for areas. OpenCV computes with weights
//! of eleven bits, so its values may be one level off.

use super::Picture;

/// How new pixels are made of old ones, by OpenCV's names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interpolation {
    /// `INTER_NEAREST`.
    Nearest,
    /// `INTER_LINEAR`: what NeMo's preprocessing resizes the frames of films with.
    Linear,
    /// `INTER_CUBIC`, with a = -0.75.
    Cubic,
    /// `INTER_AREA`: the mean of what a new pixel covers.
    Area,
    /// `INTER_LANCZOS4`: a windowed sinc over eight pixels.
    Lanczos4,
}

/// Old pixels of a line and their weights, for a new one.
type Taps = Vec<(usize, f64)>;

impl Interpolation {
    fn taps(self, from: usize, to: usize) -> Vec<Taps> {
        let scale = from as f64 / to as f64;
        (0..to).map(|at| self.taps_of(at, from, scale)).collect()
    }

    fn taps_of(self, at: usize, from: usize, scale: f64) -> Taps {
        let within = |place: i64| usize::try_from(place).unwrap_or(0).min(from - 1);
        // Where a new pixel's centre lies among the old ones', and the first of `count` around it.
        let centre = (at as f64 + 0.5) * scale - 0.5;
        let (whole, rest) = (centre.floor(), centre - centre.floor());
        let around = |count: i64, weight: &dyn Fn(f64) -> f64| -> Taps {
            let offsets = (1 - count / 2)..=(count / 2);
            let taps: Taps = offsets.map(|i| (within(whole as i64 + i), weight(rest - i as f64))).collect();
            let sum: f64 = taps.iter().map(|(_, weight)| weight).sum();
            taps.into_iter().map(|(place, weight)| (place, weight / sum)).collect()
        };
        match self {
            Self::Nearest => vec![(within((at as f64 * scale) as i64), 1.0)],
            // Of what becomes larger an area is a line with steps: OpenCV's own rule.
            Self::Area if scale <= 1.0 => {
                let first = (at as f64 * scale).floor();
                let share = (at as f64 + 1.0 - (first + 1.0) / scale).max(0.0);
                let share = if share <= 0.0 { 0.0 } else { share - share.floor() };
                vec![(within(first as i64), 1.0 - share), (within(first as i64 + 1), share)]
            }
            Self::Area => {
                let (start, end) = (at as f64 * scale, ((at + 1) as f64 * scale).min(from as f64));
                let covered = |i: usize| (end.min((i + 1) as f64) - start.max(i as f64)).max(0.0);
                (start as usize..(end.ceil() as usize).min(from)).map(|i| (i, covered(i) / (end - start))).collect()
            }
            Self::Linear => around(2, &|x| 1.0 - x.abs()),
            Self::Cubic => around(4, &|x| {
                const A: f64 = -0.75;
                match x.abs() {
                    x if x <= 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
                    x => ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A,
                }
            }),
            Self::Lanczos4 => around(8, &|x| {
                let sinc =
                    |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
                sinc(x) * sinc(x / 4.0)
            }),
        }
    }
}

/// A picture at another size, which is not 0.
pub fn interpolate(picture: &Picture, width: usize, height: usize, by: Interpolation) -> Picture {
    let (columns, rows) = (by.taps(picture.width, width), by.taps(picture.height, height));
    let line = width * 3;
    let wide = picture.rgb.chunks(picture.width * 3).flat_map(|row| {
        columns.iter().flat_map(|taps| {
            std::array::from_fn::<f64, 3, _>(|channel| {
                taps.iter().map(|(place, weight)| f64::from(row[place * 3 + channel]) * weight).sum()
            })
        })
    });
    let wide: Vec<f64> = wide.collect();
    let value = |taps: &Taps, i: usize| -> u8 {
        let sum: f64 = taps.iter().map(|(place, weight)| wide[place * line + i] * weight).sum();
        sum.round().clamp(0.0, 255.0) as u8
    };
    let rgb = rows.iter().flat_map(|taps| (0..line).map(move |i| (taps, i))).map(|(taps, i)| value(taps, i)).collect();
    Picture { width, height, rgb }
}
