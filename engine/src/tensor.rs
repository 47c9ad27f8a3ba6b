//! Tensors: strided views on shared storage.

use std::ops::Range;
use std::sync::Arc;

use smallvec::smallvec;

use crate::backend::call::{Call, CopyTo, Upload};
use crate::backend::{Device, Pending, Storage};
use crate::expr::Function;
use crate::nn::Param;
use crate::ops::pointwise::run_pointwise;
use crate::shape::{Layout, numel};
use crate::tape::{Tape, VarId};
use crate::{DType, Element, Error, Result};

/// An n-dimensional array: a strided view of storage on a device. Cheap to clone; ops make new tensors.
#[derive(Clone)]
pub struct Tensor {
    storage: Arc<Storage>,
    layout: Layout,
    dtype: DType,
    var: Option<VarId>,
    tape: Option<Tape>,
    /// Whether it was made from a parameter without a tape: no gradient can go back from it any more.
    unrecorded: bool,
    /// Whose value it is.
    param: Option<Param>,
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({} {:?})", self.dtype, self.layout.dims)
    }
}

impl Tensor {
    /// A tensor of uninitialised memory, for a kernel to write.
    pub(crate) fn empty(dims: &[usize], dtype: DType, device: &Device) -> Result<Self> {
        let bytes = numel("alloc", dims)?.checked_mul(dtype.size()).filter(|&bytes| isize::try_from(bytes).is_ok());
        let bytes = bytes.ok_or_else(|| Error::shape("alloc", format!("sizes that fit memory in {dtype}"), dims))?;
        let layout = Layout::contiguous(dims);
        let storage = Storage::alloc(device, bytes).map_err(|error| match error {
            Error::OutOfMemory { device, bytes, reason } => {
                Error::OutOfMemory { device, bytes, reason: format!("{dtype} {dims:?}; {reason}") }
            }
            other => other,
        })?;
        Ok(Self { storage, layout, dtype, var: None, tape: None, unrecorded: false, param: None })
    }

    /// The same, with the axes in memory as `like` has them: elementwise results keep their input's order.
    pub(crate) fn empty_like(like: &Self, dims: &[usize], dtype: DType) -> Result<Self> {
        if like.dims() != dims {
            return Self::empty(dims, dtype, like.device());
        }
        Self::empty_in_order(like, dims, dtype)
    }

    /// The same for other sizes of as many axes.
    pub(crate) fn empty_in_order(like: &Self, dims: &[usize], dtype: DType) -> Result<Self> {
        if like.layout.is_contiguous() || like.layout.strides.contains(&0) {
            return Self::empty(dims, dtype, like.device());
        }
        let mut order: Vec<usize> = (0..dims.len()).collect();
        order.sort_by_key(|&a| std::cmp::Reverse(like.layout.strides[a]));
        let sorted: Vec<usize> = order.iter().map(|&a| dims[a]).collect();
        let mut inverse = vec![0; order.len()];
        order.iter().enumerate().for_each(|(i, &a)| inverse[a] = i);
        let out = Self::empty(&sorted, dtype, like.device())?;
        Ok(out.view(out.layout.permute(&inverse)?))
    }

    /// Another view of the same storage, not tracked.
    pub(crate) fn view(&self, layout: Layout) -> Self {
        let storage = self.storage.clone();
        Self { storage, layout, dtype: self.dtype, var: None, tape: None, unrecorded: false, param: None }
    }

    /// Elements of a tensor without gaps, from one of them on, in these dims.
    pub(crate) fn run_of(&self, start: usize, dims: &[usize]) -> Self {
        let layout = Layout::contiguous(dims);
        self.view(Layout { offset: self.layout.offset + start, ..layout })
    }

    /// A view that repeats the one element of `self`: for what only needs dims and dtype.
    pub(crate) fn shape_only(&self, dims: &[usize]) -> Self {
        self.view(Layout { dims: dims.into(), strides: smallvec![0; dims.len()], offset: 0 })
    }

    pub(crate) fn tracked(mut self, var: Option<VarId>, tape: Option<Tape>) -> Self {
        self.var = var;
        self.tape = tape;
        self
    }

    pub(crate) fn unrecorded(mut self) -> Self {
        self.unrecorded = true;
        self
    }

    pub(crate) fn is_unrecorded(&self) -> bool {
        self.unrecorded
    }

    /// The same as the value of a parameter.
    pub(crate) fn of_param(mut self, param: Param) -> Self {
        self.param = Some(param);
        self
    }

    /// The parameter whose value it is.
    pub(crate) fn param(&self) -> Option<&Param> {
        self.param.as_ref()
    }

    /// The same value without tape or variable, which still knows its parameter.
    pub(crate) fn plain(&self) -> Self {
        Self { param: self.param.clone(), ..self.detach() }
    }

    /// From values in row-major order.
    ///
    /// # Errors
    /// When the count of values is not that of `dims`.
    pub fn from_slice<T: Element>(values: &[T], dims: &[usize], device: &Device) -> Result<Self> {
        if values.len() != numel("from_slice", dims)? {
            return Err(Error::shape("from_slice", format!("{dims:?}"), [values.len()]));
        }
        let out = Self::written(bytemuck::cast_slice(values), dims, T::DTYPE, device)?;
        out.storage.keep(bytemuck::cast_slice(values));
        Ok(out)
    }

    /// A tensor of bytes whose count is right.
    fn written(bytes: &[u8], dims: &[usize], dtype: DType, device: &Device) -> Result<Self> {
        let out = Self::empty(dims, dtype, device)?;
        Upload { bytes, target: &out }.run()?;
        Ok(out)
    }

    /// From values in row-major order.
    ///
    /// # Errors
    /// When the count of values is not that of `dims`.
    pub fn from_vec<T: Element>(values: Vec<T>, dims: &[usize], device: &Device) -> Result<Self> {
        Self::from_slice(&values, dims, device)
    }

    /// From raw little-endian bytes of `dtype` in row-major order.
    ///
    /// # Errors
    /// When the count of bytes is not that of `dims`.
    pub fn from_bytes(bytes: &[u8], dims: &[usize], dtype: DType, device: &Device) -> Result<Self> {
        if Some(bytes.len()) != dims.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d)) {
            return Err(Error::shape("from_bytes", format!("{dims:?} of {dtype}"), [bytes.len()]));
        }
        let bytes = dtype.little_endian(bytes.into());
        let out = Self::written(&bytes, dims, dtype, device)?;
        out.storage.keep(&bytes);
        Ok(out)
    }

    /// All elements equal to `value`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn full(dims: &[usize], value: f64, dtype: DType, device: &Device) -> Result<Self> {
        // Kernels may go on to write over it in place, so the host does not keep it.
        let bytes = match dtype {
            DType::F32 => bytemuck::bytes_of(&(value as f32)).to_vec(),
            DType::F64 => bytemuck::bytes_of(&value).to_vec(),
            DType::BF16 => bytemuck::bytes_of(&half::bf16::from_f64(value)).to_vec(),
            DType::F16 => bytemuck::bytes_of(&half::f16::from_f64(value)).to_vec(),
            DType::U32 => bytemuck::bytes_of(&(value as u32)).to_vec(),
        };
        let one = Self::written(&bytes, &[], dtype, device)?;
        one.expand(dims)?.contiguous()
    }

    /// Zeros.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn zeros(dims: &[usize], dtype: DType, device: &Device) -> Result<Self> {
        Self::full(dims, 0.0, dtype, device)
    }

    /// Ones.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn ones(dims: &[usize], dtype: DType, device: &Device) -> Result<Self> {
        Self::full(dims, 1.0, dtype, device)
    }

    /// Sizes of the axes.
    pub fn dims(&self) -> &[usize] {
        &self.layout.dims
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.layout.dims.len()
    }

    /// Size of one axis.
    ///
    /// # Errors
    /// When there is no such axis.
    pub fn dim(&self, axis: usize) -> Result<usize> {
        self.axis("dim", axis)?;
        Ok(self.layout.dims[axis])
    }

    /// `axis` when it exists, an error that names `op` otherwise.
    pub(crate) fn axis(&self, op: &'static str, axis: usize) -> Result<usize> {
        if axis < self.rank() {
            Ok(axis)
        } else {
            Err(Error::argument(op, format!("an axis of shape {:?}", self.dims()), axis))
        }
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.layout.numel()
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        self.storage.device()
    }

    /// The view's layout.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The memory behind the view.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Whether nobody else has its memory, and each element has a place of its own in it: it may be written in place.
    pub(crate) fn is_sole_owner(&self) -> bool {
        Arc::strong_count(&self.storage) == 1 && !self.layout.repeats()
    }

    /// Whether nothing is or could be recorded of it: it has no variable and no tape, and was not made from a parameter without one.
    pub fn is_plain(&self) -> bool {
        self.var.is_none() && self.tape.is_none() && !self.unrecorded
    }

    /// The variable of a leaf, a parameter or a recorded output.
    pub fn var(&self) -> Option<VarId> {
        self.var
    }

    /// The tape that it carries.
    pub fn tape(&self) -> Option<&Tape> {
        self.tape.as_ref()
    }

    /// Whether gradients flow to it.
    pub fn requires_grad(&self) -> bool {
        self.var.is_some()
    }

    /// The same value without tape or variable.
    pub fn detach(&self) -> Self {
        self.view(self.layout.clone())
    }

    /// The same value without tape or variable, for an operation that has no gradient of it.
    pub(crate) fn constant(&self, op: &'static str, name: &str) -> Result<Self> {
        if self.requires_grad() || self.unrecorded {
            let expected = format!("{name} that need no gradient (detach them)");
            return Err(Error::argument(op, expected, "a tensor on a tape, or one made from a parameter"));
        }
        Ok(self.detach())
    }

    /// The same tensor, carried by the tape of `other` (if it has one).
    pub fn on_tape_of(&self, other: &Self) -> Self {
        match &other.tape {
            Some(tape) => tape.attach(self),
            None => self.clone(),
        }
    }

    /// The same values on another device, on no tape. Waits for the device where it is another.
    ///
    /// # Errors
    /// When a device fails.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        if self.device().same(device) {
            return Ok(self.detach());
        }
        Self::from_bytes(&self.to_bytes()?, self.dims(), self.dtype, device)
    }

    /// The values in row-major order, converted to `T`. Waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        Ok(self.converted(&self.own_bytes()?))
    }

    /// The bytes in row-major order, each element's as the machine has them.
    pub(crate) fn own_bytes(&self) -> Result<Vec<u8>> {
        let size = self.dtype.size();
        if let Some(kept) = self.storage.kept() {
            return Ok(self.layout.positions().flat_map(|at| &kept[at * size..][..size]).copied().collect());
        }
        let plain = self.detach().contiguous()?;
        self.device().backend().download(plain.storage.buffer(), plain.span())
    }

    /// The bytes of its memory that a contiguous tensor takes.
    fn span(&self) -> Range<usize> {
        let size = self.dtype.size();
        self.layout.offset * size..(self.layout.offset + self.numel()) * size
    }

    /// Reads the values now, but waits for them only when they are asked for.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read_later(&self) -> Result<Later> {
        let plain = self.detach().contiguous()?;
        let pending = plain.device().backend().read_later(plain.storage.buffer(), plain.span())?;
        Ok(Later { plain, pending })
    }

    /// Elements of its dtype, row-major, as `T`.
    fn converted<T: Element>(&self, bytes: &[u8]) -> Vec<T> {
        fn convert<S: Element, T: Element>(bytes: &[u8]) -> Vec<T> {
            if S::DTYPE == T::DTYPE {
                return bytemuck::pod_collect_to_vec(bytes);
            }
            let chunks = bytes.chunks_exact(size_of::<S>());
            chunks.map(|c| T::from_f64(bytemuck::pod_read_unaligned::<S>(c).to_f64())).collect()
        }
        match self.dtype {
            DType::F32 => convert::<f32, T>(bytes),
            DType::BF16 => convert::<half::bf16, T>(bytes),
            DType::F16 => convert::<half::f16, T>(bytes),
            DType::F64 => convert::<f64, T>(bytes),
            DType::U32 => convert::<u32, T>(bytes),
        }
    }

    /// The raw little-endian bytes in row-major order. Waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        Ok(self.dtype.little_endian(self.own_bytes()?.into()).into_owned())
    }

    /// The value of a tensor with one element. Waits for the device.
    ///
    /// # Errors
    /// When there is not exactly one element.
    pub fn item(&self) -> Result<f64> {
        match self.to_vec::<f64>()?[..] {
            [value] => Ok(value),
            _ => Err(Error::shape("item", "one element", self.dims())),
        }
    }

    /// Writes `source` (same dims; the dtype is converted) over this tensor's memory: for parameters and state.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn copy_from(&self, source: &Self) -> Result<()> {
        if source.dims() != self.dims() {
            return Err(Error::shape("copy_from", format!("{:?}", self.dims()), source.dims()));
        }
        // Functions compute in floats, which do not hold all integers.
        if [self.dtype, source.dtype] == [DType::U32; 2] {
            return CopyTo { source, target: self }.run();
        }
        run_pointwise(&Function::build(|[x]| [x]), &[source], &[], &[self])
    }
}

/// Values of a tensor on their way to the host.
#[derive(Debug)]
pub struct Later {
    plain: Tensor,
    pending: Box<dyn Pending>,
}

impl Later {
    /// Waits for them: row-major, converted to `T`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn wait<T: Element>(self) -> Result<Vec<T>> {
        Ok(self.plain.converted(&self.pending.wait()?))
    }

    /// Waits for them: a tensor on the host.
    pub(crate) fn on_host(self) -> Result<Tensor> {
        let (plain, bytes) = (self.plain, self.pending.wait()?);
        let bytes = plain.dtype.little_endian(bytes.into());
        Tensor::from_bytes(&bytes, plain.dims(), plain.dtype, &Device::cpu())
    }

    /// Waits for the one value.
    ///
    /// # Errors
    /// When there is not exactly one element, or the device fails.
    pub fn item(self) -> Result<f64> {
        let wrong = Error::shape("item", "one element", self.plain.dims());
        match self.wait::<f64>()?[..] {
            [value] => Ok(value),
            _ => Err(wrong),
        }
    }
}
