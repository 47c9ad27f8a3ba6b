//! Quantised matrices: the weights of a frozen model in one byte each or half of one.
//!
//! | format | an element | a scale for each |
//! |---|---|---|
//! | `int8` | -127 to 127 | row |
//! | `fp8` | e4m3: four bits of exponent, three of mantissa | row |
//! | `nf4` | one of 16 quantiles of a normal distribution (Dettmers et al. 2023) | block of 64, itself in eight bits |
//!
//! Codes and scales lie on the matrix's device. A product dequantises them panel by panel: never is the whole matrix dense.
//!
//! | file | what is in it |
//! |---|---|
//! | `codes` | how numbers become codes, on the host |
//! | `dequantise` | where codes and scales lie, and the call that makes a panel of them dense |
//! | `linear` | the product |
//! | `store` | codes of a checkpoint on the disk |

mod codes;
mod dequantise;
mod linear;
mod store;

use std::ops::Range;

use serde::{Deserialize, Serialize};

pub use self::dequantise::{Dequantise, Parts};
pub use self::linear::linear;
pub(crate) use self::linear::linear_of;
pub use self::store::CodeStore;
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
pub const BLOCK: usize = 64;
/// Scales of nf4 that share a scale of their own.
pub const GROUP: usize = 256;

/// What the codes of nf4 stand for: bitsandbytes' table.
#[allow(clippy::excessive_precision, clippy::unreadable_literal)] // as they are published
pub const NF4: [f32; 16] = [
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

/// A quantised matrix `[out, in]`.
#[derive(Debug)]
pub struct QTensor {
    format: Format,
    dims: [usize; 2],
    /// Its [`Parts`], u32.
    words: Tensor,
}

impl QTensor {
    /// Quantises a matrix of any float dtype, for a device. The host does it, so it is best where the matrix lies.
    ///
    /// # Errors
    /// When it is no matrix, or holds values that are not finite.
    pub fn quantise(matrix: &Tensor, format: Format, device: &Device) -> Result<Self> {
        let dims: [usize; 2] =
            matrix.dims().try_into().map_err(|_| Error::shape("quantise", "a matrix", matrix.dims()))?;
        let words = match device.backend().has_data() {
            true => Tensor::from_vec(codes::words(matrix, format)?, &[Self::words_of(format, dims)], device)?,
            false => Tensor::empty(&[Self::words_of(format, dims)], DType::U32, device)?,
        };
        Ok(Self { format, dims, words })
    }

    /// Bytes that a matrix takes, with its scales.
    pub fn bytes_of(format: Format, dims: [usize; 2]) -> usize {
        4 * Self::words_of(format, dims)
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        Self::bytes_of(self.format, self.dims)
    }

    /// Its sizes, `[out, in]`.
    pub fn dims(&self) -> &[usize; 2] {
        &self.dims
    }

    /// How it is quantised.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        self.words.device()
    }

    /// Words that a matrix takes.
    pub(crate) fn words_of(format: Format, dims: [usize; 2]) -> usize {
        Parts::of(format, dims).words()
    }

    /// Codes and scales: what travels to another rank.
    pub(crate) fn words(&self) -> &Tensor {
        &self.words
    }

    /// A matrix of [`QTensor::words`].
    pub(crate) fn from_words(format: Format, dims: [usize; 2], words: &Tensor) -> Result<Self> {
        let size = Self::words_of(format, dims);
        if words.dims() != [size] || words.dtype() != DType::U32 {
            return Err(Error::argument("quantised", format!("{size} words"), words));
        }
        Ok(Self { format, dims, words: words.detach() })
    }

    /// Some rows and columns of it, dense.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn panel(&self, rows: Range<usize>, columns: Range<usize>, dtype: DType) -> Result<Tensor> {
        let out = Tensor::empty(&[rows.len(), columns.len()], dtype, self.device())?;
        if out.numel() > 0 {
            let (format, dims, start) = (self.format, self.dims, [rows.start, columns.start]);
            Dequantise { format, dims, words: &self.words, start, out: &out }.run_or_compose()?;
        }
        Ok(out)
    }

    /// All of it, dense.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn dequantise(&self, dtype: DType) -> Result<Tensor> {
        self.panel(0..self.dims[0], 0..self.dims[1], dtype)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::codes::largest;
    use super::*;
    use crate::float8::{E4M3, E4M3_MAX};
    use crate::{Gradients, Philox, Tape, ops};

    #[test]
    fn each_element_is_as_near_as_its_format_can_be() -> Result<()> {
        let [rows, columns] = [37, 150];
        let cpu = Device::cpu();
        let matrix = Philox::new(3).normal(&[rows, columns], &cpu)?;
        let values = matrix.to_vec::<f32>()?;
        for format in FORMATS {
            let quantised = QTensor::quantise(&matrix, format, &cpu)?;
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
            let back = QTensor::quantise(&matrix, format, &cpu)?.dequantise(DType::F32)?.to_vec::<f32>()?;
            for (x, y) in values.iter().zip(&back) {
                assert!((x - y).abs() <= 1e-6 * x.abs(), "{format:?}: {x} became {y}");
            }
            let zeros = QTensor::quantise(&Tensor::zeros(&[3, 5], DType::F32, &cpu)?, format, &cpu)?;
            assert_eq!(zeros.dequantise(DType::F32)?.to_vec::<f32>()?, [0.0; 15]);
        }
        let nan = Tensor::full(&[1, 1], f64::NAN, DType::F32, &cpu)?;
        assert!(QTensor::quantise(&nan, Format::Int8, &cpu).is_err());
        Ok(())
    }

    #[test]
    fn a_product_is_that_of_the_dense_matrix_forward_and_backward() -> Result<()> {
        let cpu = Device::cpu();
        for (format, [outputs, inputs]) in FORMATS.into_iter().zip([[700, 900], [65, 33], [513, 640]]) {
            let mut random = Philox::new(5);
            let weight = Arc::new(QTensor::quantise(&random.normal(&[outputs, inputs], &cpu)?, format, &cpu)?);
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
