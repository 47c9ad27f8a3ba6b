//! Freed memory of a device, kept for reuse: a training step asks for the same sizes again and again.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Result;

/// The smallest block, and what all sizes are a multiple of.
const UNIT: usize = 256;

/// Where blocks come from.
pub trait Raw: Debug + Send + Sync {
    /// A handle of a block, such as a device address.
    type Block: Clone + Debug + Send + Sync;
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
    pub used: usize,
    /// Kept for reuse.
    pub kept: usize,
    /// The most that was in use.
    pub peak: usize,
}

#[derive(Debug)]
struct Inner<R: Raw> {
    raw: R,
    /// What may be kept beyond the size of the memory in use.
    spare: usize,
    free: Mutex<Free<R::Block>>,
}

#[derive(Debug)]
struct Free<B> {
    by_size: HashMap<usize, Vec<B>>,
    usage: PoolUsage,
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

/// Eight classes an octave: at most an eighth is wasted. `None` past the end of numbers.
fn class(bytes: usize) -> Option<usize> {
    let bytes = bytes.max(UNIT);
    let step = (bytes.checked_next_power_of_two()? / 16).max(UNIT);
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
        kept.into_values().flatten().for_each(|block| self.raw.free(block));
    }
}

impl<R: Raw> Drop for Inner<R> {
    fn drop(&mut self) {
        self.trim();
    }
}

impl<R: Raw> Pool<R> {
    /// An empty pool that keeps at most `spare` bytes more than are in use.
    pub fn new(raw: R, spare: usize) -> Self {
        let free = Free { by_size: HashMap::new(), usage: PoolUsage::default() };
        Self(Arc::new(Inner { raw, spare, free: Mutex::new(free) }))
    }

    /// A block of at least `bytes` bytes. When the device has none, what is kept is given back and it is asked again.
    ///
    /// # Errors
    /// What the device says then.
    pub fn alloc(&self, bytes: usize) -> Result<Pooled<R>> {
        let size = class(bytes).unwrap_or(usize::MAX);
        let reused = {
            let mut free = self.0.lock();
            let block = free.by_size.get_mut(&size).and_then(Vec::pop);
            free.usage.kept -= if block.is_some() { size } else { 0 };
            block
        };
        let block = match reused {
            Some(block) => block,
            None => self.0.raw.alloc(size).or_else(|_| {
                self.trim();
                self.0.raw.alloc(size)
            })?,
        };
        let usage = &mut self.0.lock().usage;
        usage.used += size;
        usage.peak = usage.peak.max(usage.used);
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

    /// Its size, which may be more than was asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl<R: Raw> Drop for Pooled<R> {
    fn drop(&mut self) {
        let Inner { raw, spare, .. } = &*self.pool.0;
        let mut free = self.pool.0.lock();
        free.usage.used -= self.bytes;
        if free.usage.kept + self.bytes <= free.usage.used + spare {
            free.usage.kept += self.bytes;
            free.by_size.entry(self.bytes).or_default().push(self.block.clone());
        } else {
            drop(free);
            raw.free(self.block.clone());
        }
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
        assert_eq!(pool.usage(), PoolUsage { used: 0, kept: 1024, peak: 1024 });
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
    fn no_more_than_the_spare_is_kept() -> Result<()> {
        let pool = Counter::pool(100_000, 1024);
        let (a, b) = (pool.alloc(1024)?, pool.alloc(2048)?);
        drop(b);
        assert_eq!(pool.usage(), PoolUsage { used: 1024, kept: 2048, peak: 3072 });
        drop(a);
        assert_eq!(pool.usage().kept, 2048);
        pool.trim();
        assert!(pool.raw().state.lock().unwrap().1.is_empty());
        Ok(())
    }

    #[test]
    fn classes_waste_at_most_an_eighth() {
        for bytes in [1usize, 257, 1000, 4097, 1 << 20, (1 << 20) + 1] {
            let size = class(bytes).unwrap();
            assert!(size >= bytes && size <= bytes + bytes / 8 + UNIT);
        }
    }
}
