//! A device with shapes and no data: it counts the memory that a model or a step would take, and computes nothing.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::call::{Checked, CopyTo, Gather, MatMul, Pointwise, Reduction, ScatterAdd, Upload};
use crate::backend::{Backend, Buffer, Fused, Ran};
use crate::cpu::ALIGN;
use crate::pool::{PoolUsage, class};
use crate::{Device, Error, Result};

/// What its tensors take, in bytes, rounded up as the CPU's pool does.
#[derive(Clone, Debug, Default)]
pub struct Meta(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    used: AtomicU64,
    peak: AtomicU64,
}

#[derive(Debug)]
struct MetaBuffer {
    size: usize,
    counts: Arc<Counts>,
}

impl Buffer for MetaBuffer {}

impl Drop for MetaBuffer {
    fn drop(&mut self) {
        self.counts.used.fetch_sub(self.size as u64, Ordering::Relaxed);
    }
}

impl Meta {
    /// A device of this backend; `self` goes on counting for it.
    pub fn device(&self) -> Device {
        Device::new(self.clone())
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.0.used.load(Ordering::Relaxed)
    }

    /// The most bytes that were in use at once.
    pub fn peak(&self) -> u64 {
        self.0.peak.load(Ordering::Relaxed)
    }
}

/// All values of this device are zero; every operation is done at once.
impl Backend for Meta {
    fn name(&self) -> &str {
        "meta"
    }

    fn has_data(&self) -> bool {
        false
    }

    fn memory(&self) -> PoolUsage {
        PoolUsage { used: self.used(), peak: self.peak(), ..PoolUsage::default() }
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Buffer>> {
        let size = class(bytes, ALIGN).filter(|&size| isize::try_from(size).is_ok()).ok_or_else(|| {
            Error::OutOfMemory { device: "meta".into(), bytes, reason: "more than the address space".into() }
        })?;
        let used = self.0.used.fetch_add(size as u64, Ordering::Relaxed) + size as u64;
        self.0.peak.fetch_max(used, Ordering::Relaxed);
        Ok(Box::new(MetaBuffer { size, counts: self.0.clone() }))
    }

    fn upload(&self, _: Checked<Upload<'_>>) -> Result<()> {
        Ok(())
    }

    fn download(&self, buffer: &dyn Buffer, bytes: Range<usize>) -> Result<Vec<u8>> {
        match (buffer as &dyn Any).downcast_ref::<MetaBuffer>() {
            Some(buffer) if bytes.end <= buffer.size => Ok(vec![0; bytes.len()]),
            _ => Err(Error::argument("download", "bytes of a buffer of this device", format!("{bytes:?}"))),
        }
    }

    fn copy(&self, _: Checked<CopyTo<'_>>) -> Result<()> {
        Ok(())
    }

    fn pointwise(&self, _: Checked<Pointwise<'_>>) -> Result<()> {
        Ok(())
    }

    fn reduce(&self, _: Checked<Reduction<'_>>) -> Result<()> {
        Ok(())
    }

    fn matmul(&self, _: Checked<MatMul<'_>>) -> Result<()> {
        Ok(())
    }

    fn gather(&self, _: Checked<Gather<'_>>) -> Result<()> {
        Ok(())
    }

    fn scatter_add(&self, _: Checked<ScatterAdd<'_>>) -> Result<()> {
        Ok(())
    }

    fn fused(&self, _: Checked<Fused<'_>>) -> Result<Ran> {
        Ok(Ran::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Linear, ParamBuilder};
    use crate::{DType, Tape, Tensor};

    #[test]
    fn a_step_counts_what_it_would_take() -> Result<()> {
        let meta = Meta::default();
        let device = meta.device();
        let root = ParamBuilder::new(0, DType::F32, &device);
        let layer = Linear::new(&root, 1 << 10, 1 << 20, true)?;
        let weights = ((1u64 << 30) + (1 << 20)) * 4;
        assert_eq!(meta.used(), weights);
        let tape = Tape::new();
        let x = tape.attach(&Tensor::zeros(&[8, 1 << 10], DType::F32, &device)?);
        let loss = layer.forward(&x)?.square()?.mean_all()?;
        let gradients = tape.backward(&loss)?;
        // Weights and their gradients; the activations are small beside them.
        assert!(meta.peak() > 2 * weights && meta.peak() < 2 * weights + (200 << 20), "{}", meta.peak());
        drop((gradients, loss, x, layer, root));
        assert_eq!(meta.used(), 0);
        Ok(())
    }
}
