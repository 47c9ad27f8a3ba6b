//! Memory of a device: buffers from its allocator, kept in the engine's pool.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ::wgpu::{BufferDescriptor, BufferUsages, Device, ErrorFilter};
use flowtape_engine::backend::Buffer;
use flowtape_engine::pool::{Pool, Pooled, Raw};
use flowtape_engine::{Error, Result};

use super::platform::guarded;

/// A buffer and the last batch of commands that uses it.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) buffer: ::wgpu::Buffer,
    batch: AtomicU64,
}

impl Block {
    /// Notes that `batch` uses it.
    pub(super) fn use_in(&self, batch: u64) {
        self.batch.store(batch, Ordering::Relaxed);
    }

    /// Whether `batch` uses it.
    pub(super) fn used_in(&self, batch: u64) -> bool {
        self.batch.load(Ordering::Relaxed) == batch
    }
}

/// The allocator of a device.
#[derive(Debug)]
pub(super) struct Memory {
    device: Device,
    name: String,
    largest: u64,
    /// Bytes of all blocks, and how many there may be.
    taken: AtomicU64,
    most: AtomicU64,
}

impl Memory {
    /// Lets all blocks together take at most so many bytes.
    pub(super) fn limit(&self, bytes: u64) {
        self.most.store(bytes, Ordering::Relaxed);
    }
}

impl Raw for Memory {
    type Block = Arc<Block>;

    fn alloc(&self, bytes: usize) -> Result<Self::Block> {
        let failed = |reason: String| Error::OutOfMemory { device: self.name.clone(), bytes, reason };
        if bytes as u64 > self.largest {
            return Err(failed(format!("a buffer has at most {} bytes", self.largest)));
        }
        let (taken, most) = (self.taken.load(Ordering::Relaxed), self.most.load(Ordering::Relaxed));
        if taken.saturating_add(bytes as u64) > most {
            return Err(failed(format!("{taken} of {most} bytes are taken")));
        }
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        let descriptor = BufferDescriptor { label: None, size: bytes as u64, usage, mapped_at_creation: false };
        let kinds = [ErrorFilter::Validation, ErrorFilter::OutOfMemory];
        match guarded(&self.device, &kinds, || self.device.create_buffer(&descriptor)) {
            (_, Some(error)) => Err(failed(error.to_string())),
            (buffer, None) => {
                self.taken.fetch_add(bytes as u64, Ordering::Relaxed);
                Ok(Arc::new(Block { buffer, batch: AtomicU64::new(0) }))
            }
        }
    }

    fn free(&self, block: Self::Block) {
        self.taken.fetch_sub(block.buffer.size(), Ordering::Relaxed);
    }
}

/// Memory of a tensor.
#[derive(Debug)]
pub(super) struct WgpuBuffer(pub(super) Pooled<Memory>);

impl Buffer for WgpuBuffer {}

/// A pool that gives nothing back before memory runs out.
pub(super) fn pool(device: &Device, name: &str, largest: u64) -> Pool<Memory> {
    let (taken, most) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
    Pool::new(Memory { device: device.clone(), name: name.into(), largest, taken, most }, usize::MAX / 2)
}
