//! Any GPU that wgpu reaches: Vulkan, Metal or DirectX 12, and WebGPU in a browser.
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
//! | `platform` | waits and errors, which are others in a browser |
//! | `pointwise`, `reduce`, `matmul`, `index`, `norm`, `attention`, `quant`, `random` | kernels and their launchers |

mod adapter;
mod attention;
mod index;
mod matmul;
mod memory;
mod norm;
mod platform;
mod pointwise;
mod quant;
mod queue;
mod random;
mod reduce;
mod tile;
mod transfer;
mod tuning;
mod view;
mod wgsl;

use std::ops::Range;
use std::sync::Arc;

use flowtape_engine::backend::call::{
    Call, Checked, CopyTo, Gather, MatMul, Pointwise, PointwiseEach, Reduction, ScatterAdd, Upload,
};
use flowtape_engine::backend::{Backend, Buffer, Fused, Pending, Ran};
use flowtape_engine::ops::{
    AttentionBackward, AttentionForward, ModulatedNormBackward, ModulatedNormForward, NormBackward, NormForward,
    NormRopeBackward, NormRopeForward,
};
use flowtape_engine::pool::PoolUsage;
use flowtape_engine::random::RandomFill;
use flowtape_engine::{DType, Device, Error, Result, Tensor};

pub use self::adapter::reports;
use self::memory::{Block, WgpuBuffer};
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

    /// The block of a tensor's memory, which must be this device's.
    fn block<'a>(&self, buffer: &'a dyn Buffer) -> Result<&'a Arc<Block>> {
        block(&self.gpu, buffer)
    }

    /// The window of a tensor, whose memory must be this device's.
    fn view(&self, tensor: &Tensor) -> Result<View> {
        View::of(&self.gpu, tensor)
    }

    fn views(&self, tensors: &[&Tensor]) -> Result<Vec<View>> {
        tensors.iter().map(|tensor| self.view(tensor)).collect()
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

    fn upload(&self, call: Checked<Upload<'_>>) -> Result<()> {
        let Upload { bytes, target } = *call;
        let block = self.block(target.storage().buffer())?;
        if bytes.len() as u64 > block.buffer.size() {
            return Err(Error::argument("upload", format!("at most {} bytes", block.buffer.size()), bytes.len()));
        }
        self.gpu.upload(block, bytes)
    }

    fn download(&self, buffer: &dyn Buffer, bytes: Range<usize>) -> Result<Vec<u8>> {
        self.read_later(buffer, bytes)?.wait()
    }

    fn read_later(&self, buffer: &dyn Buffer, bytes: Range<usize>) -> Result<Box<dyn Pending>> {
        let block = self.block(buffer)?;
        if bytes.end as u64 > block.buffer.size() {
            return Err(Error::argument("download", format!("at most {} bytes", block.buffer.size()), bytes.end));
        }
        Ok(Box::new(self.gpu.read_later(block, bytes)?))
    }

    fn copy(&self, call: Checked<CopyTo<'_>>) -> Result<()> {
        let (source, target) = (self.view(call.source)?, self.view(call.target)?);
        pointwise::run(&self.gpu, Body::Copy, &[source], &[], &[target])
    }

    fn pointwise(&self, call: Checked<Pointwise<'_>>) -> Result<()> {
        let (inputs, outputs) = (self.views(call.inputs)?, self.views(call.outputs)?);
        pointwise::run(&self.gpu, Body::Program(call.program), &inputs, &narrowed(call.scalars), &outputs)
    }

    fn pointwise_each(&self, call: Checked<PointwiseEach<'_>>) -> Result<()> {
        let groups = call.groups.iter().map(|(inputs, outputs)| Ok((self.views(inputs)?, self.views(outputs)?)));
        let groups = groups.collect::<Result<Vec<_>>>()?;
        pointwise::run_each(&self.gpu, call.program, &groups, &narrowed(call.scalars))
    }

    fn reduce(&self, call: Checked<Reduction<'_>>) -> Result<()> {
        if call.is_empty() {
            return Ok(());
        }
        let (inputs, outputs) = (self.views(call.inputs)?, self.views(call.outputs)?);
        reduce::run(&self.gpu, call.program, call.kind, &inputs, &narrowed(call.scalars), &outputs)
    }

    fn matmul(&self, call: Checked<MatMul<'_>>) -> Result<()> {
        let bias = call.bias.map(|bias| self.view(bias)).transpose()?;
        let (a, b, out) = (self.view(call.a)?, self.view(call.b)?, self.view(call.out)?);
        matmul::run(&self.gpu, &a, &b, bias.as_ref(), call.accumulate, &out)
    }

    fn gather(&self, call: Checked<Gather<'_>>) -> Result<()> {
        index::gather(&self.gpu, &self.view(call.table)?, &self.view(call.index)?, &self.view(call.out)?)
    }

    fn scatter_add(&self, call: Checked<ScatterAdd<'_>>) -> Result<()> {
        index::scatter_add(&self.gpu, &self.view(call.rows)?, &self.view(call.index)?, &self.view(call.out)?)
    }

    fn fused(&self, call: Checked<Fused<'_>>) -> Result<Ran> {
        if call.reads().chain(call.writes()).any(|t| t.dtype() == DType::F64) {
            return Ok(Ran::Declined);
        }
        let gpu = &self.gpu;
        // What exceeds a binding is done in parts, of which a row is the least.
        let rows = |tensors: &[&Tensor]| {
            let row = |t: &&Tensor| t.dims().last().is_some_and(|width| gpu.bounds.binding.holds(4 * width));
            tensors.iter().all(|t| t.layout().strides.last() == Some(&1) && row(t))
        };
        let present =
            |tensors: &[Option<&Tensor>]| tensors.iter().flatten().map(|t| self.view(t)).collect::<Result<Vec<_>>>();
        let done = match *call {
            Fused::AttentionForward(AttentionForward { q, k, v, mask, scale, o, lse }) => {
                let inputs = present(&[Some(q), Some(k), Some(v), mask])?;
                attention::forward(gpu, scale, &inputs, &self.view(o)?, &self.view(lse)?)?
            }
            Fused::AttentionBackward(AttentionBackward { d_mask: Some(_), .. }) => false,
            Fused::AttentionBackward(AttentionBackward { q, k, v, mask, scale, o, lse, grad, dq, dk, dv, .. }) => {
                let mut inputs = self.views(&[q, k, v, o, grad, lse])?;
                inputs.extend(mask.map(|mask| self.view(mask)).transpose()?);
                attention::backward(gpu, scale, &inputs, &self.views(&[dq, dk, dv])?)?
            }
            Fused::NormForward(NormForward { x, weight, bias, eps, y, mean, rstd }) => {
                let then = Then::Affine { weight: weight.is_some(), bias: bias.is_some() };
                let (inputs, outputs) = (present(&[Some(x), weight, bias])?, present(&[Some(y), mean, Some(rstd)])?);
                norm::forward(gpu, Norm { centred: mean.is_some(), then }, eps, &inputs, &outputs)?
            }
            Fused::NormBackward(NormBackward { x, weight, mean, rstd, grad, dx }) => {
                let then = Then::Affine { weight: weight.is_some(), bias: false };
                let inputs = present(&[Some(x), Some(grad), Some(rstd), mean, weight])?;
                norm::backward(gpu, Norm { centred: mean.is_some(), then }, &inputs, &self.view(dx)?)?
            }
            Fused::ModulatedNormForward(ModulatedNormForward { x, shift, scale, eps, y, mean, rstd }) => {
                rows(&[x, shift, scale]) && {
                    let (inputs, outputs) = (self.views(&[x, shift, scale])?, self.views(&[y, mean, rstd])?);
                    norm::forward(gpu, Norm::MODULATED, eps, &inputs, &outputs)?
                }
            }
            Fused::ModulatedNormBackward(call) => {
                let ModulatedNormBackward { x, scale, mean, rstd, grad, dx, d_shift, d_scale } = call;
                rows(&[x, scale, grad]) && {
                    let inputs = self.views(&[x, grad, mean, rstd, scale])?;
                    norm::modulated_backward(gpu, &inputs, &self.views(&[dx, d_shift, d_scale])?)?
                }
            }
            Fused::NormRopeForward(NormRopeForward { x, weight, cos, sin, eps, layout, y, rstd }) => {
                rows(&[x, weight, cos, sin]) && {
                    let inputs = self.views(&[x, weight, cos, sin])?;
                    norm::forward(gpu, Norm::rotated(layout), eps, &inputs, &self.views(&[y, rstd])?)?
                }
            }
            Fused::NormRopeBackward(NormRopeBackward { x, weight, cos, sin, layout, rstd, grad, dx, dw }) => {
                rows(&[x, weight, cos, sin, grad]) && {
                    let inputs = self.views(&[x, grad, rstd, weight, cos, sin])?;
                    norm::rotated_backward(gpu, layout, &inputs, &self.views(&[dx, dw])?)?
                }
            }
            Fused::Dequantise(call) => quant::dequantise(gpu, &call, &self.view(call.words)?, &self.view(call.out)?)?,
            Fused::Random(RandomFill { distribution, seed, counter, out }) => {
                random::fill(gpu, distribution, seed, counter, &self.view(out)?)?;
                true
            }
            _ => false,
        };
        Ok(if done { Ran::Done } else { Ran::Declined })
    }
}
