//! 1,797 real handwritten digits, embedded: the test part of UCI's *Optical Recognition of Handwritten Digits* (E.
//! Alpaydin, C. Kaynak, 1998; CC BY 4.0).

use std::io::Read;

use flate2::read::GzDecoder;
use flowtape_engine::Philox;

use crate::{Error, Result};

static CSV: &[u8] = include_bytes!("../data/digits.csv.gz");

/// Side of an image.
pub const SIDE: usize = 8;
/// Pixels of an image.
pub const PIXELS: usize = SIDE * SIDE;
/// The captions, by class.
pub const CAPTIONS: [&str; 10] = [
    "a handwritten zero",
    "a handwritten one",
    "a handwritten two",
    "a handwritten three",
    "a handwritten four",
    "a handwritten five",
    "a handwritten six",
    "a handwritten seven",
    "a handwritten eight",
    "a handwritten nine",
];

/// The images, with grey levels in [-1, 1], and their classes.
#[derive(Clone, Debug)]
pub struct Digits {
    /// Row-major, one after the other.
    pub pixels: Vec<f32>,
    /// One per image.
    pub labels: Vec<u8>,
    /// The order of each epoch follows from it.
    seed: u64,
}

impl Digits {
    /// Unpacks the embedded images.
    ///
    /// # Errors
    /// When they are damaged.
    pub fn load(seed: u64) -> Result<Self> {
        let broken = |what: String| Error::Recipe { path: "data.source: digits".into(), what };
        let mut text = String::new();
        GzDecoder::new(CSV).read_to_string(&mut text).map_err(|e| broken(e.to_string()))?;
        let (mut pixels, mut labels) = (Vec::new(), Vec::new());
        for (number, line) in text.lines().enumerate() {
            let values: Vec<u8> = line.split(',').filter_map(|v| v.parse().ok()).collect();
            match values.split_last() {
                Some((label, grey)) if grey.len() == PIXELS && *label < 10 && grey.iter().all(|g| *g <= 16) => {
                    pixels.extend(grey.iter().map(|g| f32::from(*g) / 8.0 - 1.0));
                    labels.push(*label);
                }
                _ => return Err(broken(format!("line {}: expected 64 grey levels and a class", number + 1))),
            }
        }
        Ok(Self { pixels, labels, seed })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// One image.
    pub fn image(&self, index: usize) -> &[f32] {
        &self.pixels[index * PIXELS..][..PIXELS]
    }

    /// Indices of the images `from..from + size` of the endless sequence of shuffled epochs.
    pub fn sequence(&self, from: usize, size: usize) -> Vec<usize> {
        let (mut order, mut epoch) = (Vec::new(), usize::MAX);
        let mut at = |place: usize| {
            if place / self.len() != epoch {
                epoch = place / self.len();
                order = self.order(epoch);
            }
            order[place % self.len()]
        };
        (from..from + size).map(&mut at).collect()
    }

    fn order(&self, epoch: usize) -> Vec<usize> {
        let mut random = Philox::new(self.seed).fork(epoch as u64);
        let mut order: Vec<usize> = (0..self.len()).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, (random.next_f64() * (i + 1) as f64) as usize);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_has_every_image_once_and_the_next_another_order() -> Result<()> {
        let digits = Digits::load(3)?;
        assert_eq!((digits.len(), digits.pixels.len()), (1797, 1797 * 64));
        assert_eq!((0..10).map(|c| digits.labels.iter().filter(|l| **l == c).count()).min(), Some(174));
        let (first, second) = (digits.order(0), digits.order(1));
        assert_ne!(first, second);
        let mut sorted = first;
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..1797));
        Ok(())
    }

    #[test]
    fn the_sequence_goes_on_over_the_end_of_an_epoch() -> Result<()> {
        let digits = Digits::load(3)?;
        assert_eq!(digits.sequence(1790, 14)[7..], digits.sequence(1797, 7));
        Ok(())
    }
}
