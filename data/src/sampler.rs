//! Which samples a batch holds.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use flowtape_engine::Philox;
use serde::{Deserialize, Serialize};

/// Where a run stands in its data: all that resume needs. Batches are those of one rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Cursor {
    /// Passes over the data that are over.
    pub epoch: u64,
    /// Batches of this epoch that are over.
    pub batch: u64,
}

/// One of several processes that train together. At a cursor each takes a batch of its own: those of one process one after the
/// other, where it is alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rank {
    /// Which, from 0.
    pub index: u64,
    /// How many there are.
    pub count: u64,
}

impl Rank {
    /// The only one.
    pub const ALONE: Self = Self { index: 0, count: 1 };
}

/// A sample of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pick {
    /// Its number in the source.
    pub index: usize,
    /// Its place in the run's sequence: what is drawn for it follows from that.
    pub place: u64,
}

/// The samples of a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BatchPlan {
    /// In order.
    pub picks: Vec<Pick>,
    /// Where the batch after it is.
    pub next: Cursor,
}

/// A plan of batches. It has no state: the same cursor gives the same batch.
pub trait Sampler: Send + Sync {
    /// The batch of a rank at a cursor, or the first one after it where its epoch has no more. `None` if there is none at all.
    fn plan(&self, at: Cursor, rank: Rank) -> Option<BatchPlan>;

    /// The cursor of `to` ranks that stands where that of `from` ranks does: exactly where their batches share out, else a little
    /// before, so that nothing is left out.
    fn recount(&self, at: Cursor, from: u64, to: u64) -> Cursor {
        let batch = u128::from(at.batch) * u128::from(from) / u128::from(to.max(1));
        Cursor { batch: u64::try_from(batch).unwrap_or(u64::MAX), ..at }
    }

    /// Samples that each epoch leaves out because they fill no batch.
    fn dropped(&self, rank: Rank) -> usize {
        let _ = rank;
        0
    }
}

/// The numbers below `len`, shuffled (Fisher and Yates) where there is something to draw from.
pub(crate) fn shuffled(len: usize, random: Option<Philox>) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    if let Some(mut random) = random {
        for i in (1..len).rev() {
            order.swap(i, (random.next_f64() * (i + 1) as f64) as usize);
        }
    }
    order
}

/// Each epoch has every sample once, shuffled anew or in the source's order. All batches are of one size: an epoch's last
/// one goes on into the next epoch, or is left out.
#[derive(Debug)]
pub struct EpochSampler {
    len: u64,
    batch_size: u64,
    seed: Option<u64>,
    drop_last: bool,
    /// Orders of the newest epochs that were asked for: making one takes as long as the data is large.
    orders: Mutex<Vec<(u64, Arc<[usize]>)>>,
}

impl EpochSampler {
    /// A sampler over `len` samples. Each epoch's order follows from `seed`; without one it is the source's. With `drop_last`
    /// the samples that fill no batch at an epoch's end are left out.
    pub fn new(len: usize, batch_size: usize, seed: Option<u64>, drop_last: bool) -> Self {
        let orders = Mutex::default();
        Self { len: len as u64, batch_size: batch_size as u64, seed, drop_last, orders }
    }

    /// Samples that all ranks take at a cursor.
    fn stride(&self, rank: Rank) -> u128 {
        u128::from(self.batch_size) * u128::from(rank.count)
    }

    /// The numbers of an epoch's batches, counted from the first epoch on: each counts where it begins.
    fn batches(&self, epoch: u64, rank: Rank) -> Range<u128> {
        let (epoch, len, stride) = (u128::from(epoch), u128::from(self.len), self.stride(rank));
        if self.drop_last {
            let each = len / stride;
            epoch * each..(epoch + 1) * each
        } else {
            (epoch * len).div_ceil(stride)..((epoch + 1) * len).div_ceil(stride)
        }
    }

    /// An epoch's order.
    fn order(&self, epoch: u64) -> Arc<[usize]> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, order)) = orders.iter().find(|(of, _)| *of == epoch) {
            return order.clone();
        }
        let order = shuffled(self.len as usize, self.seed.map(|seed| Philox::new(seed).fork(epoch)));
        let order: Arc<[usize]> = order.into();
        // A batch may reach into the next epoch.
        if orders.len() == 2 {
            orders.remove(0);
        }
        orders.push((epoch, order.clone()));
        order
    }
}

impl Sampler for EpochSampler {
    fn plan(&self, at: Cursor, rank: Rank) -> Option<BatchPlan> {
        if self.len == 0 || self.batch_size == 0 || (self.drop_last && u128::from(self.len) < self.stride(rank)) {
            return None;
        }
        let mut at = at;
        let mut batches = self.batches(at.epoch, rank);
        while u128::from(at.batch) >= batches.end - batches.start {
            at = Cursor { epoch: at.epoch.checked_add(1)?, batch: 0 };
            batches = self.batches(at.epoch, rank);
        }
        let len = u128::from(self.len);
        let begin = if self.drop_last {
            u128::from(at.epoch) * len + u128::from(at.batch) * self.stride(rank)
        } else {
            (batches.start + u128::from(at.batch)) * self.stride(rank)
        };
        let first = begin + u128::from(rank.index) * u128::from(self.batch_size);
        let picks = (first..first + u128::from(self.batch_size)).map(|place| {
            let order = self.order((place / len) as u64);
            Pick { index: order[(place % len) as usize], place: place as u64 }
        });
        Some(BatchPlan { picks: picks.collect(), next: Cursor { batch: at.batch + 1, ..at } })
    }

    fn recount(&self, at: Cursor, from: u64, to: u64) -> Cursor {
        let [from, to] = [from, to].map(|count| Rank { index: 0, count: count.max(1) });
        if from == to || self.len == 0 || self.batch_size == 0 {
            return at;
        }
        if self.drop_last {
            let batch = u128::from(at.batch) * self.stride(from) / self.stride(to);
            return Cursor { batch: u64::try_from(batch).unwrap_or(u64::MAX), ..at };
        }
        // Where it stands in the sequence of all samples, and in which epoch that batch begins.
        let batches = (self.batches(at.epoch, from).start + u128::from(at.batch)) * self.stride(from) / self.stride(to);
        let epoch = u64::try_from(batches * self.stride(to) / u128::from(self.len)).unwrap_or(u64::MAX);
        let batch = u64::try_from(batches - self.batches(epoch, to).start).unwrap_or(u64::MAX);
        Cursor { epoch, batch }
    }

    fn dropped(&self, rank: Rank) -> usize {
        if self.drop_last { (u128::from(self.len) % self.stride(rank).max(1)) as usize } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plans(sampler: &EpochSampler, from: Cursor, rank: Rank, n: usize) -> Vec<BatchPlan> {
        let mut at = from;
        let plan = |_| {
            let plan = sampler.plan(at, rank).unwrap();
            at = plan.next;
            plan
        };
        (0..n).map(plan).collect()
    }

    fn indices(plans: &[BatchPlan]) -> Vec<usize> {
        plans.iter().flat_map(|plan| plan.picks.iter().map(|p| p.index)).collect()
    }

    #[test]
    fn an_epoch_has_every_sample_once_and_the_next_another_order() {
        for len in [1, 5, 12, 97] {
            let sampler = EpochSampler::new(len, 1, Some(3), false);
            let all = indices(&plans(&sampler, Cursor::default(), Rank::ALONE, 2 * len));
            let (first, second) = all.split_at(len);
            for epoch in [first, second] {
                let mut sorted = epoch.to_vec();
                sorted.sort_unstable();
                assert!(sorted.into_iter().eq(0..len));
            }
            assert!(len < 5 || first != second);
        }
        let plain = EpochSampler::new(3, 2, None, false);
        assert_eq!(indices(&plans(&plain, Cursor::default(), Rank::ALONE, 3)), [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn batches_go_on_over_the_end_of_an_epoch_or_are_left_out() {
        for (len, size) in [(10, 4), (10, 5), (3, 7), (4, 4), (1, 3)] {
            let one = EpochSampler::new(len, 1, Some(1), false);
            let sampler = EpochSampler::new(len, size, Some(1), false);
            let several = plans(&sampler, Cursor::default(), Rank::ALONE, 12);
            // The sequence does not depend on how it is cut.
            assert_eq!(indices(&several), indices(&plans(&one, Cursor::default(), Rank::ALONE, 12 * size)));
            assert!(several.iter().flat_map(|p| &p.picks).map(|p| p.place).eq(0..12 * size as u64));
            // A batch counts in the epoch in which it begins.
            let epochs = several.iter().map(|plan| plan.next.epoch);
            assert!(epochs.eq((0..12).map(|i| (i * size / len) as u64)), "{len} {size}");
        }
        let dropping = EpochSampler::new(10, 4, None, true);
        let plans = plans(&dropping, Cursor::default(), Rank::ALONE, 4);
        assert_eq!(indices(&plans), [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(plans[2].picks[0].place, 10);
        assert_eq!((dropping.dropped(Rank::ALONE), EpochSampler::new(10, 4, None, false).dropped(Rank::ALONE)), (2, 0));
        assert_eq!(
            plans.iter().map(|p| (p.next.epoch, p.next.batch)).collect::<Vec<_>>(),
            [(0, 1), (0, 2), (1, 1), (1, 2)]
        );
    }

    #[test]
    fn any_cursor_gives_its_batch_whatever_was_asked_before() {
        for drop_last in [false, true] {
            let new = || EpochSampler::new(11, 3, Some(5), drop_last);
            let sampler = new();
            let all = plans(&sampler, Cursor::default(), Rank::ALONE, 20);
            for i in [13, 2, 19, 7] {
                assert_eq!(new().plan(all[i - 1].next, Rank::ALONE), Some(all[i].clone()));
                assert_eq!(sampler.plan(all[i - 1].next, Rank::ALONE), Some(all[i].clone()));
            }
        }
    }

    #[test]
    fn ranks_take_turns_in_the_sequence_of_one() {
        for drop_last in [false, true] {
            let sampler = EpochSampler::new(12, 2, Some(9), drop_last);
            let alone = plans(&sampler, Cursor::default(), Rank::ALONE, 12);
            for count in [2, 3] {
                for index in 0..count {
                    let part = plans(&sampler, Cursor::default(), Rank { index, count }, 12 / count as usize);
                    let theirs = alone.iter().skip(index as usize).step_by(count as usize);
                    assert!(part.iter().map(|p| &p.picks).eq(theirs.map(|p| &p.picks)), "{index} of {count}");
                }
            }
        }
    }

    #[test]
    fn other_ranks_go_on_where_these_stand() {
        for drop_last in [false, true] {
            let sampler = EpochSampler::new(24, 2, Some(9), drop_last);
            let alone = plans(&sampler, Cursor::default(), Rank::ALONE, 36);
            let places = |plan: &BatchPlan| plan.picks.clone();
            for (from, to) in [(1, 2), (2, 4), (4, 1), (1, 4), (4, 2), (2, 1), (3, 3)] {
                let own = plans(&sampler, Cursor::default(), Rank { index: 0, count: from }, 36 / from as usize);
                for (i, plan) in
                    own.iter().enumerate().filter(|(i, _)| ((i + 1) * from as usize).is_multiple_of(to as usize))
                {
                    let at = sampler.recount(plan.next, from, to);
                    let next = sampler.plan(at, Rank { index: 0, count: to }).unwrap();
                    let expected = alone.get((i + 1) * from as usize);
                    assert!(expected.is_none_or(|plan| places(plan) == next.picks), "{i} from {from} to {to}");
                }
            }
        }
    }

    #[test]
    fn no_batch_at_all_is_none_and_far_cursors_are_no_trouble() {
        let none = [
            EpochSampler::new(0, 2, None, false),
            EpochSampler::new(3, 4, None, true),
            EpochSampler::new(3, 0, None, false),
        ];
        assert!(none.iter().all(|s| s.plan(Cursor::default(), Rank::ALONE).is_none()));
        let far = Cursor { epoch: u64::MAX, batch: 0 };
        assert!(EpochSampler::new(7, 2, Some(1), true).plan(far, Rank::ALONE).is_some());
        assert!(EpochSampler::new(7, 2, Some(1), true).plan(Cursor { batch: u64::MAX, ..far }, Rank::ALONE).is_none());
        assert!(
            EpochSampler::new(7, 2, Some(1), false).plan(Cursor { epoch: 3, batch: u64::MAX }, Rank::ALONE).is_some()
        );
    }
}
