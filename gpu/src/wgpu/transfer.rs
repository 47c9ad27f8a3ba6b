//! Bytes to the device and back.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use ::wgpu::{BufferDescriptor, BufferUsages, ErrorFilter, MapMode, PollType, SubmissionIndex};
use flowtape_engine::backend::Pending;
use flowtape_engine::{Error, Result};
use futures_channel::oneshot;

use super::memory::Block;
use super::platform::{guarded, wait};
use super::queue::{Gpu, Launch, failed, lock, words};
use super::view::Access;
use super::wgsl;

/// Bytes of an upload that may go along as parameters.
const INLINE: usize = 4 << 10;

impl Gpu {
    /// Writes to the start of a block, after all commands so far. A few bytes for a block that recorded kernels use go
    /// along as a kernel's parameters; more of them submit those kernels.
    pub(super) fn upload(&self, block: &Arc<Block>, bytes: &[u8]) -> Result<()> {
        self.check()?;
        let mut whole = bytes.to_vec();
        whole.resize(bytes.len().next_multiple_of(4), 0);
        let mut batch = lock(&self.batch);
        if block.used_in(batch.number) && whole.len() <= INLINE {
            drop(batch);
            return self.upload_inline(block, &whole);
        }
        if block.used_in(batch.number) {
            self.submit(&mut batch);
        }
        self.queue.write_buffer(&block.buffer, 0, &whole);
        Ok(())
    }

    fn upload_inline(&self, block: &Arc<Block>, bytes: &[u8]) -> Result<()> {
        let count = bytes.len() / 4;
        let mut params = vec![count as u32];
        params.extend(bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned::<u32>));
        // Few sizes, few kernels.
        params.resize((count + 1).next_power_of_two(), 0);
        let target = words(block, count);
        let launch = Launch {
            name: "upload",
            shape: vec![],
            operands: &[(&target, Access::Write)],
            params: &params,
            workgroups: count.div_ceil(wgsl::THREADS),
        };
        self.launch(&launch, || {
            wgsl::entry(&format!(
                "  let i = group * 256u + index;
  if i >= {} {{ return; }}
  let p = i + 2u;
  put0({} + i, P[p / 4u][p % 4u]);
",
                wgsl::param(1),
                wgsl::param(0)
            ))
        })
    }

    /// Copies bytes of a block to the host, after all commands so far.
    pub(super) fn read_later(self: &Arc<Self>, block: &Block, bytes: Range<usize>) -> Result<Read> {
        self.check()?;
        // Copies begin and end at words.
        let start = bytes.start / 4 * 4;
        let size = ((bytes.end - start).max(1) as u64).next_multiple_of(4);
        let bytes = bytes.start - start..bytes.end - start;
        let descriptor = BufferDescriptor {
            label: Some("download"),
            size: size + 4,
            usage: BufferUsages::MAP_READ | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        };
        let make = || self.device.create_buffer(&descriptor);
        let (staging, error) = guarded(&self.device, &[ErrorFilter::OutOfMemory], make);
        if let Some(error) = error {
            return Err(Error::OutOfMemory {
                device: self.name.clone(),
                bytes: size as usize,
                reason: error.to_string(),
            });
        }
        let submitted = Arc::new(OnceLock::new());
        let mut batch = lock(&self.batch);
        drop(batch.pass.take());
        let encoder = batch.encoder.get_or_insert_with(|| self.encoder());
        encoder.copy_buffer_to_buffer(&block.buffer, start as u64, &staging, 0, size);
        encoder.copy_buffer_to_buffer(&self.fault.block().buffer, 0, &staging, size, 4);
        batch.reads.push(submitted.clone());
        Ok(Read { gpu: self.clone(), staging, bytes, submitted })
    }
}

/// Bytes on their way to the host.
#[derive(Debug)]
pub(super) struct Read {
    gpu: Arc<Gpu>,
    staging: ::wgpu::Buffer,
    /// Which of the bytes in it.
    bytes: Range<usize>,
    /// The submission that copies them, once it is made.
    submitted: Arc<OnceLock<SubmissionIndex>>,
}

impl Pending for Read {
    fn wait(self: Box<Self>) -> Result<Vec<u8>> {
        let Self { gpu, staging, bytes, submitted } = *self;
        let wrong = |e: &dyn std::fmt::Display| failed(&gpu.name, e);
        gpu.reads.fetch_add(1, Ordering::Relaxed);
        if submitted.get().is_none() {
            gpu.submit(&mut lock(&gpu.batch));
        }
        let (tell, told) = oneshot::channel();
        staging.map_async(MapMode::Read, .., move |result| drop(tell.send(result)));
        // For this submission alone: later ones go on.
        let until = PollType::Wait { submission_index: submitted.get().cloned(), timeout: None };
        gpu.device.poll(until).map_err(|e| wrong(&e))?;
        // Another thread may have been told first, and still be telling us; a browser tells when it is waited for.
        let mapped = wait(told)?;
        gpu.check()?;
        mapped.map_err(|e| wrong(&e))?.map_err(|e| wrong(&e))?;
        let values = staging.get_mapped_range(..).map_err(|e| wrong(&e))?;
        let fault: u32 = bytemuck::pod_read_unaligned(&values[values.len() - 4..]);
        if fault > 0 {
            gpu.upload(gpu.fault.block(), &[0; 4])?;
            return Err(Error::argument("gather or scatter_add", "indices of rows that there are", fault - 1));
        }
        Ok(values[bytes].to_vec())
    }
}
