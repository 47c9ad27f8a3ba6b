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
mod team;

use std::any::Any;

use self::isa::{Isa, isa};
pub use self::limits::peak_flops;
pub(crate) use self::pool::ALIGN;
use self::pool::{CpuBuffer, Host};
pub use self::team::{awake, cores, usable_threads};
use crate::backend::{Backend, Buffer, Fused, Ran};
use crate::expr::{Program, Reduce};
use crate::pool::{Pool, PoolUsage};
use crate::{DType, Error, Result, Tensor};

/// The CPU. Work runs on the current rayon pool; results do not depend on its size.
#[derive(Debug)]
pub struct Cpu {
    pool: Pool<Host>,
}

impl Default for Cpu {
    fn default() -> Self {
        Self { pool: pool::pool() }
    }
}

/// The instruction set in use: `portable`, `avx2`, `avx512` or `avx512bf16`. It is the machine's best, or less if the
/// environment variable `FLOWTAPE_ISA` names less.
pub fn instruction_set() -> &'static str {
    Isa::NAMES.into_iter().find(|(_, known)| *known == isa()).map_or("", |(name, _)| name)
}

/// The instruction sets that the machine has, poorest first, by the names that `FLOWTAPE_ISA` takes.
pub fn instruction_sets() -> Vec<&'static str> {
    let name = |isa| Isa::NAMES.into_iter().find(|(_, known)| *known == isa).map(|(name, _)| name);
    Isa::available().filter_map(name).collect()
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

fn views<'a>(tensors: &[&'a Tensor]) -> Result<Vec<View<'a>>> {
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

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Buffer>> {
        Ok(Box::new(self.pool.alloc(bytes)?))
    }

    fn upload(&self, target: &dyn Buffer, bytes: &[u8]) -> Result<()> {
        let target = buffer(target)?;
        if bytes.len() > target.bytes() {
            return Err(Error::argument("upload", format!("at most {} bytes", target.bytes()), bytes.len()));
        }
        // SAFETY: the buffer holds that many bytes; it is new, so nobody else reads it yet.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn download(&self, source: &dyn Buffer, bytes: usize) -> Result<Vec<u8>> {
        let source = buffer(source)?;
        if bytes > source.bytes() {
            return Err(Error::argument("download", format!("at most {} bytes", source.bytes()), bytes));
        }
        // SAFETY: the buffer holds that many initialised bytes.
        Ok(unsafe { std::slice::from_raw_parts(source.as_ptr(), bytes) }.to_vec())
    }

    fn copy(&self, source: &Tensor, target: &Tensor) -> Result<()> {
        let (source, target) = (view(source)?, view(target)?);
        if source.dims != target.dims || source.dtype != target.dtype {
            return Err(Error::shape("copy", format!("{} {:?}", target.dtype, target.dims), source.dims));
        }
        // SAFETY: views of tensors lie in their memory; the ops give targets that nobody else uses.
        unsafe { index::copy(&source, &target) };
        Ok(())
    }

    fn pointwise(&self, program: &Program, inputs: &[&Tensor], scalars: &[f64], outputs: &[&Tensor]) -> Result<()> {
        program.check_counts(inputs.len(), scalars.len(), outputs.len())?;
        let (inputs, outputs) = (views(inputs)?, views(outputs)?);
        // SAFETY: views of tensors lie in their memory; the ops give outputs that nobody else uses.
        unsafe {
            let own = programs::kernel(program);
            if !own.is_some_and(|kernel| kernel(isa(), &inputs, scalars, &outputs)) {
                pointwise::pointwise(program, &inputs, scalars, &outputs, isa());
            }
        }
        Ok(())
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
        // SAFETY: as in `pointwise`.
        unsafe { pointwise::reduce(program, kind, &views(inputs)?, scalars, &views(outputs)?, isa()) };
        Ok(())
    }

    fn matmul(&self, a: &Tensor, b: &Tensor, bias: Option<&Tensor>, accumulate: bool, out: &Tensor) -> Result<()> {
        let bias = bias.map(view).transpose()?;
        // SAFETY: as in `pointwise`; the op has checked the shapes.
        unsafe { gemm::matmul(isa(), &view(a)?, &view(b)?, bias.as_ref(), accumulate, &view(out)?) };
        Ok(())
    }

    fn gather(&self, table: &Tensor, at: &Tensor, out: &Tensor) -> Result<()> {
        let (at, rows) = (at.to_vec::<u32>()?, table.dims()[0]);
        check_index("index_select", &at, rows)?;
        // SAFETY: the indices are in range; the op gives contiguous views.
        unsafe { index::gather(&view(table)?, &at, &view(out)?) };
        Ok(())
    }

    fn scatter_add(&self, rows: &Tensor, at: &Tensor, out: &Tensor) -> Result<()> {
        let at = at.to_vec::<u32>()?;
        check_index("scatter_add", &at, out.dims()[0])?;
        // SAFETY: the indices are in range; the op gives contiguous views.
        unsafe { index::scatter_add(&view(rows)?, &at, &view(out)?) };
        Ok(())
    }

    fn fuses(&self, op: &Fused, inputs: &[&Tensor]) -> bool {
        let dense = |t: &Tensor| t.layout().strides.last() == Some(&1);
        let narrow = inputs.iter().all(|t| matches!(t.dtype(), DType::F32 | DType::BF16 | DType::F16));
        match (op, inputs) {
            (Fused::ModulatedNormForward { .. }, _) => narrow && inputs.iter().all(|t| dense(t)),
            (Fused::NormRopeForward { .. }, [x, _, cos, sin]) => {
                let table = |t: &Tensor| t.dtype() == DType::F32 && dense(t);
                narrow && dense(x) && table(cos) && table(sin)
            }
            _ => false,
        }
    }

    fn fused(&self, op: &Fused, inputs: &[&Tensor], outputs: &[&Tensor]) -> Result<Ran> {
        if inputs.iter().any(|t| t.dtype() == DType::F64) {
            return Ok(Ran::Declined);
        }
        let (x, y) = (views(inputs)?, views(outputs)?);
        // SAFETY: as in `pointwise`; the op has checked the shapes.
        unsafe {
            match (op, &x[..], &y[..]) {
                (Fused::AttentionForward { scale, .. }, [q, k, v, mask @ ..], [o, lse]) => {
                    attention::attention_forward(q, k, v, mask.first(), *scale, o, lse);
                }
                (Fused::AttentionBackward { scale, .. }, [q, k, v, o, go, lse, mask @ ..], [dq, dk, dv]) => {
                    attention::attention_backward(q, k, v, o, go, lse, mask.first(), *scale, dq, dk, dv);
                }
                (Fused::NormForward { centred, weight, bias, eps }, [x, affine @ ..], [y, statistics @ ..]) => {
                    let bias_at = usize::from(*weight);
                    let affine = [affine.first().filter(|_| *weight), affine.get(bias_at).filter(|_| *bias)];
                    let (mean, scale) = (statistics.first().filter(|_| *centred), &statistics[usize::from(*centred)]);
                    if !norm::norm_forward(x, affine, *eps, y, mean, scale) {
                        return Ok(Ran::Declined);
                    }
                }
                (Fused::NormBackward { centred, weight }, [x, grad, scale, rest @ ..], [dx]) => {
                    let mean = rest.first().filter(|_| *centred);
                    let weight = rest.get(usize::from(*centred)).filter(|_| *weight);
                    if !norm::norm_backward(x, mean, scale, weight, grad, dx) {
                        return Ok(Ran::Declined);
                    }
                }
                (Fused::ModulatedNormForward { eps }, [x, shift, scale], [y, mean, deviation]) => {
                    norm_fused::modulated_forward([x, shift, scale], *eps, [y, mean, deviation]);
                }
                (Fused::ModulatedNormBackward, [x, grad, mean, deviation, scale], [dx, d_shift, d_scale]) => {
                    norm_fused::modulated_backward([x, grad, mean, deviation, scale], [dx, d_shift, d_scale]);
                }
                (Fused::NormRopeForward { eps, layout }, [x, weight, cos, sin], [y, deviation]) => {
                    norm_fused::norm_rope_forward([x, weight, cos, sin], *eps, *layout, [y, deviation]);
                }
                (Fused::NormRopeBackward { layout }, [x, grad, s, weight, cos, sin], [dx, dw]) => {
                    norm_fused::norm_rope_backward([x, grad, s, weight, cos, sin], *layout, [dx, dw]);
                }
                _ => return Ok(Ran::Declined),
            }
        }
        Ok(Ran::Done)
    }
}

fn check_index(op: &'static str, index: &[u32], rows: usize) -> Result<()> {
    match index.iter().find(|&&i| i as usize >= rows) {
        None => Ok(()),
        Some(i) => Err(Error::argument(op, format!("indices below {rows}"), i)),
    }
}
