//! The call that makes a panel of a quantised matrix dense.

use super::{BLOCK, Format, GROUP, NF4};
use crate::backend::call::{has_dims, has_dtype, is_dense, is_float};
use crate::backend::{FusedCall, Ran, operands, run_fused};
use crate::float8::E4M3;
use crate::{DType, Error, Result, Tensor};

/// Where the parts of a quantised matrix lie in its words, one behind the other. Bytes lie in a word in memory's order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parts {
    /// Words of the codes, row-major: a byte for each element; of nf4 half of one, the first element in the low half.
    pub codes: usize,
    /// Words of nf4's signed bytes, one for each block of [`BLOCK`] elements.
    pub blocks: usize,
    /// Floats, as their bits: a scale for each row. Of nf4 what is added to the scale of each block, then what the bytes of
    /// [`GROUP`] blocks are multiplied with.
    pub scales: usize,
}

impl Parts {
    /// Those of a matrix of these sizes.
    pub fn of(format: Format, [rows, columns]: [usize; 2]) -> Self {
        let n = rows * columns;
        match format {
            Format::Int8 | Format::Fp8 => Self { codes: n.div_ceil(4), blocks: 0, scales: rows },
            Format::Nf4 => {
                let blocks = n.div_ceil(BLOCK);
                Self { codes: n.div_ceil(8), blocks: blocks.div_ceil(4), scales: 1 + blocks.div_ceil(GROUP) }
            }
        }
    }

    /// All words.
    pub fn words(&self) -> usize {
        self.codes + self.blocks + self.scales
    }
}

/// `out = matrix[start[0].., start[1]..]`: as many rows and columns of a quantised matrix as `out` has, each element the
/// number of its code, times its scale in f32, rounded to the dtype of `out`.
#[derive(Clone, Copy, Debug)]
pub struct Dequantise<'a> {
    /// How the matrix is quantised.
    pub format: Format,
    /// Its sizes.
    pub dims: [usize; 2],
    /// Its [`Parts`], u32, one axis without gaps.
    pub words: &'a Tensor,
    /// The first row and column.
    pub start: [usize; 2],
    /// Of floats, two axes, row-major without gaps.
    pub out: &'a Tensor,
}

impl<'a> FusedCall<'a> for Dequantise<'a> {
    const NAME: &'static str = "dequantise";

    fn inputs(&self) -> [Option<&'a Tensor>; 8] {
        operands([Some(self.words)])
    }

    fn outputs(&self) -> [Option<&'a Tensor>; 4] {
        operands([Some(self.out)])
    }

    fn fits(&self) -> Result<()> {
        let Self { format, dims, words, start, out } = *self;
        if dims[0].checked_mul(dims[1]).is_none_or(|n| n > usize::MAX / 4) {
            return Err(Error::shape(Self::NAME, "a matrix that fits memory", dims));
        }
        has_dtype(Self::NAME, "words", words, DType::U32)?;
        has_dims(Self::NAME, "words", words, &[Parts::of(format, dims).words()])?;
        is_dense(Self::NAME, "words", words)?;
        is_float(Self::NAME, "a panel", out)?;
        is_dense(Self::NAME, "a panel", out)?;
        let inside = |axis: usize| out.dims()[axis].checked_add(start[axis]).is_some_and(|end| end <= dims[axis]);
        if out.rank() == 2 && inside(0) && inside(1) {
            return Ok(());
        }
        Err(Error::shape(Self::NAME, format!("a panel inside of {dims:?}, from {start:?} on"), out.dims()))
    }
}

impl Dequantise<'_> {
    /// Runs it: where the device has no kernel for it, by its definition.
    ///
    /// # Errors
    /// When the call breaks its contract, or the device fails.
    pub fn run_or_compose(&self) -> Result<()> {
        if run_fused(*self)? == Ran::Declined { self.compose() } else { Ok(()) }
    }

    /// The definition, element by element on the host: there is no arithmetic on codes elsewhere.
    pub(crate) fn compose(&self) -> Result<()> {
        let Self { format, dims: [_, width], words, start: [row, column], out } = *self;
        let words = words.to_vec::<u32>()?;
        let parts = Parts::of(format, self.dims);
        let (codes, rest) = words.split_at(parts.codes);
        let (blocks, scales) = rest.split_at(parts.blocks);
        let (codes, blocks): (&[u8], &[i8]) = (bytemuck::cast_slice(codes), bytemuck::cast_slice(blocks));
        let scale = |i: usize| f32::from_bits(scales[i]);
        let element = |at: usize| match format {
            Format::Int8 => f32::from(codes[at] as i8) * scale(at / width),
            Format::Fp8 => E4M3[usize::from(codes[at])] * scale(at / width),
            Format::Nf4 => {
                let block = at / BLOCK;
                let code = codes[at / 2] >> (at % 2 * 4) & 15;
                NF4[usize::from(code)] * (scale(0) + f32::from(blocks[block]) * scale(1 + block / GROUP))
            }
        };
        let &[rows, columns] = out.dims() else { return Ok(()) };
        let places =
            (row..row + rows).flat_map(|row| (column..column + columns).map(move |column| row * width + column));
        let values = places.map(element).collect();
        out.copy_from(&Tensor::from_vec::<f32>(values, out.dims(), out.device())?)
    }
}
