//! How good generated digits are, judged by their nearest real ones.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::digits::{Digits, PIXELS};

/// Two figures that see different failures: wrong digits, and digits that no hand wrote.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Quality {
    /// Share of generated digits whose three nearest real ones are, by majority, of the class asked for.
    pub accuracy: f64,
    /// Mean distance of a generated digit to its nearest real one, over that of a real digit to its nearest other.
    pub distance_ratio: f64,
    /// Number of generated digits.
    pub samples: usize,
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

/// Judges images ([`PIXELS`] each) that were asked to be of `classes`.
pub fn judge(images: &[f32], classes: &[u8], digits: &Digits) -> Quality {
    let judged: Vec<(bool, f64)> = images
        .par_chunks_exact(PIXELS)
        .zip(classes)
        .map(|(image, class)| {
            let neighbours = nearest::<3>(image, digits, None);
            let voted = vote(neighbours.map(|(_, index)| digits.labels[index]));
            (voted == *class, f64::from(neighbours[0].0).sqrt())
        })
        .collect();
    let real: Vec<f64> = (0..digits.len())
        .into_par_iter()
        .map(|i| f64::from(nearest::<1>(digits.image(i), digits, Some(i))[0].0).sqrt())
        .collect();
    let mean = |values: &mut dyn Iterator<Item = f64>, n: usize| values.sum::<f64>() / n.max(1) as f64;
    let samples = judged.len();
    Quality {
        accuracy: mean(&mut judged.iter().map(|j| f64::from(u8::from(j.0))), samples),
        distance_ratio: mean(&mut judged.iter().map(|j| j.1), samples) / mean(&mut real.iter().copied(), real.len()),
        samples,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_digits_are_right_and_noise_is_far_away() {
        let digits = Digits::load(0).unwrap();
        let real = judge(&digits.pixels[..200 * PIXELS], &digits.labels[..200], &digits);
        // Each is its own nearest neighbour; the two others of the vote may err.
        assert!(real.accuracy > 0.95 && real.distance_ratio == 0.0, "{real:?}");
        let wrong: Vec<u8> = digits.labels[..200].iter().map(|l| (l + 1) % 10).collect();
        assert!(judge(&digits.pixels[..200 * PIXELS], &wrong, &digits).accuracy < 0.01);
        let mut noise = vec![0.0; 100 * PIXELS];
        flowtape_engine::Philox::new(1).fill_normal(&mut noise);
        assert!(judge(&noise, &[0; 100], &digits).distance_ratio > 2.0);
    }

    #[test]
    fn two_of_three_win() {
        assert_eq!((vote([1, 2, 2]), vote([1, 1, 2]), vote([1, 2, 1]), vote([1, 2, 3])), (2, 1, 1, 1));
    }
}
