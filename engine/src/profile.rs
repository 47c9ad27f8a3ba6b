//! Where time goes: a backend that measures every call of another.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::call::{
    Call, Checked, CopyTo, Gather, MatMul, Pointwise, PointwiseEach, Reduction, ScatterAdd, Upload,
};
use crate::backend::{Backend, Buffer, Decorator, Fused, Pending, Ran};
use crate::platform::Instant;
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

/// Bytes of a tensor; what is repeated counts once.
fn size(tensor: &Tensor) -> usize {
    let layout = tensor.layout();
    let distinct = layout.dims.iter().zip(&layout.strides).filter(|(_, s)| **s != 0);
    distinct.map(|(d, _)| d).product::<usize>() * tensor.dtype().size()
}

/// Bytes of a call's operands.
fn bytes<'a>(call: &impl Call<'a>) -> usize {
    call.reads().chain(call.writes()).map(size).sum()
}

/// Sizes as `2x3x4`.
fn sizes(dims: &[usize]) -> String {
    dims.iter().map(usize::to_string).collect::<Vec<_>>().join("x")
}

/// The largest sizes and the widest dtype.
fn widest<'a>(operands: impl Iterator<Item = &'a Tensor> + Clone) -> String {
    let dtype = operands.clone().map(Tensor::dtype).reduce(DType::promote).map_or("", DType::name);
    let dims = operands.map(Tensor::dims).max_by_key(|d| d.iter().product::<usize>()).unwrap_or(&[]);
    format!("{} {dtype}", sizes(dims))
}

/// The largest sizes of a call's operands and their widest dtype.
pub(crate) fn operands<'a>(call: &impl Call<'a>) -> String {
    widest(call.reads().chain(call.writes()))
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
        let result = work(self.inner())?;
        self.profile.add(name(), started, flops, bytes);
        Ok(result)
    }
}

impl Decorator for Measured {
    fn inner(&self) -> &dyn Backend {
        self.inner.backend()
    }

    fn read_later(&self, buffer: &dyn Buffer, bytes: Range<usize>) -> Result<Box<dyn Pending>> {
        self.run(|| "read_later".into(), 0.0, bytes.len(), |b| b.read_later(buffer, bytes))
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Buffer>> {
        self.run(|| "alloc".into(), 0.0, 0, |b| b.alloc(bytes))
    }

    fn upload(&self, call: Checked<Upload<'_>>) -> Result<()> {
        self.run(|| "upload".into(), 0.0, call.bytes.len(), |b| b.upload(call))
    }

    fn download(&self, buffer: &dyn Buffer, bytes: Range<usize>) -> Result<Vec<u8>> {
        self.run(|| "download".into(), 0.0, bytes.len(), |b| b.download(buffer, bytes))
    }

    fn copy(&self, call: Checked<CopyTo<'_>>) -> Result<()> {
        self.run(|| format!("copy {}", operands(&*call)), 0.0, bytes(&*call), |b| b.copy(call))
    }

    fn pointwise(&self, call: Checked<Pointwise<'_>>) -> Result<()> {
        let name = || {
            let (steps, from, to) = (call.program.instructions.len(), call.inputs.len(), call.outputs.len());
            format!("pointwise {steps} ops, {from} > {to}, {}", operands(&*call))
        };
        self.run(name, 0.0, bytes(&*call), |b| b.pointwise(call))
    }

    fn pointwise_each(&self, call: Checked<PointwiseEach<'_>>) -> Result<()> {
        let name = || {
            let (steps, groups) = (call.program.instructions.len(), call.groups.len());
            let dtype = call.reads().chain(call.writes()).map(Tensor::dtype).reduce(DType::promote);
            format!("pointwise {steps} ops on {groups} groups, {}", dtype.map_or("", DType::name))
        };
        self.run(name, 0.0, bytes(&*call), |b| b.pointwise_each(call))
    }

    fn reduce(&self, call: Checked<Reduction<'_>>) -> Result<()> {
        let name = || {
            let (steps, from, to) = (call.program.instructions.len(), call.inputs.len(), call.outputs.len());
            let result = call.outputs.first().map_or(String::new(), |t| sizes(t.dims()));
            format!("reduce {steps} ops, {from} > {to}, {} to {result}", widest(call.reads()))
        };
        self.run(name, 0.0, bytes(&*call), |b| b.reduce(call))
    }

    fn matmul(&self, call: Checked<MatMul<'_>>) -> Result<()> {
        let MatMul { a, b, accumulate, out, .. } = *call;
        let rank = a.rank();
        let (k, n) = (a.dims()[rank - 1], out.dims()[rank - 1]);
        let (rows, m) = (out.numel() / n.max(1), out.dims()[rank - 2]);
        let letter = |t: &Tensor| if t.layout().strides[rank - 1] == 1 { 'N' } else { 'T' };
        let name = || {
            let batch = if rows == m { String::new() } else { format!("{} of ", rows / m) };
            let more = if accumulate { " +=" } else { "" };
            format!("matmul {}{} {batch}{m}x{k}x{n} {}{more}", letter(a), letter(b), a.dtype())
        };
        self.run(name, 2.0 * (rows * k * n) as f64, bytes(&*call), |back| back.matmul(call))
    }

    fn gather(&self, call: Checked<Gather<'_>>) -> Result<()> {
        self.run(|| "gather".into(), 0.0, 2 * size(call.out), |b| b.gather(call))
    }

    fn scatter_add(&self, call: Checked<ScatterAdd<'_>>) -> Result<()> {
        self.run(|| "scatter_add".into(), 0.0, 3 * size(call.rows), |b| b.scatter_add(call))
    }

    fn fused(&self, call: Checked<Fused<'_>>) -> Result<Ran> {
        let started = Instant::now();
        let ran = self.inner().fused(call)?;
        if ran == Ran::Done {
            let name = format!("{} {}", call.name(), operands(&*call));
            self.profile.add(name, started, call.flops(), bytes(&*call));
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

    /// What a device does together is measured together, as it runs without a profile.
    #[test]
    fn groups_stay_together() -> Result<()> {
        let profile = Profile::default();
        let device = profile.device(&Device::cpu());
        let x = [3, 5].map(|n| Tensor::ones(&[n], DType::F32, &device));
        let [a, b] = [x[0].as_ref().unwrap(), x[1].as_ref().unwrap()];
        profile.take();
        let double = crate::expr::Function::build(|[x]| [x * 2.0]);
        crate::ops::pointwise::run_pointwise_each(&double, &[(vec![a], vec![a]), (vec![b], vec![b])], &[])?;
        assert_eq!((a.to_vec::<f32>()?, b.to_vec::<f32>()?), (vec![2.0; 3], vec![2.0; 5]));
        let all = profile.take();
        let calls: Vec<&str> =
            all.iter().map(|(name, _)| &name[..]).filter(|name| name.starts_with("pointwise")).collect();
        assert_eq!(calls, ["pointwise 1 ops on 2 groups, f32"]);
        Ok(())
    }
}
