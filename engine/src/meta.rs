//! A device with shapes and no data: it counts the memory that a model or a step would take, and computes nothing.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::backend::{Backend, Buffer, Fused, Ran};
use crate::cpu::ALIGN;
use crate::expr::{Program, Reduce};
use crate::pool::{PoolUsage, class};
use crate::{Device, Error, Result, Tensor};

/// What its tensors take, in bytes, rounded up as the CPU's pool does.
#[derive(Clone, Debug, Default)]
pub struct Meta(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    used: AtomicUsize,
    peak: AtomicUsize,
}

#[derive(Debug)]
struct MetaBuffer {
    size: usize,
    counts: Arc<Counts>,
}

impl Buffer for MetaBuffer {}

impl Drop for MetaBuffer {
    fn drop(&mut self) {
        self.counts.used.fetch_sub(self.size, Ordering::Relaxed);
    }
}

impl Meta {
    /// A device of this backend; `self` goes on counting for it.
    pub fn device(&self) -> Device {
        Device::new(self.clone())
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.0.used.load(Ordering::Relaxed)
    }

    /// The most bytes that were in use at once.
    pub fn peak(&self) -> usize {
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
        let size = class(bytes, ALIGN).ok_or_else(|| Error::argument("alloc", "a size that fits memory", bytes))?;
        let used = self.0.used.fetch_add(size, Ordering::Relaxed) + size;
        self.0.peak.fetch_max(used, Ordering::Relaxed);
        Ok(Box::new(MetaBuffer { size, counts: self.0.clone() }))
    }

    fn upload(&self, _: &dyn Buffer, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn download(&self, buffer: &dyn Buffer, bytes: usize) -> Result<Vec<u8>> {
        match (buffer as &dyn Any).downcast_ref::<MetaBuffer>() {
            Some(buffer) if bytes <= buffer.size => Ok(vec![0; bytes]),
            _ => Err(Error::argument("download", "at most the bytes of a buffer of this device", bytes)),
        }
    }

    fn copy(&self, _: &Tensor, _: &Tensor) -> Result<()> {
        Ok(())
    }

    fn pointwise(&self, _: &Program, _: &[&Tensor], _: &[f64], _: &[&Tensor]) -> Result<()> {
        Ok(())
    }

    fn reduce(&self, _: &Program, _: Reduce, _: &[&Tensor], _: &[f64], _: &[&Tensor]) -> Result<()> {
        Ok(())
    }

    fn matmul(&self, _: &Tensor, _: &Tensor, _: Option<&Tensor>, _: bool, _: &Tensor) -> Result<()> {
        Ok(())
    }

    fn gather(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<()> {
        Ok(())
    }

    fn scatter_add(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<()> {
        Ok(())
    }

    fn fuses(&self, _: &Fused, _: &[&Tensor]) -> bool {
        true
    }

    fn fused(&self, _: &Fused, _: &[&Tensor], _: &[&Tensor]) -> Result<Ran> {
        Ok(Ran::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Linear, ParamBuilder};
    use crate::{DType, Tape};

    #[test]
    fn a_step_counts_what_it_would_take() -> Result<()> {
        let meta = Meta::default();
        let device = meta.device();
        let root = ParamBuilder::new(0, DType::F32, &device);
        let layer = Linear::new(&root, 1 << 10, 1 << 20, true)?;
        let weights = ((1usize << 30) + (1 << 20)) * 4;
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
