//! Where the elements of views lie: the end of what a view reaches, whether it repeats, whether two views meet.

use crate::shape::Layout;

/// Steps of the search for a common element, beyond which two views count as meeting: layouts that ops make need a few.
const SEARCH: usize = 10_000;

impl Layout {
    /// The distance from the first element to the last one; `None` past the end of numbers.
    fn reach(&self) -> Option<usize> {
        let axes = self.dims.iter().zip(&self.strides);
        axes.filter(|(dim, _)| **dim > 1)
            .try_fold(0usize, |sum, (dim, stride)| (dim - 1).checked_mul(*stride).and_then(|r| sum.checked_add(r)))
    }

    /// The place behind the last element, or 0 where there is none; `None` past the end of numbers.
    pub(crate) fn end(&self) -> Option<usize> {
        if self.dims.contains(&0) {
            return Some(0);
        }
        self.reach()?.checked_add(self.offset)?.checked_add(1)
    }

    /// Whether two of its elements may lie at one place: no axis may step into what the finer ones reach.
    pub(crate) fn repeats(&self) -> bool {
        if self.dims.contains(&0) || self.is_contiguous() {
            return false;
        }
        let axes = || self.dims.iter().zip(&self.strides).enumerate().filter(|(_, (dim, _))| **dim > 1);
        axes().any(|(axis, (_, stride))| {
            let finer = axes().filter(|(other, (_, s))| (*s, other) < (stride, &axis));
            let within = finer.map(|(_, (dim, s))| (dim - 1).saturating_mul(*s)).fold(0, usize::saturating_add);
            *stride <= within
        })
    }

    /// Whether both walk the same places in the same order.
    pub(crate) fn is_same_walk(&self, other: &Self) -> bool {
        let axes = self.strides.iter().zip(&other.strides).zip(&self.dims);
        self.dims == other.dims && self.offset == other.offset && axes.into_iter().all(|((a, b), d)| a == b || *d == 1)
    }

    /// Whether some element of this view of a memory may be one of `other`'s.
    pub(crate) fn meets(&self, other: &Self) -> bool {
        let (Some(a_end), Some(b_end)) = (self.end(), other.end()) else { return true };
        if a_end <= other.offset || b_end <= self.offset {
            return false;
        }
        // Common is `a + sum i s = b + sum j t`. With `j` counted from the end of its axis, all terms stand on one side.
        let steps = |layout: &Self| {
            let axes = layout.dims.iter().zip(&layout.strides).filter(|(dim, stride)| **dim > 1 && **stride > 0);
            axes.map(|(dim, stride)| (*stride, dim - 1)).collect::<Vec<_>>()
        };
        let mut terms = steps(self);
        terms.extend(steps(other));
        terms.sort_unstable_by(|a, b| b.cmp(a));
        terms.dedup_by(|next, kept| {
            let alike = next.0 == kept.0;
            if alike {
                kept.1 = kept.1.saturating_add(next.1);
            }
            alike
        });
        Search::new(&terms).finds(b_end - 1 - self.offset, 0)
    }
}

/// Looks for counts `x <= most` with `sum x stride = rest`, the coarsest strides first (NumPy's `shares_memory`).
struct Search<'a> {
    terms: &'a [(usize, usize)],
    /// What the terms from each on add up to at most, and what all their sums are multiples of.
    from: Vec<(usize, usize)>,
    steps: usize,
}

fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

impl<'a> Search<'a> {
    fn new(terms: &'a [(usize, usize)]) -> Self {
        let mut from = vec![(0, 0); terms.len() + 1];
        for (i, (stride, most)) in terms.iter().enumerate().rev() {
            let (reach, divisor) = from[i + 1];
            from[i] = (stride.saturating_mul(*most).saturating_add(reach), common_divisor(*stride, divisor));
        }
        Self { terms, from, steps: 0 }
    }

    fn finds(&mut self, rest: usize, at: usize) -> bool {
        self.steps += 1;
        if rest == 0 || self.steps > SEARCH {
            return true;
        }
        let (reach, divisor) = self.from[at];
        if rest > reach || !rest.is_multiple_of(divisor) {
            return false;
        }
        let (stride, most) = self.terms[at];
        let least = rest.saturating_sub(self.from[at + 1].0).div_ceil(stride);
        (least..=most.min(rest / stride)).any(|count| self.finds(rest - count * stride, at + 1))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use smallvec::smallvec;

    use super::*;

    fn layout() -> impl Strategy<Value = Layout> {
        (prop::collection::vec((0..4usize, 0..9usize), 0..4), 0..20usize).prop_map(|(axes, offset)| {
            let (dims, strides) = axes.into_iter().unzip();
            Layout { dims, strides, offset }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5_000))]

        /// Against the places themselves, one by one.
        #[test]
        fn places_are_found_without_walking_them(a in layout(), b in layout()) {
            let [all_a, all_b] = [&a, &b].map(|l| l.positions().collect::<Vec<_>>());
            let [set_a, set_b] = [&all_a, &all_b].map(|all| all.iter().copied().collect::<BTreeSet<_>>());
            prop_assert_eq!(a.end(), Some(set_a.last().map_or(0, |last| last + 1)));
            prop_assert_eq!(a.meets(&b), !set_a.is_disjoint(&set_b));
            // Interleaved axes that happen not to meet may count as repeating; nothing that repeats is missed.
            prop_assert!(a.repeats() || set_a.len() == all_a.len());
            prop_assert!(!a.is_same_walk(&b) || all_a == all_b);
        }

        /// Of what slicing, permuting and expanding make of a tensor, exactly the expanded ones repeat.
        #[test]
        fn views_repeat_where_they_are_expanded(
            dims in prop::collection::vec(1..4usize, 1..4), axis in 0..4usize, swap in 0..4usize, extra in 1..3usize,
        ) {
            let whole = Layout::contiguous(&dims);
            let axis = axis % dims.len();
            let part = whole.narrow(axis, dims[axis] / 2, dims[axis] - dims[axis] / 2).unwrap();
            let mut axes: Vec<usize> = (0..dims.len()).collect();
            axes.swap(axis, swap % dims.len());
            let turned = part.permute(&axes).unwrap();
            prop_assert!(!whole.repeats() && !part.repeats() && !turned.repeats());
            let wide = turned.expand(&[&[extra][..], &turned.dims].concat()).unwrap();
            prop_assert_eq!(wide.repeats(), extra > 1);
        }
    }

    #[test]
    fn what_exceeds_numbers_is_said() {
        let huge = Layout { dims: smallvec![usize::MAX, 3], strides: smallvec![usize::MAX, 1], offset: 0 };
        assert!(huge.end().is_none() && huge.meets(&Layout::contiguous(&[1])));
    }
}
