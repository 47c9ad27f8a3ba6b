//! What a device has to offer.
//!
//! | file | what is in it |
//! |---|---|
//! | `call` | the calls of a backend's methods, checked before any backend sees them |
//! | `fused` | the calls that a backend may decline |
//! | `decorator` | backends that watch another |

pub mod call;
mod decorator;
mod fused;

use std::any::Any;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use self::call::{Checked, CopyTo, Gather, MatMul, Pointwise, PointwiseEach, Reduction, ScatterAdd, Upload};
pub use self::decorator::Decorator;
pub(crate) use self::fused::operands;
pub use self::fused::{Fused, FusedCall, run_fused};
use crate::pool::PoolUsage;
use crate::{Error, Result, Tensor};

/// A device. Object-safe and small; everything only enqueues, `download` alone waits.
///
/// What is computed comes as [calls](call) that keep their contracts: their operands are plain views that a backend may
/// trust, but for one thing. A [`Decorator`] hands on what was made for it, so a backend looks at the memory itself to tell
/// whether it is its own.
pub trait Backend: Debug + Send + Sync {
    /// Its name, such as `cpu`.
    fn name(&self) -> &str;
    /// Whether its tensors hold values: a backend that only plans has none, and values need not be made for it.
    fn has_data(&self) -> bool {
        true
    }
    /// Whether its memory is the host's: reading it waits for nothing.
    fn is_host(&self) -> bool {
        false
    }
    /// Whether it computes in f64.
    fn has_f64(&self) -> bool {
        true
    }
    /// What its tensors take; nothing where it does not count that.
    fn memory(&self) -> PoolUsage {
        PoolUsage::default()
    }
    /// Bytes that its tensors may take together, where that is known.
    fn capacity(&self) -> Option<u64> {
        None
    }
    /// Uninitialised memory of at least `bytes` bytes.
    fn alloc(&self, bytes: usize) -> Result<Box<dyn Buffer>>;
    /// Writes bytes of the host.
    fn upload(&self, call: Checked<Upload<'_>>) -> Result<()>;
    /// Reads the first `bytes` bytes of `buffer`; waits for all work before.
    fn download(&self, buffer: &dyn Buffer, bytes: Range<usize>) -> Result<Vec<u8>>;
    /// Reads what [`Backend::download`] would read now, but waits for it only when it is asked for.
    fn read_later(&self, buffer: &dyn Buffer, bytes: Range<usize>) -> Result<Box<dyn Pending>> {
        Ok(Box::new(self.download(buffer, bytes)?))
    }
    /// Copies a view to another, bit for bit.
    fn copy(&self, call: Checked<CopyTo<'_>>) -> Result<()>;
    /// Computes a program element by element.
    fn pointwise(&self, call: Checked<Pointwise<'_>>) -> Result<()>;
    /// A program on groups of operands, each of its own shape: one after another, where the device has no better way.
    fn pointwise_each(&self, call: Checked<PointwiseEach<'_>>) -> Result<()> {
        call.each().try_for_each(|group| self.pointwise(group))
    }
    /// Reduces what a program gives.
    fn reduce(&self, call: Checked<Reduction<'_>>) -> Result<()>;
    /// A matrix product.
    fn matmul(&self, call: Checked<MatMul<'_>>) -> Result<()>;
    /// Rows by index.
    fn gather(&self, call: Checked<Gather<'_>>) -> Result<()>;
    /// Adds to rows by index.
    fn scatter_add(&self, call: Checked<ScatterAdd<'_>>) -> Result<()>;
    /// A kernel of the backend's own, or [`Ran::Declined`]: then the op's composition runs.
    fn fused(&self, call: Checked<Fused<'_>>) -> Result<Ran> {
        let _ = call;
        Ok(Ran::Declined)
    }
}

/// Bytes on their way to the host.
pub trait Pending: Debug + Send {
    /// Waits for them.
    fn wait(self: Box<Self>) -> Result<Vec<u8>>;
}

impl Pending for Vec<u8> {
    fn wait(self: Box<Self>) -> Result<Vec<u8>> {
        Ok(*self)
    }
}

/// Memory of a backend.
pub trait Buffer: Any + Debug + Send + Sync {}

/// Whether a backend ran a fused op.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ran {
    /// It did.
    Done,
    /// It has no kernel for it.
    Declined,
}

/// What random numbers are drawn from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Distribution {
    /// All 32 bits.
    Bits,
    /// Uniform in [0, 1).
    Uniform,
    /// Standard normal.
    Normal,
}

/// A shared handle of a backend.
#[derive(Clone, Debug)]
pub struct Device(Arc<dyn Backend>);

impl Device {
    /// A device from a backend.
    pub fn new(backend: impl Backend + 'static) -> Self {
        Self(Arc::new(backend))
    }

    /// The CPU: one shared device for the process.
    pub fn cpu() -> Self {
        static CPU: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
        CPU.get_or_init(|| Self::new(crate::cpu::Cpu::default())).clone()
    }

    /// The backend behind it.
    pub fn backend(&self) -> &dyn Backend {
        &*self.0
    }

    /// Whether both are the same device.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Memory on a device, shared by the views on it.
#[derive(Debug)]
pub struct Storage {
    device: Device,
    buffer: Box<dyn Buffer>,
    /// As many as were asked for.
    bytes: usize,
    version: AtomicU64,
    /// What the host wrote, where it is small and the memory is elsewhere, and the version since then: reading it back waits
    /// for nothing.
    host: OnceLock<(Vec<u8>, u64)>,
}

/// Bytes up to which the host keeps what it wrote.
const KEPT: usize = 64 << 10;

impl Storage {
    /// Uninitialised memory of `bytes` bytes.
    pub(crate) fn alloc(device: &Device, bytes: usize) -> Result<Arc<Self>> {
        let buffer = device.backend().alloc(bytes)?;
        Ok(Arc::new(Self { device: device.clone(), buffer, bytes, version: AtomicU64::new(0), host: OnceLock::new() }))
    }

    /// Keeps what the host wrote to all of it.
    pub(crate) fn keep(&self, bytes: &[u8]) {
        if bytes.len() <= KEPT && !self.device.backend().is_host() {
            let _ = self.host.set((bytes.to_vec(), self.version()));
        }
    }

    /// What the host wrote, if nothing was written since.
    pub(crate) fn kept(&self) -> Option<&[u8]> {
        self.host.get().filter(|(_, version)| self.version() == *version).map(|(bytes, _)| bytes.as_slice())
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The backend's memory.
    pub fn buffer(&self) -> &dyn Buffer {
        &*self.buffer
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Counts writes in place: what was saved at another version may not be read by backward.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Says that the storage is written: each checked call does, for what it writes.
    pub(crate) fn touch(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
    }
}

/// The common device of `tensors`.
pub(crate) fn common_device<'a>(op: &'static str, tensors: &[&'a Tensor]) -> Result<&'a Device> {
    let first = tensors.first().ok_or_else(|| Error::argument(op, "at least one tensor", 0))?;
    for tensor in tensors {
        if !tensor.device().same(first.device()) {
            return Err(Error::Device {
                op,
                expected: first.device().backend().name().into(),
                got: tensor.device().backend().name().into(),
            });
        }
    }
    Ok(first.device())
}
