//! Strided windows on a device's memory, and which of them a binding holds.

use std::any::Any;
use std::sync::Arc;

use flowtape_engine::backend::Buffer;
use flowtape_engine::ops::RopeLayout;
use flowtape_engine::shape::{Axes, Layout};
use flowtape_engine::{DType, Error, Result, Tensor};

use super::memory::{Block, WgpuBuffer};
use super::queue::Gpu;

/// A strided window on a block. Strides and offset count elements; stride 0 repeats.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) block: Arc<Block>,
    pub(super) dtype: DType,
    pub(super) dims: Axes,
    pub(super) strides: Axes,
    pub(super) offset: usize,
}

/// The block of a buffer of this device.
pub(super) fn block<'a>(gpu: &Gpu, buffer: &'a dyn Buffer) -> Result<&'a Arc<Block>> {
    let own = (buffer as &dyn Any).downcast_ref::<WgpuBuffer>().filter(|b| std::ptr::eq(b.0.raw(), gpu.pool.raw()));
    match own {
        Some(buffer) => Ok(buffer.0.block()),
        None => {
            Err(Error::Device { op: "wgpu", expected: format!("memory of {}", gpu.name), got: format!("{buffer:?}") })
        }
    }
}

impl View {
    /// The window of a tensor on this device.
    pub(super) fn of(gpu: &Gpu, tensor: &Tensor) -> Result<Self> {
        if tensor.dtype() == DType::F64 {
            return Err(Error::DType { op: "wgpu", expected: "f32, bf16, f16 or u32".into(), got: "f64".into() });
        }
        let Layout { dims, strides, offset } = tensor.layout().clone();
        let block = block(gpu, tensor.storage().buffer())?.clone();
        Ok(Self { block, dtype: tensor.dtype(), dims, strides, offset })
    }

    /// A row-major view of all of a block.
    pub(super) fn plain(block: &Arc<Block>, dtype: DType, dims: &[usize]) -> Self {
        let Layout { dims, strides, offset } = Layout::contiguous(dims);
        Self { block: block.clone(), dtype, dims, strides, offset }
    }

    /// Any window of a block.
    pub(super) fn strided(block: &Arc<Block>, dtype: DType, dims: &[usize], strides: &[usize]) -> Self {
        Self { block: block.clone(), dtype, dims: dims.into(), strides: strides.into(), offset: 0 }
    }

    /// Whether `count` neighbours along an axis always begin at a multiple of `count`, side by side.
    fn aligned(&self, axis: usize, count: usize) -> bool {
        let mut others = (0..self.dims.len()).filter(|a| *a != axis && self.dims[*a] != 1);
        self.strides[axis] == 1
            && self.dims[axis].is_multiple_of(count)
            && self.offset.is_multiple_of(count)
            && others.all(|a| self.strides[a].is_multiple_of(count))
    }

    /// Whether four neighbours along an axis always lie side by side in whole words.
    pub(super) fn quads(&self, axis: usize) -> bool {
        self.dtype != DType::U32 && self.aligned(axis, 4)
    }

    /// Whether two neighbours along an axis always fill a word.
    pub(super) fn pairs(&self, axis: usize) -> bool {
        self.is_half() && self.aligned(axis, 2)
    }

    /// Whether elements are two to a word.
    pub(super) fn is_half(&self) -> bool {
        self.dtype.size() == 2
    }

    pub(super) fn numel(&self) -> usize {
        self.dims.iter().product()
    }

    /// The bytes that it reaches, whole words.
    pub(super) fn span(&self) -> (u64, u64) {
        let reach: usize = self.dims.iter().zip(&self.strides).map(|(d, s)| d.saturating_sub(1) * s).sum();
        let size = self.dtype.size();
        let (first, end) = (self.offset * size, (self.offset + reach + 1) * size);
        (first as u64 / 4 * 4, (end as u64).next_multiple_of(4))
    }

    fn layout(&self) -> Layout {
        Layout { dims: self.dims.clone(), strides: self.strides.clone(), offset: self.offset }
    }

    fn with(&self, layout: Layout) -> Self {
        let Layout { dims, strides, offset } = layout;
        Self { block: self.block.clone(), dtype: self.dtype, dims, strides, offset }
    }

    /// The same for each position of `dims`: axes are added in front, and those of size 1 repeat.
    pub(super) fn expanded(&self, dims: &[usize]) -> Result<Self> {
        Ok(self.with(self.layout().expand(dims)?))
    }

    /// The first and second elements of the pairs that are turned, each half as wide.
    pub(super) fn halved(&self, pairs: RopeLayout) -> [Self; 2] {
        pairs.halves(&self.layout()).map(|half| self.with(half))
    }

    /// The same with an axis of size 1 more.
    pub(super) fn unsqueezed(&self, axis: usize) -> Self {
        let mut out = self.clone();
        out.dims.insert(axis, 1);
        out.strides.insert(axis, 0);
        out
    }

    /// `len` positions of an axis from `start`; an axis of size 1, which repeats, stays.
    pub(super) fn narrow(&self, axis: usize, start: usize, len: usize) -> Self {
        let mut out = self.clone();
        if self.dims[axis] != 1 {
            out.offset += start * self.strides[axis];
            out.dims[axis] = len;
        }
        out
    }

    /// The axis along which it reaches farthest.
    pub(super) fn longest_axis(&self) -> Option<usize> {
        let reach = |a: &usize| (self.dims[*a] - 1) * self.strides[*a];
        (0..self.dims.len()).filter(|a| self.dims[*a] > 1 && self.strides[*a] > 0).max_by_key(reach)
    }
}

/// How a kernel uses an operand.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Access {
    Read,
    /// Read by fours too, whose first lies at a multiple of four.
    ReadQuads,
    /// Written element by element: halves of a word by atomics.
    Write,
    /// Written in pairs that fill words.
    WritePairs,
    /// Words that only grow, by an atomic maximum.
    Raise,
}

impl Access {
    /// Written in pairs where they fill words.
    pub(super) fn pairs_if(aligned: bool) -> Self {
        if aligned { Self::WritePairs } else { Self::Write }
    }

    /// Read by fours where they lie so.
    pub(super) fn quads_if(aligned: bool) -> Self {
        if aligned { Self::ReadQuads } else { Self::Read }
    }

    fn writes(self) -> bool {
        matches!(self, Self::Write | Self::WritePairs | Self::Raise)
    }
}

/// A window of a block that one binding holds.
#[derive(Clone, Debug)]
pub(super) struct Binding {
    pub(super) block: Arc<Block>,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) written: bool,
    pub(super) atomic: bool,
    /// Words that are read at once: 1, 2 or 4. Memory that is written is bound word by word.
    pub(super) vector: usize,
}

/// Which binding holds which operand.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) bindings: Vec<Binding>,
    /// The binding of each operand.
    pub(super) places: Vec<usize>,
    /// Where each operand starts in its binding, in elements.
    pub(super) offsets: Vec<u32>,
}

/// What a binding may hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct BindingLimits {
    /// Bytes.
    pub(super) size: u64,
    /// What a window's start is a multiple of.
    pub(super) alignment: u64,
}

impl BindingLimits {
    /// The window of a view: its whole block where that fits.
    fn window(&self, view: &View) -> (u64, u64) {
        let whole = view.block.buffer.size();
        if whole <= self.size {
            return (0, whole);
        }
        let (start, end) = view.span();
        // Whole vectors of words; blocks end with such.
        (start / self.alignment * self.alignment, end.next_multiple_of(16))
    }

    /// Whether a binding can hold that many bytes, wherever they begin.
    pub(super) fn holds(&self, bytes: usize) -> bool {
        bytes as u64 + self.alignment + 16 <= self.size
    }

    /// Whether a binding can hold it.
    pub(super) fn fits(&self, view: &View) -> bool {
        let (start, end) = self.window(view);
        end - start <= self.size
    }

    /// Operands on one block share a binding where it holds them: a block may not be read and written by two.
    pub(super) fn plan(&self, operands: &[(&View, Access)]) -> Plan {
        let mut plan = Plan { bindings: Vec::new(), places: Vec::new(), offsets: Vec::new() };
        for (view, access) in operands {
            let (start, end) = self.window(view);
            let joins =
                |b: &Binding| Arc::ptr_eq(&b.block, &view.block) && b.end.max(end) - b.start.min(start) <= self.size;
            let at = plan.bindings.iter().position(joins).unwrap_or_else(|| {
                let block = view.block.clone();
                plan.bindings.push(Binding { block, start, end, written: false, atomic: false, vector: 1 });
                plan.bindings.len() - 1
            });
            let binding = &mut plan.bindings[at];
            binding.start = binding.start.min(start);
            binding.end = binding.end.max(end);
            binding.atomic |= *access == Access::Raise || (*access == Access::Write && view.is_half());
            binding.written |= access.writes();
            if *access == Access::ReadQuads {
                binding.vector = binding.vector.max(view.dtype.size());
            }
            plan.places.push(at);
        }
        // A block in two windows, one of them written: both are bound for writing.
        for i in 0..plan.bindings.len() {
            let (written, block) = (plan.bindings[i].written, plan.bindings[i].block.clone());
            let same = plan.bindings.iter_mut().filter(|b| Arc::ptr_eq(&b.block, &block));
            same.for_each(|b| b.written |= written);
        }
        plan.bindings.iter_mut().filter(|b| b.written).for_each(|b| b.vector = 1);
        let offset = |(view, place): (&View, usize)| {
            (view.offset - plan.bindings[place].start as usize / view.dtype.size()) as u32
        };
        plan.offsets = operands.iter().map(|(v, _)| *v).zip(plan.places.iter().copied()).map(offset).collect();
        plan
    }
}
