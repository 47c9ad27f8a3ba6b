//! Matrix products and the linear layer.

use crate::backend::call::{self, Call};
use crate::backend::common_device;
use crate::expr::{Function, Reduce};
use crate::gradcheck::{Case, Sample};
use crate::ops::pointwise::reduced_axes;
use crate::ops::reduce::run_reduce;
use crate::shape::broadcast;
use crate::tape::{Forward, InputGradients, Op, Saved, apply_one};
use crate::{DType, Error, Result, Tensor};

/// A plain product of plain tensors: `[.., m, k] x [.., k, n]`, leading axes broadcast.
pub(crate) fn product(a: &Tensor, b: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (ra, rb) = (a.rank() - 2, b.rank() - 2);
    let batch = broadcast("matmul", &[&a.dims()[..ra], &b.dims()[..rb]])?;
    let (m, k, n) = (a.dims()[ra], a.dims()[ra + 1], b.dims()[rb + 1]);
    let out = Tensor::empty(&[&batch[..], &[m, n]].concat(), a.dtype(), a.device())?;
    if out.numel() > 0 {
        let a = a.view(a.layout().expand(&[&batch[..], &[m, k]].concat())?);
        let b = b.view(b.layout().expand(&[&batch[..], &[k, n]].concat())?);
        call::MatMul { a: &a, b: &b, bias, accumulate: false, out: &out }.run()?;
    }
    Ok(out)
}

/// A plain view with the last two axes exchanged.
pub(crate) fn flipped(x: &Tensor) -> Result<Tensor> {
    let mut axes: Vec<usize> = (0..x.rank()).collect();
    axes.swap(x.rank() - 2, x.rank() - 1);
    Ok(x.view(x.layout().permute(&axes)?))
}

pub(crate) fn same_dtype(op: &'static str, tensors: &[&Tensor]) -> Result<DType> {
    let dtype = tensors[0].dtype();
    match tensors.iter().find(|t| t.dtype() != dtype || !t.dtype().is_float()) {
        None => Ok(dtype),
        Some(t) => Err(Error::DType { op, expected: format!("one float dtype ({dtype})"), got: t.dtype().to_string() }),
    }
}

/// Keeps the factors of a product: each is read by the gradient of the other alone.
pub(crate) fn save_factors(cx: &mut Forward, names: [&'static str; 2], factors: [&Tensor; 2]) {
    for i in [0, 1] {
        if cx.needs_grad(1 - i) {
            cx.save(names[i], factors[i]);
        } else {
            cx.save_shape(names[i], factors[i]);
        }
    }
}

#[derive(Debug)]
struct MatMul;

impl Op for MatMul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        save_factors(cx, ["a", "b"], [&inputs[0], &inputs[1]]);
        Ok(vec![product(&inputs[0], &inputs[1], None)?])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let unbroadcast = |full: Tensor, to: &[usize]| {
            let axes = reduced_axes(to, full.dims());
            let batch: Vec<usize> = axes.into_iter().filter(|&a| a + 2 < full.rank()).collect();
            if batch.is_empty() { full.reshape(to) } else { full.sum(&batch, true)?.reshape(to) }
        };
        if out.needs(0) {
            out.set(0, unbroadcast(product(grad, &flipped(saved.get("b")?)?, None)?, saved.shape("a")?.0)?);
        }
        if out.needs(1) {
            out.set(1, unbroadcast(product(&flipped(saved.get("a")?)?, grad, None)?, saved.shape("b")?.0)?);
        }
        Ok(())
    }
}

/// `x W^T + b` over the last axis: the bias is added in the product's epilogue.
#[derive(Debug)]
struct Linear;

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let (x, weight) = (&inputs[0], &inputs[1]);
        save_factors(cx, ["x", "weight"], [x, weight]);
        Ok(vec![product(x, &flipped(weight)?, inputs.get(2))?])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        if out.needs(0) {
            out.set(0, product(grad, saved.get("weight")?, None)?);
        }
        if out.needs(1) {
            out.set(1, product(&flipped(grad)?, saved.get("x")?, None)?);
        }
        if out.needs(2) {
            let identity = Function::build(|[g]| [g]);
            let sums = run_reduce(&identity, Reduce::Sum, &[grad], grad.dims(), &[0], &[grad.dtype()])?;
            out.set(2, sums[0].reshape(&grad.dims()[1..])?);
        }
        Ok(())
    }
}

/// The linear layer `x W^T + b`: x `[.., in]`, weight `[out, in]`, bias `[out]`, result `[.., out]`.
///
/// # Errors
/// When shapes, dtypes or devices do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let fits = x.rank() >= 1
        && weight.rank() == 2
        && weight.dims()[1] == x.dims()[x.rank() - 1]
        && bias.is_none_or(|b| b.dims() == &weight.dims()[..1]);
    if !fits {
        let got = (x.dims(), weight.dims(), bias.map(Tensor::dims));
        return Err(Error::shape("linear", "x [.., in], weight [out, in], bias [out]", got));
    }
    let mut dims = x.dims().to_vec();
    let width = dims.pop().unwrap_or(1);
    let rows = dims.iter().product();
    let flat = x.reshape(&[rows, width])?;
    let mut inputs = vec![&flat, weight];
    inputs.extend(bias);
    same_dtype("linear", &inputs)?;
    common_device("linear", &inputs)?;
    dims.push(weight.dims()[0]);
    apply_one(Linear, &inputs)?.reshape(&dims)
}

impl Tensor {
    /// The matrix product `[.., m, k] x [.., k, n]`; leading axes broadcast. Sums are kept in f32 (f64 for f64).
    ///
    /// # Errors
    /// When shapes, dtypes or devices do not fit.
    pub fn matmul(&self, other: &Self) -> Result<Self> {
        let (ra, rb) = (self.rank(), other.rank());
        if ra < 2 || rb < 2 || self.dims()[ra - 1] != other.dims()[rb - 2] {
            return Err(Error::shape("matmul", "[.., m, k] and [.., k, n]", (self.dims(), other.dims())));
        }
        same_dtype("matmul", &[self, other])?;
        common_device("matmul", &[self, other])?;
        apply_one(MatMul, &[self, other])
    }
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[
    Case {
        name: "matmul with broadcast batches",
        make: |draw| {
            let [m, k, n] = [draw.size(1, 7), draw.size(1, 7), draw.size(1, 7)];
            let batch = draw.dims(2);
            let (left, right) = (draw.broadcast(&batch), draw.broadcast(&batch));
            let a = draw.standard(&[&left[..], &[m, k]].concat())?;
            let b = draw.standard(&[&right[..], &[k, n]].concat())?;
            Sample::new(vec![a, b], |xs| xs[0].matmul(&xs[1]))
        },
    },
    Case {
        name: "linear",
        make: |draw| {
            let [rows, k, n] = [draw.size(1, 5), draw.size(1, 9), draw.size(1, 9)];
            let mut inputs = vec![draw.standard(&[2, rows, k])?, draw.standard(&[n, k])?];
            if draw.size(0, 1) == 1 {
                inputs.push(draw.standard(&[n])?);
            }
            Sample::new(inputs, |xs| linear(&xs[0], &xs[1], xs.get(2)))
        },
    },
];
