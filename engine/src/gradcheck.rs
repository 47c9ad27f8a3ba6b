//! Checks of gradients: random cases, central differences, and other dtypes against f64.
//!
//! Each file of `ops` lists its [`Case`]s. A case draws sizes, values and views; the checks run it.

use crate::random::Philox;
use crate::{DType, Device, Error, Result, Tape, Tensor};

/// A named way to draw inputs and a function of them.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What is checked.
    pub name: &'static str,
    /// Draws sizes, values and views.
    pub make: fn(&mut Draw) -> Result<Sample>,
}

/// A function of tensors, as a case draws it.
pub type Run = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// Inputs on the CPU in f64, with values that bf16 holds exactly, and a differentiable function of all of them.
pub struct Sample {
    /// The inputs.
    pub inputs: Vec<Tensor>,
    /// The function; constants that it needs are made on the device of its inputs.
    pub run: Run,
}

impl std::fmt::Debug for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.inputs)
    }
}

impl Sample {
    /// From inputs and a function.
    ///
    /// # Errors
    /// None: a `Result`, so that a case may end with it.
    pub fn new(inputs: Vec<Tensor>, run: impl Fn(&[Tensor]) -> Result<Tensor> + 'static) -> Result<Self> {
        Ok(Self { inputs, run: Box::new(run) })
    }
}

/// Random sizes, values and views.
#[derive(Clone, Debug)]
pub struct Draw(Philox);

impl Draw {
    /// A source that gives the same for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(Philox::new(seed))
    }

    /// A size from `low..=high`.
    pub fn size(&mut self, low: usize, high: usize) -> usize {
        low + self.0.next_u32() as usize % (high - low + 1)
    }

    /// `rank` sizes from 1 to 5.
    pub fn dims(&mut self, rank: usize) -> Vec<usize> {
        (0..rank).map(|_| self.size(1, 5)).collect()
    }

    /// A number in `[low, high)` that bf16 holds exactly.
    pub fn number(&mut self, low: f64, high: f64) -> f64 {
        let value = low + (high - low) * self.0.next_f64();
        half::bf16::from_f64(value).to_f64()
    }

    /// Values in `[low, high)`, as a view that may be contiguous, transposed or a part of a larger tensor.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn tensor(&mut self, dims: &[usize], low: f64, high: f64) -> Result<Tensor> {
        let kind = self.size(0, 2);
        let mut make = |dims: &[usize]| {
            let values = (0..dims.iter().product()).map(|_| self.number(low, high)).collect();
            Tensor::from_vec::<f64>(values, dims, &Device::cpu())
        };
        let rank = dims.len();
        match kind {
            1 if rank >= 2 => {
                let mut flipped = dims.to_vec();
                flipped.swap(0, rank - 1);
                make(&flipped)?.transpose(0, rank - 1)
            }
            2 if rank >= 1 => {
                let mut larger = dims.to_vec();
                larger[rank - 1] += 3;
                make(&larger)?.narrow(rank - 1, 2, dims[rank - 1])
            }
            _ => make(dims),
        }
    }

    /// Standard values: in `[-2, 2)`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn standard(&mut self, dims: &[usize]) -> Result<Tensor> {
        self.tensor(dims, -2.0, 2.0)
    }

    /// Distinct values around zero, none of them zero: for functions with kinks. At most 200 elements.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn distinct(&mut self, dims: &[usize]) -> Result<Tensor> {
        let count: usize = dims.iter().product();
        let mut values: Vec<f64> = (0..count).map(|i| (i as f64 - (count / 2) as f64 + 0.5) / 32.0).collect();
        for i in (1..count).rev() {
            values.swap(i, self.size(0, i));
        }
        Tensor::from_vec(values, dims, &Device::cpu())
    }

    /// Shapes that broadcast to `dims`: some axes of size 1, leading ones left out.
    pub fn broadcast(&mut self, dims: &[usize]) -> Vec<usize> {
        let start = self.size(0, dims.len());
        dims[start..].iter().map(|&d| if self.size(0, 2) == 0 { 1 } else { d }).collect()
    }
}

/// The output and the gradients of all inputs of a sample in `dtype`, as f64, on `device`.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// The output, row-major.
    pub output: Vec<f64>,
    /// The gradient of each input, row-major.
    pub gradients: Vec<Vec<f64>>,
}

/// Weights of the outputs in the scalar that is differentiated: fixed, of both signs, exact in bf16.
fn cotangent(count: usize) -> Vec<f64> {
    (0..count).map(|i| ((i * 37 + 11) % 64) as f64 / 32.0 - 0.984_375).collect()
}

/// Runs a sample forward and backward.
///
/// # Errors
/// What the function or its backward returns; a missing gradient counts as zeros.
pub fn evaluate(sample: &Sample, dtype: DType, device: &Device) -> Result<Evaluation> {
    evaluate_at(sample, &sample.inputs, cotangent, dtype, device)
}

fn evaluate_at(
    sample: &Sample,
    inputs: &[Tensor],
    mut cotangent: impl FnMut(usize) -> Vec<f64>,
    dtype: DType,
    device: &Device,
) -> Result<Evaluation> {
    let tape = Tape::new();
    let leaf = |x: &Tensor| {
        // Cast before it becomes a leaf; a view stays a view of the same kind.
        let cast = if dtype == DType::F64 { x.clone() } else { x.to_dtype(dtype)? };
        let there = if cast.device().same(device) {
            cast
        } else {
            Tensor::from_bytes(&cast.to_bytes()?, cast.dims(), dtype, device)?
        };
        Ok(tape.leaf(&there))
    };
    let inputs: Vec<Tensor> = inputs.iter().map(leaf).collect::<Result<_>>()?;
    let output = (sample.run)(&inputs)?;
    let values = output.to_vec::<f64>()?;
    let weights = Tensor::from_vec(cotangent(values.len()), output.dims(), &Device::cpu())?.to_dtype(output.dtype())?;
    let weights = Tensor::from_bytes(&weights.to_bytes()?, output.dims(), output.dtype(), device)?;
    let mut gradients = crate::Gradients::default();
    tape.backward_with(&[(&output, &weights)], &mut gradients)?;
    let gradient = |x: &Tensor| match gradients.of(x) {
        // An optimiser would meet it beside its parameter.
        Some(g) if g.dims() != x.dims() => Err(Error::shape("gradient", format!("{:?}", x.dims()), g.dims())),
        Some(g) => g.to_vec::<f64>(),
        None => Ok(vec![0.0; x.numel()]),
    };
    Ok(Evaluation { output: values, gradients: inputs.iter().map(gradient).collect::<Result<_>>()? })
}

/// Checks the gradient of each input in f64 against central differences along a random direction.
///
/// # Errors
/// The outer one when the function fails; the inner one says which input differs and by how much.
pub fn check_gradient(sample: &Sample, seed: u64) -> Result<Result<(), String>> {
    const STEP: f64 = 1e-5;
    let device = Device::cpu();
    let analytic = evaluate(sample, DType::F64, &device)?;
    let mut draw = Draw::new(seed);
    for (i, input) in sample.inputs.iter().enumerate() {
        let direction: Vec<f64> = (0..input.numel()).map(|_| draw.number(-1.0, 1.0)).collect();
        let along = Tensor::from_slice(&direction, input.dims(), &device)?;
        let value = |step: f64| -> Result<Vec<f64>> {
            let mut inputs = sample.inputs.clone();
            inputs[i] = input.add(&along.mul_scalar(step)?)?;
            (sample.run)(&inputs)?.to_vec::<f64>()
        };
        let (up, down) = (value(STEP)?, value(-STEP)?);
        let weights = cotangent(up.len());
        let numeric: f64 =
            weights.iter().zip(up.iter().zip(&down)).map(|(w, (a, b))| w * (a - b)).sum::<f64>() / (2.0 * STEP);
        let products = analytic.gradients[i].iter().zip(&direction).map(|(g, u)| g * u);
        let exact: f64 = products.clone().sum();
        // Truncation grows with the gradient, cancellation with the values.
        let size: f64 = products.map(f64::abs).sum();
        let values: f64 = weights.iter().zip(&analytic.output).map(|(w, y)| (w * y).abs()).sum();
        let bound = 1e-6 * size + 1e-9 * values + 1e-9;
        if (numeric - exact).is_nan() || (numeric - exact).abs() > bound {
            return Ok(Err(format!(
                "input {i} {:?}: derivative {exact:.9e}, central difference {numeric:.9e}, bound {bound:.1e}",
                input.dims()
            )));
        }
    }
    Ok(Ok(()))
}

/// The unit of the last place of a dtype, relative.
fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        DType::F32 => 2f64.powi(-23),
        DType::F64 | DType::U32 => 2f64.powi(-52),
    }
}

/// The largest difference of two lists; NaN where either has one.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, |m: f64, d| if d > m || d.is_nan() { d } else { m })
}

impl Evaluation {
    fn tensors(&self) -> impl Iterator<Item = &Vec<f64>> {
        std::iter::once(&self.output).chain(&self.gradients)
    }
}

/// Checks output and gradients of a sample in `dtype` on `device` against f64 on the CPU.
///
/// A tensor may deviate by 16 units of the last place: of its largest value, and of its inputs and the cotangent,
/// measured by moving them by one unit in f64 (that covers what cancels).
///
/// # Errors
/// The outer one when the function fails; the inner one says what differs and by how much.
pub fn check_dtype(sample: &Sample, dtype: DType, device: &Device, seed: u64) -> Result<Result<(), String>> {
    let exact = evaluate(sample, DType::F64, &Device::cpu())?;
    let rounded = evaluate(sample, dtype, device)?;
    let mut draw = Draw::new(seed);
    let mut moves = vec![0.0; 1 + sample.inputs.len()];
    for _ in 0..4 {
        let mut shaken = |values: Vec<f64>| -> Vec<f64> {
            values.into_iter().map(|v| v * (1.0 + unit(dtype) * (2.0 * draw.size(0, 1) as f64 - 1.0))).collect()
        };
        let cpu = Device::cpu();
        let inputs = sample.inputs.iter().map(|x| Tensor::from_vec(shaken(x.to_vec::<f64>()?), x.dims(), &cpu));
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let moved = evaluate_at(sample, &inputs, |n| shaken(cotangent(n)), DType::F64, &cpu)?;
        for ((a, b), m) in exact.tensors().zip(moved.tensors()).zip(&mut moves) {
            *m = distance(a, b).max(*m);
        }
    }
    for (i, ((a, b), moved)) in exact.tensors().zip(rounded.tensors()).zip(moves).enumerate() {
        let size = a.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let bound = 16.0 * (moved + unit(dtype) * size) + 1e-30;
        let worst = distance(a, b);
        if a.len() != b.len() || worst.is_nan() || worst > bound {
            let what = if i == 0 { "output".into() } else { format!("gradient {}", i - 1) };
            return Ok(Err(format!("{what} in {dtype}: deviates by {worst:.2e}, bound {bound:.2e}, size {size:.2e}")));
        }
    }
    Ok(Ok(()))
}
