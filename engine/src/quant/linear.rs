//! The linear layer of a quantised weight.

use std::ops::Range;
use std::sync::Arc;

use super::{BLOCK, QTensor};
use crate::backend::call::{Call, MatMul};
use crate::expr::{Function, Reduce};
use crate::nn::Param;
use crate::ops::matmul::flipped;
use crate::ops::reduce::run_reduce;
use crate::tape::{Forward, InputGradients, Op, Saved, apply_one};
use crate::{Device, Error, Result, Tensor};

/// About the most elements of a panel, where the host computes: what fits into a core's cache.
const PANEL: usize = 1 << 18;
/// The same on other devices: products that fill a GPU, in little memory beside a model's.
const LARGE_PANEL: usize = 1 << 22;

/// The right operand of a product.
#[derive(Debug)]
enum Weight {
    Plain(Arc<QTensor>),
    /// What a parameter has at the time.
    Of(Param),
}

impl Weight {
    fn get(&self) -> Result<Arc<QTensor>> {
        match self {
            Self::Plain(weight) => Ok(weight.clone()),
            Self::Of(param) => param.codes(),
        }
    }
}

/// `x W^T + b`: panels of rows forward, and of columns backward, so that no sum is rounded on the way.
#[derive(Debug)]
struct QuantisedLinear(Weight);

/// Pieces of `n` lines, each of which has so many elements.
fn pieces(device: &Device, n: usize, each: usize) -> impl Iterator<Item = Range<usize>> {
    let panel = if device.backend().is_host() { PANEL } else { LARGE_PANEL };
    let step = (panel / each.max(1)).next_multiple_of(BLOCK).max(BLOCK);
    (0..n).step_by(step).map(move |start| start..n.min(start + step))
}

impl Op for QuantisedLinear {
    fn name(&self) -> &'static str {
        "linear (quantised)"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let (x, weight) = (&inputs[0], self.0.get()?);
        cx.save_shape("x", x);
        let [outputs, width] = weight.dims;
        let out = Tensor::empty(&[x.dims()[0], outputs], x.dtype(), x.device())?;
        if out.numel() == 0 {
            return Ok(vec![out]);
        }
        for rows in pieces(x.device(), outputs, width) {
            let panel = weight.panel(rows.clone(), 0..width, x.dtype())?;
            let target = out.view(out.layout().narrow(1, rows.start, rows.len())?);
            let bias = inputs.get(1).map(|b| Ok::<_, Error>(b.view(b.layout().narrow(0, rows.start, rows.len())?)));
            let bias = bias.transpose()?;
            MatMul { a: x, b: &flipped(&panel)?, bias: bias.as_ref(), accumulate: false, out: &target }.run()?;
        }
        Ok(vec![out])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        if out.needs(0) {
            let (dims, dtype) = saved.shape("x")?;
            let dx = Tensor::empty(dims, dtype, grad.device())?;
            let weight = self.0.get()?;
            let [outputs, width] = weight.dims;
            for columns in pieces(grad.device(), width, outputs).filter(|_| dx.numel() > 0) {
                let panel = weight.panel(0..outputs, columns.clone(), dtype)?;
                let target = dx.view(dx.layout().narrow(1, columns.start, columns.len())?);
                MatMul { a: grad, b: &panel, bias: None, accumulate: false, out: &target }.run()?;
            }
            out.set(0, dx);
        }
        if out.needs(1) {
            let identity = Function::build(|[g]| [g]);
            let sums = run_reduce(&identity, Reduce::Sum, &[grad], grad.dims(), &[0], &[grad.dtype()])?;
            out.set(1, sums[0].reshape(&grad.dims()[1..])?);
        }
        Ok(())
    }
}

/// The linear layer `x W^T + b` of a quantised weight: x `[.., in]`, result `[.., out]`.
///
/// # Errors
/// When shapes, dtypes or devices do not fit.
pub fn linear(x: &Tensor, weight: &Arc<QTensor>, bias: Option<&Tensor>) -> Result<Tensor> {
    run(x, Weight::Plain(weight.clone()), bias)
}

/// The same of a parameter, whose codes may go and come back between forward and backward.
pub fn linear_of(x: &Tensor, weight: Param, bias: Option<&Tensor>) -> Result<Tensor> {
    run(x, Weight::Of(weight), bias)
}

fn run(x: &Tensor, operand: Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let weight = operand.get()?;
    let [outputs, width] = weight.dims;
    let fits = x.dims().last() == Some(&width) && bias.is_none_or(|b| b.dims() == [outputs]);
    if !fits || !x.dtype().is_float() || bias.is_some_and(|b| b.dtype() != x.dtype()) {
        let expected = format!("x [.., {width}] and a bias [{outputs}] of its dtype");
        return Err(Error::shape("linear (quantised)", expected, (x.dims(), bias.map(Tensor::dims))));
    }
    if !x.device().same(weight.device()) {
        return Err(Error::argument("linear (quantised)", "x on the weight's device", x.device()));
    }
    let (rows, dims) = (x.numel() / width.max(1), &x.dims()[..x.rank() - 1]);
    let flat = x.reshape(&[rows, width])?;
    let inputs: Vec<&Tensor> = [&flat].into_iter().chain(bias).collect();
    apply_one(QuantisedLinear(operand), &inputs)?.reshape(&[dims, &[outputs]].concat())
}
