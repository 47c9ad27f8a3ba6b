//! The host's memory as the blocks of a pool.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::backend::Buffer;
use crate::pool::{Pool, Pooled, Raw};
use crate::{Error, Result};

/// A cache line, and the width of the widest vector.
pub(crate) const ALIGN: usize = 64;
/// What the pool may hold beyond the most that was in use.
const SPARE: usize = 256 << 20;
/// A block that the system may give pages of its own, and so the same place in a page as all others.
const LARGE: usize = 64 << 10;
const PAGE: usize = 4096;
/// How much further into its page each large block begins than the one before: an odd number of lines, so that all lines have their turn.
const STRIDE: usize = 17 * ALIGN;

/// The system's allocator. Memory is always initialised: new pages are zero, reused ones hold old values.
///
/// Large blocks begin at different places of their pages. A processor tells addresses apart by their place in a page first: where all
/// operands begin at the same one, reads wait for writes to other operands, and all share a few sets of the cache.
#[derive(Debug, Default)]
pub(super) struct Host {
    large: AtomicUsize,
}

/// A block of the host's memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    ptr: NonNull<u8>,
    /// What was asked of the system, and how far behind its beginning the block lies.
    layout: Layout,
    skipped: usize,
}

// SAFETY: a block is an address; access is through raw pointers under the kernels' own promises.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Raw for Host {
    type Block = Block;
    const UNIT: usize = ALIGN;

    fn alloc(&self, bytes: usize) -> Result<Block> {
        let failed = |reason: &str| Error::OutOfMemory { device: "cpu".into(), bytes, reason: reason.into() };
        let skipped = match bytes {
            LARGE.. => self.large.fetch_add(1, Ordering::Relaxed).wrapping_mul(STRIDE) % PAGE,
            _ => 0,
        };
        let layout = Layout::from_size_align(bytes.saturating_add(skipped), ALIGN);
        let layout = layout.map_err(|_| failed("more than the address space"))?;
        // SAFETY: the pool asks for no block of size zero.
        let whole = NonNull::new(unsafe { alloc_zeroed(layout) });
        let whole = whole.ok_or_else(|| failed("the system has no such block left"))?;
        // SAFETY: as much more was asked for.
        Ok(Block { ptr: unsafe { whole.add(skipped) }, layout, skipped })
    }

    fn free(&self, block: Block) {
        // SAFETY: allocated with this layout so far before the block, and the pool gives each block back once.
        unsafe { dealloc(block.ptr.sub(block.skipped).as_ptr(), block.layout) };
    }
}

/// Memory of one storage.
pub(super) type CpuBuffer = Pooled<Host>;

impl Buffer for CpuBuffer {}

impl CpuBuffer {
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.block().ptr.as_ptr()
    }
}

/// An empty pool.
pub(super) fn pool() -> Pool<Host> {
    Pool::new(Host::default(), SPARE)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn memory_is_reused_and_aligned() -> Result<()> {
        let pool = pool();
        let first = pool.alloc(1000)?;
        let address = first.as_ptr() as usize;
        assert!(address.is_multiple_of(ALIGN) && first.bytes() >= 1000);
        drop(first);
        assert_eq!(pool.alloc(1001)?.as_ptr() as usize, address);
        Ok(())
    }

    #[test]
    fn large_blocks_begin_at_different_places_of_their_pages() -> Result<()> {
        let pool = pool();
        let blocks = (0..PAGE / ALIGN).map(|_| pool.alloc(LARGE)).collect::<Result<Vec<_>>>()?;
        // The system gives a few of them places of another kind.
        let places: BTreeSet<usize> = blocks.iter().map(|block| block.as_ptr() as usize % PAGE).collect();
        assert!(
            places.len() > PAGE / ALIGN / 4 && places.iter().all(|place| place.is_multiple_of(ALIGN)),
            "{places:?}"
        );
        for block in &blocks {
            // SAFETY: the block is the test's own.
            unsafe { std::slice::from_raw_parts_mut(block.as_ptr(), LARGE) }.fill(1);
        }
        Ok(())
    }

    #[test]
    fn too_much_is_an_error_that_says_so() {
        for bytes in [1 << 60, usize::MAX / 2, usize::MAX] {
            let error = pool().alloc(bytes).unwrap_err();
            assert!(matches!(&error, Error::OutOfMemory { device, .. } if device == "cpu"), "{error}");
        }
    }
}
