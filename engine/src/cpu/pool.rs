//! The host's memory as the blocks of a pool.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use crate::backend::Buffer;
use crate::pool::{Pool, Pooled, Raw};
use crate::{Error, Result};

/// A cache line, and the width of the widest vector.
pub(crate) const ALIGN: usize = 64;
/// What the pool may hold beyond the most that was in use.
const SPARE: usize = 256 << 20;

/// The system's allocator. Memory is always initialised: new pages are zero, reused ones hold old values.
#[derive(Debug)]
pub(super) struct Host;

/// A block of the host's memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    ptr: NonNull<u8>,
    layout: Layout,
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
        let layout = Layout::from_size_align(bytes, ALIGN).map_err(|_| failed("more than the address space"))?;
        // SAFETY: the pool asks for no block of size zero.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) });
        let ptr = ptr.ok_or_else(|| failed("the system has no such block left"))?;
        Ok(Block { ptr, layout })
    }

    fn free(&self, block: Block) {
        // SAFETY: allocated with this layout, and the pool gives each block back once.
        unsafe { dealloc(block.ptr.as_ptr(), block.layout) };
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
    Pool::new(Host, SPARE)
}

#[cfg(test)]
mod tests {
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
    fn too_much_is_an_error_that_says_so() {
        for bytes in [1 << 60, usize::MAX / 2, usize::MAX] {
            let error = pool().alloc(bytes).unwrap_err();
            assert!(matches!(&error, Error::OutOfMemory { device, .. } if device == "cpu"), "{error}");
        }
    }
}
