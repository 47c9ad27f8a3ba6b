//! The CPU backend: SIMD kernels chosen at run time, spread over rayon's threads.

mod adamw;
mod attention;
mod blocks;
mod eval;
mod gemm;
mod index;
mod isa;
mod lanes;
mod limits;
mod math;
mod norm;
mod norm_fused;
mod opcode_loops;
mod pointwise;
mod pool;
mod programs;
mod quant;
mod square_sum;
mod team;

use std::any::Any;
use std::ops::Range;

use smallvec::SmallVec;

use self::isa::{Isa, isa};
pub use self::limits::peak_flops;
pub(crate) use self::pool::ALIGN;
use self::pool::{CpuBuffer, Host};
pub use self::team::{alone, awake, usable_threads};
use crate::backend::call::{Call, Checked, CopyTo, Gather, MatMul, Pointwise, Reduction, ScatterAdd, Upload};
use crate::backend::{Backend, Buffer, Fused, Ran};
use crate::expr::Reduce;
use crate::ops::{
    AttentionBackward, AttentionForward, ConvForward, ModulatedNormBackward, ModulatedNormForward, NormBackward,
    NormForward, NormRopeBackward, NormRopeForward,
};
pub use crate::platform::cores;
use crate::pool::{Pool, PoolUsage};
use crate::quant::Dequantise;
use crate::shape::is_contiguous;
use crate::{DType, Error, Result, Tensor};

/// The CPU. Work runs on the current rayon pool, or the calling thread and the global pool; results do not depend on its size.
#[derive(Debug)]
pub struct Cpu {
    pool: Pool<Host>,
}

impl Default for Cpu {
    fn default() -> Self {
        Self { pool: pool::pool() }
    }
}

/// The instruction set in use: `portable`, `avx2`, `avx512`, `avx512bf16`, `neon` or `neonbf16`. It is the machine's best, or less if the
/// environment variable `FLOWTAPE_ISA` names less.
pub fn instruction_set() -> &'static str {
    name(isa())
}

/// The instruction sets that the machine has, poorest first, by the names that `FLOWTAPE_ISA` takes.
pub fn instruction_sets() -> Vec<&'static str> {
    Isa::available().map(name).collect()
}

fn name(isa: Isa) -> &'static str {
    Isa::NAMES.iter().find(|(_, known)| *known == isa).map_or("", |(name, _)| name)
}

/// A strided window on memory of one dtype. Strides count elements; 0 repeats.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a> {
    /// The first element.
    pub ptr: *mut u8,
    pub dtype: DType,
    pub dims: &'a [usize],
    pub strides: &'a [usize],
}

impl View<'_> {
    /// Whether its elements lie row-major without gaps.
    fn is_contiguous(&self) -> bool {
        is_contiguous(self.dims, self.strides)
    }

    /// Whether both are the same elements in the same order.
    fn is_like(&self, other: &Self) -> bool {
        std::ptr::eq(self.ptr, other.ptr)
            && (self.dtype, self.dims, self.strides) == (other.dtype, other.dims, other.strides)
    }
}

// SAFETY: a view is an address; each kernel states what may be read and written through it.
unsafe impl Send for View<'_> {}
// SAFETY: as above.
unsafe impl Sync for View<'_> {}

fn buffer(buffer: &dyn Buffer) -> Result<&CpuBuffer> {
    (buffer as &dyn Any).downcast_ref().ok_or_else(|| Error::Device {
        op: "cpu",
        expected: "memory of the CPU".into(),
        got: format!("{buffer:?}"),
    })
}

fn view(tensor: &Tensor) -> Result<View<'_>> {
    let layout = tensor.layout();
    let base = buffer(tensor.storage().buffer())?.as_ptr();
    let ptr = base.wrapping_add(layout.offset * tensor.dtype().size());
    Ok(View { ptr, dtype: tensor.dtype(), dims: &layout.dims, strides: &layout.strides })
}

fn views<'a>(tensors: &[&'a Tensor]) -> Result<SmallVec<[View<'a>; 6]>> {
    tensors.iter().map(|t| view(t)).collect()
}

impl Backend for Cpu {
    fn name(&self) -> &str {
        "cpu"
    }

    fn is_host(&self) -> bool {
        true
    }

    fn memory(&self) -> PoolUsage {
        self.pool.usage()
    }

    fn capacity(&self) -> Option<u64> {
        limits::memory().map(|free| free + self.pool.usage().used)
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Buffer>> {
        Ok(Box::new(self.pool.alloc(bytes)?))
    }

    fn upload(&self, call: Checked<Upload<'_>>) -> Result<()> {
        let Upload { bytes, target } = *call;
        let target = buffer(target.storage().buffer())?;
        if bytes.len() > target.bytes() {
            return Err(Error::argument("upload", format!("at most {} bytes", target.bytes()), bytes.len()));
        }
        // SAFETY: the buffer holds that many bytes, and what the host gives lies elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn download(&self, source: &dyn Buffer, bytes: Range<usize>) -> Result<Vec<u8>> {
        let source = buffer(source)?;
        if bytes.end > source.bytes() {
            return Err(Error::argument("download", format!("at most {} bytes", source.bytes()), bytes.end));
        }
        // SAFETY: the buffer holds that many initialised bytes.
        Ok(unsafe { std::slice::from_raw_parts(source.as_ptr(), bytes.end) }[bytes.start..].to_vec())
    }

    fn copy(&self, call: Checked<CopyTo<'_>>) -> Result<()> {
        // SAFETY: the call is checked; views of tensors lie in their memory, and the target meets no other.
        unsafe { index::copy(&view(call.source)?, &view(call.target)?) };
        Ok(())
    }

    fn pointwise(&self, call: Checked<Pointwise<'_>>) -> Result<()> {
        if call.is_empty() {
            return Ok(());
        }
        let Pointwise { program, inputs, scalars, outputs } = *call;
        let (inputs, outputs) = (views(inputs)?, views(outputs)?);
        // SAFETY: the call is checked; an output is an input exactly or meets none.
        unsafe {
            let own = programs::kernel(program);
            if !own.is_some_and(|kernel| kernel(isa(), &inputs, scalars, &outputs)) {
                pointwise::pointwise(program, &inputs, scalars, &outputs, isa());
            }
        }
        Ok(())
    }

    fn reduce(&self, call: Checked<Reduction<'_>>) -> Result<()> {
        if call.is_empty() {
            return Ok(());
        }
        let Reduction { program, kind, inputs, scalars, outputs } = *call;
        let (inputs, outputs) = (views(inputs)?, views(outputs)?);
        // SAFETY: the call is checked.
        unsafe {
            let own = kind == Reduce::Sum && programs::is_square(program);
            if !(own && square_sum::square_sum(isa(), &inputs[0], &outputs[0])) {
                pointwise::reduce(program, kind, &inputs, scalars, &outputs, isa());
            }
        }
        Ok(())
    }

    fn matmul(&self, call: Checked<MatMul<'_>>) -> Result<()> {
        let MatMul { a, b, bias, accumulate, out } = *call;
        let bias = bias.map(view).transpose()?;
        // SAFETY: the call is checked.
        unsafe { gemm::matmul(isa(), &view(a)?, &view(b)?, bias.as_ref(), accumulate, &view(out)?) };
        Ok(())
    }

    fn gather(&self, call: Checked<Gather<'_>>) -> Result<()> {
        let Gather { table, index, out } = *call;
        let at = index.to_vec::<u32>()?;
        check_index("index_select", &at, table.dims()[0])?;
        // SAFETY: the call is checked, and the indices are in range.
        unsafe { index::gather(&view(table)?, &at, &view(out)?) };
        Ok(())
    }

    fn scatter_add(&self, call: Checked<ScatterAdd<'_>>) -> Result<()> {
        let ScatterAdd { rows, index, out } = *call;
        let at = index.to_vec::<u32>()?;
        check_index("scatter_add", &at, out.dims()[0])?;
        // SAFETY: the call is checked, and the indices are in range.
        unsafe { index::scatter_add(&view(rows)?, &at, &view(out)?) };
        Ok(())
    }

    fn fused(&self, call: Checked<Fused<'_>>) -> Result<Ran> {
        if call.reads().chain(call.writes()).any(|t| t.dtype() == DType::F64) {
            return Ok(Ran::Declined);
        }
        // SAFETY: the call is checked, and no operand is f64.
        let ran = unsafe {
            match *call {
                Fused::AttentionForward(AttentionForward { q, k, v, mask, scale, o, lse }) => {
                    let ([q, k, v, o, lse], mask) = (each([q, k, v, o, lse])?, some(mask)?);
                    attention::attention_forward(&q, &k, &v, mask.as_ref(), scale, &o, &lse);
                    true
                }
                Fused::AttentionBackward(AttentionBackward { d_mask: Some(_), .. }) => false,
                Fused::AttentionBackward(AttentionBackward {
                    q, k, v, mask, scale, o, lse, grad, dq, dk, dv, ..
                }) => {
                    let ([q, k, v, o, grad, lse], mask) = (each([q, k, v, o, grad, lse])?, some(mask)?);
                    let [dq, dk, dv] = each([dq, dk, dv])?;
                    attention::attention_backward(&q, &k, &v, &o, &grad, &lse, mask.as_ref(), scale, &dq, &dk, &dv);
                    true
                }
                Fused::ConvForward(ConvForward { x, weight, bias, axes, groups, y }) => {
                    let ([x, weight, y], bias) = (each([x, weight, y])?, some(bias)?);
                    gemm::convolution(isa(), [&x, &weight, &y], bias.as_ref(), axes, groups);
                    true
                }
                Fused::NormForward(NormForward { x, weight, bias, eps, y, mean, rstd }) => {
                    let ([x, y, rstd], [weight, bias]) = (each([x, y, rstd])?, [some(weight)?, some(bias)?]);
                    let affine = [weight.as_ref(), bias.as_ref()];
                    norm::norm_forward(&x, affine, eps, &y, some(mean)?.as_ref(), &rstd)
                }
                Fused::NormBackward(NormBackward { x, weight, mean, rstd, grad, dx }) => {
                    let [x, rstd, grad, dx] = each([x, rstd, grad, dx])?;
                    norm::norm_backward(&x, some(mean)?.as_ref(), &rstd, some(weight)?.as_ref(), &grad, &dx)
                }
                Fused::ModulatedNormForward(ModulatedNormForward { x, shift, scale, eps, y, mean, rstd }) => {
                    let dense = [x, shift, scale, y].into_iter().all(is_dense);
                    let ([x, shift, scale], [y, mean, rstd]) = (each([x, shift, scale])?, each([y, mean, rstd])?);
                    if dense {
                        norm_fused::modulated_forward([&x, &shift, &scale], eps, [&y, &mean, &rstd]);
                    }
                    dense
                }
                Fused::ModulatedNormBackward(ModulatedNormBackward {
                    x,
                    scale,
                    mean,
                    rstd,
                    grad,
                    dx,
                    d_shift,
                    d_scale,
                }) => {
                    let dense = [x, scale, grad, dx].into_iter().all(is_dense);
                    let [x, grad, mean, rstd, scale] = each([x, grad, mean, rstd, scale])?;
                    let [dx, d_shift, d_scale] = each([dx, d_shift, d_scale])?;
                    if dense {
                        let inputs = [&x, &grad, &mean, &rstd, &scale];
                        norm_fused::modulated_backward(inputs, [&dx, &d_shift, &d_scale]);
                    }
                    dense
                }
                Fused::NormRopeForward(NormRopeForward { x, weight, cos, sin, eps, layout, y, rstd }) => {
                    let dense = [x, cos, sin, y].into_iter().all(is_dense) && are_f32([cos, sin]);
                    let ([x, weight, cos, sin], [y, rstd]) = (each([x, weight, cos, sin])?, each([y, rstd])?);
                    if dense {
                        norm_fused::norm_rope_forward([&x, &weight, &cos, &sin], eps, layout, [&y, &rstd]);
                    }
                    dense
                }
                Fused::NormRopeBackward(NormRopeBackward { x, weight, cos, sin, layout, rstd, grad, dx, dw }) => {
                    let dense = [x, cos, sin, grad, dx].into_iter().all(is_dense) && are_f32([cos, sin]);
                    let [x, grad, rstd, weight, cos, sin] = each([x, grad, rstd, weight, cos, sin])?;
                    let [dx, dw] = each([dx, dw])?;
                    if dense {
                        let inputs = [&x, &grad, &rstd, &weight, &cos, &sin];
                        norm_fused::norm_rope_backward(inputs, layout, [&dx, &dw]);
                    }
                    dense
                }
                Fused::Dequantise(Dequantise { format, dims, words, start, out }) => {
                    quant::dequantise(isa(), format, dims, &view(words)?, start, &view(out)?);
                    true
                }
                Fused::Random(_) => false,
            }
        };
        Ok(if ran { Ran::Done } else { Ran::Declined })
    }
}

/// The view of a tensor that may be missing.
fn some(tensor: Option<&Tensor>) -> Result<Option<View<'_>>> {
    tensor.map(view).transpose()
}

/// The views of some tensors.
fn each<const N: usize>(tensors: [&Tensor; N]) -> Result<[View<'_>; N]> {
    let mut views = [View { ptr: std::ptr::null_mut(), dtype: DType::F32, dims: &[], strides: &[] }; N];
    for (to, tensor) in views.iter_mut().zip(tensors) {
        *to = view(tensor)?;
    }
    Ok(views)
}

/// Whether neighbours of the last axis lie side by side.
fn is_dense(tensor: &Tensor) -> bool {
    tensor.layout().strides.last() == Some(&1)
}

fn are_f32(tables: [&Tensor; 2]) -> bool {
    tables.iter().all(|t| t.dtype() == DType::F32)
}

fn check_index(op: &'static str, index: &[u32], rows: usize) -> Result<()> {
    match index.iter().find(|&&i| i as usize >= rows) {
        None => Ok(()),
        Some(i) => Err(Error::argument(op, format!("indices below {rows}"), i)),
    }
}
