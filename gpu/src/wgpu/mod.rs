//! Any GPU that wgpu reaches: Vulkan, Metal or DirectX 12.
//!
//! | file | what is in it |
//! |---|---|
//! | `adapter` | the adapters: what they are, which can be used, how one is opened |
//! | `memory`, `view` | buffers in the engine's pool; strided windows and how bindings hold them |
//! | `queue` | kernels compiled once, recorded one after the other, submitted many at once |
//! | `transfer` | bytes to the device and back |
//! | `wgsl` | what all kernels' texts share: bindings, dtypes, programs |
//! | `tile` | products of tiles, of which `matmul` and `attention` are made |
//! | `tuning` | measured choices among kernels, kept on disk |
//! | `pointwise`, `reduce`, `matmul`, `index`, `norm`, `attention`, `random` | kernels and their launchers |

mod adapter;
mod attention;
mod index;
mod matmul;
mod memory;
mod norm;
mod pointwise;
mod queue;
mod random;
mod reduce;
mod tile;
mod transfer;
mod tuning;
mod view;
mod wgsl;

use std::sync::Arc;

use flowtape_engine::backend::{Backend, Buffer, Fused, Pending, Ran};
use flowtape_engine::expr::{Program, Reduce};
use flowtape_engine::pool::PoolUsage;
use flowtape_engine::{DType, Device, Error, Result, Tensor};

pub use self::adapter::reports;
use self::memory::WgpuBuffer;
use self::norm::{Norm, Then};
use self::pointwise::Body;
pub use self::queue::Counts;
use self::queue::Gpu;
use self::view::{View, block};

/// Restrictions on what a device is taken to have: its own limits by default. For tests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WgpuOptions {
    /// Bytes of a storage binding; at least a kilobyte.
    pub max_binding_size: Option<u64>,
    /// Storage buffers of a kernel; at least 8.
    pub max_bindings: Option<usize>,
    /// Workgroups along an axis.
    pub max_workgroups: Option<u32>,
    /// Whether kernels are chosen by measurement. By default the environment's `FLOWTAPE_TUNE` says so (`1` or `0`), else it
    /// is done on everything but software.
    pub tune: Option<bool>,
}

/// A GPU. Clones are the same.
#[derive(Clone, Debug)]
pub struct Wgpu {
    gpu: Arc<Gpu>,
}

impl Wgpu {
    /// Opens adapter `index` of [`reports`]; the first that is usable, GPUs before software, if none is named.
    ///
    /// # Errors
    /// When there is no such adapter, or it can't be used.
    pub fn open(index: Option<usize>, options: WgpuOptions) -> Result<Self> {
        let gpu = Arc::new(adapter::open(index, options)?);
        matmul::check_cooperative(&gpu)?;
        Ok(Self { gpu })
    }

    /// The device of [`Wgpu::open`].
    ///
    /// # Errors
    /// Those of [`Wgpu::open`].
    pub fn device(index: Option<usize>) -> Result<Device> {
        Ok(Device::new(Self::open(index, WgpuOptions::default())?))
    }

    /// What it has done so far.
    pub fn counts(&self) -> Counts {
        self.gpu.counts()
    }

    /// Lets all tensors together, with what the pool keeps, take at most so many bytes: what is left is for others.
    pub fn limit_memory(&self, bytes: u64) {
        self.gpu.pool.raw().limit(bytes);
    }

    /// Gives the device up, as if it were lost: everything on it fails from now on.
    pub fn destroy(&self) {
        self.gpu.destroy();
    }
}

/// Scalars as kernels take them.
fn narrowed(scalars: &[f64]) -> Vec<f32> {
    scalars.iter().map(|s| *s as f32).collect()
}

impl Backend for Wgpu {
    fn name(&self) -> &str {
        &self.gpu.name
    }

    fn has_f64(&self) -> bool {
        false
    }

    fn memory(&self) -> PoolUsage {
        self.gpu.pool.usage()
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Buffer>> {
        Ok(Box::new(WgpuBuffer(self.gpu.alloc(bytes)?)))
    }

    fn upload(&self, buffer: &dyn Buffer, bytes: &[u8]) -> Result<()> {
        let block = block(buffer)?;
        if bytes.len() as u64 > block.buffer.size() {
            return Err(Error::argument("upload", format!("at most {} bytes", block.buffer.size()), bytes.len()));
        }
        self.gpu.upload(block, bytes)
    }

    fn download(&self, buffer: &dyn Buffer, bytes: usize) -> Result<Vec<u8>> {
        self.read_later(buffer, bytes)?.wait()
    }

    fn read_later(&self, buffer: &dyn Buffer, bytes: usize) -> Result<Box<dyn Pending>> {
        let block = block(buffer)?;
        if bytes as u64 > block.buffer.size() {
            return Err(Error::argument("download", format!("at most {} bytes", block.buffer.size()), bytes));
        }
        Ok(Box::new(self.gpu.read_later(block, bytes)?))
    }

    fn copy(&self, source: &Tensor, target: &Tensor) -> Result<()> {
        let (source, target) = (View::of(source)?, View::of(target)?);
        if source.dims != target.dims || source.dtype != target.dtype {
            return Err(Error::shape("copy", format!("{} {:?}", target.dtype, target.dims), source.dims));
        }
        pointwise::run(&self.gpu, Body::Copy, &[source], &[], &[target])
    }

    fn pointwise(&self, program: &Program, inputs: &[&Tensor], scalars: &[f64], outputs: &[&Tensor]) -> Result<()> {
        program.check_counts(inputs.len(), scalars.len(), outputs.len())?;
        let (inputs, outputs) = (View::all(inputs)?, View::all(outputs)?);
        pointwise::run(&self.gpu, Body::Program(program), &inputs, &narrowed(scalars), &outputs)
    }

    fn pointwise_each(
        &self,
        program: &Program,
        groups: &[(Vec<&Tensor>, Vec<&Tensor>)],
        scalars: &[f64],
    ) -> Result<()> {
        let group = |(inputs, outputs): &(Vec<&Tensor>, Vec<&Tensor>)| {
            program.check_counts(inputs.len(), scalars.len(), outputs.len())?;
            Ok((View::all(inputs)?, View::all(outputs)?))
        };
        let groups = groups.iter().map(group).collect::<Result<Vec<_>>>()?;
        pointwise::run_each(&self.gpu, program, &groups, &narrowed(scalars))
    }

    fn reduce(
        &self,
        program: &Program,
        kind: Reduce,
        inputs: &[&Tensor],
        scalars: &[f64],
        outputs: &[&Tensor],
    ) -> Result<()> {
        program.check_counts(inputs.len(), scalars.len(), outputs.len())?;
        let (inputs, outputs) = (View::all(inputs)?, View::all(outputs)?);
        reduce::run(&self.gpu, program, kind, &inputs, &narrowed(scalars), &outputs)
    }

    fn matmul(&self, a: &Tensor, b: &Tensor, bias: Option<&Tensor>, accumulate: bool, out: &Tensor) -> Result<()> {
        let bias = bias.map(View::of).transpose()?;
        matmul::run(&self.gpu, &View::of(a)?, &View::of(b)?, bias.as_ref(), accumulate, &View::of(out)?)
    }

    fn gather(&self, table: &Tensor, at: &Tensor, out: &Tensor) -> Result<()> {
        index::gather(&self.gpu, &View::of(table)?, &View::of(at)?, &View::of(out)?)
    }

    fn scatter_add(&self, rows: &Tensor, at: &Tensor, out: &Tensor) -> Result<()> {
        index::scatter_add(&self.gpu, &View::of(rows)?, &View::of(at)?, &View::of(out)?)
    }

    fn fuses(&self, op: &Fused, inputs: &[&Tensor]) -> bool {
        let narrow = |t: &Tensor| matches!(t.dtype(), DType::F32 | DType::BF16 | DType::F16);
        // What exceeds a binding is done in parts, of which a row is the least.
        let dense = |t: &Tensor| t.layout().strides.last() == Some(&1);
        let row = |t: &Tensor| t.dims().last().is_some_and(|width| self.gpu.bounds.binding.holds(4 * width));
        matches!(op, Fused::ModulatedNormForward { .. } | Fused::NormRopeForward { .. })
            && inputs.iter().all(|t| narrow(t) && dense(t) && row(t))
    }

    fn fused(&self, op: &Fused, inputs: &[&Tensor], outputs: &[&Tensor]) -> Result<Ran> {
        if inputs.iter().chain(outputs).any(|t| t.dtype() == DType::F64) {
            return Ok(Ran::Declined);
        }
        let (x, y) = (View::all(inputs)?, View::all(outputs)?);
        let gpu = &self.gpu;
        let done = match (op, &y[..]) {
            (Fused::AttentionForward { scale, .. }, [o, lse]) => attention::forward(gpu, *scale, &x, o, lse)?,
            (Fused::AttentionBackward { scale, .. }, [_, _, _]) => attention::backward(gpu, *scale, &x, &y)?,
            (Fused::NormForward { centred, weight, bias, eps }, _) => {
                let then = Then::Affine { weight: *weight, bias: *bias };
                norm::forward(gpu, Norm { centred: *centred, then }, *eps, &x, &y)?
            }
            (Fused::NormBackward { centred, weight }, [dx]) => {
                let then = Then::Affine { weight: *weight, bias: false };
                norm::backward(gpu, Norm { centred: *centred, then }, &x, dx)?
            }
            (Fused::ModulatedNormForward { eps }, _) => norm::forward(gpu, Norm::MODULATED, *eps, &x, &y)?,
            (Fused::ModulatedNormBackward, _) => norm::modulated_backward(gpu, &x, &y)?,
            (Fused::NormRopeForward { eps, layout }, _) => norm::forward(gpu, Norm::rotated(*layout), *eps, &x, &y)?,
            (Fused::NormRopeBackward { layout }, _) => norm::rotated_backward(gpu, *layout, &x, &y)?,
            (Fused::Random { distribution, seed, counter }, [out]) => {
                random::fill(gpu, *distribution, *seed, *counter, out)?;
                true
            }
            _ => false,
        };
        Ok(if done { Ran::Done } else { Ran::Declined })
    }
}
