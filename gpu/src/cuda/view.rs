//! Views of tensors as addresses.

use std::any::Any;
use std::sync::Arc;

use flowtape_engine::backend::Buffer;
use flowtape_engine::{DType, Error, Result, Tensor};

use super::gpu::Gpu;
use super::memory::CudaBuffer;

/// A strided window on device memory. Strides count elements; 0 repeats.
#[derive(Clone, Debug)]
pub(super) struct View {
    /// Of the first element.
    pub address: u64,
    pub dtype: DType,
    pub dims: Vec<usize>,
    pub strides: Vec<usize>,
}

/// A buffer of this device.
pub(super) fn buffer<'a>(gpu: &Arc<Gpu>, buffer: &'a dyn Buffer) -> Result<&'a CudaBuffer> {
    let own = (buffer as &dyn Any).downcast_ref().filter(|own: &&CudaBuffer| Arc::ptr_eq(&own.0.raw().0, gpu));
    own.ok_or_else(|| Error::Device {
        op: "cuda",
        expected: format!("memory of {}", gpu.name),
        got: format!("{buffer:?}"),
    })
}

impl View {
    /// A place for a view.
    pub const NONE: Self = Self { address: 0, dtype: DType::F32, dims: Vec::new(), strides: Vec::new() };

    /// The window of a tensor on this device.
    pub fn of(gpu: &Arc<Gpu>, tensor: &Tensor) -> Result<Self> {
        let layout = tensor.layout();
        let base = *buffer(gpu, tensor.storage().buffer())?.0.block();
        let address = base + (layout.offset * tensor.dtype().size()) as u64;
        Ok(Self { address, dtype: tensor.dtype(), dims: layout.dims.to_vec(), strides: layout.strides.to_vec() })
    }

    /// Row-major without gaps.
    pub fn dense(address: u64, dtype: DType, dims: &[usize]) -> Self {
        let layout = flowtape_engine::shape::Layout::contiguous(dims);
        Self { address, dtype, dims: layout.dims.to_vec(), strides: layout.strides.to_vec() }
    }

    pub fn numel(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether the last axis has no gaps.
    pub fn is_unit(&self) -> bool {
        self.strides.last() == Some(&1) || self.dims.last() == Some(&1)
    }

    /// Whether each row (of the last axis) begins at a multiple of 16 bytes.
    pub fn rows_aligned(&self) -> bool {
        let per = 16 / self.dtype.size();
        let outer = self.strides.iter().zip(&self.dims).rev().skip(1);
        self.address.is_multiple_of(16) && outer.filter(|(_, d)| **d != 1).all(|(s, _)| s.is_multiple_of(per))
    }

    /// The strides of leading axes, as many as asked for.
    pub fn leading<const N: usize>(&self) -> [i64; N] {
        std::array::from_fn(|i| self.strides.get(i).copied().unwrap_or(0) as i64)
    }
}

/// A dtype error of an op that takes the floats of 32 and 16 bits.
pub(super) fn wrong_dtype(op: &'static str, got: DType) -> Error {
    Error::DType { op, expected: "f32, bf16 or f16 on a CUDA device (f64 is the CPU's)".into(), got: got.to_string() }
}
