//! Where time goes: a backend that measures every call of another.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::backend::{Backend, Buffer, Fused, Pending, Ran};
use crate::expr::{Program, Reduce};
use crate::pool::PoolUsage;
use crate::{DType, Device, Result, Tensor};

/// What the calls of one kind came to.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Entry {
    /// How many.
    pub calls: u64,
    /// Seconds together.
    pub seconds: f64,
    /// Seconds of the fastest call: what others do on the machine hardly moves it.
    pub fastest: f64,
    /// Floating-point operations of matrix products and attention; 0 for what memory limits.
    pub flops: f64,
    /// Bytes of all operands, each read or written once.
    pub bytes: f64,
}

/// What was measured since the last [`Profile::take`], by kernel, shape and dtype. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Profile(Arc<Mutex<BTreeMap<String, Entry>>>);

impl Profile {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A device that does what `device` does and tells this profile. Only work that is done when a call returns (the
    /// CPU's) is measured.
    pub fn device(&self, device: &Device) -> Device {
        Device::new(Measured { inner: device.clone(), profile: self.clone() })
    }

    /// What was measured, the longest first; the profile is empty then.
    pub fn take(&self) -> Vec<(String, Entry)> {
        let mut all: Vec<_> = std::mem::take(&mut *self.lock()).into_iter().collect();
        all.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
        all
    }

    fn add(&self, kernel: String, started: Instant, flops: f64, bytes: usize) {
        let seconds = started.elapsed().as_secs_f64();
        let mut all = self.lock();
        let new = Entry { calls: 0, seconds: 0.0, fastest: f64::INFINITY, flops: 0.0, bytes: 0.0 };
        let entry = all.entry(kernel).or_insert(new);
        entry.calls += 1;
        entry.seconds += seconds;
        entry.fastest = entry.fastest.min(seconds);
        entry.flops += flops;
        entry.bytes += bytes as f64;
    }
}

#[derive(Debug)]
struct Measured {
    inner: Device,
    profile: Profile,
}

/// Bytes of tensors; what is repeated counts once.
fn bytes<'a>(tensors: impl IntoIterator<Item = &'a &'a Tensor>) -> usize {
    let size = |t: &Tensor| {
        let layout = t.layout();
        let distinct = layout.dims.iter().zip(&layout.strides).filter(|(_, s)| **s != 0);
        distinct.map(|(d, _)| d).product::<usize>() * t.dtype().size()
    };
    tensors.into_iter().map(|t| size(t)).sum()
}

/// Sizes as `2x3x4`.
fn sizes(dims: &[usize]) -> String {
    dims.iter().map(usize::to_string).collect::<Vec<_>>().join("x")
}

fn widest(inputs: &[&Tensor], outputs: &[&Tensor]) -> String {
    let all = || inputs.iter().chain(outputs);
    let dtype = all().map(|t| t.dtype()).reduce(DType::promote).map_or("", DType::name);
    let dims = all().map(|t| t.dims()).max_by_key(|d| d.iter().product::<usize>()).unwrap_or(&[]);
    format!("{} {dtype}", sizes(dims))
}

impl Measured {
    fn run<R>(
        &self,
        name: impl FnOnce() -> String,
        flops: f64,
        bytes: usize,
        work: impl FnOnce(&dyn Backend) -> Result<R>,
    ) -> Result<R> {
        let started = Instant::now();
        let result = work(self.inner.backend())?;
        self.profile.add(name(), started, flops, bytes);
        Ok(result)
    }
}

impl Backend for Measured {
    fn name(&self) -> &str {
        self.inner.backend().name()
    }

    fn has_data(&self) -> bool {
        self.inner.backend().has_data()
    }

    fn is_host(&self) -> bool {
        self.inner.backend().is_host()
    }

    fn has_f64(&self) -> bool {
        self.inner.backend().has_f64()
    }

    fn memory(&self) -> PoolUsage {
        self.inner.backend().memory()
    }

    fn read_later(&self, buffer: &dyn Buffer, bytes: usize) -> Result<Box<dyn Pending>> {
        self.run(|| "read_later".into(), 0.0, bytes, |b| b.read_later(buffer, bytes))
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Buffer>> {
        self.run(|| "alloc".into(), 0.0, 0, |b| b.alloc(bytes))
    }

    fn upload(&self, buffer: &dyn Buffer, data: &[u8]) -> Result<()> {
        self.run(|| "upload".into(), 0.0, data.len(), |b| b.upload(buffer, data))
    }

    fn download(&self, buffer: &dyn Buffer, bytes: usize) -> Result<Vec<u8>> {
        self.run(|| "download".into(), 0.0, bytes, |b| b.download(buffer, bytes))
    }

    fn copy(&self, source: &Tensor, target: &Tensor) -> Result<()> {
        let size = bytes([&source, &target]);
        self.run(|| format!("copy {}", widest(&[source], &[target])), 0.0, size, |b| b.copy(source, target))
    }

    fn pointwise(&self, program: &Program, inputs: &[&Tensor], scalars: &[f64], outputs: &[&Tensor]) -> Result<()> {
        let name = || {
            let steps = program.instructions.len();
            format!("pointwise {steps} ops, {} > {}, {}", inputs.len(), outputs.len(), widest(inputs, outputs))
        };
        self.run(name, 0.0, bytes(inputs.iter().chain(outputs)), |b| b.pointwise(program, inputs, scalars, outputs))
    }

    fn reduce(
        &self,
        program: &Program,
        kind: Reduce,
        inputs: &[&Tensor],
        scalars: &[f64],
        outputs: &[&Tensor],
    ) -> Result<()> {
        let name = || {
            let (steps, to) = (program.instructions.len(), outputs.first().map_or(String::new(), |t| sizes(t.dims())));
            format!("reduce {steps} ops, {} > {}, {} to {to}", inputs.len(), outputs.len(), widest(inputs, &[]))
        };
        let size = bytes(inputs.iter().chain(outputs));
        self.run(name, 0.0, size, |b| b.reduce(program, kind, inputs, scalars, outputs))
    }

    fn matmul(&self, a: &Tensor, b: &Tensor, bias: Option<&Tensor>, accumulate: bool, out: &Tensor) -> Result<()> {
        let rank = a.rank();
        let (k, n) = (a.dims()[rank - 1], out.dims()[rank - 1]);
        let (rows, m) = (out.numel() / n.max(1), out.dims()[rank - 2]);
        let letter = |t: &Tensor| if t.layout().strides[rank - 1] == 1 { 'N' } else { 'T' };
        let name = || {
            let batch = if rows == m { String::new() } else { format!("{} of ", rows / m) };
            let more = if accumulate { " +=" } else { "" };
            format!("matmul {}{} {batch}{m}x{k}x{n} {}{more}", letter(a), letter(b), a.dtype())
        };
        let size = bytes([&a, &b, &out]);
        self.run(name, 2.0 * (rows * k * n) as f64, size, |back| back.matmul(a, b, bias, accumulate, out))
    }

    fn gather(&self, table: &Tensor, index: &Tensor, out: &Tensor) -> Result<()> {
        self.run(|| "gather".into(), 0.0, 2 * bytes([&out]), |b| b.gather(table, index, out))
    }

    fn scatter_add(&self, rows: &Tensor, index: &Tensor, out: &Tensor) -> Result<()> {
        self.run(|| "scatter_add".into(), 0.0, 3 * bytes([&rows]), |b| b.scatter_add(rows, index, out))
    }

    fn fuses(&self, op: &Fused, inputs: &[&Tensor]) -> bool {
        self.inner.backend().fuses(op, inputs)
    }

    fn fused(&self, op: &Fused, inputs: &[&Tensor], outputs: &[&Tensor]) -> Result<Ran> {
        let started = Instant::now();
        let ran = self.inner.backend().fused(op, inputs, outputs)?;
        if ran == Ran::Done {
            let name = format!("{} {}", op.name(), widest(inputs, outputs));
            self.profile.add(name, started, op.flops(inputs), bytes(inputs.iter().chain(outputs)));
        }
        Ok(ran)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear;

    #[test]
    fn calls_are_counted_by_kernel_and_shape_and_change_nothing() -> Result<()> {
        let profile = Profile::default();
        let run = |device: &Device| {
            let x = Tensor::ones(&[3, 4], DType::F32, device)?;
            let w = Tensor::full(&[5, 4], 0.5, DType::F32, device)?;
            linear(&x, &w, None)?.to_vec::<f32>()
        };
        assert_eq!(run(&profile.device(&Device::cpu()))?, run(&Device::cpu())?);
        let all = profile.take();
        let (_, product) = all.iter().find(|(name, _)| name == "matmul NT 3x4x5 f32").unwrap();
        assert_eq!((product.calls, product.flops, product.bytes), (1, 120.0, 188.0));
        assert!(profile.take().is_empty());
        Ok(())
    }
}
