//! What a device has to offer.

use std::any::Any;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::expr::{Program, Reduce};
use crate::ops::RopeLayout;
use crate::pool::PoolUsage;
use crate::{Error, Result, Tensor};

/// A device. Object-safe and small; everything only enqueues, `download` alone waits.
///
/// Tensors handed in are plain views of storage on this device: an output is written, never re-made.
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
    /// Uninitialised memory of at least `bytes` bytes.
    fn alloc(&self, bytes: usize) -> Result<Box<dyn Buffer>>;
    /// Writes `bytes` to the start of `buffer`.
    fn upload(&self, buffer: &dyn Buffer, bytes: &[u8]) -> Result<()>;
    /// Reads the first `bytes` bytes of `buffer`; waits for all work before.
    fn download(&self, buffer: &dyn Buffer, bytes: usize) -> Result<Vec<u8>>;
    /// Reads what [`Backend::download`] would read now, but waits for it only when it is asked for.
    fn read_later(&self, buffer: &dyn Buffer, bytes: usize) -> Result<Box<dyn Pending>> {
        Ok(Box::new(self.download(buffer, bytes)?))
    }
    /// Copies a view to another of the same dims and dtype, bit for bit.
    fn copy(&self, source: &Tensor, target: &Tensor) -> Result<()>;
    /// `outputs = program(inputs)`, element by element. All views have the dims of the outputs.
    fn pointwise(&self, program: &Program, inputs: &[&Tensor], scalars: &[f64], outputs: &[&Tensor]) -> Result<()>;
    /// The same program on groups of operands, each of its own shape: inputs, then outputs. One after another, where the device
    /// has no better way; what one group writes no other may use.
    fn pointwise_each(
        &self,
        program: &Program,
        groups: &[(Vec<&Tensor>, Vec<&Tensor>)],
        scalars: &[f64],
    ) -> Result<()> {
        groups.iter().try_for_each(|(inputs, outputs)| self.pointwise(program, inputs, scalars, outputs))
    }
    /// `outputs = kind over the axes where an output has size 1 of program(inputs)`.
    fn reduce(
        &self,
        program: &Program,
        kind: Reduce,
        inputs: &[&Tensor],
        scalars: &[f64],
        outputs: &[&Tensor],
    ) -> Result<()>;
    /// `out[.., m, n] (+)= a[.., m, k] b[.., k, n] + bias[n]`, leading axes equal (stride 0 repeats).
    fn matmul(&self, a: &Tensor, b: &Tensor, bias: Option<&Tensor>, accumulate: bool, out: &Tensor) -> Result<()>;
    /// `out[i, ..] = table[index[i], ..]`; `table` and `out` contiguous, index u32 `[n]`.
    fn gather(&self, table: &Tensor, index: &Tensor, out: &Tensor) -> Result<()>;
    /// `out[index[i], ..] += rows[i, ..]`, in the order of `i`.
    fn scatter_add(&self, rows: &Tensor, index: &Tensor, out: &Tensor) -> Result<()>;
    /// Whether [`Backend::fused`] runs `op` on such inputs, and its gradient on what belongs to them. Asked where the
    /// composition is one of recorded ops, which has to be known before.
    fn fuses(&self, op: &Fused, inputs: &[&Tensor]) -> bool {
        let _ = (op, inputs);
        false
    }
    /// A kernel of the backend's own, or [`Ran::Declined`]: then the op's composition runs.
    fn fused(&self, op: &Fused, inputs: &[&Tensor], outputs: &[&Tensor]) -> Result<Ran> {
        let _ = (op, inputs, outputs);
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

/// Operations that a backend may have a kernel for. Each is defined by its composition.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Fused {
    /// Inputs q, k, v `[B, H, L, D]` and maybe an additive f32 mask; outputs o `[B, H, Lq, Dv]` and
    /// the log-sum-exp of the scores, f32 (f64 for f64) `[B, H, Lq]`.
    AttentionForward {
        /// Factor of the scores.
        scale: f64,
        /// Whether the fourth input is a mask.
        masked: bool,
    },
    /// Inputs x, then weight and bias `[d]` where there are such; outputs y, then the mean (where centred) and the
    /// reciprocal deviation of each row, f32 (f64 for f64), with a last axis of size 1.
    NormForward {
        /// Whether the mean is taken off: LayerNorm; else RMSNorm.
        centred: bool,
        /// Whether there is a weight.
        weight: bool,
        /// Whether there is a bias.
        bias: bool,
        /// Added to the variance.
        eps: f64,
    },
    /// Inputs x, the gradient of y, the reciprocal deviation, then the mean and the weight where there are such;
    /// output dx.
    NormBackward {
        /// As forward.
        centred: bool,
        /// As forward.
        weight: bool,
    },
    /// Inputs x `[B, L, d]`, shift and scale `[B, 1, d]` or `[B, L, d]`; outputs `y = layer_norm(x) (1 + scale) + shift`, and
    /// the mean and the reciprocal deviation of each row, f32 `[B, L, 1]`.
    ModulatedNormForward {
        /// Added to the variance.
        eps: f64,
    },
    /// Inputs x, the gradient of y (dense), mean and reciprocal deviation, scale; outputs the gradients of x, shift and
    /// scale.
    ModulatedNormBackward,
    /// Inputs x `[B, L, H, d]`, a weight `[d]`, cosines and sines `[L, d]`, f32; outputs the rotated `rms_norm(x) weight`, and
    /// the reciprocal root mean square of each row, f32 `[B, L, H, 1]`.
    NormRopeForward {
        /// Added to the mean square.
        eps: f64,
        /// Which elements form a pair.
        layout: RopeLayout,
    },
    /// Inputs x, the gradient of y, the reciprocal root mean squares, weight, cosines and sines; outputs the gradients of x
    /// and the weight.
    NormRopeBackward {
        /// As forward.
        layout: RopeLayout,
    },
    /// Inputs q, k, v, o, the gradient of o, the log-sum-exp and maybe the mask; outputs dq, dk, dv.
    AttentionBackward {
        /// Factor of the scores.
        scale: f64,
        /// Whether the last input is a mask.
        masked: bool,
    },
    /// No input; output contiguous random numbers of Philox4x32-10 from a fresh block on: u32 for bits, else f32.
    Random {
        /// What is drawn.
        distribution: Distribution,
        /// The generator's key.
        seed: u64,
        /// Its next block.
        counter: u64,
    },
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

impl Fused {
    /// Its name in profiles.
    pub fn name(&self) -> &'static str {
        match self {
            Self::AttentionForward { .. } => "attention",
            Self::AttentionBackward { .. } => "attention backward",
            Self::NormForward { .. } => "norm",
            Self::NormBackward { .. } => "norm backward",
            Self::ModulatedNormForward { .. } => "modulated norm",
            Self::ModulatedNormBackward => "modulated norm backward",
            Self::NormRopeForward { .. } => "norm and rope",
            Self::NormRopeBackward { .. } => "norm and rope backward",
            Self::Random { .. } => "random numbers",
        }
    }

    /// Floating-point operations of its matrix products.
    pub fn flops(&self, inputs: &[&Tensor]) -> f64 {
        let products = match self {
            Self::AttentionForward { .. } => 2,
            Self::AttentionBackward { .. } => 5,
            _ => return 0.0,
        };
        let (Some(q), Some(k)) = (inputs.first(), inputs.get(1)) else { return 0.0 };
        2.0 * products as f64 * (q.numel() * k.dims().get(2).copied().unwrap_or(0)) as f64
    }
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
    version: AtomicU64,
    /// What the host wrote, where it is small and the memory is elsewhere: reading it back waits for nothing.
    host: OnceLock<Vec<u8>>,
}

/// Bytes up to which the host keeps what it wrote.
const KEPT: usize = 64 << 10;

impl Storage {
    /// Uninitialised memory of `bytes` bytes.
    pub(crate) fn alloc(device: &Device, bytes: usize) -> Result<Arc<Self>> {
        let buffer = device.backend().alloc(bytes)?;
        Ok(Arc::new(Self { device: device.clone(), buffer, version: AtomicU64::new(0), host: OnceLock::new() }))
    }

    /// Keeps what the host wrote to all of it.
    pub(crate) fn keep(&self, bytes: &[u8]) {
        if bytes.len() <= KEPT && !self.device.backend().is_host() {
            let _ = self.host.set(bytes.to_vec());
        }
    }

    /// What the host wrote, if nothing was written since.
    pub(crate) fn kept(&self) -> Option<&[u8]> {
        self.host.get().filter(|_| self.version() == 0).map(Vec::as_slice)
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The backend's memory.
    pub fn buffer(&self) -> &dyn Buffer {
        &*self.buffer
    }

    /// Counts writes in place: what was saved at another version may not be read by backward.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Says that the storage is written in place.
    pub(crate) fn touch(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
    }
}

/// Runs a kernel that the backend said it has.
pub(crate) fn run_fused(op: &Fused, inputs: &[&Tensor], outputs: &[&Tensor]) -> Result<()> {
    match inputs[0].device().backend().fused(op, inputs, outputs)? {
        Ran::Done => Ok(()),
        Ran::Declined => Err(Error::argument(op.name(), "a backend that runs what it fuses", "one that declined")),
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
