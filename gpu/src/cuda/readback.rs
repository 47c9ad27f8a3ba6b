//! Values on their way to the host: the device writes them to pinned memory, the host waits when it asks for them.

use std::sync::{Arc, Mutex, PoisonError};

use cust::event::{Event, EventFlags};
use cust::sys;

use super::gpu::{Failure, Gpu, checked};

/// Bytes of a slot; more is waited for at once.
pub(super) const SLOT: usize = 4 << 10;
/// Behind the values: the word that says whether an index was past its table's end.
const FAULT: usize = 4;

/// Pinned memory for one read, and when it is there.
#[derive(Debug)]
pub(super) struct Slot {
    memory: *mut u8,
    there: Event,
}

// SAFETY: plain host memory, owned by whoever has the slot.
unsafe impl Send for Slot {}

/// The slots of a device that nobody uses.
#[derive(Debug)]
pub(super) struct Reader {
    gpu: Arc<Gpu>,
    free: Mutex<Vec<Slot>>,
}

impl Reader {
    pub fn new(gpu: Arc<Gpu>) -> Self {
        Self { gpu, free: Mutex::default() }
    }

    fn slot(&self) -> Result<Slot, Failure> {
        if let Some(slot) = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(slot);
        }
        let there = Event::new(EventFlags::DISABLE_TIMING)?;
        let mut memory = std::ptr::null_mut();
        // SAFETY: the address is written to a variable.
        checked(unsafe { sys::cuMemAllocHost_v2(&raw mut memory, SLOT + FAULT) })?;
        Ok(Slot { memory: memory.cast(), there })
    }

    /// Enqueues a copy of up to [`SLOT`] bytes from `address` and of the word at `fault`.
    pub fn enqueue(&self, address: u64, bytes: usize, fault: u64) -> Result<Slot, Failure> {
        self.gpu.enter()?;
        let slot = self.slot()?;
        let stream = self.gpu.stream.as_inner();
        // SAFETY: the slot holds both; it is given back no sooner than the next read that uses it is enqueued behind
        // this one; the caller owns the memory of the device.
        unsafe {
            checked(sys::cuMemcpyDtoHAsync_v2(slot.memory.cast(), address, bytes, stream))?;
            checked(sys::cuMemcpyDtoHAsync_v2(slot.memory.add(SLOT).cast(), fault, FAULT, stream))?;
        }
        slot.there.record(&self.gpu.stream)?;
        Ok(slot)
    }

    /// Waits for a slot: its first `bytes` bytes and the fault word.
    pub fn wait(&self, slot: &Slot, bytes: usize) -> Result<(Vec<u8>, u32), Failure> {
        self.gpu.enter()?;
        slot.there.synchronize()?;
        // SAFETY: the device has written both.
        let word = unsafe { slot.memory.add(SLOT).cast::<u32>().read() };
        // SAFETY: as above.
        Ok((unsafe { std::slice::from_raw_parts(slot.memory, bytes) }.to_vec(), word))
    }

    /// Gives a slot back, read or not: what is enqueued for it later comes later.
    pub fn give_back(&self, slot: Slot) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(slot);
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // A device that failed writes no more either.
        let _ = self.gpu.synchronize();
        for slot in self.free.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // SAFETY: from `cuMemAllocHost`, given back once, and the device writes to it no more.
            let _ = unsafe { sys::cuMemFreeHost(slot.memory.cast()) };
        }
    }
}
