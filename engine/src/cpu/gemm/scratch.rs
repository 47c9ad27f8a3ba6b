//! Working memory of the kernels, kept per thread: fresh pages cost more than the work on them.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ptr::NonNull;

const ALIGN: usize = 64;
/// Buffers that one thread keeps.
const KEPT: usize = 12;

thread_local! {
    static POOL: RefCell<Vec<Block>> = const { RefCell::new(Vec::new()) };
}

/// One 64-byte aligned allocation of `len` floats, always initialised.
struct Block {
    ptr: NonNull<f32>,
    len: usize,
}

impl Block {
    fn new(len: usize) -> Self {
        let len = len.max(1024).next_power_of_two();
        let layout = Self::layout(len);
        // SAFETY: the layout has at least 4 KiB.
        let ptr = unsafe { alloc_zeroed(layout) };
        match NonNull::new(ptr.cast()) {
            Some(ptr) => Self { ptr, len },
            None => handle_alloc_error(layout),
        }
    }

    fn layout(len: usize) -> Layout {
        // An impossible size becomes one that the allocator refuses.
        Layout::from_size_align(len.saturating_mul(4), ALIGN).unwrap_or(Layout::new::<[u64; 8]>())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout.
        unsafe { dealloc(self.ptr.as_ptr().cast(), Self::layout(self.len)) }
    }
}

/// A buffer lent by the thread's pool; it goes back when dropped.
///
/// Taken out rather than borrowed in place, because a thread that waits inside rayon may run another task.
pub(crate) struct Scratch(Option<Block>);

impl Scratch {
    /// At least `len` floats with any finite or non-finite old values.
    pub fn take(len: usize) -> Self {
        let kept = POOL.try_with(|pool| {
            let mut pool = pool.try_borrow_mut().ok()?;
            let best = (0..pool.len()).filter(|&i| pool[i].len >= len).min_by_key(|&i| pool[i].len)?;
            Some(pool.swap_remove(best))
        });
        Self(Some(kept.ok().flatten().unwrap_or_else(|| Block::new(len))))
    }

    /// The first float; 64-byte aligned.
    pub fn ptr(&self) -> *mut f32 {
        self.0.as_ref().map_or(std::ptr::null_mut(), |b| b.ptr.as_ptr())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let Some(block) = self.0.take() else { return };
        let _ = POOL.try_with(|pool| {
            if let Ok(mut pool) = pool.try_borrow_mut() {
                pool.push(block);
                if pool.len() > KEPT
                    && let Some(least) = (0..pool.len()).min_by_key(|&i| pool[i].len)
                {
                    pool.swap_remove(least);
                }
            }
        });
    }
}
