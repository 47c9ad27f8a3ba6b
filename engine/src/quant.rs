//! Quantised matrices: the weights of a frozen model in one byte each or half of one.
//!
//! | format | an element | a scale for each |
//! |---|---|---|
//! | `int8` | -127 to 127 | row |
//! | `fp8` | e4m3: four bits of exponent, three of mantissa | row |
//! | `nf4` | one of 16 quantiles of a normal distribution (Dettmers et al. 2023) | block of 64, itself in eight bits |
//!
//! The codes lie in the host's memory. A product dequantises them panel by panel: never is the whole matrix dense.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::backend::call::{Call, MatMul};
use crate::expr::{Function, Reduce};
use crate::float8::{E4M3, E4M3_MAX, to_e4m3};
use crate::nn::Param;
use crate::ops::matmul::flipped;
use crate::ops::reduce::run_reduce;
use crate::tape::{Forward, InputGradients, Op, Saved, apply_one};
use crate::{DType, Device, Error, Result, Tensor};

/// How a matrix is quantised.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Whole numbers with a scale for each row.
    Int8,
    /// Floats of eight bits (e4m3) with a scale for each row.
    Fp8,
    /// Quantiles of a normal distribution in four bits, with a scale for each 64 elements.
    Nf4,
}

/// All formats.
pub const FORMATS: [Format; 3] = [Format::Int8, Format::Fp8, Format::Nf4];

/// Elements that share a scale of nf4.
const BLOCK: usize = 64;
/// Scales of nf4 that share a scale of their own.
const GROUP: usize = 256;
/// About the most elements of a panel: what fits into a core's cache.
const PANEL: usize = 1 << 18;

/// bitsandbytes' table.
#[allow(clippy::excessive_precision, clippy::unreadable_literal)] // as they are published
const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// The place of the nearest of ascending values.
fn nearest(values: &[f32], x: f32) -> usize {
    let above = values.partition_point(|v| *v < x);
    match (above.checked_sub(1), values.get(above)) {
        (Some(below), Some(value)) if x - values[below] <= value - x => below,
        (Some(below), None) => below,
        _ => above,
    }
}

/// A quantised matrix `[out, in]`.
#[derive(Debug)]
pub struct QTensor {
    format: Format,
    dims: [usize; 2],
    codes: Vec<u8>,
    scales: Vec<f32>,
    /// Takes the memory that the codes would, on a device without data.
    held: Option<Tensor>,
    device: Device,
}

impl QTensor {
    /// Quantises a matrix of any float dtype.
    ///
    /// # Errors
    /// When it is no matrix, or holds values that are not finite.
    pub fn quantise(matrix: &Tensor, format: Format) -> Result<Self> {
        let dims: [usize; 2] =
            matrix.dims().try_into().map_err(|_| Error::shape("quantise", "a matrix", matrix.dims()))?;
        let device = matrix.device().clone();
        if !device.backend().has_data() {
            let words = Self::bytes_of(format, dims).div_ceil(4);
            let held = Some(Tensor::empty(&[words], DType::U32, &device)?);
            return Ok(Self { format, dims, codes: Vec::new(), scales: Vec::new(), held, device });
        }
        let values = matrix.to_dtype(DType::F32)?.to_vec::<f32>()?;
        if values.par_iter().any(|v| !v.is_finite()) {
            return Err(Error::NonFinite { op: "quantise", what: "a weight".into() });
        }
        let (codes, scales) = match format {
            Format::Int8 => by_rows(&values, dims[1], 127.0, |x| x.round() as i8 as u8),
            Format::Fp8 => by_rows(&values, dims[1], E4M3_MAX, to_e4m3),
            Format::Nf4 => by_blocks(&values),
        };
        Ok(Self { format, dims, codes, scales, held: None, device })
    }

    /// Bytes that a matrix takes, with its scales.
    pub fn bytes_of(format: Format, [rows, columns]: [usize; 2]) -> usize {
        let n = rows * columns;
        match format {
            Format::Int8 | Format::Fp8 => n + 4 * rows,
            Format::Nf4 => n.div_ceil(2) + n.div_ceil(BLOCK) + 4 * n.div_ceil(BLOCK * GROUP) + 4,
        }
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        if self.held.is_some() {
            Self::bytes_of(self.format, self.dims)
        } else {
            self.codes.len() + 4 * self.scales.len()
        }
    }

    /// Its sizes, `[out, in]`.
    pub fn dims(&self) -> &[usize; 2] {
        &self.dims
    }

    /// How it is quantised.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Words that a matrix takes on its way to another rank: scales, then codes.
    pub(crate) fn words_of(format: Format, dims: [usize; 2]) -> usize {
        Self::bytes_of(format, dims).div_ceil(4)
    }

    /// The same as a tensor of the matrix's device.
    pub(crate) fn to_words(&self) -> Result<Tensor> {
        if let Some(held) = &self.held {
            return Ok(held.clone());
        }
        let mut bytes: Vec<u8> = self.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        bytes.extend(&self.codes);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        Tensor::from_bytes(&bytes, &[bytes.len() / 4], DType::U32, &self.device)
    }

    /// A matrix from [`QTensor::to_words`], for a device.
    pub(crate) fn from_words(format: Format, dims: [usize; 2], words: &Tensor, device: &Device) -> Result<Self> {
        let size = Self::words_of(format, dims);
        if words.dims() != [size] || words.dtype() != DType::U32 {
            return Err(Error::argument("quantised", format!("{size} words"), words));
        }
        let device = device.clone();
        if !device.backend().has_data() {
            return Ok(Self {
                format,
                dims,
                codes: Vec::new(),
                scales: Vec::new(),
                held: Some(words.detach()),
                device,
            });
        }
        let mut bytes = words.to_bytes()?;
        bytes.truncate(Self::bytes_of(format, dims));
        let scales = match format {
            Format::Int8 | Format::Fp8 => dims[0],
            Format::Nf4 => (dims[0] * dims[1]).div_ceil(BLOCK * GROUP) + 1,
        };
        let (scales, codes) = bytes.split_at(4 * scales);
        let scales = scales.chunks_exact(4).map(|s| f32::from_le_bytes([s[0], s[1], s[2], s[3]])).collect();
        Ok(Self { format, dims, codes: codes.to_vec(), scales, held: None, device })
    }

    /// Some rows and columns of it, dense.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn panel(&self, rows: Range<usize>, columns: Range<usize>, dtype: DType) -> Result<Tensor> {
        let size = [rows.len(), columns.len()];
        if self.held.is_some() || size.contains(&0) {
            return Tensor::empty(&size, dtype, &self.device);
        }
        let mut values = vec![0f32; size[0] * size[1]];
        values.par_chunks_mut(size[1]).zip(rows).for_each(|(out, row)| self.decode(row, columns.clone(), out));
        Tensor::from_vec(values, &size, &self.device)?.to_dtype(dtype)
    }

    /// All of it, dense.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn dequantise(&self, dtype: DType) -> Result<Tensor> {
        self.panel(0..self.dims[0], 0..self.dims[1], dtype)
    }

    fn decode(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let start = row * self.dims[1] + columns.start;
        let scaled = |out: &mut [f32], of: &dyn Fn(u8) -> f32| {
            let codes = &self.codes[start..][..out.len()];
            let scale = self.scales[row];
            out.iter_mut().zip(codes).for_each(|(out, code)| *out = of(*code) * scale);
        };
        match self.format {
            Format::Int8 => {
                let (codes, scale) = (&self.codes[start..][..out.len()], self.scales[row]);
                out.iter_mut().zip(codes).for_each(|(out, code)| *out = f32::from(*code as i8) * scale);
            }
            Format::Fp8 => {
                let table = &*E4M3;
                scaled(out, &|code| table[usize::from(code)]);
            }
            Format::Nf4 => {
                let elements = self.dims[0] * self.dims[1];
                let packed = elements.div_ceil(2);
                let mut at = start;
                let mut rest = out;
                while !rest.is_empty() {
                    let block = at / BLOCK;
                    let (now, later) = rest.split_at_mut(rest.len().min((block + 1) * BLOCK - at));
                    let code = f32::from(self.codes[packed + block] as i8);
                    let scale = self.scales[0] + code * self.scales[1 + block / GROUP];
                    for (i, out) in now.iter_mut().enumerate() {
                        let pair = self.codes[(at + i) / 2];
                        *out = NF4[usize::from(if (at + i).is_multiple_of(2) { pair & 15 } else { pair >> 4 })] * scale;
                    }
                    at += now.len();
                    rest = later;
                }
            }
        }
    }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most: f32, v| most.max(v.abs()))
}

/// Codes of values that a row's scale brings to at most `most`.
fn by_rows(values: &[f32], columns: usize, most: f32, code: impl Fn(f32) -> u8 + Sync) -> (Vec<u8>, Vec<f32>) {
    let rows = || values.par_chunks(columns.max(1));
    let scales: Vec<f32> = rows().map(|row| largest(row) / most).collect();
    let factor = |scale: &f32| if *scale > 0.0 { 1.0 / scale } else { 0.0 };
    let coded = rows().zip(&scales).flat_map_iter(|(row, scale)| {
        let factor = factor(scale);
        row.iter().map(move |x| x * factor).map(&code).collect::<Vec<_>>()
    });
    (coded.collect(), scales)
}

/// nf4: codes, two to a byte, then a byte for each block; their mean, then a scale for each group of blocks.
fn by_blocks(values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let blocks: Vec<f32> = values.par_chunks(BLOCK).map(largest).collect();
    let mean = (blocks.iter().map(|b| f64::from(*b)).sum::<f64>() / blocks.len().max(1) as f64) as f32;
    let offsets: Vec<f32> = blocks.iter().map(|b| b - mean).collect();
    let (scales_in_bytes, groups) = by_rows(&offsets, GROUP, 127.0, |x| x.round() as i8 as u8);
    // The codes are chosen for the scales as they will be read.
    let stored = |block: usize| mean + f32::from(scales_in_bytes[block] as i8) * groups[block / GROUP];
    let pairs = values.par_chunks(2).enumerate().map(|(pair, two)| {
        let code = |place: usize| {
            let scale = stored((2 * pair + place) / BLOCK);
            let x = two.get(place).copied().unwrap_or(0.0);
            nearest(&NF4, if scale == 0.0 { 0.0 } else { x / scale }) as u8
        };
        code(0) | code(1) << 4
    });
    let mut codes: Vec<u8> = pairs.collect();
    codes.extend(&scales_in_bytes);
    (codes, [&[mean][..], &groups].concat())
}

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
fn pieces(n: usize, each: usize) -> impl Iterator<Item = Range<usize>> {
    let step = (PANEL / each.max(1)).next_multiple_of(BLOCK).max(BLOCK);
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
        for rows in pieces(outputs, width) {
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
            for columns in pieces(width, outputs).filter(|_| dx.numel() > 0) {
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
pub(crate) fn linear_of(x: &Tensor, weight: Param, bias: Option<&Tensor>) -> Result<Tensor> {
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
    if !x.device().same(&weight.device) {
        return Err(Error::argument("linear (quantised)", "x on the weight's device", x.device()));
    }
    let (rows, dims) = (x.numel() / width.max(1), &x.dims()[..x.rank() - 1]);
    let flat = x.reshape(&[rows, width])?;
    let inputs: Vec<&Tensor> = [&flat].into_iter().chain(bias).collect();
    apply_one(QuantisedLinear(operand), &inputs)?.reshape(&[dims, &[outputs]].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Gradients, Philox, Tape, ops};

    #[test]
    fn each_element_is_as_near_as_its_format_can_be() -> Result<()> {
        let [rows, columns] = [37, 150];
        let matrix = Philox::new(3).normal(&[rows, columns], &Device::cpu())?;
        let values = matrix.to_vec::<f32>()?;
        for format in FORMATS {
            let quantised = QTensor::quantise(&matrix, format)?;
            assert_eq!(quantised.bytes(), QTensor::bytes_of(format, [rows, columns]));
            let back = quantised.dequantise(DType::F32)?.to_vec::<f32>()?;
            for (i, (x, y)) in values.iter().zip(&back).enumerate() {
                let row = &values[i / columns * columns..][..columns];
                let block = &values[i / BLOCK * BLOCK..values.len().min((i / BLOCK + 1) * BLOCK)];
                let allowed = match format {
                    Format::Int8 => largest(row) / 127.0 * 0.5001,
                    // Half of the last bit of the mantissa, or of the least number.
                    Format::Fp8 => (x.abs() / 16.0).max(largest(row) / E4M3_MAX * 2f32.powi(-10)) * 1.0001,
                    // Half of the widest gap between quantiles, and what the block's own scale is off.
                    Format::Nf4 => largest(block) * (0.5 * 0.3039 + 0.02),
                };
                assert!((x - y).abs() <= allowed, "{format:?}: {x} became {y}");
            }
        }
        Ok(())
    }

    #[test]
    fn what_a_format_can_hold_comes_back_as_it_was() -> Result<()> {
        let cpu = Device::cpu();
        let int8: Vec<f32> = (0..254).map(|i| (i - 127) as f32 / 127.0).chain([1.0]).collect();
        let fp8: Vec<f32> = E4M3.iter().copied().filter(|v| v.is_finite()).collect();
        let nf4: Vec<f32> = NF4.iter().copied().cycle().take(BLOCK).collect();
        for (format, values) in [(Format::Int8, int8), (Format::Fp8, fp8), (Format::Nf4, nf4)] {
            let matrix = Tensor::from_slice(&values, &[1, values.len()], &cpu)?;
            let back = QTensor::quantise(&matrix, format)?.dequantise(DType::F32)?.to_vec::<f32>()?;
            for (x, y) in values.iter().zip(&back) {
                assert!((x - y).abs() <= 1e-6 * x.abs(), "{format:?}: {x} became {y}");
            }
            let zeros = QTensor::quantise(&Tensor::zeros(&[3, 5], DType::F32, &cpu)?, format)?;
            assert_eq!(zeros.dequantise(DType::F32)?.to_vec::<f32>()?, [0.0; 15]);
        }
        assert!(QTensor::quantise(&Tensor::full(&[1, 1], f64::NAN, DType::F32, &cpu)?, Format::Int8).is_err());
        Ok(())
    }

    #[test]
    fn a_product_is_that_of_the_dense_matrix_forward_and_backward() -> Result<()> {
        let cpu = Device::cpu();
        for (format, [outputs, inputs]) in FORMATS.into_iter().zip([[700, 900], [65, 33], [513, 640]]) {
            let mut random = Philox::new(5);
            let weight = Arc::new(QTensor::quantise(&random.normal(&[outputs, inputs], &cpu)?, format)?);
            let (x, b) = (random.normal(&[2, 3, inputs], &cpu)?, random.normal(&[outputs], &cpu)?);
            let cotangent = random.normal(&[2, 3, outputs], &cpu)?;
            let run = |of: &dyn Fn(&Tensor, &Tensor) -> Result<Tensor>| -> Result<Vec<Vec<f64>>> {
                let tape = Tape::new();
                let (x, b) = (tape.leaf(&x), tape.leaf(&b));
                let y = of(&x, &b)?;
                let mut gradients = Gradients::default();
                tape.backward_with(&[(&y, &cotangent)], &mut gradients)?;
                [&y, gradients.of(&x).unwrap(), gradients.of(&b).unwrap()]
                    .map(|t| t.to_vec::<f64>())
                    .into_iter()
                    .collect()
            };
            let dense = weight.dequantise(DType::F32)?;
            let (got, want) =
                (run(&|x, b| linear(x, &weight, Some(b)))?, run(&|x, b| ops::linear(x, &dense, Some(b)))?);
            for (got, want) in got.iter().zip(&want) {
                let most = want.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
                let off = got.iter().zip(want).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
                assert!(off <= 1e-5 * most, "{format:?}: {off} of {most}");
            }
        }
        Ok(())
    }
}
