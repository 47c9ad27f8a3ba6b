//! How good generated digits are, judged by their nearest real ones.

use flowtape_data::Source;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Digits, PIXELS};
use crate::builtin::moving_digits::{Crop, VideoSize};

/// Figures that see different failures: wrong digits, and digits that no hand wrote.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Quality {
    /// Share of generated digits whose three nearest real ones are, by majority, of the class asked for. In videos each
    /// frame counts: its digit is the crop that is nearest to a real one.
    pub accuracy: f64,
    /// The same of each class, of images.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub accuracy_by_class: Option<[f64; 10]>,
    /// Mean distance of a generated digit to its nearest real one, over that of a real digit to its nearest other.
    pub distance_ratio: f64,
    /// Mean squared distance from black of all pixels outside the crop, for videos.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub background_error: Option<f64>,
    /// Number of generated images or videos.
    pub samples: usize,
}

/// How closely videos follow the first frames that they were given.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct FirstFrame {
    /// Mean squared error of the first frame.
    pub error: f64,
    /// The same against the frame that the next video was given: what a model that ignores it would reach.
    pub error_shuffled: f64,
}

/// The nearest real digits of an image: squared distance and index, nearest first.
fn nearest<const K: usize>(image: &[f32], digits: &Digits, except: Option<usize>) -> [(f32, usize); K] {
    let mut best = [(f32::INFINITY, 0); K];
    for index in (0..digits.len()).filter(|i| Some(*i) != except) {
        let distance: f32 = image.iter().zip(digits.image(index)).map(|(a, b)| (a - b) * (a - b)).sum();
        if distance < best[K - 1].0 {
            best[K - 1] = (distance, index);
            // Stable: of equal distances the earlier image counts as nearer.
            best.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
    }
    best
}

/// The majority of three labels; the nearest one's where all differ.
fn vote(labels: [u8; 3]) -> u8 {
    if labels[1] == labels[2] { labels[1] } else { labels[0] }
}

/// Whether the three nearest real digits of an image are of `class`, and the distance of the nearest.
fn judge_image(image: &[f32], class: u8, digits: &Digits) -> (bool, f64) {
    let neighbours = nearest::<3>(image, digits, None);
    let voted = vote(neighbours.map(|(_, index)| digits.labels[index]));
    (voted == class, f64::from(neighbours[0].0).sqrt())
}

fn mean(values: impl Iterator<Item = f64>, n: usize) -> f64 {
    values.sum::<f64>() / n.max(1) as f64
}

/// Mean distance of a real digit to its nearest other.
fn real_distance(digits: &Digits) -> f64 {
    let distances: Vec<f64> = (0..digits.len())
        .into_par_iter()
        .map(|i| f64::from(nearest::<1>(digits.image(i), digits, Some(i))[0].0).sqrt())
        .collect();
    mean(distances.iter().copied(), distances.len())
}

/// Judges images ([`PIXELS`] each) that were asked to be of `classes`.
pub fn judge(images: &[f32], classes: &[u8], digits: &Digits) -> Quality {
    let judged: Vec<(bool, f64)> =
        images.par_chunks_exact(PIXELS).zip(classes).map(|(image, class)| judge_image(image, *class, digits)).collect();
    let samples = judged.len();
    let of_class = |class: usize| {
        let right = judged
            .iter()
            .zip(classes)
            .filter(|(_, c)| usize::from(**c) == class)
            .map(|(j, _)| f64::from(u8::from(j.0)));
        let right: Vec<f64> = right.collect();
        mean(right.iter().copied(), right.len())
    };
    Quality {
        accuracy: mean(judged.iter().map(|j| f64::from(u8::from(j.0))), samples),
        accuracy_by_class: Some(std::array::from_fn(of_class)),
        distance_ratio: mean(judged.iter().map(|j| j.1), samples) / real_distance(digits),
        background_error: None,
        samples,
    }
}

/// Judges videos, frame by frame, that were asked to be of `classes`.
pub fn judge_videos(videos: &[f32], size: &VideoSize, classes: &[u8], digits: &Digits) -> Quality {
    let judged: Vec<(bool, f64, f64)> = videos
        .par_chunks_exact(size.frame())
        .enumerate()
        .filter_map(|(i, frame)| {
            let distance = |crop: &Crop<'_>| nearest::<1>(&crop.pixels(), digits, None)[0].0;
            let crop = size.crops(frame).min_by(|a, b| distance(a).total_cmp(&distance(b)))?;
            let (right, distance) = judge_image(&crop.pixels(), *classes.get(i / size.frames)?, digits);
            Some((right, distance, crop.background_error()))
        })
        .collect();
    Quality {
        accuracy: mean(judged.iter().map(|j| f64::from(u8::from(j.0))), judged.len()),
        accuracy_by_class: None,
        distance_ratio: mean(judged.iter().map(|j| j.1), judged.len()) / real_distance(digits),
        background_error: Some(mean(judged.iter().map(|j| j.2), judged.len())),
        samples: judged.len() / size.frames,
    }
}

/// Compares the first frames of videos with those that they were given.
pub fn judge_first_frames(videos: &[f32], given: &[f32], size: &VideoSize) -> FirstFrame {
    let given: Vec<&[f32]> = given.chunks_exact(size.frame()).collect();
    let error = |shift: usize| {
        let squares = videos.chunks_exact(size.pixels()).enumerate().map(|(i, video)| {
            let target = given[(i + shift) % given.len()];
            let sum: f64 = video.iter().zip(target).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            sum / target.len() as f64
        });
        mean(squares, given.len())
    };
    FirstFrame { error: error(0), error_shuffled: error(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_digits_are_right_and_noise_is_far_away() {
        let digits = Digits::load().unwrap();
        let real = judge(&digits.pixels[..200 * PIXELS], &digits.labels[..200], &digits);
        // Each is its own nearest neighbour; the two others of the vote may err.
        assert!(real.accuracy > 0.95 && real.distance_ratio == 0.0, "{real:?}");
        let sevens = digits.of_classes(&[7]);
        let by_class = judge(&sevens.pixels, &sevens.labels, &digits).accuracy_by_class.unwrap();
        assert!(by_class[7] > 0.95 && by_class.iter().filter(|share| **share == 0.0).count() == 9, "{by_class:?}");
        let wrong: Vec<u8> = digits.labels[..200].iter().map(|l| (l + 1) % 10).collect();
        assert!(judge(&digits.pixels[..200 * PIXELS], &wrong, &digits).accuracy < 0.01);
        let mut noise = vec![0.0; 100 * PIXELS];
        flowtape_engine::Philox::new(1).fill_normal(&mut noise);
        assert!(judge(&noise, &[0; 100], &digits).distance_ratio > 2.0);
    }

    #[test]
    fn real_videos_are_right_and_their_first_frames_are_their_own() {
        let digits = Digits::load().unwrap();
        let size = VideoSize { frames: 2, height: 11, width: 11, stride: 1 };
        let mut random = flowtape_engine::Philox::new(2);
        let videos: Vec<f32> = (0..20).flat_map(|i| size.animate(digits.image(i), &mut random)).collect();
        let quality = judge_videos(&videos, &size, &digits.labels[..20], &digits);
        assert!(quality.accuracy > 0.9 && quality.distance_ratio < 1e-6, "{quality:?}");
        assert!(quality.background_error.unwrap() < 1e-9 && quality.samples == 20, "{quality:?}");
        let given: Vec<f32> = videos.chunks(size.pixels()).flat_map(|v| &v[..size.frame()]).copied().collect();
        let first = judge_first_frames(&videos, &given, &size);
        assert!(first.error == 0.0 && first.error_shuffled > 0.1, "{first:?}");
        let noise: Vec<f32> = videos.iter().map(|v| v + 0.5).collect();
        assert!(judge_videos(&noise, &size, &digits.labels[..20], &digits).background_error.unwrap() > 0.1);
    }

    #[test]
    fn two_of_three_win() {
        assert_eq!((vote([1, 2, 2]), vote([1, 1, 2]), vote([1, 2, 1]), vote([1, 2, 3])), (2, 1, 1, 1));
    }
}
