//! The engine's backend on an NVIDIA GPU.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cust::sys;
use flowtape_engine::backend::call::{
    Checked, CopyTo, Gather, MatMul, Pointwise, PointwiseEach, Reduction, ScatterAdd, Upload,
};
use flowtape_engine::backend::{Backend, Buffer, Fused, Pending, Ran};
use flowtape_engine::ops::{
    AttentionBackward, AttentionForward, ModulatedNormBackward, ModulatedNormForward, NormBackward, NormForward,
    NormRopeBackward, NormRopeForward,
};
use flowtape_engine::pool::{Pool, PoolUsage, Pooled};
use flowtape_engine::random::RandomFill;
use flowtape_engine::{Device, Error, Result, Tensor};

use super::gpu::{Gpu, checked};
use super::memory::{CudaBuffer, CudaRaw, Staging, download};
use super::norm::{self, After, Operands};
use super::pointwise::At;
use super::readback::{Reader, SLOT, Slot};
use super::view::{View, buffer};
use super::{attention, index, matmul, pointwise, pointwise_each, quant, random, reduce};

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

    pub(super) fn gpu(&self) -> &Arc<Gpu> {
        &self.0.gpu
    }

    fn at(&self) -> At<'_> {
        At { gpu: &self.0.gpu, pool: &self.0.pool }
    }

    fn fault(&self) -> u64 {
        *self.0.fault.block()
    }

    /// The window of a tensor, whose memory must be this device's.
    fn view(&self, tensor: &Tensor) -> Result<View> {
        View::of(&self.0.gpu, tensor)
    }

    fn views<const N: usize>(&self, tensors: [&Tensor; N]) -> Result<[View; N]> {
        let mut views = [const { View::NONE }; N];
        for (to, tensor) in views.iter_mut().zip(tensors) {
            *to = self.view(tensor)?;
        }
        Ok(views)
    }

    fn some(&self, tensor: Option<&Tensor>) -> Result<Option<View>> {
        tensor.map(|tensor| self.view(tensor)).transpose()
    }

    fn all(&self, tensors: &[&Tensor]) -> Result<Vec<View>> {
        tensors.iter().map(|tensor| self.view(tensor)).collect()
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

    fn capacity(&self) -> Option<u64> {
        Some(self.0.gpu.total as u64)
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Buffer>> {
        Ok(Box::new(CudaBuffer(self.0.pool.alloc(bytes)?)))
    }

    fn upload(&self, call: Checked<Upload<'_>>) -> Result<()> {
        let Upload { bytes, target } = *call;
        let target = buffer(&self.0.gpu, target.storage().buffer())?;
        check_size("upload", target, bytes.len())?;
        self.0.staging.upload(*target.0.block(), bytes).map_err(|failure| self.0.gpu.failed("upload", failure))
    }

    fn download(&self, source: &dyn Buffer, bytes: Range<usize>) -> Result<Vec<u8>> {
        let source = buffer(&self.0.gpu, source)?;
        check_size("download", source, bytes.end)?;
        self.0.reads.fetch_add(1, Ordering::Relaxed);
        let (mut out, mut fault) = (vec![0; bytes.len()], [0; 4]);
        download(&self.0.gpu, *source.0.block() + bytes.start as u64, &mut out)
            .and_then(|()| download(&self.0.gpu, self.fault(), &mut fault))
            .map_err(|failure| self.0.gpu.failed("download", failure))?;
        self.check_fault(u32::from_le_bytes(fault))?;
        Ok(out)
    }

    fn read_later(&self, source: &dyn Buffer, bytes: Range<usize>) -> Result<Box<dyn Pending>> {
        if bytes.len() > SLOT {
            return Ok(Box::new(self.download(source, bytes)?));
        }
        let source = buffer(&self.0.gpu, source)?;
        check_size("download", source, bytes.end)?;
        let slot = self.0.reader.enqueue(*source.0.block() + bytes.start as u64, bytes.len(), self.fault());
        let slot = slot.map_err(|failure| self.0.gpu.failed("download", failure))?;
        Ok(Box::new(Reading { cuda: self.clone(), slot: Some(slot), bytes: bytes.len() }))
    }

    fn copy(&self, call: Checked<CopyTo<'_>>) -> Result<()> {
        let [source, target] = self.views([call.source, call.target])?;
        index::copy(self.at(), &source, &target)
    }

    fn pointwise(&self, call: Checked<Pointwise<'_>>) -> Result<()> {
        let (inputs, outputs) = (self.all(call.inputs)?, self.all(call.outputs)?);
        pointwise::pointwise(self.at(), call.program, &inputs, call.scalars, &outputs)
    }

    fn pointwise_each(&self, call: Checked<PointwiseEach<'_>>) -> Result<()> {
        let views = call.groups.iter().map(|(inputs, outputs)| Ok((self.all(inputs)?, self.all(outputs)?)));
        let views = views.collect::<Result<Vec<_>>>()?;
        pointwise_each::pointwise_each(self.at(), &self.0.staging, call.program, &views, call.scalars)
    }

    fn reduce(&self, call: Checked<Reduction<'_>>) -> Result<()> {
        let (inputs, outputs) = (self.all(call.inputs)?, self.all(call.outputs)?);
        reduce::reduce(self.at(), call.program, call.kind, &inputs, call.scalars, &outputs)
    }

    fn matmul(&self, call: Checked<MatMul<'_>>) -> Result<()> {
        let [a, b, out] = self.views([call.a, call.b, call.out])?;
        let bias = call.bias.map(Tensor::contiguous).transpose()?;
        matmul::matmul(self.at(), &a, &b, self.some(bias.as_ref())?.as_ref(), call.accumulate, &out)
    }

    fn gather(&self, call: Checked<Gather<'_>>) -> Result<()> {
        let [table, index, out] = self.views([call.table, call.index, call.out])?;
        index::gather(self.at(), &table, &index, &out, self.fault())
    }

    fn scatter_add(&self, call: Checked<ScatterAdd<'_>>) -> Result<()> {
        let [rows, index, out] = self.views([call.rows, call.index, call.out])?;
        index::scatter_add(self.at(), &rows, &index, &out, self.fault())
    }

    fn fused(&self, call: Checked<Fused<'_>>) -> Result<Ran> {
        match *call {
            Fused::AttentionForward(AttentionForward { q, k, v, mask, scale, o, lse }) => {
                let [q, k, v, o, lse] = self.views([q, k, v, o, lse])?;
                attention::forward(self.at(), [&q, &k, &v], self.some(mask)?.as_ref(), scale, [&o, &lse])
            }
            Fused::AttentionBackward(AttentionBackward { d_mask: Some(_), .. }) => Ok(Ran::Declined),
            Fused::AttentionBackward(AttentionBackward { q, k, v, mask, scale, o, lse, grad, dq, dk, dv, .. }) => {
                let inputs = self.views([q, k, v, o, grad, lse])?;
                let outputs = self.views([dq, dk, dv])?;
                attention::backward(self.at(), inputs.each_ref(), self.some(mask)?.as_ref(), scale, outputs.each_ref())
            }
            Fused::NormForward(NormForward { x, weight, bias, eps, y, mean, rstd }) => {
                let [x, y, rstd] = self.views([x, y, rstd])?;
                let (weight, bias, mean) = (self.some(weight)?, self.some(bias)?, self.some(mean)?);
                let operands = Operands {
                    weight: weight.as_ref(),
                    bias: bias.as_ref(),
                    mean: mean.as_ref(),
                    ..Operands::new(&x, &y, &rstd)
                };
                norm::forward(self.at(), After::Affine, &operands, eps)
            }
            Fused::NormBackward(NormBackward { x, weight, mean, rstd, grad, dx }) => {
                let [x, rstd, grad, dx] = self.views([x, rstd, grad, dx])?;
                let (weight, mean) = (self.some(weight)?, self.some(mean)?);
                let operands = Operands {
                    grad: Some(&grad),
                    weight: weight.as_ref(),
                    mean: mean.as_ref(),
                    ..Operands::new(&x, &dx, &rstd)
                };
                norm::backward(self.at(), After::Affine, &operands)
            }
            Fused::ModulatedNormForward(ModulatedNormForward { x, shift, scale, eps, y, mean, rstd }) => {
                let [x, shift, scale, y, mean, rstd] = self.views([x, shift, scale, y, mean, rstd])?;
                let (weight, bias, mean) = (Some(&scale), Some(&shift), Some(&mean));
                let operands = Operands { weight, bias, mean, ..Operands::new(&x, &y, &rstd) };
                norm::forward(self.at(), After::Modulated, &operands, eps)
            }
            Fused::ModulatedNormBackward(call) => {
                let ModulatedNormBackward { x, scale, mean, rstd, grad, dx, d_shift, d_scale } = call;
                let [x, scale, mean, rstd, grad] = self.views([x, scale, mean, rstd, grad])?;
                let [dx, d_shift, d_scale] = self.views([dx, d_shift, d_scale])?;
                let (weight_grad, bias_grad) = (Some(&d_scale), Some(&d_shift));
                let (grad, weight, mean) = (Some(&grad), Some(&scale), Some(&mean));
                let operands = Operands { grad, weight, mean, weight_grad, bias_grad, ..Operands::new(&x, &dx, &rstd) };
                norm::backward(self.at(), After::Modulated, &operands)
            }
            Fused::NormRopeForward(NormRopeForward { x, weight, cos, sin, eps, layout, y, rstd }) => {
                let [x, weight, cos, sin, y, rstd] = self.views([x, weight, cos, sin, y, rstd])?;
                let (weight, tables) = (Some(&weight), Some([&cos, &sin]));
                let operands = Operands { weight, tables, ..Operands::new(&x, &y, &rstd) };
                norm::forward(self.at(), After::Rotated(layout), &operands, eps)
            }
            Fused::NormRopeBackward(NormRopeBackward { x, weight, cos, sin, layout, rstd, grad, dx, dw }) => {
                let [x, weight, cos, sin, rstd, grad] = self.views([x, weight, cos, sin, rstd, grad])?;
                let [dx, dw] = self.views([dx, dw])?;
                let (grad, weight, weight_grad) = (Some(&grad), Some(&weight), Some(&dw));
                let tables = Some([&cos, &sin]);
                let operands = Operands { grad, weight, tables, weight_grad, ..Operands::new(&x, &dx, &rstd) };
                norm::backward(self.at(), After::Rotated(layout), &operands)
            }
            Fused::Dequantise(call) => {
                let [words, out] = self.views([call.words, call.out])?;
                quant::dequantise(self.at(), &call, &words, &out)
            }
            Fused::Random(RandomFill { distribution, seed, counter, out }) => {
                random::fill(self.at(), distribution, seed, counter, &self.view(out)?)
            }
            _ => Ok(Ran::Declined),
        }
    }
}
