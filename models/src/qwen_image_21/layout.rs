//! Where text and images stand in the sequence of each sample, and what each place sees.

use std::ops::Range;

use flowtape_engine::{Device, Tensor};

use crate::blocks::{RopePrecision, RopeTables, key_mask, read_marks};
use crate::config::product;
use crate::{Error, Result};

/// Base of the rotary frequencies.
const THETA: f64 = 10_000.0;
/// Position axes.
const AXES: usize = 3;
/// Tokens of an image that stand in for one token of the text.
const SLOT: usize = 4;

/// The rows of one sample.
#[derive(Debug, Default)]
struct Sequence {
    /// Where each comes from.
    sources: Vec<u32>,
    /// Its positions.
    positions: Vec<f32>,
    /// How many rows it sees, from the first on.
    seen: Vec<usize>,
    /// The position that is reached behind them.
    end: f32,
}

impl Sequence {
    /// A token of the text.
    fn token(&mut self, source: usize) {
        self.sources.push(source as u32);
        self.positions.extend([self.end; AXES]);
        self.seen.push(self.sources.len());
        self.end += 1.0;
    }

    /// An image, whose tokens see all of it.
    fn image(&mut self, sources: Range<usize>, size: [usize; 2]) {
        self.sources.extend(sources.map(|source| source as u32));
        self.positions.extend(image_positions(size, self.end));
        self.seen.resize(self.sources.len(), self.sources.len());
        self.end += size[0].max(size[1]) as f32;
    }
}

/// The sequences of a batch but for the image to make: the text's valid tokens, in which images to edit take the places that
/// are kept for them, at the beginning of as many rows as the longest sample needs.
#[derive(Debug)]
pub(super) struct Layout {
    samples: Vec<Sequence>,
    /// Rows of each sample.
    rows: usize,
}

/// Positions of an image of a height and a width behind a position: rows and columns count from its middle.
fn image_positions([height, width]: [usize; 2], start: f32) -> impl Iterator<Item = f32> {
    let centred = |at: usize, size: usize| at as f32 - (size - size / 2) as f32;
    (0..height * width).flat_map(move |i| [start, centred(i / width, height), centred(i % width, width)])
}

impl Layout {
    /// Of texts `[B, T, D]`, where there are some a mask of their tokens (0 at padding), the places kept for images, and the sizes of
    /// the images to edit, alike in all samples. Rows come from the tokens of all texts, and then from those of the images to edit of
    /// all samples.
    pub(super) fn of(
        text: &Tensor,
        mask: Option<&Tensor>,
        slots: Option<&Tensor>,
        images: &[[usize; 2]],
    ) -> Result<Self> {
        let (batch, len) = (text.dim(0)?, text.dim(1)?);
        let tokens: usize = images.iter().map(|size| product(size)).sum();
        let valid = read_marks(mask, [batch, len])?.unwrap_or_else(|| vec![true; batch * len]);
        // Without data the images' places are the first ones.
        let first = || (0..batch * len).map(|i| i % len < tokens / SLOT).collect();
        let slots = read_marks(slots, [batch, len])?.unwrap_or_else(first);
        let one = |sample: usize| {
            let wrong = |what: &str| {
                let expected = format!(
                    "as many places in `image_pad_mask` as the images to edit need, one behind the other for each: a quarter of \
                     their tokens {images:?}"
                );
                Error::adapter("qwen_image_21_edit", expected, format!("{what} in sample {sample}"))
            };
            let (mut sequence, mut rest) = (Sequence::default(), images.iter());
            // The next token of an image, and how many places are left to the one under way.
            let (mut next, mut left) = (batch * len + sample * tokens, 0);
            for place in (sample * len..(sample + 1) * len).filter(|place| valid[*place]) {
                match (slots[place], left) {
                    (false, 0) => sequence.token(place),
                    (false, _) => return Err(wrong("text inside of an image's places")),
                    (true, 0) => {
                        let size = rest.next().ok_or_else(|| wrong("more places"))?;
                        let count = product(size);
                        sequence.image(next..next + count, *size);
                        (next, left) = (next + count, (count / SLOT).saturating_sub(1));
                    }
                    (true, _) => left -= 1,
                }
            }
            if left > 0 || rest.next().is_some() { Err(wrong("fewer places")) } else { Ok(sequence) }
        };
        let mut samples = (0..batch).map(one).collect::<Result<Vec<Sequence>>>()?;
        let rows = samples.iter().map(|sample| sample.sources.len()).max().unwrap_or(0).max(1);
        for Sequence { positions, seen, .. } in &mut samples {
            // Rows without a token see what is before them, and nobody sees them.
            seen.extend(seen.len() + 1..=rows);
            positions.resize(rows * AXES, 0.0);
        }
        Ok(Self { samples, rows })
    }

    /// Where each row comes from, u32 `[B, rows]`.
    pub(super) fn sources(&self, device: &Device) -> Result<Tensor> {
        let row = |sample: &Sequence| {
            let mut sources = sample.sources.clone();
            sources.resize(self.rows, 0);
            sources
        };
        let sources: Vec<u32> = self.samples.iter().flat_map(row).collect();
        Ok(Tensor::from_vec(sources, &[self.samples.len(), self.rows], device)?)
    }

    /// Tables of the rows, and of an image of these sizes behind them.
    pub(super) fn rope(&self, target: [usize; 2], axes_dim: &[usize], device: &Device) -> Result<[RopeTables; 2]> {
        let rows: Vec<f32> = self.samples.iter().flat_map(|sample| sample.positions.iter().copied()).collect();
        let behind: Vec<f32> = self.samples.iter().flat_map(|sample| image_positions(target, sample.end)).collect();
        let tables = |positions: &[f32]| {
            RopeTables::new(positions, axes_dim, THETA, RopePrecision::F32, device)?.per_sample(self.samples.len())
        };
        Ok([tables(&rows)?, tables(&behind)?])
    }

    /// What is added to the scores of the rows with each other: f32 `[B, 1, rows, rows]`, or of one sample where all are alike.
    pub(super) fn causal_mask(&self, device: &Device) -> Result<Tensor> {
        let alike = self.samples.windows(2).all(|two| two[0].seen == two[1].seen);
        let samples = if alike { &self.samples[..self.samples.len().min(1)] } else { &self.samples[..] };
        let row = |seen: usize| (0..self.rows).map(move |i| if i < seen { 0.0 } else { f32::NEG_INFINITY });
        let bias: Vec<f32> = samples.iter().flat_map(|sample| &sample.seen).flat_map(|seen| row(*seen)).collect();
        Ok(Tensor::from_vec(bias, &[samples.len(), 1, self.rows, self.rows], device)?)
    }

    /// What is added to the scores of those who see all rows, and `behind` places behind them: f32 `[B, 1, 1, rows + behind]`; none
    /// where all samples have as many rows.
    pub(super) fn row_mask(&self, behind: usize, device: &Device) -> Result<Option<Tensor>> {
        if self.samples.iter().all(|sample| sample.sources.len() == self.rows) {
            return Ok(None);
        }
        let row = |sample: &Sequence| {
            let count = sample.sources.len();
            (0..self.rows).map(move |i| f32::from(u8::from(i < count)))
        };
        let marks: Vec<f32> = self.samples.iter().flat_map(row).collect();
        let marks = Tensor::from_vec(marks, &[self.samples.len(), self.rows], device)?;
        // No place of the image is masked: nothing is added to its scores.
        Ok(Some(key_mask(&marks)?.pad(3, 0, behind)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;

    fn marks_of(marks: &[u32]) -> Tensor {
        Tensor::from_slice(marks, &[1, marks.len()], &Device::cpu()).unwrap()
    }

    #[test]
    fn images_take_their_places_in_the_text() {
        let (text, mask) = (normal(&[1, 7, 3]), marks_of(&[1, 1, 1, 1, 1, 1, 0]));
        let layout =
            Layout::of(&text, Some(&mask), Some(&marks_of(&[0, 1, 1, 1, 0, 0, 0])), &[[2, 2], [2, 4]]).unwrap();
        let (sequence, sources) = (&layout.samples[0], [0].into_iter().chain(7..19).chain([4, 5]));
        assert_eq!((layout.rows, &sequence.sources), (15, &sources.collect::<Vec<u32>>()));
        // Adjacent images are blocks of their own.
        let seen = [&[1][..], &[5; 4], &[13; 8], &[14, 15]].concat();
        assert_eq!((&sequence.seen, sequence.end), (&seen, 9.0));
        let at = |row: usize| &sequence.positions[3 * row..3 * row + 3];
        assert_eq!(
            [at(0), at(1), at(4), at(5), at(12), at(13), at(14)],
            [
                [0.0, 0.0, 0.0],
                [1.0, -1.0, -1.0],
                [1.0, 0.0, 0.0],
                [3.0, -1.0, -2.0],
                [3.0, 0.0, 1.0],
                [7.0, 7.0, 7.0],
                [8.0, 8.0, 8.0],
            ]
        );
        for (slots, what) in [
            ([0, 1, 0, 1, 1, 0, 0], "more places"),
            ([0, 1, 1, 0, 0, 0, 0], "text inside"),
            ([0, 1, 0, 0, 0, 0, 0], "fewer places"),
            ([1, 1, 1, 1, 0, 0, 0], "more places"),
        ] {
            let images: &[[usize; 2]] = if slots[2] == 0 && slots[3] == 1 { &[[2, 2]] } else { &[[2, 2], [2, 4]] };
            let error = Layout::of(&text, Some(&mask), Some(&marks_of(&slots)), images).unwrap_err().to_string();
            assert!(error.contains(what) && error.contains("image_pad_mask"), "{slots:?}: {error}");
        }
    }
}
