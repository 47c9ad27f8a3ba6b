//! Resolutions that samples are brought to, so that those of a batch are alike: NeMo's multi-tier buckets.

use crate::{Error, Result};

/// Width over height of the buckets, the narrowest first.
const ASPECT_RATIOS: [f64; 14] = [
    1.0 / 2.0,
    9.0 / 16.0,
    2.0 / 3.0,
    3.0 / 4.0,
    4.0 / 5.0,
    1.0,
    5.0 / 4.0,
    4.0 / 3.0,
    3.0 / 2.0,
    16.0 / 10.0,
    5.0 / 3.0,
    16.0 / 9.0,
    2.0,
    21.0 / 9.0,
];

/// Width and height in pixels.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Resolution {
    /// Pixels of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

impl Resolution {
    /// A width and a height.
    pub fn new(width: usize, height: usize) -> Self {
        Self { width, height }
    }

    /// Width over height.
    pub fn aspect_ratio(self) -> f64 {
        self.width as f64 / self.height as f64
    }

    /// Width times height.
    pub fn pixels(self) -> usize {
        self.width * self.height
    }
}

/// The buckets of a budget of pixels, the narrowest first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Buckets {
    /// Their resolutions; a bucket's number is its place.
    pub resolutions: Vec<Resolution>,
}

impl Buckets {
    /// NeMo's step between sides of pictures.
    pub const QUANTIZATION: usize = 64;
    /// NeMo's budget where none is given.
    pub const MAX_PIXELS: usize = 256 * 256;

    /// The buckets whose sides are multiples of `quantization` and that have at most `max_pixels`.
    ///
    /// # Errors
    /// When not even the smallest square fits.
    pub fn new(quantization: usize, max_pixels: usize) -> Result<Self> {
        let least = quantization.saturating_mul(quantization);
        if quantization == 0 || least > max_pixels {
            let expected = format!("at least {least}, a square of the step between sides ({quantization})");
            return Err(Error::batch("max_pixels", expected, max_pixels));
        }
        // Python's rounding.
        let whole = |side: f64| ((side / quantization as f64).round_ties_even() as usize).max(1) * quantization;
        let mut resolutions: Vec<Resolution> = Vec::new();
        for ratio in ASPECT_RATIOS {
            let mut height = whole((max_pixels as f64 / ratio).sqrt().trunc());
            let mut width = whole((height as f64 * ratio).trunc());
            while width * height > max_pixels {
                let side = if width >= height { &mut width } else { &mut height };
                *side -= quantization;
            }
            let resolution = Resolution { width, height };
            if !resolutions.contains(&resolution) {
                resolutions.push(resolution);
            }
        }
        resolutions.sort_by(|a, b| a.aspect_ratio().total_cmp(&b.aspect_ratio()));
        Ok(Self { resolutions })
    }

    /// The number of the bucket whose aspect ratio is nearest to an image's; the first of two that are as near.
    pub fn of(&self, image: Resolution) -> usize {
        let far = |bucket: &Resolution| (bucket.aspect_ratio() - image.aspect_ratio()).abs();
        let nearest = self.resolutions.iter().enumerate().min_by(|a, b| far(a.1).total_cmp(&far(b.1)));
        nearest.map_or(0, |(number, _)| number)
    }
}

/// How many samples of a resolution have about as many pixels as `base` of another: at least one.
pub fn dynamic_batch_size(base: usize, base_resolution: Resolution, resolution: Resolution) -> usize {
    (base.saturating_mul(base_resolution.pixels()) / resolution.pixels().max(1)).max(1)
}

/// How an image is brought to a bucket: it is resized until it covers the bucket, then what stands over is cut off on both
/// sides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Crop {
    /// What the image is resized to. Rounded down, a side may be a pixel short of the bucket's.
    pub resized: Resolution,
    /// The first column and row of it that stays; -1 where a column or row of black comes before it.
    pub offset: [i64; 2],
}

impl Crop {
    /// NeMo's centre crop of an image to a bucket.
    pub fn center(image: Resolution, bucket: Resolution) -> Self {
        let (wide, high) = (bucket.width as f64 / image.width as f64, bucket.height as f64 / image.height as f64);
        let scale = wide.max(high);
        let side = |side: usize| (side as f64 * scale) as usize;
        let resized = Resolution { width: side(image.width), height: side(image.height) };
        let offset = |side: usize, wanted: usize| (side as i64 - wanted as i64).div_euclid(2);
        Self { resized, offset: [offset(resized.width, bucket.width), offset(resized.height, bucket.height)] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_fits_the_budget_and_an_image_goes_to_the_nearest() -> Result<()> {
        for (quantization, max_pixels) in [(64, 4096), (64, 300_000), (8, 399_360)] {
            let buckets = Buckets::new(quantization, max_pixels)?;
            assert!(buckets.resolutions.is_sorted_by(|a, b| a.aspect_ratio() < b.aspect_ratio()));
            for (number, bucket) in buckets.resolutions.iter().enumerate() {
                assert!(bucket.pixels() <= max_pixels && bucket.width % quantization == 0, "{bucket:?}");
                assert_eq!(buckets.of(*bucket), number);
            }
        }
        assert!(Buckets::new(64, 4095).is_err() && Buckets::new(0, 10).is_err());
        Ok(())
    }
}
