//! Memory of the device: what the pool is filled from, and transfers.

use std::sync::{Arc, Mutex, PoisonError};

use cust::event::{Event, EventFlags};
use cust::stream::{Stream, StreamFlags, StreamWaitEventFlags};
use cust::sys;
use flowtape_engine::backend::Buffer;
use flowtape_engine::pool::{Pool, Pooled, Raw};
use flowtape_engine::{Error, Result};

use super::gpu::{Failure, Gpu, checked};

/// Memory straight from the driver.
#[derive(Clone, Debug)]
pub(super) struct CudaRaw(pub Arc<Gpu>);

impl Raw for CudaRaw {
    type Block = u64;

    fn alloc(&self, bytes: usize) -> Result<u64> {
        let gpu = &self.0;
        let mut address = 0;
        let mut allocate = || -> Result<(), Failure> {
            gpu.enter()?;
            // SAFETY: the address is written to a variable; the stream lives as long as the device.
            checked(unsafe {
                if gpu.ordered {
                    sys::cuMemAllocAsync(&raw mut address, bytes, gpu.stream.as_inner())
                } else {
                    sys::cuMemAlloc_v2(&raw mut address, bytes)
                }
            })
        };
        match allocate() {
            Ok(()) => Ok(address),
            Err(failure) if failure.is_memory() => {
                let (mut free, mut total) = (0, gpu.total);
                // SAFETY: both are written to variables; on failure they keep their values.
                let _ = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
                let reason = format!("{free} of {total} bytes are free");
                Err(Error::OutOfMemory { device: gpu.name.clone(), bytes, reason })
            }
            Err(failure) => Err(gpu.failed("alloc", failure)),
        }
    }

    fn free(&self, block: u64) {
        let gpu = &self.0;
        // After a failure the driver has taken all memory back; there is nobody to tell about another one here.
        if gpu.enter().is_ok() {
            // SAFETY: the block came from `alloc`, and the pool gives it back once. Work that uses it is before this on
            // the stream; where memory is not in its order, the driver waits for all work.
            let _ = unsafe {
                if gpu.ordered { sys::cuMemFreeAsync(block, gpu.stream.as_inner()) } else { sys::cuMemFree_v2(block) }
            };
        }
    }
}

/// A tensor's memory.
#[derive(Debug)]
pub(super) struct CudaBuffer(pub Pooled<CudaRaw>);

impl Buffer for CudaBuffer {}

/// Working memory of a kernel: given back as soon as the kernel is enqueued, since work is in order.
pub(super) fn scratch(pool: &Pool<CudaRaw>, bytes: usize) -> Result<Pooled<CudaRaw>> {
    pool.alloc(bytes)
}

/// Parts of the pinned memory: the host waits for the device only when all are on their way.
const SEGMENTS: usize = 16;
const SEGMENT: usize = 1 << 20;

/// What uploads go through: pinned memory, and as much of the device's. The host writes the pinned memory and goes on. A
/// stream of its own fetches it, beside the work that is enqueued: the next batch while a step still runs. The stream of
/// the work waits for that and moves it to its place, since only there it is known that nobody reads the place any more.
#[derive(Debug)]
pub(super) struct Staging {
    gpu: Arc<Gpu>,
    state: Mutex<Option<Pinned>>,
}

#[derive(Debug)]
struct Pinned {
    memory: *mut u8,
    landing: u64,
    copies: Stream,
    /// When each segment was moved to its place.
    events: Vec<Event>,
    segment: usize,
    used: usize,
}

// SAFETY: plain host memory, used behind a mutex.
unsafe impl Send for Pinned {}

fn event() -> Result<Event, Failure> {
    Ok(Event::new(EventFlags::DISABLE_TIMING)?)
}

impl Staging {
    pub fn new(gpu: Arc<Gpu>) -> Self {
        Self { gpu, state: Mutex::default() }
    }

    fn pinned() -> Result<Pinned, Failure> {
        let events = (0..SEGMENTS).map(|_| event()).collect::<Result<_, Failure>>()?;
        let copies = Stream::new(StreamFlags::NON_BLOCKING, None)?;
        let (mut memory, mut landing) = (std::ptr::null_mut(), 0);
        // SAFETY: the addresses are written to variables; what was made is given back where the second fails.
        unsafe {
            checked(sys::cuMemAllocHost_v2(&raw mut memory, SEGMENTS * SEGMENT))?;
            checked(sys::cuMemAlloc_v2(&raw mut landing, SEGMENTS * SEGMENT)).inspect_err(|_| {
                let _ = sys::cuMemFreeHost(memory);
            })?;
        }
        Ok(Pinned { memory: memory.cast(), landing, copies, events, segment: 0, used: 0 })
    }

    /// Enqueues a copy of `bytes` to `address`.
    pub fn upload(&self, address: u64, bytes: &[u8]) -> Result<(), Failure> {
        let stream = &self.gpu.stream;
        self.gpu.enter()?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.is_none() {
            *state = Some(Self::pinned()?);
        }
        let Some(pinned) = state.as_mut() else { return Ok(()) };
        let mut done = 0;
        while done < bytes.len() {
            if pinned.used == SEGMENT {
                pinned.events[pinned.segment].record(stream)?;
                pinned.segment = (pinned.segment + 1) % SEGMENTS;
                pinned.events[pinned.segment].synchronize()?;
                pinned.used = 0;
            }
            let count = (bytes.len() - done).min(SEGMENT - pinned.used);
            // SAFETY: `count` bytes fit the segment, of which all before was moved away; the target holds `bytes`, and
            // is written in the order of the work.
            unsafe {
                let at = pinned.segment * SEGMENT + pinned.used;
                let (from, landing) = (pinned.memory.add(at), pinned.landing + at as u64);
                std::ptr::copy_nonoverlapping(bytes.as_ptr().add(done), from, count);
                checked(sys::cuMemcpyHtoDAsync_v2(landing, from.cast(), count, pinned.copies.as_inner()))?;
                let fetched = event()?;
                fetched.record(&pinned.copies)?;
                stream.wait_event(fetched, StreamWaitEventFlags::DEFAULT)?;
                checked(sys::cuMemcpyDtoDAsync_v2(address + done as u64, landing, count, stream.as_inner()))?;
            }
            done += count;
            // Pieces begin at multiples of 16 bytes.
            pinned.used = (pinned.used + count).next_multiple_of(16).min(SEGMENT);
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(pinned) = state.take() {
            // A device that failed reads no more either.
            let _ = self.gpu.synchronize();
            // SAFETY: both were allocated in `pinned`, are given back once, and the device is done with them.
            let _ = unsafe { (sys::cuMemFreeHost(pinned.memory.cast()), sys::cuMemFree_v2(pinned.landing)) };
        }
    }
}

/// Waits for all work before, and reads `out.len()` bytes from `address`.
pub(super) fn download(gpu: &Gpu, address: u64, out: &mut [u8]) -> Result<(), Failure> {
    gpu.enter()?;
    // SAFETY: `out` is that large and outlives the copy, since the stream is waited for; the caller owns the memory.
    checked(unsafe { sys::cuMemcpyDtoHAsync_v2(out.as_mut_ptr().cast(), address, out.len(), gpu.stream.as_inner()) })?;
    Ok(gpu.stream.synchronize()?)
}
