//! What a backend is asked to do, checked before it is asked.
//!
//! A call is a struct of operands by name. [`Checked::new`] compares it with its contract and is the only way to what the
//! methods of [`Backend`] take, so kernels may trust what they are given:
//!
//! - shapes and dtypes are those of the call's documentation;
//! - all operands are on one device, and each view lies inside its memory;
//! - no two elements that are written lie at one place;
//! - what is written is nothing that is read, and nothing else that is written; element by element
//!   ([`Call::IN_PLACE`]) an output may be exactly an input.

use std::fmt::Debug;
use std::ops::Deref;

use super::{Backend, Device};
use crate::expr::{Program, Reduce};
use crate::{DType, Error, Result, Tensor};

/// One thing that a backend does, with its operands.
pub trait Call<'a>: Clone + Debug {
    /// What the backend answers.
    type Answer;
    /// Whether an output may be exactly one of the inputs.
    const IN_PLACE: bool = false;

    /// The name in errors.
    fn name(&self) -> &'static str;
    /// The operands that are read.
    fn reads(&self) -> impl Iterator<Item = &'a Tensor> + Clone;
    /// The operands that are written; what is added to counts as one.
    fn writes(&self) -> impl Iterator<Item = &'a Tensor> + Clone;
    /// Whether shapes and dtypes are those of the contract.
    ///
    /// # Errors
    /// When they are not, with what is expected.
    fn fits(&self) -> Result<()>;
    /// Hands the call to the method that it is for.
    ///
    /// # Errors
    /// Those of the backend.
    fn send(call: Checked<Self>, backend: &dyn Backend) -> Result<Self::Answer>;

    /// Compares the call with its contract.
    ///
    /// # Errors
    /// When it breaks it.
    fn check(&self) -> Result<()> {
        let op = self.name();
        let device = device_of(op, self.writes().next())?;
        self.reads().chain(self.writes()).try_for_each(|tensor| inside(op, device, tensor))?;
        self.fits()?;
        for (i, output) in self.writes().enumerate() {
            if output.layout().repeats() {
                let what = format!("an output with several elements at one place, {output:?}");
                return Err(Error::Overlap { op, what });
            }
            let in_place = |input: &Tensor| Self::IN_PLACE && is_same_view(input, output);
            let read = self.reads().find(|input| overlap(input, output) && !in_place(input));
            if let Some(other) = read.or_else(|| self.writes().skip(i + 1).find(|other| overlap(other, output))) {
                return Err(Error::Overlap {
                    op,
                    what: format!("an output {output:?} that shares memory with {other:?}"),
                });
            }
        }
        Ok(())
    }

    /// Checks the call and runs it on the device of its operands.
    ///
    /// # Errors
    /// When it breaks its contract, or the device fails.
    fn run(self) -> Result<Self::Answer> {
        let call = Checked::new(self)?;
        let device = device_of(call.name(), call.writes().next())?;
        Self::send(call, device.backend())
    }
}

fn device_of<'a>(op: &'static str, output: Option<&'a Tensor>) -> Result<&'a Device> {
    output.map(Tensor::device).ok_or_else(|| Error::argument(op, "at least one output", 0))
}

/// A call that keeps its contract.
#[derive(Clone, Copy, Debug)]
pub struct Checked<C>(C);

impl<C> Deref for Checked<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.0
    }
}

impl<'a, C: Call<'a>> Checked<C> {
    /// Compares a call with its contract. What it writes counts as overwritten from then on.
    ///
    /// # Errors
    /// When the call breaks it.
    pub fn new(call: C) -> Result<Self> {
        call.check()?;
        call.writes().for_each(|output| output.storage().touch());
        Ok(Self(call))
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.writes().all(|output| output.dims().contains(&0))
    }
}

/// Whether a tensor is on the device, and inside its memory.
fn inside(op: &'static str, device: &Device, tensor: &Tensor) -> Result<()> {
    let storage = tensor.storage();
    if !storage.device().same(device) {
        let [expected, got] = [device, storage.device()].map(|d| d.backend().name().to_owned());
        return Err(Error::Device { op, expected, got });
    }
    let layout = tensor.layout();
    let bytes = layout.end().and_then(|end| end.checked_mul(tensor.dtype().size()));
    if layout.dims.len() != layout.strides.len() || bytes.is_none_or(|end| end > storage.bytes()) {
        let got = (tensor, &layout.strides, layout.offset);
        return Err(Error::argument(op, format!("a view inside its memory of {} bytes", storage.bytes()), got));
    }
    Ok(())
}

/// Whether two tensors have an element in common.
pub(crate) fn overlap(a: &Tensor, b: &Tensor) -> bool {
    std::ptr::eq(a.storage(), b.storage()) && a.layout().meets(b.layout())
}

/// Whether both are the same elements in the same order.
pub(crate) fn is_same_view(a: &Tensor, b: &Tensor) -> bool {
    std::ptr::eq(a.storage(), b.storage()) && a.dtype() == b.dtype() && a.layout().is_same_walk(b.layout())
}

/// An operand of a contract has these dims.
pub(crate) fn has_dims(op: &'static str, name: &str, tensor: &Tensor, dims: &[usize]) -> Result<()> {
    if tensor.dims() == dims {
        return Ok(());
    }
    Err(Error::shape(op, format!("{name} {dims:?}"), tensor.dims()))
}

/// An operand of a contract has this dtype.
pub(crate) fn has_dtype(op: &'static str, name: &str, tensor: &Tensor, dtype: DType) -> Result<()> {
    if tensor.dtype() == dtype {
        return Ok(());
    }
    Err(Error::DType { op, expected: format!("{name} of {dtype}"), got: tensor.dtype().to_string() })
}

/// An operand of a contract holds floats.
pub(crate) fn is_float(op: &'static str, name: &str, tensor: &Tensor) -> Result<()> {
    if tensor.dtype().is_float() {
        return Ok(());
    }
    Err(Error::DType { op, expected: format!("{name} of floats"), got: tensor.dtype().to_string() })
}

/// An operand of a contract lies row-major without gaps.
pub(crate) fn is_dense(op: &'static str, name: &str, tensor: &Tensor) -> Result<()> {
    if tensor.layout().is_contiguous() {
        return Ok(());
    }
    Err(Error::argument(op, format!("{name} row-major without gaps"), (tensor, &tensor.layout().strides)))
}

/// `target = source`, bit for bit; both have the same dims and dtype.
#[derive(Clone, Copy, Debug)]
pub struct CopyTo<'a> {
    /// What is read.
    pub source: &'a Tensor,
    /// What is written.
    pub target: &'a Tensor,
}

impl<'a> Call<'a> for CopyTo<'a> {
    type Answer = ();

    fn name(&self) -> &'static str {
        "copy"
    }

    fn reads(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        [self.source].into_iter()
    }

    fn writes(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        [self.target].into_iter()
    }

    fn fits(&self) -> Result<()> {
        has_dims("copy", "a target", self.target, self.source.dims())?;
        has_dtype("copy", "a target", self.target, self.source.dtype())
    }

    fn send(call: Checked<Self>, backend: &dyn Backend) -> Result<()> {
        backend.copy(call)
    }
}

/// Bytes of the host, little-endian and row-major, to a tensor that is all of its memory.
#[derive(Clone, Copy, Debug)]
pub struct Upload<'a> {
    /// What is written.
    pub bytes: &'a [u8],
    /// Where to: dense, from the start of its memory to its end.
    pub target: &'a Tensor,
}

impl<'a> Call<'a> for Upload<'a> {
    type Answer = ();

    fn name(&self) -> &'static str {
        "upload"
    }

    fn reads(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        std::iter::empty()
    }

    fn writes(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        [self.target].into_iter()
    }

    fn fits(&self) -> Result<()> {
        let Self { bytes, target } = *self;
        let size = target.storage().bytes();
        if target.layout().offset != 0 || !target.layout().is_contiguous() || size != bytes.len() {
            let expected = format!("{} bytes for the whole memory of a dense tensor of {size} bytes", bytes.len());
            return Err(Error::argument("upload", expected, target));
        }
        Ok(())
    }

    fn send(call: Checked<Self>, backend: &dyn Backend) -> Result<()> {
        backend.upload(call)
    }
}

/// `outputs = program(inputs)`, element by element; all views have one shape, of any dtypes. An output may be exactly an
/// input.
#[derive(Clone, Copy, Debug)]
pub struct Pointwise<'a> {
    /// What is computed.
    pub program: &'a Program,
    /// As many as the program takes.
    pub inputs: &'a [&'a Tensor],
    /// As many as the program takes.
    pub scalars: &'a [f64],
    /// As many as the program has, at least one.
    pub outputs: &'a [&'a Tensor],
}

impl<'a> Call<'a> for Pointwise<'a> {
    type Answer = ();
    const IN_PLACE: bool = true;

    fn name(&self) -> &'static str {
        "pointwise"
    }

    fn reads(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        self.inputs.iter().copied()
    }

    fn writes(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        self.outputs.iter().copied()
    }

    fn fits(&self) -> Result<()> {
        self.program.check_counts(self.inputs.len(), self.scalars.len(), self.outputs.len())?;
        let dims = self.outputs.first().map_or(&[][..], |output| output.dims());
        self.reads().chain(self.writes()).try_for_each(|t| has_dims("pointwise", "all operands", t, dims))
    }

    fn send(call: Checked<Self>, backend: &dyn Backend) -> Result<()> {
        backend.pointwise(call)
    }
}

/// Inputs, then outputs of one of the groups of [`PointwiseEach`].
pub type Group<'a> = (Vec<&'a Tensor>, Vec<&'a Tensor>);

/// One program on groups of operands, each as for [`Pointwise`] and of its own shape. What one group writes no other uses.
#[derive(Clone, Copy, Debug)]
pub struct PointwiseEach<'a> {
    /// What is computed.
    pub program: &'a Program,
    /// The operands.
    pub groups: &'a [Group<'a>],
    /// As many as the program takes, the same for all groups.
    pub scalars: &'a [f64],
}

impl<'a> PointwiseEach<'a> {
    fn calls(&self) -> impl Iterator<Item = Pointwise<'a>> + Clone {
        let Self { program, groups, scalars } = *self;
        groups.iter().map(move |(inputs, outputs)| Pointwise { program, inputs, scalars, outputs })
    }

    /// No group writes what another uses: operands sorted by their places, so that only neighbours are compared.
    fn is_apart(&self) -> Result<()> {
        if self.groups.len() == 1 {
            return Ok(());
        }
        let place = |tensor: &'a Tensor| (std::ptr::from_ref(tensor.storage()), tensor.layout().offset);
        let of = |(group, (inputs, outputs)): (usize, &'a Group<'a>)| {
            let read = inputs.iter().map(move |t| (place(t), group, false, *t));
            read.chain(outputs.iter().map(move |t| (place(t), group, true, *t)))
        };
        let mut all: Vec<_> = self.groups.iter().enumerate().flat_map(of).collect();
        all.sort_unstable_by_key(|(place, group, ..)| (*place, *group));
        for one_memory in all.chunk_by(|a, b| a.0.0 == b.0.0) {
            for &(_, group, _, output) in one_memory.iter().filter(|(.., written, _)| *written) {
                let end = output.layout().end();
                let near = one_memory.iter().take_while(|((_, offset), ..)| end.is_none_or(|end| *offset < end));
                let mut others = near.filter(|(_, other, ..)| *other != group);
                if let Some((.., other)) = others.find(|(.., other)| overlap(output, other)) {
                    let what = format!("an output {output:?} that shares memory with {other:?} of another group");
                    return Err(Error::Overlap { op: "pointwise", what });
                }
            }
        }
        Ok(())
    }
}

impl<'a> Call<'a> for PointwiseEach<'a> {
    type Answer = ();

    fn name(&self) -> &'static str {
        "pointwise"
    }

    fn reads(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        self.groups.iter().flat_map(|(inputs, _)| inputs.iter().copied())
    }

    fn writes(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        self.groups.iter().flat_map(|(_, outputs)| outputs.iter().copied())
    }

    fn fits(&self) -> Result<()> {
        self.calls().try_for_each(|call| call.fits())
    }

    fn check(&self) -> Result<()> {
        let device = device_of("pointwise", self.writes().next())?;
        for call in self.calls() {
            call.check()?;
            call.outputs.iter().try_for_each(|output| inside("pointwise", device, output))?;
        }
        self.is_apart()
    }

    fn send(call: Checked<Self>, backend: &dyn Backend) -> Result<()> {
        backend.pointwise_each(call)
    }
}

impl<'a> Checked<PointwiseEach<'a>> {
    /// The groups as calls of their own.
    pub fn each(&self) -> impl Iterator<Item = Checked<Pointwise<'a>>> {
        self.0.calls().map(Checked)
    }
}

/// `outputs = kind of program(inputs)` over the axes where the outputs have size 1: inputs of one shape, outputs of that
/// shape but for those axes, all dtypes. Sums are kept in f32 (f64 where an operand is f64).
#[derive(Clone, Copy, Debug)]
pub struct Reduction<'a> {
    /// What is computed before.
    pub program: &'a Program,
    /// How its results are combined.
    pub kind: Reduce,
    /// As many as the program takes, at least one.
    pub inputs: &'a [&'a Tensor],
    /// As many as the program takes.
    pub scalars: &'a [f64],
    /// As many as the program has, at least one.
    pub outputs: &'a [&'a Tensor],
}

impl<'a> Call<'a> for Reduction<'a> {
    type Answer = ();

    fn name(&self) -> &'static str {
        "reduce"
    }

    fn reads(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        self.inputs.iter().copied()
    }

    fn writes(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        self.outputs.iter().copied()
    }

    fn fits(&self) -> Result<()> {
        self.program.check_counts(self.inputs.len(), self.scalars.len(), self.outputs.len())?;
        let (Some(input), Some(output)) = (self.inputs.first(), self.outputs.first()) else {
            return Err(Error::argument("reduce", "at least one input and one output", (self.inputs, self.outputs)));
        };
        self.reads().try_for_each(|t| has_dims("reduce", "all inputs", t, input.dims()))?;
        self.writes().try_for_each(|t| has_dims("reduce", "all outputs", t, output.dims()))?;
        let mut axes = input.dims().iter().zip(output.dims());
        let fits = input.rank() == output.rank() && axes.all(|(from, to)| from == to || *to == 1);
        if !fits || (input.dims().contains(&0) && !output.dims().contains(&0)) {
            let expected = format!("elements to reduce, and outputs of {:?} with some sizes 1", input.dims());
            return Err(Error::shape("reduce", expected, output.dims()));
        }
        Ok(())
    }

    fn send(call: Checked<Self>, backend: &dyn Backend) -> Result<()> {
        backend.reduce(call)
    }
}

/// `out[.., m, n] (+)= a[.., m, k] b[.., k, n] + bias[n]`, leading axes equal. All are of one float dtype; `out` may also be
/// f32 where the others are halves. Sums are kept in f32 (f64 for f64).
#[derive(Clone, Copy, Debug)]
pub struct MatMul<'a> {
    /// `[.., m, k]`
    pub a: &'a Tensor,
    /// `[.., k, n]`
    pub b: &'a Tensor,
    /// `[n]`
    pub bias: Option<&'a Tensor>,
    /// Whether the product is added to what `out` holds.
    pub accumulate: bool,
    /// `[.., m, n]`
    pub out: &'a Tensor,
}

impl<'a> Call<'a> for MatMul<'a> {
    type Answer = ();

    fn name(&self) -> &'static str {
        "matmul"
    }

    fn reads(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        [Some(self.a), Some(self.b), self.bias].into_iter().flatten()
    }

    fn writes(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        [self.out].into_iter()
    }

    fn fits(&self) -> Result<()> {
        let Self { a, b, bias, out, .. } = *self;
        let fits = match (a.dims(), b.dims(), out.dims()) {
            ([a @ .., m, k], [b @ .., of_k, n], [lead @ .., of_m, of_n]) => {
                a == lead && b == lead && (k, m, n) == (of_k, of_m, of_n) && bias.is_none_or(|bias| bias.dims() == [*n])
            }
            _ => false,
        };
        if !fits {
            let got = (a.dims(), b.dims(), bias.map(Tensor::dims), out.dims());
            return Err(Error::shape("matmul", "[.., m, k], [.., k, n], [n] and [.., m, n]", got));
        }
        is_float("matmul", "factors", a)?;
        self.reads().try_for_each(|t| has_dtype("matmul", "factors and bias", t, a.dtype()))?;
        if a.dtype().size() == 2 && out.dtype() == DType::F32 {
            return Ok(());
        }
        has_dtype("matmul", "a result", out, a.dtype())
    }

    fn send(call: Checked<Self>, backend: &dyn Backend) -> Result<()> {
        backend.matmul(call)
    }
}

/// The widths of rows by index: `rows` are `[n, ..]` where `table` is `[.., ..]` and `index` u32 `[n]`; all dense.
fn rows_fit(op: &'static str, table: &Tensor, index: &Tensor, rows: &Tensor) -> Result<()> {
    has_dtype(op, "an index", index, DType::U32)?;
    let ([count], Some(width)) = (index.dims(), table.dims().get(1..)) else {
        return Err(Error::shape(op, "an index [n] and a table of one axis or more", (index.dims(), table.dims())));
    };
    if rows.rank() != table.rank() || rows.dims()[0] != *count || rows.dims()[1..] != *width {
        return Err(Error::shape(op, format!("rows [{count}, ..] of {width:?}"), rows.dims()));
    }
    has_dtype(op, "rows", rows, table.dtype())?;
    [("a table", table), ("an index", index), ("rows", rows)].iter().try_for_each(|(name, t)| is_dense(op, name, t))
}

/// `out[i, ..] = table[index[i], ..]`, all row-major without gaps; index u32 `[n]`, the others of one dtype. What an index
/// past the end gives is no value; the device tells of it, at once or with what is read next.
#[derive(Clone, Copy, Debug)]
pub struct Gather<'a> {
    /// `[rows, ..]`
    pub table: &'a Tensor,
    /// u32 `[n]`
    pub index: &'a Tensor,
    /// `[n, ..]`
    pub out: &'a Tensor,
}

impl<'a> Call<'a> for Gather<'a> {
    type Answer = ();

    fn name(&self) -> &'static str {
        "index_select"
    }

    fn reads(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        [self.table, self.index].into_iter()
    }

    fn writes(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        [self.out].into_iter()
    }

    fn fits(&self) -> Result<()> {
        rows_fit("index_select", self.table, self.index, self.out)
    }

    fn send(call: Checked<Self>, backend: &dyn Backend) -> Result<()> {
        backend.gather(call)
    }
}

/// `out[index[i], ..] += rows[i, ..]` in the order of `i`, all row-major without gaps; index u32 `[n]`, the others of one
/// float dtype. An index past the end adds nothing; the device tells of it, at once or with what is read next.
#[derive(Clone, Copy, Debug)]
pub struct ScatterAdd<'a> {
    /// `[n, ..]`
    pub rows: &'a Tensor,
    /// u32 `[n]`
    pub index: &'a Tensor,
    /// `[rows, ..]`
    pub out: &'a Tensor,
}

impl<'a> Call<'a> for ScatterAdd<'a> {
    type Answer = ();

    fn name(&self) -> &'static str {
        "scatter_add"
    }

    fn reads(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        [self.rows, self.index].into_iter()
    }

    fn writes(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
        [self.out].into_iter()
    }

    fn fits(&self) -> Result<()> {
        is_float("scatter_add", "rows", self.rows)?;
        rows_fit("scatter_add", self.out, self.index, self.rows)
    }

    fn send(call: Checked<Self>, backend: &dyn Backend) -> Result<()> {
        backend.scatter_add(call)
    }
}
