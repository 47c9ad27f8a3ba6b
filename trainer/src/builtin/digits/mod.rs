//! 1,797 real handwritten digits, embedded: the test part of UCI's *Optical Recognition of Handwritten Digits* (E.
//! Alpaydin, C. Kaynak, 1998; CC BY 4.0).

mod judge;
mod report;

use std::io::Read;

use flate2::read::GzDecoder;
use flowtape_data::{Error, Fingerprint, Media, Result, Sample, SampleHeader, Source, Text};
use flowtape_engine::{Device, Philox, Tensor};

pub use judge::{FirstFrame, Quality, judge, judge_first_frames, judge_videos};
pub use report::{DigitsReport, ImageToVideo, preview};

static CSV: &[u8] = include_bytes!("../../../data/digits.csv.gz");

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
}

impl Digits {
    /// Unpacks the embedded images.
    ///
    /// # Errors
    /// When they are damaged.
    pub fn load() -> Result<Self> {
        let broken = |what: String| Error::Open { name: "the embedded digits".into(), what };
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
        Ok(Self { pixels, labels })
    }

    /// Those of some classes alone.
    #[must_use]
    pub fn of_classes(&self, classes: &[u8]) -> Self {
        let chosen: Vec<usize> = (0..self.labels.len()).filter(|i| classes.contains(&self.labels[*i])).collect();
        Self {
            pixels: chosen.iter().flat_map(|i| self.image(*i)).copied().collect(),
            labels: chosen.iter().map(|i| self.labels[*i]).collect(),
        }
    }

    /// One image.
    pub fn image(&self, index: usize) -> &[f32] {
        &self.pixels[index * PIXELS..][..PIXELS]
    }

    /// The caption of an image.
    pub fn caption(&self, index: usize) -> Text {
        Text::Caption(CAPTIONS[usize::from(self.labels[index])].into())
    }
}

impl Source for Digits {
    fn len(&self) -> usize {
        self.labels.len()
    }

    fn header(&self, _: usize) -> Result<SampleHeader> {
        Ok(SampleHeader { dims: vec![1, SIDE, SIDE] })
    }

    fn read(&self, index: usize, _: &mut Philox) -> Result<Sample> {
        let pixels = Tensor::from_slice(self.image(index), &[1, SIDE, SIDE], &Device::cpu())?;
        Ok(Sample::new(Media::Pixels(pixels), self.caption(index)))
    }

    fn fingerprint(&self) -> Fingerprint {
        let all = Fingerprint::of(CSV);
        if (0..10).all(|class| self.labels.contains(&class)) { all } else { all.and(&self.labels) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_classes_are_there_with_their_captions() -> Result<()> {
        let digits = Digits::load()?;
        assert_eq!((digits.len(), digits.pixels.len()), (1797, 1797 * 64));
        assert_eq!((0..10).map(|c| digits.labels.iter().filter(|l| **l == c).count()).min(), Some(174));
        let index = digits.labels.iter().position(|l| *l == 7).unwrap();
        let sample = digits.read(index, &mut Philox::new(0))?;
        assert!(matches!(&sample.text, Text::Caption(caption) if caption == "a handwritten seven"));
        assert_eq!(sample.media.tensor().dims(), digits.header(index)?.dims);
        assert_eq!(sample.media.tensor().to_vec::<f32>()?, digits.image(index));
        let some = digits.of_classes(&[7, 2]);
        assert!(some.labels.iter().all(|l| [2, 7].contains(l)) && some.labels.contains(&7) && some.labels.contains(&2));
        let first = some.labels.iter().position(|l| *l == 7).unwrap();
        assert_eq!((some.image(first), some.fingerprint() == digits.fingerprint()), (digits.image(index), false));
        Ok(())
    }
}
