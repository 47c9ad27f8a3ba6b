//! Digits that move in straight lines over a canvas and bounce off its edges.

use flowtape_data::{Fingerprint, Media, Result, Sample, SampleHeader, Source};
use flowtape_engine::{Device, Philox, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::builtin::digits::{Digits, SIDE};

/// The greatest speed, in strides a frame on each axis.
const SPEED: i64 = 1;

/// Videos of the embedded digits: a digit moves anew each time that it is read.
#[derive(Clone, Debug)]
pub struct MovingDigits {
    digits: Digits,
    size: VideoSize,
}

impl MovingDigits {
    /// Videos of one size, at least a digit's.
    ///
    /// # Errors
    /// When the embedded digits are damaged.
    pub fn new(size: VideoSize) -> Result<Self> {
        Ok(Self { digits: Digits::load()?, size })
    }

    fn dims(&self) -> [usize; 4] {
        [1, self.size.frames, self.size.height, self.size.width]
    }
}

impl Source for MovingDigits {
    fn len(&self) -> usize {
        self.digits.len()
    }

    fn header(&self, _: usize) -> Result<SampleHeader> {
        Ok(SampleHeader { dims: self.dims().to_vec() })
    }

    fn read(&self, index: usize, random: &mut Philox) -> Result<Sample> {
        let video = self.size.animate(self.digits.image(index), random);
        let pixels = Tensor::from_vec(video, &self.dims(), &Device::cpu())?;
        Ok(Sample::new(Media::Pixels(pixels), self.digits.caption(index)))
    }

    fn fingerprint(&self) -> Fingerprint {
        let sizes = self.dims().into_iter().chain([self.size.stride]).map(|size| size as u64);
        sizes.fold(self.digits.fingerprint(), |so_far, size| so_far.and(&size.to_le_bytes()))
    }
}

/// Sizes of a video.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VideoSize {
    /// Number of frames.
    #[schemars(range(min = 1, max = 65_536))]
    pub frames: usize,
    /// Rows of a frame.
    #[schemars(range(min = 8, max = 65_536))]
    pub height: usize,
    /// Columns of a frame.
    #[schemars(range(min = 8, max = 65_536))]
    pub width: usize,
    /// Pixels between the places where a digit may be, on each axis: it moves by one place a frame. Where it is the patch size of
    /// a model, patches move as a whole.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 65_536))]
    pub stride: usize,
}

fn one() -> usize {
    1
}

/// The most pixels of a video.
const MAX_PIXELS: usize = 1 << 28;

impl VideoSize {
    /// What does not fit together.
    pub(crate) fn problems(&self) -> Vec<String> {
        // Of sides that are bounded by themselves.
        let pixels = self.frames.saturating_mul(self.frame());
        let mut problems = Vec::new();
        if pixels > MAX_PIXELS {
            problems.push(format!(
                "frames: expected frames x height x width of at most {MAX_PIXELS} together, got {pixels}"
            ));
        }
        if self.room().iter().any(|room| room % self.stride.max(1) != 0) {
            let (height, width, stride) = (self.height, self.width, self.stride);
            problems.push(format!(
                "stride: expected a divisor of height - {SIDE} and width - {SIDE}, the room of a digit; got {stride} for {height} x {width}"
            ));
        }
        problems
    }

    /// Pixels of a frame.
    pub fn frame(&self) -> usize {
        self.height.saturating_mul(self.width)
    }

    /// Pixels of all frames.
    pub fn pixels(&self) -> usize {
        self.frames * self.frame()
    }

    /// Pixels that a digit can move on each axis.
    fn room(&self) -> [usize; 2] {
        [self.height, self.width].map(|side| side.saturating_sub(SIDE))
    }

    /// A video `[F, H, W]` of a digit: its start and its velocity come from `random`, the ground is black (-1).
    ///
    /// The canvas must be at least as large as the digit.
    pub fn animate(&self, digit: &[f32], random: &mut Philox) -> Vec<f32> {
        let mut below = |n: usize| (random.next_f64() * n as f64) as i64;
        // In places, not pixels.
        let room = self.room().map(|room| room / self.stride);
        let start = room.map(|r| below(r + 1));
        let velocity = loop {
            let v = [0; 2].map(|_: i64| below(2 * SPEED as usize + 1) - SPEED);
            // Where there is room, something moves.
            if room == [0, 0] || v.iter().zip(&room).any(|(v, room)| v * *room as i64 != 0) {
                break v;
            }
        };
        let mut video = vec![-1.0; self.pixels()];
        for (time, frame) in video.chunks_exact_mut(self.frame()).enumerate() {
            let at = |axis: usize| bounce(start[axis] + velocity[axis] * time as i64, room[axis]) * self.stride;
            let (top, left) = (at(0), at(1));
            for (y, row) in digit.chunks_exact(SIDE).enumerate() {
                frame[(top + y) * self.width + left..][..SIDE].copy_from_slice(row);
            }
        }
        video
    }

    /// All crops of a digit's size, row by row.
    pub fn crops<'a>(&self, frame: &'a [f32]) -> impl Iterator<Item = Crop<'a>> {
        let (height, width) = (self.height, self.width);
        (0..=height - SIDE).flat_map(move |top| (0..=width - SIDE).map(move |left| Crop { frame, width, top, left }))
    }
}

/// Where a point is that bounces between 0 and `room`.
fn bounce(position: i64, room: usize) -> usize {
    if room == 0 {
        return 0;
    }
    let room = room as i64;
    let folded = position.rem_euclid(2 * room);
    (if folded > room { 2 * room - folded } else { folded }) as usize
}

/// A window of a digit's size on a frame.
#[derive(Clone, Copy, Debug)]
pub struct Crop<'a> {
    frame: &'a [f32],
    width: usize,
    top: usize,
    left: usize,
}

impl Crop<'_> {
    /// Its pixels.
    pub fn pixels(&self) -> Vec<f32> {
        let rows = (self.top..self.top + SIDE).map(|y| &self.frame[y * self.width + self.left..][..SIDE]);
        rows.flatten().copied().collect()
    }

    /// The mean squared distance of all pixels outside from black.
    pub fn background_error(&self) -> f64 {
        let square = |v: &f32| f64::from(v + 1.0).powi(2);
        let all: f64 = self.frame.iter().map(square).sum();
        let inside: f64 = self.pixels().iter().map(square).sum();
        (all - inside).max(0.0) / (self.frame.len() - SIDE * SIDE).max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_multiples_of_the_stride() {
        let size = VideoSize { frames: 8, height: 12, width: 14, stride: 2 };
        assert_eq!(size.problems(), Vec::<String>::new());
        let digit = [1.0; SIDE * SIDE];
        let mut random = Philox::new(2);
        let places: std::collections::BTreeSet<_> = (0..50)
            .flat_map(|_| {
                size.animate(&digit, &mut random)
                    .chunks_exact(size.frame())
                    .map(|f| f.iter().position(|v| *v > 0.0))
                    .collect::<Vec<_>>()
            })
            .map(|first| first.map(|at| (at / size.width, at % size.width)).unwrap())
            .collect();
        assert_eq!(places, [0, 2, 4].into_iter().flat_map(|y| [0, 2, 4, 6].map(|x| (y, x))).collect());
        let line = VideoSize { height: SIDE, ..size };
        for _ in 0..50 {
            let video = line.animate(&digit, &mut random);
            assert!(video.chunks_exact(line.frame()).any(|frame| *frame != video[..line.frame()]));
        }
        assert!(VideoSize { width: 13, ..size }.problems()[0].contains("divisor"));
    }

    #[test]
    fn digits_stay_whole_move_and_bounce() {
        let size = VideoSize { frames: 12, height: 11, width: 14, stride: 1 };
        let digit: Vec<f32> = (0..64).map(|i| i as f32 / 64.0).collect();
        let mut random = Philox::new(5);
        for _ in 0..50 {
            let video = size.animate(&digit, &mut random);
            let places: Vec<(usize, usize)> = video
                .chunks_exact(size.frame())
                .map(|frame| {
                    let whole: Vec<_> = size.crops(frame).filter(|c| c.pixels() == digit).collect();
                    assert_eq!(whole.len(), 1);
                    assert!(whole[0].background_error() < 1e-12);
                    (whole[0].top, whole[0].left)
                })
                .collect();
            assert!(places.windows(2).any(|p| p[0] != p[1]), "{places:?}");
            let step = |a: usize, b: usize| a.abs_diff(b) <= SPEED as usize;
            assert!(places.windows(2).all(|p| step(p[0].0, p[1].0) && step(p[0].1, p[1].1)), "{places:?}");
        }
        assert_eq!([-1, 0, 2, 3, 4, 6, 7].map(|p| bounce(p, 3)), [1, 0, 2, 3, 2, 0, 1]);
        assert_eq!(bounce(5, 0), 0);
    }
}
