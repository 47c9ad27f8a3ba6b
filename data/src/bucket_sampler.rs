//! Batches of samples of one resolution: NeMo's `SequentialBucketSampler`.

use std::sync::{Arc, Mutex, PoisonError};

use flowtape_engine::Philox;

use crate::bucket::{Resolution, dynamic_batch_size};
use crate::sampler::shuffled;
use crate::{BatchPlan, Cursor, Pick, Rank, Result, Sampler, Source};

/// Samples of one size.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bucket {
    /// Of their pictures or frames.
    pub resolution: Resolution,
    /// Their numbers in the source.
    pub indices: Vec<usize>,
}

/// How batches are made of buckets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BucketOptions {
    /// Samples of a batch.
    pub batch_size: usize,
    /// Where one is given, `batch_size` is for it, and batches of other resolutions have about as many pixels.
    pub base_resolution: Option<Resolution>,
    /// Each epoch's order of buckets, and of the samples in each, follows from it; without one they are as given.
    pub seed: Option<u64>,
    /// Whether samples that fill no batch at a bucket's end are left out; else the batch is smaller.
    pub drop_last: bool,
}

impl BucketOptions {
    /// Batches of one size, in the order as given.
    pub fn of_size(batch_size: usize) -> Self {
        Self { batch_size, base_resolution: None, seed: None, drop_last: false }
    }
}

/// Of an epoch and a bucket: its samples.
type Order = (u64, usize, Arc<[usize]>);

/// Each epoch goes through the buckets one by one. Ranks take turns in a bucket's samples; where they do not share out, some are
/// taken again, so that all ranks have as many batches.
#[derive(Debug)]
pub struct BucketSampler {
    /// The smallest resolution first.
    buckets: Vec<Bucket>,
    options: BucketOptions,
    /// The newest orders of a bucket that were asked for, by epoch and bucket.
    orders: Mutex<Vec<Order>>,
}

impl BucketSampler {
    /// A sampler over these buckets; empty ones are passed over.
    pub fn new(mut buckets: Vec<Bucket>, options: BucketOptions) -> Self {
        buckets.retain(|bucket| !bucket.indices.is_empty());
        buckets.sort_by_key(|bucket| bucket.resolution.pixels());
        Self { buckets, options, orders: Mutex::default() }
    }

    /// The buckets of a source: its samples by the sizes that their headers state.
    ///
    /// # Errors
    /// When a header can't be read.
    pub fn buckets_of(source: &dyn Source) -> Result<Vec<Bucket>> {
        let mut found: Vec<(Vec<usize>, Bucket)> = Vec::new();
        let mut places = std::collections::HashMap::new();
        for index in 0..source.len() {
            let dims = source.header(index)?.dims;
            let place = *places.entry(dims.clone()).or_insert(found.len());
            if place == found.len() {
                let side = |from_end: usize| dims.iter().rev().nth(from_end).copied().unwrap_or(1);
                let resolution = Resolution { width: side(0), height: side(1) };
                found.push((dims, Bucket { resolution, indices: Vec::new() }));
            }
            found[place].1.indices.push(index);
        }
        Ok(found.into_iter().map(|(_, bucket)| bucket).collect())
    }

    /// The buckets, the smallest resolution first.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Samples of a batch of this bucket.
    pub fn batch_size(&self, bucket: &Bucket) -> usize {
        let size = self.options.batch_size;
        self.options.base_resolution.map_or(size, |base| dynamic_batch_size(size, base, bucket.resolution))
    }

    /// Batches that a rank gets of a bucket in an epoch.
    pub fn batches(&self, bucket: &Bucket, rank: Rank) -> usize {
        let (each, size) = (bucket.indices.len().div_ceil(rank.count.max(1) as usize), self.batch_size(bucket));
        match size {
            0 => 0,
            size if self.options.drop_last => each / size,
            size => each.div_ceil(size),
        }
    }

    /// Samples of a bucket that an epoch leaves out.
    pub fn dropped_of(&self, bucket: &Bucket, rank: Rank) -> usize {
        let taken = self.batches(bucket, rank) * self.batch_size(bucket) * rank.count.max(1) as usize;
        if self.options.drop_last { bucket.indices.len().saturating_sub(taken) } else { 0 }
    }

    /// The stream of an epoch's order of buckets, and forks of it for each bucket.
    fn random(&self, epoch: u64) -> Option<Philox> {
        self.options.seed.map(|seed| Philox::new(seed).fork(epoch))
    }

    fn bucket_order(&self, epoch: u64) -> Vec<usize> {
        shuffled(self.buckets.len(), self.random(epoch))
    }

    /// The order of a bucket's samples in an epoch.
    fn order(&self, epoch: u64, number: usize) -> Arc<[usize]> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((.., order)) = orders.iter().find(|(e, n, _)| (*e, *n) == (epoch, number)) {
            return order.clone();
        }
        let random = self.random(epoch).map(|random| random.fork(1 + number as u64));
        let indices = &self.buckets[number].indices;
        let order: Arc<[usize]> = shuffled(indices.len(), random).into_iter().map(|i| indices[i]).collect();
        if orders.len() == 2 {
            orders.remove(0);
        }
        orders.push((epoch, number, order.clone()));
        order
    }
}

impl Sampler for BucketSampler {
    fn plan(&self, at: Cursor, rank: Rank) -> Option<BatchPlan> {
        let each = self.buckets.iter().map(|bucket| self.batches(bucket, rank));
        let total: u64 = each.sum::<usize>() as u64;
        if total == 0 {
            return None;
        }
        let at = if at.batch < total { at } else { Cursor { epoch: at.epoch.checked_add(1)?, batch: 0 } };
        // Places of earlier epochs: all padded samples of all buckets.
        let padded = |bucket: &Bucket| bucket.indices.len().next_multiple_of(rank.count.max(1) as usize) as u64;
        let mut place = at.epoch.wrapping_mul(self.buckets.iter().map(padded).sum::<u64>());
        let mut batch = at.batch as usize;
        for number in self.bucket_order(at.epoch) {
            let bucket = &self.buckets[number];
            let (batches, size) = (self.batches(bucket, rank), self.batch_size(bucket));
            if batch >= batches {
                batch -= batches;
                place = place.wrapping_add(padded(bucket));
                continue;
            }
            let order = self.order(at.epoch, number);
            let end = ((batch + 1) * size).min(order.len().div_ceil(rank.count as usize));
            let picks = (batch * size..end).map(|i| {
                let turn = i * rank.count as usize + rank.index as usize;
                Pick { index: order[turn % order.len()], place: place.wrapping_add(turn as u64) }
            });
            return Some(BatchPlan { picks: picks.collect(), next: Cursor { batch: at.batch + 1, ..at } });
        }
        None
    }

    fn dropped(&self, rank: Rank) -> usize {
        self.buckets.iter().map(|bucket| self.dropped_of(bucket, rank)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buckets() -> Vec<Bucket> {
        let bucket = |side, indices: std::ops::Range<usize>| Bucket {
            resolution: Resolution::new(side, side),
            indices: indices.collect(),
        };
        vec![bucket(128, 0..11), bucket(64, 11..16), bucket(256, 16..16), bucket(256, 16..29)]
    }

    fn epoch(sampler: &BucketSampler, epoch: u64, rank: Rank) -> Vec<BatchPlan> {
        let mut at = Cursor { epoch, batch: 0 };
        let plan = |_| {
            let plan = sampler.plan(at, rank)?;
            at = plan.next;
            Some(plan)
        };
        (0..sampler.buckets.iter().map(|b| sampler.batches(b, rank)).sum()).map_while(plan).collect()
    }

    #[test]
    fn an_epoch_has_every_sample_once_in_batches_of_one_bucket() {
        let options = BucketOptions { batch_size: 3, base_resolution: None, seed: Some(1), drop_last: false };
        let sampler = BucketSampler::new(buckets(), options);
        let orders: Vec<Vec<usize>> = (0..3)
            .map(|number| {
                let plans = epoch(&sampler, number, Rank::ALONE);
                let all: Vec<usize> = plans.iter().flat_map(|p| p.picks.iter().map(|p| p.index)).collect();
                let mut sorted = all.clone();
                sorted.sort_unstable();
                assert!(sorted.into_iter().eq(0..29));
                let bucket = |index: usize| sampler.buckets.iter().position(|b| b.indices.contains(&index));
                for plan in &plans {
                    assert!(plan.picks.iter().all(|p| bucket(p.index) == bucket(plan.picks[0].index)));
                }
                all
            })
            .collect();
        assert!(orders[0] != orders[1] && orders[1] != orders[2]);
    }

    #[test]
    fn any_cursor_gives_its_batch_and_no_place_comes_twice() {
        for (count, drop_last) in [(1, false), (2, true), (3, false)] {
            let options = BucketOptions { batch_size: 2, base_resolution: None, seed: Some(7), drop_last };
            let sampler = BucketSampler::new(buckets(), options);
            let mut places = std::collections::HashSet::new();
            for index in 0..count {
                let rank = Rank { index, count };
                let plans: Vec<BatchPlan> = (0..3).flat_map(|e| epoch(&sampler, e, rank)).collect();
                assert!(plans.iter().flat_map(|p| &p.picks).all(|pick| places.insert(pick.place)));
                for i in [5, 2, 9] {
                    let fresh = BucketSampler::new(buckets(), options);
                    assert_eq!(fresh.plan(plans[i - 1].next, rank).as_ref(), Some(&plans[i]));
                }
            }
        }
    }
}
