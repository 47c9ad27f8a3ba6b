//! Views: other sizes, orders and parts of the same storage; joining and padding.

use crate::backend::call::{Call, CopyTo};
use crate::backend::common_device;
use crate::gradcheck::{Case, Sample};
use crate::shape::{Layout, numel};
use crate::tape::{Forward, InputGradients, Op, Saved, apply, apply_one};
use crate::{Error, Result, Tensor};

/// A change of layout and the layout of its gradient.
#[derive(Clone, Debug)]
enum View {
    Reshape { from: Vec<usize>, to: Vec<usize> },
    Permute(Vec<usize>),
    Expand { from: Vec<usize>, to: Vec<usize> },
    Contiguous,
}

impl Op for View {
    fn name(&self) -> &'static str {
        match self {
            Self::Reshape { .. } => "reshape",
            Self::Permute(_) => "permute",
            Self::Expand { .. } => "expand",
            Self::Contiguous => "contiguous",
        }
    }

    fn forward(&self, _: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let x = &inputs[0];
        let out = match self {
            Self::Reshape { to, .. } => reshaped(x, to)?,
            Self::Permute(axes) => x.view(x.layout().permute(axes)?),
            Self::Expand { to, .. } => x.view(x.layout().expand(to)?),
            Self::Contiguous => copied(x)?,
        };
        Ok(vec![out])
    }

    fn backward(&self, _: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let dx = match self {
            Self::Reshape { from, .. } => reshaped(grad, from)?,
            Self::Permute(axes) => {
                let mut inverse = vec![0; axes.len()];
                axes.iter().enumerate().for_each(|(i, &a)| inverse[a] = i);
                grad.view(grad.layout().permute(&inverse)?)
            }
            Self::Expand { from, to } => {
                let axes = super::pointwise::reduced_axes(from, to);
                reshaped(&grad.sum(&axes, true)?, from)?
            }
            Self::Contiguous => grad.clone(),
        };
        out.set(0, dx);
        Ok(())
    }
}

/// A plain row-major copy.
pub(crate) fn copied(x: &Tensor) -> Result<Tensor> {
    let out = Tensor::empty(x.dims(), x.dtype(), x.device())?;
    CopyTo { source: x, target: &out }.run()?;
    Ok(out)
}

fn reshaped(x: &Tensor, dims: &[usize]) -> Result<Tensor> {
    match x.layout().reshape(dims) {
        Some(layout) => Ok(x.view(layout)),
        None => Ok(copied(x)?.view(Layout::contiguous(dims))),
    }
}

/// Parts of one axis, one after the other. Its gradient joins theirs.
#[derive(Debug)]
struct Split {
    axis: usize,
    start: usize,
    sizes: Vec<usize>,
    dims: Vec<usize>,
}

impl Op for Split {
    fn name(&self) -> &'static str {
        "split"
    }

    fn forward(&self, _: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let mut start = self.start;
        let part = |&size: &usize| {
            let view = inputs[0].view(inputs[0].layout().narrow(self.axis, start, size)?);
            start += size;
            Ok(view)
        };
        self.sizes.iter().map(part).collect()
    }

    fn backward(&self, _: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(any) = grads.iter().flatten().next() else { return Ok(()) };
        let complete = grads.iter().all(Option::is_some) && self.sizes.iter().sum::<usize>() == self.dims[self.axis];
        let dx = if complete {
            Tensor::empty(&self.dims, any.dtype(), any.device())?
        } else {
            Tensor::zeros(&self.dims, any.dtype(), any.device())?
        };
        let mut start = self.start;
        for (grad, &size) in grads.iter().zip(&self.sizes) {
            if let Some(grad) = grad {
                CopyTo { source: grad, target: &dx.view(dx.layout().narrow(self.axis, start, size)?) }.run()?;
            }
            start += size;
        }
        out.set(0, dx);
        Ok(())
    }
}

/// Tensors side by side on one axis, with zeros before and after.
#[derive(Debug)]
struct Cat {
    axis: usize,
    before: usize,
    after: usize,
    sizes: Vec<usize>,
}

impl Op for Cat {
    fn name(&self) -> &'static str {
        "cat"
    }

    fn forward(&self, _: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let first = &inputs[0];
        let mut dims = first.dims().to_vec();
        dims[self.axis] = self.before + self.sizes.iter().sum::<usize>() + self.after;
        let out = if self.before + self.after == 0 {
            Tensor::empty_in_order(first, &dims, first.dtype())?
        } else {
            Tensor::zeros(&dims, first.dtype(), first.device())?
        };
        let mut start = self.before;
        for input in inputs {
            let size = input.dims()[self.axis];
            CopyTo { source: input, target: &out.view(out.layout().narrow(self.axis, start, size)?) }.run()?;
            start += size;
        }
        Ok(vec![out])
    }

    fn backward(&self, _: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let mut start = self.before;
        for (i, &size) in self.sizes.iter().enumerate() {
            out.set(i, grad.view(grad.layout().narrow(self.axis, start, size)?));
            start += size;
        }
        Ok(())
    }
}

/// Views and joins. All are recorded; none copies unless it says so.
impl Tensor {
    /// The same elements in row-major order under other sizes; copies only when no view can do it.
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn reshape(&self, dims: &[usize]) -> Result<Self> {
        if numel("reshape", dims)? != self.numel() {
            return Err(Error::shape("reshape", format!("{} elements", self.numel()), dims));
        }
        if dims == self.dims() {
            return Ok(self.clone());
        }
        apply_one(View::Reshape { from: self.dims().to_vec(), to: dims.to_vec() }, &[self])
    }

    /// The axes in another order.
    ///
    /// # Errors
    /// When `axes` does not name each axis once.
    pub fn permute(&self, axes: &[usize]) -> Result<Self> {
        apply_one(View::Permute(axes.to_vec()), &[self])
    }

    /// Two axes exchanged.
    ///
    /// # Errors
    /// When an axis does not exist.
    pub fn transpose(&self, a: usize, b: usize) -> Result<Self> {
        let mut axes: Vec<usize> = (0..self.rank()).collect();
        axes.swap(self.axis("transpose", a)?, self.axis("transpose", b)?);
        self.permute(&axes)
    }

    /// The last two axes exchanged.
    ///
    /// # Errors
    /// When there are fewer than two axes.
    pub fn t(&self) -> Result<Self> {
        match self.rank() {
            0 | 1 => Err(Error::shape("t", "two axes or more", self.dims())),
            rank => self.transpose(rank - 2, rank - 1),
        }
    }

    /// Repeats axes of size 1, and adds leading axes, to reach `dims`.
    ///
    /// # Errors
    /// When another axis would have to change.
    pub fn expand(&self, dims: &[usize]) -> Result<Self> {
        if dims == self.dims() {
            return Ok(self.clone());
        }
        apply_one(View::Expand { from: self.dims().to_vec(), to: dims.to_vec() }, &[self])
    }

    /// Another name of [`Tensor::expand`], as in PyTorch.
    ///
    /// # Errors
    /// When another axis would have to change.
    pub fn broadcast_to(&self, dims: &[usize]) -> Result<Self> {
        self.expand(dims)
    }

    /// The tensor row-major without gaps; copies when it is not.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn contiguous(&self) -> Result<Self> {
        if self.layout().is_contiguous() {
            return Ok(self.clone());
        }
        apply_one(View::Contiguous, &[self])
    }

    /// `len` elements of `axis` from `start`.
    ///
    /// # Errors
    /// When the range or the axis does not exist.
    pub fn narrow(&self, axis: usize, start: usize, len: usize) -> Result<Self> {
        self.axis("narrow", axis)?;
        apply_one(Split { axis, start, sizes: vec![len], dims: self.dims().to_vec() }, &[self])
    }

    /// Parts of the given sizes along `axis`.
    ///
    /// # Errors
    /// When the sizes do not add up to the axis.
    pub fn split(&self, sizes: &[usize], axis: usize) -> Result<Vec<Self>> {
        if sizes.iter().try_fold(0usize, |sum, &size| sum.checked_add(size)) != Some(self.dim(axis)?) {
            return Err(Error::argument("split", format!("sizes that add up to {}", self.dims()[axis]), sizes));
        }
        apply(Split { axis, start: 0, sizes: sizes.to_vec(), dims: self.dims().to_vec() }, &[self])
    }

    /// `n` equal parts along `axis`.
    ///
    /// # Errors
    /// When `n` does not divide the axis.
    pub fn chunk(&self, n: usize, axis: usize) -> Result<Vec<Self>> {
        let size = self.dim(axis)?;
        if n == 0 || size % n != 0 {
            return Err(Error::argument("chunk", format!("a divisor of {size}"), n));
        }
        self.split(&vec![size / n; n], axis)
    }

    /// An axis of size 1 before `axis`.
    ///
    /// # Errors
    /// When `axis` is past the end.
    pub fn unsqueeze(&self, axis: usize) -> Result<Self> {
        if axis > self.rank() {
            return Err(Error::argument("unsqueeze", format!("an axis up to {}", self.rank()), axis));
        }
        let mut dims = self.dims().to_vec();
        dims.insert(axis, 1);
        self.reshape(&dims)
    }

    /// Without `axis`, which has size 1.
    ///
    /// # Errors
    /// When its size is another.
    pub fn squeeze(&self, axis: usize) -> Result<Self> {
        if self.dim(axis)? != 1 {
            return Err(Error::shape("squeeze", format!("size 1 on axis {axis}"), self.dims()));
        }
        let mut dims = self.dims().to_vec();
        dims.remove(axis);
        self.reshape(&dims)
    }

    /// The axes `from..=to` as one.
    ///
    /// # Errors
    /// When they do not exist.
    pub fn flatten(&self, from: usize, to: usize) -> Result<Self> {
        self.axis("flatten", from.max(to))?;
        if from > to {
            return Err(Error::argument("flatten", "from <= to", (from, to)));
        }
        let d = self.dims();
        let dims = [&d[..from], &[d[from..=to].iter().product()], &d[to + 1..]].concat();
        self.reshape(&dims)
    }

    /// Tensors side by side along `axis`. Copies.
    ///
    /// # Errors
    /// When there are none, or the other axes, dtypes or devices differ.
    pub fn cat(tensors: &[&Self], axis: usize) -> Result<Self> {
        common_device("cat", tensors)?;
        let first = tensors[0];
        first.axis("cat", axis)?;
        for t in tensors {
            let fits = t.rank() == first.rank() && (0..t.rank()).all(|a| a == axis || t.dims()[a] == first.dims()[a]);
            if !fits {
                return Err(Error::shape("cat", format!("{:?} but for axis {axis}", first.dims()), t.dims()));
            }
            if t.dtype() != first.dtype() {
                return Err(Error::DType {
                    op: "cat",
                    expected: first.dtype().to_string(),
                    got: t.dtype().to_string(),
                });
            }
        }
        if tensors.len() == 1 {
            return Ok(first.clone());
        }
        let sizes = tensors.iter().map(|t| t.dims()[axis]).collect();
        apply_one(Cat { axis, before: 0, after: 0, sizes }, tensors)
    }

    /// Tensors of one shape along a new axis. Copies.
    ///
    /// # Errors
    /// When there are none, or shapes, dtypes or devices differ.
    pub fn stack(tensors: &[&Self], axis: usize) -> Result<Self> {
        let parts: Vec<Self> = tensors.iter().map(|t| t.unsqueeze(axis)).collect::<Result<_>>()?;
        Self::cat(&parts.iter().collect::<Vec<_>>(), axis)
    }

    /// Zeros before and after, along `axis`. Copies.
    ///
    /// # Errors
    /// When the axis does not exist or memory runs out.
    pub fn pad(&self, axis: usize, before: usize, after: usize) -> Result<Self> {
        let sizes = vec![self.dim(axis)?];
        if before.checked_add(after).and_then(|n| n.checked_add(sizes[0])).is_none() {
            return Err(Error::argument("pad", "a size that fits the address space", (before, after)));
        }
        apply_one(Cat { axis, before, after, sizes }, &[self])
    }
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[
    Case {
        name: "reshape, permute, narrow, expand",
        make: |draw| {
            let [a, b, c] = [draw.size(1, 4), draw.size(2, 5), draw.size(1, 4)];
            Sample::new(vec![draw.standard(&[a, b, c])?], move |xs| {
                let x = xs[0].permute(&[2, 0, 1])?.narrow(2, 1, b - 1)?;
                let x = x.reshape(&[c * a, b - 1])?.unsqueeze(1)?.expand(&[c * a, 3, b - 1])?;
                x.square()?.flatten(0, 1)?.transpose(0, 1)?.contiguous()
            })
        },
    },
    Case {
        name: "cat, split, pad",
        make: |draw| {
            let [a, b, c] = [draw.size(1, 4), draw.size(1, 4), draw.size(1, 4)];
            Sample::new(vec![draw.standard(&[a, c])?, draw.standard(&[b, c])?], move |xs| {
                let joined = Tensor::cat(&[&xs[0], &xs[1], &xs[0]], 0)?;
                let parts = joined.split(&[b, a, a], 0)?;
                let stacked = Tensor::stack(&[&parts[1], &parts[2]], 1)?;
                Tensor::cat(&[&stacked.flatten(0, 1)?.pad(1, 1, 2)?.square()?, &parts[0].pad(1, 2, 1)?], 0)
            })
        },
    },
    Case {
        name: "chunk, one part unused",
        make: |draw| {
            let dims = [draw.size(1, 4), 3 * draw.size(1, 3)];
            Sample::new(vec![draw.standard(&dims)?], |xs| {
                let parts = xs[0].chunk(3, 1)?;
                parts[0].mul(&parts[2])
            })
        },
    },
];
