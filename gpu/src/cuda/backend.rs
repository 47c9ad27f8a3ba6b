//! The engine's backend on an NVIDIA GPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cust::sys;
use flowtape_engine::backend::{Backend, Buffer, Fused, Pending, Ran};
use flowtape_engine::expr::{Program, Reduce};
use flowtape_engine::pool::{Pool, PoolUsage, Pooled};
use flowtape_engine::{Device, Error, Result, Tensor};

use super::gpu::{Gpu, checked};
use super::memory::{CudaBuffer, CudaRaw, Staging, download};
use super::norm::{self, After, Operands};
use super::pointwise::At;
use super::readback::{Reader, SLOT, Slot};
use super::view::{View, buffer};
use super::{attention, each, index, matmul, pointwise, random, reduce};

/// Memory that is kept for reuse beyond what is in use.
const SPARE: usize = 1 << 30;

/// An NVIDIA GPU. Work is enqueued on one stream; only [`Backend::download`] waits.
///
/// Operands are f32, bf16, f16 and u32; f64 is converted and moved, computed with on the CPU alone. A failure of work
/// that was enqueued before is seen by a later call: its error says what was launched last. Clones are one device.
#[derive(Clone, Debug)]
pub struct Cuda(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    // Dropped in this order: all memory goes back while the device is there.
    staging: Staging,
    reader: Reader,
    /// Holds an index past the end of its table, plus one; or zero.
    fault: Pooled<CudaRaw>,
    pool: Pool<CudaRaw>,
    gpu: Arc<Gpu>,
    reads: AtomicUsize,
}

/// What a device has done so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CudaUsage {
    /// Memory of tensors and the pool.
    pub pool: PoolUsage,
    /// Kernels launched.
    pub launches: usize,
    /// Kernels printed from programs and compiled.
    pub printed: usize,
    /// Reads that all work was waited for.
    pub reads: usize,
}

impl Cuda {
    /// Device `ordinal`, in the driver's order.
    ///
    /// # Errors
    /// When there is no driver, it is older than CUDA 12.0, there is no such device, its compute capability is less
    /// than 8.0 or it can't be opened. The error says which and what to do.
    pub fn open(ordinal: u32) -> Result<Self> {
        let gpu = Arc::new(Gpu::open(ordinal)?);
        let pool = Pool::new(CudaRaw(gpu.clone()), SPARE);
        let fault = pool.alloc(4)?;
        let (staging, reader) = (Staging::new(gpu.clone()), Reader::new(gpu.clone()));
        let cuda = Self(Arc::new(Inner { staging, reader, fault, pool, gpu, reads: AtomicUsize::new(0) }));
        cuda.clear_fault()?;
        Ok(cuda)
    }

    /// The same as the engine's device.
    ///
    /// # Errors
    /// As [`Cuda::open`].
    pub fn device(ordinal: u32) -> Result<Device> {
        Self::open(ordinal).map(Device::new)
    }

    /// What it has done so far.
    pub fn usage(&self) -> CudaUsage {
        let launches = self.0.gpu.launches.load(Ordering::Relaxed);
        let reads = self.0.reads.load(Ordering::Relaxed);
        CudaUsage { pool: self.0.pool.usage(), launches, printed: self.0.gpu.printed_count(), reads }
    }

    /// Whether a failure was seen after which it takes no more work.
    pub fn is_lost(&self) -> bool {
        self.0.gpu.lost.load(Ordering::Relaxed)
    }

    fn at(&self) -> At<'_> {
        At { gpu: &self.0.gpu, pool: &self.0.pool }
    }

    fn fault(&self) -> u64 {
        *self.0.fault.block()
    }

    fn clear_fault(&self) -> Result<()> {
        let cleared = self.0.gpu.enter().and_then(|()| {
            // SAFETY: the fault word is memory of this device.
            checked(unsafe { sys::cuMemsetD32Async(self.fault(), 0, 1, self.0.gpu.stream.as_inner()) })
        });
        cleared.map_err(|failure| self.0.gpu.failed("cuda", failure))
    }
}

impl Cuda {
    /// An index past the end of its table, where the fault word says so.
    fn check_fault(&self, word: u32) -> Result<()> {
        match word {
            0 => Ok(()),
            past => {
                self.clear_fault()?;
                Err(Error::argument("index_select", "indices below the number of rows", past - 1))
            }
        }
    }
}

/// A read that is enqueued.
#[derive(Debug)]
struct Reading {
    cuda: Cuda,
    slot: Option<Slot>,
    bytes: usize,
}

impl Pending for Reading {
    fn wait(mut self: Box<Self>) -> Result<Vec<u8>> {
        let Inner { reader, gpu, .. } = &*self.cuda.0;
        let Some(slot) = self.slot.take() else { return Ok(Vec::new()) };
        let read = reader.wait(&slot, self.bytes);
        reader.give_back(slot);
        let (bytes, fault) = read.map_err(|failure| gpu.failed("download", failure))?;
        self.cuda.check_fault(fault)?;
        Ok(bytes)
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.cuda.0.reader.give_back(slot);
        }
    }
}

fn check_counts(program: &Program, inputs: &[&Tensor], scalars: &[f64], outputs: &[&Tensor]) -> Result<()> {
    let expected = (program.inputs, program.scalars, program.outputs.len());
    let got = (inputs.len(), scalars.len(), outputs.len());
    if expected == got {
        Ok(())
    } else {
        Err(Error::argument("pointwise", format!("{expected:?} inputs, scalars and outputs"), got))
    }
}

fn check_size(op: &'static str, buffer: &CudaBuffer, bytes: usize) -> Result<()> {
    if bytes <= buffer.0.bytes() {
        Ok(())
    } else {
        Err(Error::argument(op, format!("at most {} bytes", buffer.0.bytes()), bytes))
    }
}

impl Backend for Cuda {
    fn name(&self) -> &str {
        &self.0.gpu.name
    }

    fn has_f64(&self) -> bool {
        false
    }

    fn memory(&self) -> PoolUsage {
        self.0.pool.usage()
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Buffer>> {
        Ok(Box::new(CudaBuffer(self.0.pool.alloc(bytes)?)))
    }

    fn upload(&self, target: &dyn Buffer, bytes: &[u8]) -> Result<()> {
        let target = buffer(target)?;
        check_size("upload", target, bytes.len())?;
        self.0.staging.upload(*target.0.block(), bytes).map_err(|failure| self.0.gpu.failed("upload", failure))
    }

    fn download(&self, source: &dyn Buffer, bytes: usize) -> Result<Vec<u8>> {
        let source = buffer(source)?;
        check_size("download", source, bytes)?;
        self.0.reads.fetch_add(1, Ordering::Relaxed);
        let (mut out, mut fault) = (vec![0; bytes], [0; 4]);
        download(&self.0.gpu, *source.0.block(), &mut out)
            .and_then(|()| download(&self.0.gpu, self.fault(), &mut fault))
            .map_err(|failure| self.0.gpu.failed("download", failure))?;
        self.check_fault(u32::from_le_bytes(fault))?;
        Ok(out)
    }

    fn read_later(&self, source: &dyn Buffer, bytes: usize) -> Result<Box<dyn Pending>> {
        if bytes > SLOT {
            return Ok(Box::new(self.download(source, bytes)?));
        }
        let source = buffer(source)?;
        check_size("download", source, bytes)?;
        let slot = self.0.reader.enqueue(*source.0.block(), bytes, self.fault());
        let slot = slot.map_err(|failure| self.0.gpu.failed("download", failure))?;
        Ok(Box::new(Reading { cuda: self.clone(), slot: Some(slot), bytes }))
    }

    fn copy(&self, source: &Tensor, target: &Tensor) -> Result<()> {
        index::copy(self.at(), &View::of(source)?, &View::of(target)?)
    }

    fn pointwise(&self, program: &Program, inputs: &[&Tensor], scalars: &[f64], outputs: &[&Tensor]) -> Result<()> {
        check_counts(program, inputs, scalars, outputs)?;
        pointwise::pointwise(self.at(), program, &View::all(inputs)?, scalars, &View::all(outputs)?)
    }

    fn pointwise_each(
        &self,
        program: &Program,
        groups: &[(Vec<&Tensor>, Vec<&Tensor>)],
        scalars: &[f64],
    ) -> Result<()> {
        let mut views = Vec::with_capacity(groups.len());
        for (inputs, outputs) in groups {
            check_counts(program, inputs, scalars, outputs)?;
            views.push((View::all(inputs)?, View::all(outputs)?));
        }
        each::pointwise_each(self.at(), &self.0.staging, program, &views, scalars)
    }

    fn reduce(
        &self,
        program: &Program,
        kind: Reduce,
        inputs: &[&Tensor],
        scalars: &[f64],
        outputs: &[&Tensor],
    ) -> Result<()> {
        check_counts(program, inputs, scalars, outputs)?;
        reduce::reduce(self.at(), program, kind, &View::all(inputs)?, scalars, &View::all(outputs)?)
    }

    fn matmul(&self, a: &Tensor, b: &Tensor, bias: Option<&Tensor>, accumulate: bool, out: &Tensor) -> Result<()> {
        let bias = bias.map(Tensor::contiguous).transpose()?;
        let bias = bias.as_ref().map(View::of).transpose()?;
        matmul::matmul(self.at(), &View::of(a)?, &View::of(b)?, bias.as_ref(), accumulate, &View::of(out)?)
    }

    fn gather(&self, table: &Tensor, at: &Tensor, out: &Tensor) -> Result<()> {
        index::gather(self.at(), &View::of(table)?, &View::of(at)?, &View::of(out)?, self.fault())
    }

    fn scatter_add(&self, rows: &Tensor, at: &Tensor, out: &Tensor) -> Result<()> {
        index::scatter_add(self.at(), &View::of(rows)?, &View::of(at)?, &View::of(out)?, self.fault())
    }

    fn fuses(&self, op: &Fused, inputs: &[&Tensor]) -> bool {
        View::all(inputs).is_ok_and(|inputs| norm::fuses(op, &inputs))
    }

    fn fused(&self, op: &Fused, inputs: &[&Tensor], outputs: &[&Tensor]) -> Result<Ran> {
        let (x, y) = (View::all(inputs)?, View::all(outputs)?);
        match (op, &x[..], &y[..]) {
            (Fused::AttentionForward { scale, .. }, ..) => attention::forward(self.at(), &x, &y, *scale),
            (Fused::AttentionBackward { scale, .. }, ..) => attention::backward(self.at(), &x, &y, *scale),
            (Fused::NormForward { centred, weight, bias, eps }, [x, affine @ ..], [y, statistics @ ..]) => {
                let operands = Operands {
                    weight: affine.first().filter(|_| *weight),
                    bias: affine.get(usize::from(*weight)).filter(|_| *bias),
                    mean: statistics.first().filter(|_| *centred),
                    ..Operands::new(x, y, &statistics[usize::from(*centred)])
                };
                norm::forward(self.at(), After::Affine, &operands, *eps)
            }
            (Fused::NormBackward { centred, weight }, [x, grad, scale, rest @ ..], [dx]) => {
                let mean = rest.first().filter(|_| *centred);
                let weight = rest.get(usize::from(*centred)).filter(|_| *weight);
                let operands = Operands { grad: Some(grad), weight, mean, ..Operands::new(x, dx, scale) };
                norm::backward(self.at(), After::Affine, &operands)
            }
            (Fused::ModulatedNormForward { eps }, [x, shift, scale], [y, mean, deviation]) => {
                let (weight, bias, mean) = (Some(scale), Some(shift), Some(mean));
                let operands = Operands { weight, bias, mean, ..Operands::new(x, y, deviation) };
                norm::forward(self.at(), After::Modulated, &operands, *eps)
            }
            (Fused::ModulatedNormBackward, [x, grad, mean, deviation, scale], [dx, d_shift, d_scale]) => {
                let (weight_grad, bias_grad) = (Some(d_scale), Some(d_shift));
                let (grad, weight, mean) = (Some(grad), Some(scale), Some(mean));
                let operands =
                    Operands { grad, weight, mean, weight_grad, bias_grad, ..Operands::new(x, dx, deviation) };
                norm::backward(self.at(), After::Modulated, &operands)
            }
            (Fused::NormRopeForward { eps, layout }, [x, weight, cos, sin], [y, deviation]) => {
                let operands =
                    Operands { weight: Some(weight), tables: Some([cos, sin]), ..Operands::new(x, y, deviation) };
                norm::forward(self.at(), After::Rotated(*layout), &operands, *eps)
            }
            (Fused::NormRopeBackward { layout }, [x, grad, deviation, weight, cos, sin], [dx, dw]) => {
                let (grad, weight, weight_grad) = (Some(grad), Some(weight), Some(dw));
                let tables = Some([cos, sin]);
                let operands = Operands { grad, weight, tables, weight_grad, ..Operands::new(x, dx, deviation) };
                norm::backward(self.at(), After::Rotated(*layout), &operands)
            }
            (Fused::Random { distribution, seed, counter }, [], [out]) => {
                random::fill(self.at(), *distribution, *seed, *counter, out)
            }
            _ => Ok(Ran::Declined),
        }
    }
}
