//! Convolution in one to three dimensions, as products that are never a whole matrix of patches in memory.
//!
//! Results lie with their channels innermost (channels last), whatever the order of x, so that the channels of neighbouring
//! places are runs of memory; operations element by element keep that order. Every tap of the kernel is then a product of a
//! strided view with a matrix: that is the composition. The CPU's kernel takes the taps of a row at once (`cpu/gemm/conv.rs`).

use std::ops::Range;

use smallvec::smallvec;

use crate::backend::call::{self, Call, has_dims, has_dtype, is_float};
use crate::backend::{FusedCall, Ran, common_device, operands, run_fused};
use crate::expr::{Function, Reduce};
use crate::gradcheck::{Case, Draw, Sample};
use crate::ops::matmul::product;
use crate::ops::pointwise::run_pointwise;
use crate::ops::reduce::{accumulator, run_reduce};
use crate::ops::view::copied;
use crate::shape::Layout;
use crate::tape::{Forward, InputGradients, Op, Saved, apply_one};
use crate::{DType, Error, Result, Tensor, ops::linear};

/// Most axes beside samples and channels.
const AXES: usize = 3;

/// What lies beyond the ends of an axis.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Padding {
    /// Zeros.
    #[default]
    Zeros,
    /// The first or last value, again and again.
    Replicate,
    /// The values before the end, backwards, without the last one.
    Reflect,
}

/// How a convolution walks one axis.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConvAxis {
    /// From one place of the result to the next.
    pub stride: usize,
    /// From one tap of the kernel to the next.
    pub dilation: usize,
    /// Places added before the first one.
    pub before: usize,
    /// Places added behind the last one.
    pub after: usize,
    /// What is in the added places.
    pub padding: Padding,
}

impl Default for ConvAxis {
    /// Each place, nothing added.
    fn default() -> Self {
        Self { stride: 1, dilation: 1, before: 0, after: 0, padding: Padding::Zeros }
    }
}

impl ConvAxis {
    /// For an odd kernel, whose result is as long as its input: `kernel / 2` added on both sides.
    pub fn same(kernel: usize) -> Self {
        Self::padded(kernel / 2, kernel / 2)
    }

    /// For a kernel along time that sees no later place: `kernel - 1` added before.
    pub fn causal(kernel: usize) -> Self {
        Self::padded(kernel.saturating_sub(1), 0)
    }

    /// With zeros added.
    pub fn padded(before: usize, after: usize) -> Self {
        Self { before, after, ..Self::default() }
    }

    /// With another step.
    #[must_use]
    pub fn with_stride(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// With other values beyond the ends.
    #[must_use]
    pub fn with_padding(self, padding: Padding) -> Self {
        Self { padding, ..self }
    }

    /// With what is added.
    fn full(&self, size: usize) -> Option<usize> {
        self.before.checked_add(self.after)?.checked_add(size)
    }

    /// Places of the result for an axis of `size` places and a kernel; nothing where the kernel does not fit in.
    pub fn output(&self, size: usize, kernel: usize) -> Option<usize> {
        let reach = kernel.checked_sub(1)?.checked_mul(self.dilation)?.checked_add(1)?;
        let reflects = self.padding == Padding::Reflect && self.before.max(self.after) >= size;
        let empty = self.padding != Padding::Zeros && size == 0;
        if self.stride == 0 || self.dilation == 0 || reflects || empty {
            return None;
        }
        Some(self.full(size)?.checked_sub(reach)? / self.stride + 1)
    }

    /// The places of an axis of `size` that some places of the result see, and the walk along these alone. Nothing where what is
    /// added is no less than the kernel sees (or half of it, where that is a reflection), since there a part would not do.
    pub(crate) fn window(&self, size: usize, kernel: usize, places: Range<usize>) -> Option<(Range<usize>, Self)> {
        let reach = kernel.checked_sub(1)? * self.dilation + 1;
        let added = self.before.max(self.after) * if self.padding == Padding::Reflect { 2 } else { 1 };
        if added >= reach || places.is_empty() || places.end > self.output(size, kernel)? {
            return None;
        }
        // Both in the padded axis.
        let (first, end) = (places.start * self.stride, (places.end - 1) * self.stride + reach);
        let seen = first.saturating_sub(self.before)..(end - self.before).min(size);
        let (before, after) = (self.before.saturating_sub(first), end.saturating_sub(self.before + size));
        Some((seen, Self { before, after, ..*self }))
    }

    /// Where the value at place `at` of the padded axis comes from: a place of the axis, or nothing for a zero.
    pub(crate) fn source(&self, size: usize, at: usize) -> Option<usize> {
        let behind = (at + 1).saturating_sub(self.before + size);
        match self.padding {
            _ if at >= self.before && behind == 0 => Some(at - self.before),
            Padding::Zeros => None,
            Padding::Replicate => Some(if behind > 0 { size - 1 } else { 0 }),
            Padding::Reflect => Some(if behind > 0 { size - 1 - behind } else { self.before - at }),
        }
    }
}

/// A tensor of uninitialised memory, `[B, C, s..]` with the channels innermost.
pub(crate) fn channels_last(dims: &[usize], dtype: DType, like: &Tensor) -> Result<Tensor> {
    let order: Vec<usize> = [&[dims[0]], &dims[2..], &[dims[1]]].concat();
    let out = Tensor::empty(&order, dtype, like.device())?;
    let rank = dims.len();
    let axes: Vec<usize> = [0, rank - 1].into_iter().chain(1..rank - 1).collect();
    Ok(out.view(out.layout().permute(&axes)?))
}

/// A convolution (a cross-correlation, as in PyTorch): all operands are of one float dtype, sums are f32 (f64 for f64).
#[derive(Clone, Copy, Debug)]
pub struct ConvForward<'a> {
    /// `[B, C, s..]` with one to three axes s.
    pub x: &'a Tensor,
    /// `[O, C / groups, k..]`
    pub weight: &'a Tensor,
    /// `[O]`
    pub bias: Option<&'a Tensor>,
    /// As many as there are axes s.
    pub axes: &'a [ConvAxis],
    /// Parts of the channels that do not meet.
    pub groups: usize,
    /// `[B, O, ..]`, each axis as [`ConvAxis::output`] says.
    pub y: &'a Tensor,
}

/// Sizes of a convolution's result, or nothing where the operands do not fit.
fn output_dims(x: &Tensor, weight: &Tensor, axes: &[ConvAxis], groups: usize) -> Option<Vec<usize>> {
    let (&[batch, channels, ref sizes @ ..], &[outputs, width, ref kernel @ ..]) = (x.dims(), weight.dims()) else {
        return None;
    };
    let counted = (1..=AXES).contains(&axes.len()) && sizes.len() == axes.len() && kernel.len() == axes.len();
    if !counted || groups == 0 || width.checked_mul(groups) != Some(channels) || outputs % groups != 0 {
        return None;
    }
    let mut dims = vec![batch, outputs];
    for ((axis, size), kernel) in axes.iter().zip(sizes).zip(kernel) {
        dims.push(axis.output(*size, *kernel)?);
    }
    Some(dims)
}

impl<'a> FusedCall<'a> for ConvForward<'a> {
    const NAME: &'static str = "conv";

    fn inputs(&self) -> [Option<&'a Tensor>; 8] {
        operands([Some(self.x), Some(self.weight), self.bias])
    }

    fn outputs(&self) -> [Option<&'a Tensor>; 4] {
        operands([Some(self.y)])
    }

    fn fits(&self) -> Result<()> {
        let Self { x, weight, bias, axes, groups, y } = *self;
        is_float(Self::NAME, "x", x)?;
        has_dtype(Self::NAME, "weight", weight, x.dtype())?;
        has_dtype(Self::NAME, "y", y, x.dtype())?;
        let dims = output_dims(x, weight, axes, groups).ok_or_else(|| misfit(x, weight, axes, groups))?;
        has_dims(Self::NAME, "y", y, &dims)?;
        bias.map_or(Ok(()), |bias| {
            has_dtype(Self::NAME, "bias", bias, x.dtype())?;
            has_dims(Self::NAME, "bias", bias, &weight.dims()[..1])
        })
    }

    fn flops(&self) -> f64 {
        2.0 * self.y.numel() as f64 * self.weight.dims()[1..].iter().product::<usize>() as f64
    }
}

fn misfit(x: &Tensor, weight: &Tensor, axes: &[ConvAxis], groups: usize) -> Error {
    let expected = format!(
        "x [B, C, s..] and weight [O, C / groups, k..] with {} axes s, {groups} groups and kernels that fit in, padded as \
         {axes:?}; what is reflected must be shorter than its axis",
        axes.len()
    );
    Error::shape("conv", expected, (x.dims(), weight.dims()))
}

impl ConvForward<'_> {
    /// Runs a kernel, or the composition.
    fn run_or_compose(&self) -> Result<()> {
        if run_fused(*self)? == Ran::Declined { self.compose() } else { Ok(()) }
    }

    /// The composition: a product for each tap, added up in f32 (f64 for f64).
    fn compose(&self) -> Result<()> {
        let Self { x, weight, bias, axes, groups, y } = *self;
        let sum = channels_last(y.dims(), accumulator(y.dtype()), y)?;
        let padded = pad(x, axes)?;
        for (i, tap) in taps(weight).enumerate() {
            let a = padded.view(windows(padded.layout(), axes, &tap, &y.dims()[2..], groups));
            let b = matrices(weight, groups, &tap, &a.dims()[..y.rank() - 1])?;
            let out = sum.view(rows(sum.layout(), groups));
            call::MatMul { a: &a, b: &b, bias: None, accumulate: i > 0, out: &out }.run()?;
        }
        match bias {
            Some(bias) => {
                let bias = bias.view(bias.layout().reshape(&column(bias, y.rank())).unwrap_or(bias.layout().clone()));
                run_pointwise(&Function::build(|[x, b]| [x + b]), &[&sum, &bias], &[], &[y])
            }
            None => y.copy_from(&sum),
        }
    }
}

/// `[C]` beside the axes of `[B, C, s..]`.
fn column(vector: &Tensor, rank: usize) -> Vec<usize> {
    [&[vector.numel()][..], &vec![1; rank - 2]].concat()
}

/// All places of the kernel, the last axis fastest.
fn taps(weight: &Tensor) -> impl Iterator<Item = Vec<usize>> {
    let kernel = weight.dims()[2..].to_vec();
    (0..kernel.iter().product()).map(move |mut index: usize| {
        let mut tap = vec![0; kernel.len()];
        for (at, size) in tap.iter_mut().zip(&kernel).rev() {
            *at = index % size;
            index /= size;
        }
        tap
    })
}

/// Of `[B, C, s..]`, a view of a group's channels in the rows of the last axis: `[B, s.., groups, s, C / groups]`.
fn rows(layout: &Layout, groups: usize) -> Layout {
    let axes = vec![ConvAxis::default(); layout.dims.len() - 2];
    windows(layout, &axes, &vec![0; axes.len()], &layout.dims[2..], groups)
}

/// Of a padded `[B, C, s..]`, what one tap of the kernel meets for results of `sizes`, as [`rows`].
fn windows(layout: &Layout, axes: &[ConvAxis], tap: &[usize], sizes: &[usize], groups: usize) -> Layout {
    let steps = &layout.strides[2..];
    let offset = layout.offset + (0..axes.len()).map(|i| tap[i] * axes[i].dilation * steps[i]).sum::<usize>();
    let (width, last) = (layout.dims[1] / groups, axes.len() - 1);
    let strides: Vec<usize> = (0..=last).map(|i| axes[i].stride * steps[i]).collect();
    Layout {
        dims: [&layout.dims[..1], &sizes[..last], &[groups, sizes[last], width]].concat().into(),
        strides: [
            &layout.strides[..1],
            &strides[..last],
            &[width * layout.strides[1], strides[last], layout.strides[1]],
        ]
        .concat()
        .into(),
        offset,
    }
}

/// The weights of a tap as `[.., groups, C / groups, O / groups]` for rows of `lead`, which ends with the groups.
fn matrices(weight: &Tensor, groups: usize, tap: &[usize], lead: &[usize]) -> Result<Tensor> {
    let Layout { dims, strides, offset } = weight.layout();
    let (outputs, width) = (dims[0] / groups, dims[1]);
    let one = Layout {
        dims: smallvec![groups, width, outputs],
        strides: smallvec![outputs * strides[0], strides[1], strides[0]],
        offset: offset + tap.iter().zip(&strides[2..]).map(|(at, step)| at * step).sum::<usize>(),
    };
    Ok(weight.view(one.expand(&[lead, &[width, outputs]].concat())?))
}

/// A plain copy with what is added on each axis; x itself where nothing is.
fn pad(x: &Tensor, axes: &[ConvAxis]) -> Result<Tensor> {
    if axes.iter().all(|axis| axis.before + axis.after == 0) {
        return Ok(x.detach());
    }
    let mut dims = x.dims().to_vec();
    for (axis, dim) in axes.iter().zip(&mut dims[2..]) {
        *dim = axis.full(*dim).ok_or_else(|| Error::argument("conv", "a padding that fits the address space", axis))?;
    }
    let out = channels_last(&dims, x.dtype(), x)?;
    out.copy_from(&Tensor::zeros(&[], x.dtype(), x.device())?.view(Layout::contiguous(&[]).expand(&dims)?))?;
    out.view(inner(out.layout(), axes, x.dims())?).copy_from(x)?;
    for (i, axis) in axes.iter().enumerate() {
        for (at, from) in copies(axis, x.dims()[2 + i]) {
            let [to, from] = [at, from].map(|place| out.layout().narrow(2 + i, place, 1));
            out.view(to?).copy_from(&out.view(from?))?;
        }
    }
    Ok(out)
}

/// The part of a padded layout that is no padding.
fn inner(padded: &Layout, axes: &[ConvAxis], dims: &[usize]) -> Result<Layout> {
    let narrowed = |layout: Layout, (i, axis): (usize, &ConvAxis)| layout.narrow(2 + i, axis.before, dims[2 + i]);
    axes.iter().enumerate().try_fold(padded.clone(), narrowed)
}

/// Places of a padded axis that repeat another one, with that one.
fn copies(axis: &ConvAxis, size: usize) -> Vec<(usize, usize)> {
    let added = (0..axis.before).chain(axis.before + size..axis.before + size + axis.after);
    added.filter_map(|at| Some((at, axis.before + axis.source(size, at)?))).collect()
}

/// The gradient of x from that of the padded x, which is written over.
fn unpad(padded: &Tensor, axes: &[ConvAxis], dims: &[usize], dtype: DType) -> Result<Tensor> {
    for (i, axis) in axes.iter().enumerate().rev() {
        for (at, from) in copies(axis, dims[2 + i]) {
            let [at, from] = [at, from].map(|place| padded.layout().narrow(2 + i, place, 1));
            let (at, from) = (padded.view(at?), padded.view(from?));
            run_pointwise(&Function::build(|[a, b]| [a + b]), &[&from, &at], &[], &[&from])?;
        }
    }
    let dx = channels_last(dims, dtype, padded)?;
    dx.copy_from(&padded.view(inner(padded.layout(), axes, dims)?))?;
    Ok(dx)
}

/// A convolution with inputs x, weight and maybe bias.
#[derive(Debug)]
struct Conv {
    axes: Vec<ConvAxis>,
    groups: usize,
}

impl Conv {
    /// The gradient of x: that of a plain walk with zeros is a convolution too, of the kernel backwards.
    fn gradient_of_x(&self, grad: &Tensor, weight: &Tensor, dims: &[usize]) -> Result<Tensor> {
        let Self { axes, groups } = self;
        let wide = accumulator(grad.dtype());
        let mut padded = dims.to_vec();
        axes.iter().zip(&mut padded[2..]).for_each(|(axis, dim)| *dim += axis.before + axis.after);
        let sum = channels_last(&padded, wide, grad)?;
        sum.copy_from(&Tensor::zeros(&[], wide, grad.device())?.view(Layout::contiguous(&[]).expand(&padded)?))?;
        let a = grad.view(rows(grad.layout(), *groups));
        for tap in taps(weight) {
            let b = matrices(weight, *groups, &tap, &a.dims()[..grad.rank() - 1])?;
            let out = sum.view(windows(sum.layout(), axes, &tap, &grad.dims()[2..], *groups));
            call::MatMul { a: &a, b: &super::matmul::flipped(&b)?, bias: None, accumulate: true, out: &out }.run()?;
        }
        unpad(&sum, axes, dims, grad.dtype())
    }

    /// The gradient of the weight: for each tap the product of the gradient and what the tap met, both copied to dense rows.
    fn gradient_of_weight(&self, grad: &Tensor, x: &Tensor, dims: &[usize]) -> Result<Tensor> {
        let Self { axes, groups } = self;
        let dense = |view: Tensor| -> Result<Tensor> {
            let rank = view.rank();
            let order: Vec<usize> = [rank - 3].into_iter().chain(0..rank - 3).chain(rank - 2..rank).collect();
            let rows = copied(&view.view(view.layout().permute(&order)?))?;
            let (groups, width) = (rows.dims()[0], rows.dims()[rank - 1]);
            rows.reshape(&[groups, rows.numel() / (groups * width).max(1), width])
        };
        let padded = pad(x, axes)?;
        let transposed = super::matmul::flipped(&dense(grad.view(rows(grad.layout(), *groups)))?)?;
        let out = Tensor::empty(dims, x.dtype(), x.device())?;
        for tap in taps(&out) {
            let met = dense(padded.view(windows(padded.layout(), axes, &tap, &grad.dims()[2..], *groups)))?;
            let to = matrices(&out, *groups, &tap, &[*groups])?;
            super::matmul::flipped(&to)?.copy_from(&product(&transposed, &met, None)?)?;
        }
        Ok(out)
    }
}

impl Op for Conv {
    fn name(&self) -> &'static str {
        "conv"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let (x, weight) = (&inputs[0], &inputs[1]);
        let dims = output_dims(x, weight, &self.axes, self.groups);
        let dims = dims.ok_or_else(|| misfit(x, weight, &self.axes, self.groups))?;
        super::matmul::save_factors(cx, ["x", "weight"], [x, weight]);
        let y = channels_last(&dims, x.dtype(), x)?;
        if y.numel() > 0 {
            let (axes, groups) = (&self.axes[..], self.groups);
            ConvForward { x, weight, bias: inputs.get(2), axes, groups, y: &y }.run_or_compose()?;
        }
        Ok(vec![y])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        if out.needs(0) {
            out.set(0, self.gradient_of_x(grad, saved.get("weight")?, saved.shape("x")?.0)?);
        }
        if out.needs(1) {
            out.set(1, self.gradient_of_weight(grad, saved.get("x")?, saved.shape("weight")?.0)?);
        }
        if out.needs(2) {
            let identity = Function::build(|[g]| [g]);
            let others: Vec<usize> = (0..grad.rank()).filter(|axis| *axis != 1).collect();
            let sums = run_reduce(&identity, Reduce::Sum, &[grad], grad.dims(), &others, &[grad.dtype()])?;
            out.set(2, sums[0].reshape(&grad.dims()[1..2])?);
        }
        Ok(())
    }
}

/// Convolution (cross-correlation, as in PyTorch) in one to three dimensions: x `[B, C, s..]`, weight `[O, C / groups, k..]`,
/// bias `[O]`, result `[B, O, s'..]` in the dtype of x, its channels innermost in memory. Sums are f32 (f64 for f64).
///
/// # Errors
/// When shapes, dtypes or devices do not fit, or the padded x is smaller than the kernel.
pub fn conv(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, axes: &[ConvAxis], groups: usize) -> Result<Tensor> {
    if output_dims(x, weight, axes, groups).is_none() {
        return Err(misfit(x, weight, axes, groups));
    }
    let mut inputs = vec![x, weight];
    inputs.extend(bias);
    common_device("conv", &inputs)?;
    super::matmul::same_dtype("conv", &inputs)?;
    if let Some(bias) = bias {
        has_dims("conv", "bias", bias, &weight.dims()[..1])?;
    }
    apply_one(Conv { axes: axes.to_vec(), groups }, &inputs)
}

/// Patches as tokens: x `[B, C, s..]` to `[B, L, C k..]`, the grid's last axis fastest, a patch's channel slowest.
///
/// # Errors
/// When the ranks differ or a size is no multiple of its kernel.
pub fn patchify(x: &Tensor, kernel: &[usize]) -> Result<Tensor> {
    let n = kernel.len();
    let fits = n > 0
        && x.rank() == n + 2
        && kernel.iter().zip(&x.dims()[2..]).all(|(k, size)| *k > 0 && size.is_multiple_of(*k));
    if !fits {
        let expected = format!("x [B, C, s..] with s a multiple of {kernel:?}");
        return Err(Error::shape("patchify", expected, x.dims()));
    }
    let (batch, channels) = (x.dims()[0], x.dims()[1]);
    let grid: Vec<usize> = (0..n).map(|i| x.dims()[i + 2] / kernel[i]).collect();
    // [B, C, g0, k0, g1, k1, ..] -> [B, g0, g1, .., C, k0, k1, ..]
    let mut dims = vec![batch, channels];
    (0..n).for_each(|i| dims.extend([grid[i], kernel[i]]));
    let axes: Vec<usize> =
        [0].into_iter().chain((0..n).map(|i| 2 + 2 * i)).chain([1]).chain((0..n).map(|i| 3 + 2 * i)).collect();
    let width = channels * kernel.iter().product::<usize>();
    x.reshape(&dims)?.permute(&axes)?.reshape(&[batch, grid.iter().product(), width])
}

/// Patchify convolution in n dimensions: x `[B, C, s..]`, weight `[out, C, k..]`, bias `[out]`, stride = kernel: a view and a
/// product. The result is tokens `[B, L, out]`, the grid's last axis fastest.
///
/// # Errors
/// When a size is no multiple of its kernel or the shapes do not fit.
pub fn patchify_conv(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let kernel = weight.dims().get(2..).unwrap_or_default();
    if x.dims().get(1) != weight.dims().get(1) {
        return Err(Error::shape("patchify_conv", "x [B, C, s..] and weight [out, C, k..]", (x.dims(), weight.dims())));
    }
    let patches = patchify(x, kernel)?;
    linear(&patches, &weight.reshape(&[weight.dims()[0], patches.dims()[2]])?, bias)
}

/// An axis that a kernel fits in, with its length.
fn draw_axis(draw: &mut Draw, kernel: usize) -> (ConvAxis, usize) {
    let padding = [Padding::Zeros, Padding::Replicate, Padding::Reflect][draw.size(0, 2)];
    let (stride, dilation) = (draw.size(1, 2), draw.size(1, 2));
    let axis = ConvAxis { stride, dilation, before: draw.size(0, 2), after: draw.size(0, 2), padding };
    let reach = (kernel - 1) * dilation + 1;
    (axis, (reach + draw.size(0, 2)).saturating_sub(axis.before + axis.after).max(3))
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[
    Case {
        name: "convolution",
        make: |draw| {
            let n = draw.size(1, 3);
            let (groups, width, outputs) = (draw.size(1, 2), draw.size(1, 3), draw.size(1, 3));
            let kernel: Vec<usize> = (0..n).map(|_| draw.size(1, 3)).collect();
            let (axes, sizes): (Vec<_>, Vec<_>) = kernel.iter().map(|k| draw_axis(draw, *k)).unzip();
            let batch = draw.size(1, 2);
            let x = draw.standard(&[&[batch, groups * width], &sizes[..]].concat())?;
            let weight = draw.standard(&[&[groups * outputs, width], &kernel[..]].concat())?;
            let mut inputs = vec![x, weight];
            if draw.size(0, 1) == 1 {
                inputs.push(draw.standard(&[groups * outputs])?);
            }
            Sample::new(inputs, move |xs| conv(&xs[0], &xs[1], xs.get(2), &axes, groups))
        },
    },
    Case {
        name: "convolution of wide rows",
        make: |draw| {
            // Sizes at which a kernel has whole blocks and what is left over of them, and channels that it takes in parts.
            let (width, outputs) = match draw.size(0, 2) {
                0 => (draw.size(130, 300), draw.size(1, 5)),
                _ => (draw.size(1, 3) * 13, draw.size(30, 70)),
            };
            let places = draw.size(10, 40);
            let x = draw.standard(&[1, width, 3, places])?;
            let weight = draw.standard(&[outputs, width, 3, 3])?;
            let axes = [ConvAxis::same(3), ConvAxis::same(3).with_stride(draw.size(1, 2))];
            Sample::new(vec![x, weight, draw.standard(&[outputs])?], move |xs| {
                conv(&xs[0], &xs[1], Some(&xs[2]), &axes, 1)
            })
        },
    },
    Case {
        name: "patchify convolution in two and three dimensions",
        make: |draw| {
            let n = draw.size(2, 3);
            let patch: Vec<usize> = (0..n).map(|_| draw.size(1, 2)).collect();
            let size: Vec<usize> = patch.iter().map(|p| p * draw.size(1, 3)).collect();
            let (channels, out) = (draw.size(1, 3), draw.size(1, 4));
            let x = draw.standard(&[&[2, channels], &size[..]].concat())?;
            let weight = draw.standard(&[&[out, channels], &patch[..]].concat())?;
            let bias = draw.standard(&[out])?;
            Sample::new(vec![x, weight, bias], |xs| patchify_conv(&xs[0], &xs[1], Some(&xs[2])))
        },
    },
];
