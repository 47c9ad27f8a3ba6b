//! Reductions, each with a pointwise function as its prologue.

use crate::backend::call::{Call, Reduction};
use crate::backend::common_device;
use crate::expr::{Function, Program, Reduce};
use crate::gradcheck::{Case, Sample};
use crate::ops::pointwise::{expanded, map, pointwise};
use crate::tape::{Forward, InputGradients, Op, Saved, apply_one};
use crate::{DType, Result, Tensor};

/// Reduces `function(inputs)` over `axes` of the iteration shape `dims`; the results keep those axes with size 1.
pub(crate) fn run_reduce(
    function: &Function,
    kind: Reduce,
    inputs: &[&Tensor],
    dims: &[usize],
    axes: &[usize],
    dtypes: &[DType],
) -> Result<Vec<Tensor>> {
    let mut kept = dims.to_vec();
    axes.iter().for_each(|&a| kept[a] = 1);
    let device = common_device("reduce", inputs)?;
    let outputs: Vec<Tensor> = dtypes.iter().map(|&d| Tensor::empty(&kept, d, device)).collect::<Result<_>>()?;
    if dims.contains(&0) {
        // A sum of nothing is zero.
        return outputs.iter().map(|t| Tensor::zeros(t.dims(), t.dtype(), device)).collect();
    }
    let views = expanded(inputs, dims)?;
    let views: Vec<&Tensor> = views.iter().collect();
    let targets: Vec<&Tensor> = outputs.iter().collect();
    let program = Program::of(function);
    Reduction { program: &program, kind, inputs: &views, scalars: &[], outputs: &targets }.run()?;
    Ok(outputs)
}

/// The dtype in which sums of `dtype` are kept: f64 for f64, else f32.
pub(crate) fn accumulator(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

#[derive(Debug)]
struct ReduceOp {
    kind: Reduce,
    axes: Vec<usize>,
    /// Factor of the sum: 1/n makes it a mean.
    factor: f64,
}

impl Op for ReduceOp {
    fn name(&self) -> &'static str {
        "reduce"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let x = &inputs[0];
        let identity = Function::build(|[x]| [x]);
        let sum = run_reduce(&identity, self.kind, &[x], x.dims(), &self.axes, &[accumulator(x.dtype())])?;
        let factor = self.factor;
        let out = if factor == 1.0 && sum[0].dtype() == x.dtype() {
            sum[0].clone()
        } else {
            map(x.dtype(), [&sum[0]], |[s]| s * factor)?
        };
        if matches!(self.kind, Reduce::Max) {
            cx.save("x", x);
            cx.save("max", &out);
        } else {
            cx.save_shape("x", x);
        }
        Ok(vec![out])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        if matches!(self.kind, Reduce::Max) {
            // Equal maxima share the gradient, as in PyTorch's amax.
            let (x, largest) = (saved.get("x")?, saved.get("max")?);
            let hit = Function::build(|[x, m]| [x.select_lt(m, 0.0, 1.0)]);
            let inputs = [x, largest];
            let ties = run_reduce(&hit, Reduce::Sum, &inputs, x.dims(), &self.axes, &[accumulator(x.dtype())])?;
            let dx = map(x.dtype(), [x, largest, &ties[0], grad], |[x, m, n, g]| x.select_lt(m, 0.0, 1.0) * g / n)?;
            out.set(0, dx);
            return Ok(());
        }
        let factor = self.factor;
        let scaled = if factor == 1.0 { grad.clone() } else { map(grad.dtype(), [grad], |[g]| g * factor)? };
        out.set(0, scaled.view(scaled.layout().expand(saved.shape("x")?.0)?));
        Ok(())
    }
}

impl Tensor {
    fn reduced(&self, kind: Reduce, axes: &[usize], keepdim: bool, mean: bool) -> Result<Self> {
        let mut sorted = axes.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        for &axis in &sorted {
            self.axis("reduce", axis)?;
        }
        let count: usize = sorted.iter().map(|&a| self.dims()[a]).product();
        let factor = if mean { 1.0 / count as f64 } else { 1.0 };
        let out = apply_one(ReduceOp { kind, axes: sorted.clone(), factor }, &[self])?;
        if keepdim {
            return Ok(out);
        }
        let dims: Vec<usize> = (0..self.rank()).filter(|a| !sorted.contains(a)).map(|a| self.dims()[a]).collect();
        out.reshape(&dims)
    }

    /// The sum over `axes`, accumulated in f32 (f64 for f64).
    ///
    /// # Errors
    /// When an axis does not exist.
    pub fn sum(&self, axes: &[usize], keepdim: bool) -> Result<Self> {
        self.reduced(Reduce::Sum, axes, keepdim, false)
    }

    /// The mean over `axes`, accumulated in f32 (f64 for f64).
    ///
    /// # Errors
    /// When an axis does not exist.
    pub fn mean(&self, axes: &[usize], keepdim: bool) -> Result<Self> {
        self.reduced(Reduce::Sum, axes, keepdim, true)
    }

    /// The largest element over `axes`; equal ones share the gradient.
    ///
    /// # Errors
    /// When an axis does not exist.
    pub fn max(&self, axes: &[usize], keepdim: bool) -> Result<Self> {
        self.reduced(Reduce::Max, axes, keepdim, false)
    }

    /// The sum of all elements, a tensor without axes.
    ///
    /// # Errors
    /// When the device fails.
    pub fn sum_all(&self) -> Result<Self> {
        self.sum(&(0..self.rank()).collect::<Vec<_>>(), false)
    }

    /// The mean of all elements, a tensor without axes.
    ///
    /// # Errors
    /// When the device fails.
    pub fn mean_all(&self) -> Result<Self> {
        self.mean(&(0..self.rank()).collect::<Vec<_>>(), false)
    }

    /// Whether no element is NaN or infinite. Waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn is_finite(&self) -> Result<bool> {
        // x * 0 is 0 for finite x and NaN otherwise.
        let plain = self.detach();
        Ok(pointwise([&plain], |[x]| x * 0.0)?.sum_all()?.item()? == 0.0)
    }
}

/// Gradient-check cases.
pub const CASES: &[Case] = &[
    Case {
        name: "sum and mean over some axes",
        make: |draw| {
            let dims = draw.dims(4);
            let axes: Vec<usize> = (0..4).filter(|_| draw.size(0, 1) == 1).collect();
            Sample::new(vec![draw.standard(&dims)?], move |xs| {
                let sum = xs[0].square()?.sum(&axes, true)?;
                xs[0].mul(&sum)?.mean(&axes, false)
            })
        },
    },
    Case {
        name: "max over an axis",
        make: |draw| {
            let dims = draw.dims(3);
            let (axis, keepdim) = (draw.size(0, 2), draw.size(0, 1) == 1);
            Sample::new(vec![draw.distinct(&dims)?], move |xs| xs[0].max(&[axis], keepdim))
        },
    },
    Case {
        name: "mean of all",
        make: |draw| {
            let dims = [draw.size(1, 40), draw.size(1, 40)];
            Sample::new(vec![draw.standard(&dims)?], |xs| xs[0].square()?.mean_all())
        },
    },
];
