//! Freed memory of a device, kept for reuse: a training step asks for the same sizes again and again.

use std::collections::{HashMap, VecDeque};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Result;

/// Where blocks come from.
pub trait Raw: Debug + Send + Sync {
    /// A handle of a block, such as a device address.
    type Block: Clone + Debug + Send + Sync;
    /// The smallest block, and what all sizes are a multiple of.
    const UNIT: usize = 256;
    /// A new block of `bytes` bytes.
    ///
    /// # Errors
    /// When the device has no such block.
    fn alloc(&self, bytes: usize) -> Result<Self::Block>;
    /// Gives a block back, once.
    fn free(&self, block: Self::Block);
}

/// Bytes of a pool, by what they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PoolUsage {
    /// In use by tensors.
    pub used: u64,
    /// Kept for reuse.
    pub kept: u64,
    /// The most that was in use.
    pub peak: u64,
    /// Blocks that were asked of the device, because none of their size was kept.
    pub misses: u64,
}

#[derive(Debug)]
struct Inner<R: Raw> {
    raw: R,
    /// What may be held beyond the most that was ever in use.
    spare: usize,
    free: Mutex<Free<R::Block>>,
}

#[derive(Debug)]
struct Free<B> {
    /// By size, oldest first, with the time when each was freed.
    by_size: HashMap<usize, VecDeque<(u64, B)>>,
    usage: PoolUsage,
    /// Counts what is freed.
    time: u64,
}

impl<B> Free<B> {
    fn take(&mut self, size: usize) -> Option<B> {
        let (_, block) = self.by_size.get_mut(&size)?.pop_back()?;
        self.usage.kept -= size as u64;
        Some(block)
    }

    fn put(&mut self, size: usize, block: B) {
        self.time += 1;
        self.usage.kept += size as u64;
        self.by_size.entry(size).or_default().push_back((self.time, block));
    }

    /// Takes what was not used for the longest time.
    fn take_oldest(&mut self) -> Option<B> {
        let first = self.by_size.iter().filter_map(|(&size, blocks)| Some((blocks.front()?.0, size)));
        let (_, size) = first.min()?;
        let (_, block) = self.by_size.get_mut(&size)?.pop_front()?;
        self.usage.kept -= size as u64;
        Some(block)
    }
}

/// Blocks by size class. Clones share them.
#[derive(Debug)]
pub struct Pool<R: Raw>(Arc<Inner<R>>);

impl<R: Raw> Clone for Pool<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// A block that goes back to its pool when it is dropped. It holds what its last owner left in it.
#[derive(Debug)]
pub struct Pooled<R: Raw> {
    block: R::Block,
    bytes: usize,
    pool: Pool<R>,
}

/// What a block of `bytes` bytes takes, in multiples of `unit`: eight classes an octave, so at most an eighth is wasted.
/// `None` past the end of numbers.
pub(crate) fn class(bytes: usize, unit: usize) -> Option<usize> {
    let bytes = bytes.max(unit);
    let step = (bytes.checked_next_power_of_two()? / 16).max(unit);
    bytes.checked_next_multiple_of(step)
}

impl<R: Raw> Inner<R> {
    fn lock(&self) -> MutexGuard<'_, Free<R::Block>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn trim(&self) {
        let kept = {
            let mut free = self.lock();
            free.usage.kept = 0;
            std::mem::take(&mut free.by_size)
        };
        kept.into_values().flatten().for_each(|(_, block)| self.raw.free(block));
    }
}

impl<R: Raw> Drop for Inner<R> {
    fn drop(&mut self) {
        self.trim();
    }
}

impl<R: Raw> Pool<R> {
    /// An empty pool. It holds at most `spare` bytes more than were ever in use at once; beyond that it gives back what was
    /// not used for the longest time.
    pub fn new(raw: R, spare: usize) -> Self {
        let free = Free { by_size: HashMap::new(), usage: PoolUsage::default(), time: 0 };
        Self(Arc::new(Inner { raw, spare, free: Mutex::new(free) }))
    }

    /// A block of at least `bytes` bytes. When the device has none, what is kept is given back and it is asked again.
    ///
    /// # Errors
    /// What the device says then.
    pub fn alloc(&self, bytes: usize) -> Result<Pooled<R>> {
        let size = class(bytes, R::UNIT).unwrap_or(usize::MAX);
        let mut free = self.0.lock();
        let block = match free.take(size) {
            Some(block) => block,
            None => {
                drop(free);
                let block = self.0.raw.alloc(size).or_else(|_| {
                    self.trim();
                    self.0.raw.alloc(size)
                })?;
                free = self.0.lock();
                free.usage.misses += 1;
                block
            }
        };
        let usage = &mut free.usage;
        usage.used += size as u64;
        usage.peak = usage.peak.max(usage.used);
        drop(free);
        Ok(Pooled { block, bytes: size, pool: self.clone() })
    }

    /// Gives all kept blocks back to the device.
    pub fn trim(&self) {
        self.0.trim();
    }

    /// What is in use and what is kept.
    pub fn usage(&self) -> PoolUsage {
        self.0.lock().usage
    }

    /// Where the blocks come from.
    pub fn raw(&self) -> &R {
        &self.0.raw
    }
}

impl<R: Raw> Pooled<R> {
    /// The block.
    pub fn block(&self) -> &R::Block {
        &self.block
    }

    /// Where its pool's blocks come from.
    pub fn raw(&self) -> &R {
        self.pool.raw()
    }

    /// Its size, which may be more than was asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl<R: Raw> Drop for Pooled<R> {
    fn drop(&mut self) {
        let Inner { raw, spare, .. } = &*self.pool.0;
        let mut free = self.pool.0.lock();
        free.usage.used -= self.bytes as u64;
        free.put(self.bytes, self.block.clone());
        let mut given_back = Vec::new();
        while free.usage.used + free.usage.kept > free.usage.peak.saturating_add(*spare as u64) {
            given_back.extend(free.take_oldest());
        }
        drop(free);
        given_back.into_iter().for_each(|block| raw.free(block));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    /// Hands out numbers while there is room.
    #[derive(Debug)]
    struct Counter {
        room: usize,
        state: Mutex<(usize, HashMap<usize, usize>)>,
    }

    impl Counter {
        fn pool(room: usize, spare: usize) -> Pool<Self> {
            Pool::new(Self { room, state: Mutex::default() }, spare)
        }
    }

    impl Raw for Counter {
        type Block = usize;

        fn alloc(&self, bytes: usize) -> Result<usize> {
            let (next, live) = &mut *self.state.lock().unwrap();
            if bytes > self.room - live.values().sum::<usize>() {
                return Err(Error::argument("alloc", "room", bytes));
            }
            *next += 1;
            live.insert(*next, bytes);
            Ok(*next)
        }

        fn free(&self, block: usize) {
            assert!(self.state.lock().unwrap().1.remove(&block).is_some());
        }
    }

    #[test]
    fn blocks_are_reused_by_class() -> Result<()> {
        let pool = Counter::pool(10_000, 10_000);
        let first = pool.alloc(1000)?;
        let id = *first.block();
        assert!(first.bytes() >= 1000);
        drop(first);
        assert_eq!(pool.usage(), PoolUsage { used: 0, kept: 1024, peak: 1024, misses: 1 });
        assert_eq!(*pool.alloc(1001)?.block(), id);
        assert_ne!(*pool.alloc(2000)?.block(), id);
        Ok(())
    }

    #[test]
    fn kept_blocks_are_given_back_when_there_is_no_room() -> Result<()> {
        let pool = Counter::pool(4096, 100_000);
        drop(pool.alloc(3000)?);
        let big = pool.alloc(4000)?;
        assert_eq!((big.bytes(), pool.usage().kept), (4096, 0));
        assert!(pool.alloc(1).is_err() && pool.alloc(usize::MAX).is_err());
        assert_eq!(pool.usage().used, 4096);
        Ok(())
    }

    #[test]
    fn no_more_than_the_spare_is_kept_beyond_the_peak_and_the_oldest_goes_first() -> Result<()> {
        let pool = Counter::pool(100_000, 1024);
        let old = pool.alloc(1024)?;
        let first = *old.block();
        drop((old, pool.alloc(2048)?));
        // Held are a peak of 3072 and no more than 1024 beyond it.
        assert_eq!(pool.usage(), PoolUsage { used: 0, kept: 3072, peak: 3072, misses: 2 });
        drop(pool.alloc(512)?);
        assert_eq!(pool.usage().kept, 3584);
        drop(pool.alloc(768)?);
        assert_eq!(pool.usage(), PoolUsage { used: 0, kept: 3328, peak: 3072, misses: 4 });
        assert!(!pool.raw().state.lock().unwrap().1.contains_key(&first));
        pool.trim();
        assert!(pool.raw().state.lock().unwrap().1.is_empty());
        Ok(())
    }

    #[test]
    fn classes_waste_at_most_an_eighth() {
        for (bytes, unit) in [1usize, 257, 1000, 4097, 1 << 20, (1 << 20) + 1].into_iter().zip([64, 256].repeat(3)) {
            let size = class(bytes, unit).unwrap();
            assert!(size >= bytes && size <= bytes + bytes / 8 + unit && size.is_multiple_of(unit));
        }
    }
}
