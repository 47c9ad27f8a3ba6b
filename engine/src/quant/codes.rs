//! How numbers become codes.

use rayon::prelude::*;

use super::{BLOCK, Format, GROUP, NF4};
use crate::float8::{E4M3_MAX, to_e4m3};
use crate::{DType, Error, Result, Tensor};

/// A matrix as the words of its [`Parts`](super::Parts).
///
/// # Errors
/// When it holds values that are not finite.
pub fn words(matrix: &Tensor, format: Format) -> Result<Vec<u32>> {
    let values = matrix.to_dtype(DType::F32)?.to_vec::<f32>()?;
    if values.par_iter().any(|v| !v.is_finite()) {
        return Err(Error::NonFinite { op: "quantise", what: "a weight".into() });
    }
    let columns = matrix.dims().last().copied().unwrap_or(1);
    let (codes, blocks, scales) = match format {
        Format::Int8 => by_rows(&values, columns, 127.0, to_int8),
        Format::Fp8 => by_rows(&values, columns, E4M3_MAX, to_e4m3),
        Format::Nf4 => by_blocks(&values),
    };
    let scales = scales.iter().map(|scale| scale.to_bits());
    Ok(packed(&codes).chain(packed(&blocks)).chain(scales).collect())
}

/// Bytes four to a word, in memory's order.
fn packed(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks(4).map(|some| {
        let mut word = [0; 4];
        word[..some.len()].copy_from_slice(some);
        u32::from_ne_bytes(word)
    })
}

fn to_int8(x: f32) -> u8 {
    x.round() as i8 as u8
}

/// The place of the nearest of ascending values.
fn nearest(values: &[f32], x: f32) -> usize {
    let above = values.partition_point(|v| *v < x);
    match (above.checked_sub(1), values.get(above)) {
        (Some(below), Some(value)) if x - values[below] <= value - x => below,
        (Some(below), None) => below,
        _ => above,
    }
}

/// The largest absolute value.
pub fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most: f32, v| most.max(v.abs()))
}

/// Codes, scales of blocks in eight bits, scales.
type Coded = (Vec<u8>, Vec<u8>, Vec<f32>);

/// Codes of values that a row's scale brings to at most `most`.
fn by_rows(values: &[f32], columns: usize, most: f32, code: impl Fn(f32) -> u8 + Sync) -> Coded {
    let rows = || values.par_chunks(columns.max(1));
    let scales: Vec<f32> = rows().map(|row| largest(row) / most).collect();
    let factor = |scale: &f32| if *scale > 0.0 { 1.0 / scale } else { 0.0 };
    let coded = rows().zip(&scales).flat_map_iter(|(row, scale)| {
        let factor = factor(scale);
        row.iter().map(move |x| x * factor).map(&code).collect::<Vec<_>>()
    });
    (coded.collect(), Vec::new(), scales)
}

/// nf4: codes, two to a byte; a byte for each block; their mean, then a scale for each group of blocks.
fn by_blocks(values: &[f32]) -> Coded {
    let blocks: Vec<f32> = values.par_chunks(BLOCK).map(largest).collect();
    let mean = (blocks.iter().map(|b| f64::from(*b)).sum::<f64>() / blocks.len().max(1) as f64) as f32;
    let offsets: Vec<f32> = blocks.iter().map(|b| b - mean).collect();
    let (in_bytes, _, groups) = by_rows(&offsets, GROUP, 127.0, to_int8);
    // The codes are chosen for the scales as they will be read.
    let stored = |block: usize| mean + f32::from(in_bytes[block] as i8) * groups[block / GROUP];
    let pairs = values.par_chunks(2).enumerate().map(|(pair, two)| {
        let code = |place: usize| {
            let scale = stored((2 * pair + place) / BLOCK);
            let x = two.get(place).copied().unwrap_or(0.0);
            nearest(&NF4, if scale == 0.0 { 0.0 } else { x / scale }) as u8
        };
        code(0) | code(1) << 4
    });
    (pairs.collect(), in_bytes, [&[mean][..], &groups].concat())
}
