//! Biases of attention that follow from positions alone.

use crate::gradcheck::{Case, Sample};
use crate::ops::embedding;
use crate::platform::math::ln;
use crate::{Error, Result, Tensor};

/// The bucket of a key at `distance` after its query (Raffel et al. 2020): half of the buckets are for keys before and at the
/// query, half for those after it; of each half the first half are single distances, and the others grow with the logarithm
/// up to `max_distance`. In f32 and in the reference's order, so that no distance falls on the other side of a border.
fn bucket(distance: i64, buckets: usize, max_distance: usize) -> usize {
    let half = buckets / 2;
    let (side, distance) = (if distance > 0 { half } else { 0 }, distance.unsigned_abs() as usize);
    let exact = half / 2;
    if distance < exact {
        return side + distance;
    }
    let range = (max_distance as f64 / exact as f64).ln() as f32;
    let log = ln(distance as f32 / exact as f32) / range * (half - exact) as f32;
    side + (exact + log as usize).min(half - 1)
}

/// T5's bias by the distance of key and query: table `[buckets, H]`, result `[1, H, queries, keys]`. Distances from
/// `max_distance` on share a bucket.
///
/// # Errors
/// When the table is none of at least four buckets, or `max_distance` is not beyond the buckets of single distances.
pub fn relative_position_bias(table: &Tensor, queries: usize, keys: usize, max_distance: usize) -> Result<Tensor> {
    let &[buckets, heads] = table.dims() else {
        return Err(Error::shape("relative_position_bias", "a table [buckets, H]", table.dims()));
    };
    if buckets < 4 || max_distance <= buckets / 4 {
        let expected = "at least 4 buckets and max_distance above a quarter of them";
        return Err(Error::argument("relative_position_bias", expected, format!("{buckets} and {max_distance}")));
    }
    // All distances in a row, from the one of the last query and the first key on. That row again and again, cut into rows that are a place
    // shorter: each begins a place earlier, and is the next query's. So each head's bias lies by itself.
    let (first, step) = (queries.saturating_sub(1), queries + keys);
    let distances = (0..=step).map(|i| bucket(i as i64 - first as i64, buckets, max_distance) as u32);
    let index = Tensor::from_vec(distances.collect(), &[step + 1], table.device())?;
    let again = embedding(table, &index)?.t()?.unsqueeze(1)?.expand(&[heads, queries, step + 1])?.flatten(1, 2)?;
    again.narrow(1, first, queries * step)?.reshape(&[heads, queries, step])?.narrow(2, 0, keys)?.unsqueeze(0)
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[Case {
    name: "relative_position_bias",
    make: |draw| {
        let [half, heads, queries, keys] = [draw.size(2, 5), draw.size(1, 3), draw.size(1, 9), draw.size(1, 40)];
        let max_distance = draw.size(half + 1, 30);
        Sample::new(vec![draw.standard(&[2 * half, heads])?], move |xs| {
            relative_position_bias(&xs[0], queries, keys, max_distance)
        })
    },
}];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_keys_have_buckets_of_their_own_and_far_ones_share() {
        // T5's 32 buckets up to 128, from the published tables of `relative_position_bucket`.
        let of = |distance| bucket(distance, 32, 128);
        assert_eq!([0, -1, -7, 1, 7].map(of), [0, 1, 7, 17, 23]);
        assert_eq!([-8, -11, -12, -15, -16, -127, -128, -9999].map(of), [8, 8, 9, 9, 10, 15, 15, 15]);
        assert_eq!([8, 12, 9999].map(of), [24, 25, 31]);
    }
}
