//! Memory of tensors: aligned, and kept for reuse, since a training step asks for the same sizes again and again.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::Buffer;
use crate::{Error, Result};

/// A cache line, and the width of the widest vector.
const ALIGN: usize = 64;
/// What may be kept beyond the size of the memory in use.
const SPARE: usize = 256 << 20;

#[derive(Debug, Default)]
struct Free {
    by_size: HashMap<usize, Vec<Block>>,
    free: usize,
    used: usize,
}

/// Freed memory by size class.
#[derive(Clone, Debug, Default)]
pub(super) struct Pool(Arc<Mutex<Free>>);

#[derive(Debug)]
struct Block {
    ptr: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a block owns its memory; access is through raw pointers under the kernels' own promises.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) };
    }
}

/// Memory of one storage. It is always initialised: new pages are zero, reused ones hold old values.
#[derive(Debug)]
pub(super) struct CpuBuffer {
    /// `None` only while it is dropped.
    block: Option<Block>,
    pool: Pool,
}

impl Buffer for CpuBuffer {}

/// What a block of `bytes` bytes takes: eight classes an octave, so at most an eighth is wasted.
pub(crate) fn class(bytes: usize) -> Option<usize> {
    let bytes = bytes.max(ALIGN);
    let step = (bytes.checked_next_power_of_two()? / 16).max(ALIGN);
    bytes.checked_next_multiple_of(step)
}

impl Pool {
    pub fn alloc(&self, bytes: usize) -> Result<CpuBuffer> {
        let failed =
            || Error::argument("alloc", "memory for a tensor (lower the batch size or the model's size)", bytes);
        let size = class(bytes).ok_or_else(failed)?;
        let reused = {
            let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            pool.used += size;
            let block = pool.by_size.get_mut(&size).and_then(Vec::pop);
            pool.free -= if block.is_some() { size } else { 0 };
            block
        };
        let block = match reused {
            Some(block) => block,
            None => {
                let layout = Layout::from_size_align(size, ALIGN).map_err(|_| failed())?;
                // SAFETY: the size is not zero.
                let ptr = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(failed)?;
                Block { ptr, layout }
            }
        };
        Ok(CpuBuffer { block: Some(block), pool: self.clone() })
    }
}

impl CpuBuffer {
    pub fn as_ptr(&self) -> *mut u8 {
        self.block.as_ref().map_or(std::ptr::null_mut(), |b| b.ptr.as_ptr())
    }

    pub fn len(&self) -> usize {
        self.block.as_ref().map_or(0, |b| b.layout.size())
    }
}

impl Drop for CpuBuffer {
    fn drop(&mut self) {
        let Some(block) = self.block.take() else { return };
        let size = block.layout.size();
        let mut pool = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        pool.used -= size;
        if pool.free + size <= pool.used + SPARE {
            pool.free += size;
            pool.by_size.entry(size).or_default().push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_reused_and_aligned() -> Result<()> {
        let pool = Pool::default();
        let first = pool.alloc(1000)?;
        let address = first.as_ptr() as usize;
        assert!(address.is_multiple_of(ALIGN) && first.len() >= 1000);
        drop(first);
        assert_eq!(pool.alloc(1001)?.as_ptr() as usize, address);
        Ok(())
    }

    #[test]
    fn too_much_is_an_error() {
        assert!(Pool::default().alloc(usize::MAX / 2).is_err());
    }

    #[test]
    fn classes_waste_at_most_an_eighth() {
        for bytes in [64usize, 65, 1000, 4097, 1 << 20, (1 << 20) + 1] {
            let size = class(bytes).unwrap();
            assert!(size >= bytes && size <= bytes + bytes / 8 + ALIGN);
        }
    }
}
