//! Pointwise functions: one fused kernel forward, derived kernels backward.

use crate::backend::call::{self, Call};
use crate::backend::common_device;
use crate::expr::{Expr, Function, Program, Reduce};
use crate::gradcheck::{Case, Sample};
use crate::ops::reduce::run_reduce;
use crate::ops::view::copied;
use crate::shape::broadcast;
use crate::tape::{Forward, InputGradients, Op, Saved, apply_one};
use crate::{DType, Error, Result, Tensor};

/// Applies a function element by element, with NumPy's broadcasting.
///
/// The result has the inputs' promoted dtype; arithmetic is in f32 (f64 for f64). The gradient is derived from the
/// function itself.
///
/// ```
/// # use flowtape_engine::{Device, Tensor, ops::pointwise};
/// # fn main() -> flowtape_engine::Result<()> {
/// let x = Tensor::from_vec(vec![1.0f32, 2.0], &[2], &Device::cpu())?;
/// let y = pointwise([&x, &x], |[x, s]| x * (s + 1.0))?;
/// assert_eq!(y.to_vec::<f32>()?, [2.0, 6.0]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// When the shapes do not broadcast or the devices differ.
pub fn pointwise<const N: usize>(
    inputs: [&Tensor; N],
    f: impl for<'a> FnOnce([Expr<'a>; N]) -> Expr<'a>,
) -> Result<Tensor> {
    let dtype = promoted("pointwise", &inputs)?;
    pointwise_to(dtype, inputs, f)
}

/// The same with a result of a given dtype.
///
/// # Errors
/// When the shapes do not broadcast or the devices differ.
pub fn pointwise_to<const N: usize>(
    dtype: DType,
    inputs: [&Tensor; N],
    f: impl for<'a> FnOnce([Expr<'a>; N]) -> Expr<'a>,
) -> Result<Tensor> {
    apply_one(Pointwise { function: Function::build(|xs| [f(xs)]), dtype }, &inputs)
}

fn promoted(op: &'static str, inputs: &[&Tensor]) -> Result<DType> {
    let dtypes = inputs.iter().map(|t| t.dtype());
    dtypes.reduce(DType::promote).ok_or_else(|| Error::argument(op, "at least one input", 0))
}

/// Runs a function on plain tensors into outputs of the broadcast shape. An input that shares some memory with an output,
/// without being it exactly, is copied first.
pub(crate) fn run_pointwise(
    function: &Function,
    inputs: &[&Tensor],
    scalars: &[f64],
    outputs: &[&Tensor],
) -> Result<()> {
    if outputs[0].numel() == 0 {
        return Ok(());
    }
    let views = expanded(inputs, outputs[0].dims())?.into_iter().map(|view| apart(view, outputs));
    let views = views.collect::<Result<Vec<_>>>()?;
    let (program, views) = (Program::of(function), views.iter().collect::<Vec<_>>());
    call::Pointwise { program: &program, inputs: &views, scalars, outputs }.run()
}

/// An input as it is, or a copy of one that is some but not all of an output.
fn apart(input: Tensor, outputs: &[&Tensor]) -> Result<Tensor> {
    let meets = outputs.iter().any(|output| call::overlap(&input, output) && !call::is_same_view(&input, output));
    if meets { copied(&input) } else { Ok(input) }
}

/// Runs a function on groups of plain tensors on one device, inputs and outputs of each, all of its outputs' shape after
/// broadcasting: at once where the device can.
pub(crate) fn run_pointwise_each(
    function: &Function,
    groups: &[(Vec<&Tensor>, Vec<&Tensor>)],
    scalars: &[f64],
) -> Result<()> {
    let groups: Vec<_> = groups.iter().filter(|(_, outputs)| outputs.iter().all(|o| o.numel() > 0)).collect();
    if groups.is_empty() {
        return Ok(());
    }
    let views = groups.iter().map(|(inputs, outputs)| expanded(inputs, outputs[0].dims()));
    let views = views.collect::<Result<Vec<Vec<Tensor>>>>()?;
    let groups: Vec<_> =
        views.iter().zip(&groups).map(|(v, (_, outputs))| (v.iter().collect(), outputs.clone())).collect();
    call::PointwiseEach { program: &Program::of(function), groups: &groups, scalars }.run()
}

/// Runs a function with one output on plain tensors into a new tensor.
pub(crate) fn map<const N: usize>(
    dtype: DType,
    inputs: [&Tensor; N],
    f: impl for<'a> FnOnce([Expr<'a>; N]) -> Expr<'a>,
) -> Result<Tensor> {
    let shapes: Vec<&[usize]> = inputs.iter().map(|t| t.dims()).collect();
    common_device("pointwise", &inputs)?;
    let out = result(&inputs, &broadcast("pointwise", &shapes)?, dtype)?;
    run_pointwise(&Function::build(|xs| [f(xs)]), &inputs, &[], &[&out])?;
    Ok(out)
}

/// A result of shape `dims`, laid out in memory as the first input of that shape.
fn result(inputs: &[&Tensor], dims: &[usize], dtype: DType) -> Result<Tensor> {
    let like = inputs.iter().find(|t| t.dims() == dims).or(inputs.first());
    let like = like.ok_or_else(|| Error::argument("pointwise", "at least one input", 0))?;
    Tensor::empty_like(like, dims, dtype)
}

/// Plain views of `inputs`, expanded to `dims`.
pub(crate) fn expanded(inputs: &[&Tensor], dims: &[usize]) -> Result<Vec<Tensor>> {
    inputs.iter().map(|t| Ok(t.view(t.layout().expand(dims)?))).collect()
}

#[derive(Debug)]
struct Pointwise {
    function: Function,
    dtype: DType,
}

impl Op for Pointwise {
    fn name(&self) -> &'static str {
        "pointwise"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let views: Vec<&Tensor> = inputs.iter().collect();
        let shapes: Vec<&[usize]> = inputs.iter().map(Tensor::dims).collect();
        let dims = broadcast("pointwise", &shapes)?;
        common_device("pointwise", &views)?;
        let out = result(&views, &dims, self.dtype)?;
        run_pointwise(&self.function, &views, &[], &[&out])?;
        // Kept are the leaves that the derivatives read; of the others dims and dtype.
        if cx.recording() {
            let wrt: Vec<usize> = (0..inputs.len()).filter(|&i| cx.needs_grad(i)).collect();
            let gradient = self.function.gradient(&wrt);
            for (i, input) in inputs.iter().enumerate() {
                if gradient.uses(i) {
                    cx.save(("input", i), input);
                } else {
                    cx.save_shape(("input", i), input);
                }
            }
        }
        Ok(vec![out])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        // One kernel for the inputs of full shape, one reduction for each broadcast pattern.
        let mut patterns: Vec<(Vec<usize>, Vec<usize>)> = Vec::new();
        let shapes: Vec<(&[usize], DType)> =
            (0..self.function.inputs()).map(|i| saved.shape(("input", i))).collect::<Result<_>>()?;
        for (i, (dims, _)) in shapes.iter().enumerate() {
            if !out.needs(i) {
                continue;
            }
            let axes = reduced_axes(dims, grad.dims());
            match patterns.iter_mut().find(|(a, _)| *a == axes) {
                Some((_, members)) => members.push(i),
                None => patterns.push((axes, vec![i])),
            }
        }
        // What was not kept is not read: the gradient stands in its place.
        let mut inputs: Vec<&Tensor> =
            (0..shapes.len()).map(|i| saved.optional(("input", i)).unwrap_or(grad)).collect();
        inputs.push(grad);
        for (axes, mut members) in patterns {
            if axes.is_empty() {
                // A sum hands its gradient on: no kernel, the same elements.
                let handed_on = |&i: &usize| {
                    let same = shapes[i].1 == grad.dtype();
                    same && self.function.gradient(&[i]).passes(0) == Some(shapes.len())
                };
                let (handed, rest): (Vec<_>, Vec<_>) = members.into_iter().partition(handed_on);
                for i in handed {
                    // Leading axes of size 1 may be the result's alone.
                    out.set(i, grad.reshape(shapes[i].0)?);
                }
                members = rest;
                if members.is_empty() {
                    continue;
                }
            }
            let function = self.function.gradient(&members);
            let results = if axes.is_empty() {
                let new = |i: &usize| Tensor::empty_like(grad, grad.dims(), shapes[*i].1);
                let results: Vec<Tensor> = members.iter().map(new).collect::<Result<_>>()?;
                run_pointwise(&function, &inputs, &[], &results.iter().collect::<Vec<_>>())?;
                results
            } else {
                let dtypes: Vec<DType> = members.iter().map(|&i| shapes[i].1).collect();
                run_reduce(&function, Reduce::Sum, &inputs, grad.dims(), &axes, &dtypes)?
            };
            for (&i, result) in members.iter().zip(results) {
                out.set(i, result.reshape(shapes[i].0)?);
            }
        }
        Ok(())
    }
}

/// The axes of `dims` along which a tensor of shape `from` was repeated.
pub(crate) fn reduced_axes(from: &[usize], dims: &[usize]) -> Vec<usize> {
    let lead = dims.len() - from.len();
    (0..dims.len()).filter(|&a| dims[a] != 1 && (a < lead || from[a - lead] == 1)).collect()
}

macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident = |$x:ident| $f:expr;)*) => {
        /// Pointwise functions of one tensor.
        impl Tensor {$(
            $(#[$doc])*
            ///
            /// # Errors
            /// When the device fails.
            pub fn $name(&self) -> Result<Self> {
                pointwise([self], |[$x]| $f)
            }
        )*}
    };
}
unary! {
    /// `-x`.
    neg = |x| -x;
    /// `e^x`.
    exp = |x| x.exp();
    /// The natural logarithm.
    log = |x| x.log();
    /// The square root.
    sqrt = |x| x.sqrt();
    /// `1 / sqrt(x)`.
    rsqrt = |x| x.rsqrt();
    /// `x * x`.
    square = |x| x.square();
    /// The absolute value.
    abs = |x| x.abs();
    /// The sine of radians.
    sin = |x| x.sin();
    /// The cosine of radians.
    cos = |x| x.cos();
    /// The hyperbolic tangent.
    tanh = |x| x.tanh();
    /// `1 / (1 + e^-x)`.
    sigmoid = |x| x.sigmoid();
    /// `x * sigmoid(x)`.
    silu = |x| x.silu();
    /// GELU by its tanh form (`gelu(approximate="tanh")` in PyTorch).
    gelu = |x| x.gelu_tanh();
    /// The exact GELU, `x * Phi(x)`.
    gelu_erf = |x| x.gelu_erf();
    /// `max(x, 0)`.
    relu = |x| x.relu();
}

macro_rules! binary {
    ($($(#[$doc:meta])* $name:ident = |$a:ident, $b:ident| $f:expr;)*) => {
        /// Pointwise functions of two tensors that broadcast.
        impl Tensor {$(
            $(#[$doc])*
            ///
            /// # Errors
            /// When the shapes do not broadcast or the devices differ.
            pub fn $name(&self, other: &Self) -> Result<Self> {
                pointwise([self, other], |[$a, $b]| $f)
            }
        )*}
    };
}
binary! {
    /// `a + b`.
    add = |a, b| a + b;
    /// `a - b`.
    sub = |a, b| a - b;
    /// `a * b`.
    mul = |a, b| a * b;
    /// `a / b`.
    div = |a, b| a / b;
}

impl Tensor {
    /// The larger of both, element by element.
    ///
    /// # Errors
    /// When the shapes do not broadcast or the devices differ.
    pub fn maximum(&self, other: &Self) -> Result<Self> {
        pointwise([self, other], |[a, b]| a.maximum(b))
    }

    /// The smaller of both, element by element.
    ///
    /// # Errors
    /// When the shapes do not broadcast or the devices differ.
    pub fn minimum(&self, other: &Self) -> Result<Self> {
        pointwise([self, other], |[a, b]| a.minimum(b))
    }

    /// `x + value`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn add_scalar(&self, value: f64) -> Result<Self> {
        pointwise([self], |[x]| x + value)
    }

    /// `x * value`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn mul_scalar(&self, value: f64) -> Result<Self> {
        pointwise([self], |[x]| x * value)
    }

    /// The values in another dtype, rounded to nearest even.
    ///
    /// # Errors
    /// When the device fails.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        pointwise_to(dtype, [self], |[x]| x)
    }
}

macro_rules! unary_cases {
    ($($name:literal $draw:ident $f:expr;)*) => {
        &[$(Case {
            name: $name,
            make: |draw| {
                let rank = draw.size(1, 3);
                let dims = draw.dims(rank);
                Sample::new(vec![draw.$draw(&dims)?], |xs| $f(&xs[0]))
            },
        }),*]
    };
}

/// Gradient-check cases of one input.
const UNARY: &[Case] = unary_cases! {
    "neg" standard Tensor::neg;
    "exp" standard Tensor::exp;
    "square" standard Tensor::square;
    "sin" standard Tensor::sin;
    "cos" standard Tensor::cos;
    "tanh" standard Tensor::tanh;
    "sigmoid" standard Tensor::sigmoid;
    "silu" standard Tensor::silu;
    "gelu" standard Tensor::gelu;
    "gelu_slope" standard |x: &Tensor| pointwise([x], |[x]| x.gelu_tanh_slope());
    "gelu_erf" standard Tensor::gelu_erf;
    "abs" distinct Tensor::abs;
    "relu" distinct Tensor::relu;
    "add_scalar" standard |x: &Tensor| x.add_scalar(0.75);
    "mul_scalar" standard |x: &Tensor| x.mul_scalar(-1.5);
};

/// Gradient-check cases.
pub const CASES: &[Case] = &[
    Case {
        name: "unary",
        make: |draw| {
            let pick = draw.size(0, UNARY.len() - 1);
            (UNARY[pick].make)(draw)
        },
    },
    Case {
        name: "log, sqrt, rsqrt, div of positive values",
        make: |draw| {
            let dims = draw.dims(2);
            let inputs = vec![draw.tensor(&dims, 0.5, 3.0)?, draw.tensor(&dims, 0.5, 3.0)?];
            Sample::new(inputs, |xs| {
                let [a, b] = [&xs[0], &xs[1]];
                a.log()?.add(&b.sqrt()?)?.mul(&a.rsqrt()?)?.div(b)
            })
        },
    },
    Case {
        name: "broadcast arithmetic",
        make: |draw| {
            let dims = draw.dims(3);
            let (a, b) = (draw.broadcast(&dims), draw.broadcast(&dims));
            let inputs = vec![draw.standard(&dims)?, draw.standard(&a)?, draw.standard(&b)?];
            Sample::new(inputs, |xs| {
                let mixed = pointwise([&xs[0], &xs[1], &xs[2]], |[x, s, b]| x * (s + 1.0) + b)?;
                mixed.sub(&xs[1])?.mul(&xs[2])?.add(&xs[0])
            })
        },
    },
    Case {
        name: "a sum whose result has more axes of size 1",
        make: |draw| {
            let lead = draw.size(1, 2);
            let width = draw.size(1, 5);
            let dims = [&[1, 1][..lead], &[width]].concat();
            let inputs = vec![draw.standard(&dims)?, draw.standard(&[width + 1])?];
            Sample::new(inputs, move |xs| xs[0].add(&xs[1].narrow(0, 1, width)?)?.square())
        },
    },
    Case {
        name: "maximum and minimum",
        make: |draw| {
            let dims = draw.dims(2);
            // Halves against thirds of the grid: never equal, also after the step of a central difference.
            let (a, b) = (draw.distinct(&dims)?, draw.distinct(&dims)?);
            let b = b.add_scalar(1.0 / 64.0)?;
            Sample::new(vec![a, b], |xs| xs[0].maximum(&xs[1])?.add(&xs[0].minimum(&xs[1])?.square()?))
        },
    },
    Case {
        name: "one tensor used twice",
        make: |draw| {
            let dims = draw.dims(2);
            Sample::new(vec![draw.standard(&dims)?], |xs| xs[0].mul(&xs[0].silu()?)?.add(&xs[0]))
        },
    },
];
