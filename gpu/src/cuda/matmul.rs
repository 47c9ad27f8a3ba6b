//! Matrix products by `kernels/gemm.cu`.

use flowtape_engine::pool::Pooled;
use flowtape_engine::space::Space;
use flowtape_engine::{DType, Result};

use super::index;
use super::launch::Launch;
use super::memory::{CudaRaw, scratch};
use super::pointwise::At;
use super::view::{View, wrong_dtype};

/// The argument of the kernels: `struct Gemm` of `gemm.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Gemm {
    a: u64,
    b: u64,
    bias: u64,
    out: u64,
    m: i32,
    n: i32,
    k: i32,
    batch: [i32; 3],
    a_batch: [i64; 3],
    b_batch: [i64; 3],
    out_batch: [i64; 3],
    a_row: i64,
    a_col: i64,
    b_row: i64,
    b_col: i64,
    out_row: i64,
    out_col: i64,
    a_aligned: i32,
    b_aligned: i32,
    out_aligned: i32,
    accumulate: i32,
    out_f32: i32,
}

/// Sizes and strides of the last two axes.
fn matrix(view: &View) -> ([usize; 2], [usize; 2]) {
    let r = view.dims.len() - 2;
    ([view.dims[r], view.dims[r + 1]], [view.strides[r], view.strides[r + 1]])
}

/// A copy without gaps, where a kernel can't take the view as it is.
fn packed(at: At<'_>, view: &View) -> Result<(View, Pooled<CudaRaw>)> {
    let memory = scratch(at.pool, view.numel() * view.dtype.size())?;
    let target = View::dense(*memory.block(), view.dtype, &view.dims);
    index::copy(at, view, &target)?;
    Ok((target, memory))
}

/// `out (+)= a b + bias`.
pub(super) fn matmul(at: At<'_>, a: &View, b: &View, bias: Option<&View>, accumulate: bool, out: &View) -> Result<()> {
    let half = match (a.dtype, b.dtype, out.dtype) {
        (DType::F32, DType::F32, DType::F32) => false,
        (DType::BF16, DType::BF16, DType::BF16 | DType::F32) | (DType::F16, DType::F16, DType::F16 | DType::F32) => {
            true
        }
        (a, b, _) => return Err(wrong_dtype("matmul", if a == DType::F32 { b } else { a })),
    };
    if let Some(bias) = bias.filter(|v| v.dtype != a.dtype) {
        return Err(wrong_dtype("matmul", bias.dtype));
    }
    let rank = out.dims.len() - 2;
    let space = Space::new(&out.dims, &[&a.strides, &b.strides, &out.strides], 0..rank);
    let ([m, n], [out_row, out_col]) = matrix(out);
    let ([_, k], [a_row, a_col]) = matrix(a);
    let (_, [b_row, b_col]) = matrix(b);
    if out.numel() == 0 {
        return Ok(());
    }
    // The kernels take three axes of a batch, and as many products as a grid has rows.
    if space.dims.len() > 3 || space.len() > 65_535 {
        let outer = space.dims[0];
        for i in 0..outer {
            let part = |view: &View, operand: usize| {
                let strides = space.strides[operand][1..].iter().chain(&view.strides[rank..]).copied().collect();
                let dims = space.dims[1..].iter().chain(&view.dims[rank..]).copied().collect();
                let offset = i * space.strides[operand][0] * view.dtype.size();
                View { address: view.address + offset as u64, dtype: view.dtype, dims, strides }
            };
            matmul(at, &part(a, 0), &part(b, 1), bias, accumulate, &part(out, 2))?;
        }
        return Ok(());
    }
    if half {
        // Elements of one axis must have no gaps; and both operands flipped is no kernel of ours.
        let (a_flips, b_flips) = (a_col != 1 && k != 1, b_col != 1 && n != 1);
        if a_flips && a_row != 1 && m != 1 {
            let (a, _memory) = packed(at, a)?;
            return matmul(at, &a, b, bias, accumulate, out);
        }
        if b_flips && (a_flips || b_row != 1 && k != 1) {
            let (b, _memory) = packed(at, b)?;
            return matmul(at, a, &b, bias, accumulate, out);
        }
    }

    let batches = |operand: usize| -> [i64; 3] {
        let lead = 3 - space.dims.len();
        std::array::from_fn(|i| i.checked_sub(lead).map_or(0, |i| space.strides[operand][i] as i64))
    };
    let mut batch = [1; 3];
    let lead = 3 - space.dims.len();
    batch[lead..].iter_mut().zip(&space.dims).for_each(|(to, &d)| *to = d as i32);
    let (a_flipped, b_flipped) = (a_col != 1 && k != 1, b_col != 1 && n != 1);
    // Rows of the tile in memory begin at multiples of 16 bytes.
    let aligned = |view: &View, stride: usize, batches: [i64; 3]| {
        let per = 16 / view.dtype.size();
        let batches = batches.iter().all(|s| (*s as usize).is_multiple_of(per));
        i32::from(view.address.is_multiple_of(16) && stride.is_multiple_of(per) && batches)
    };
    let gemm = Gemm {
        a: a.address,
        b: b.address,
        bias: bias.map_or(0, |v| v.address),
        out: out.address,
        m: m as i32,
        n: n as i32,
        k: k as i32,
        batch,
        a_batch: batches(0),
        b_batch: batches(1),
        out_batch: batches(2),
        a_row: a_row as i64,
        a_col: a_col as i64,
        b_row: b_row as i64,
        b_col: b_col as i64,
        out_row: out_row as i64,
        out_col: out_col as i64,
        a_aligned: aligned(a, if a_flipped { a_col } else { a_row }, batches(0)),
        b_aligned: aligned(b, if b_flipped { b_col } else { b_row }, batches(1)),
        out_aligned: i32::from(out.dtype == a.dtype && out_col == 1) & aligned(out, out_row, batches(2)),
        accumulate: i32::from(accumulate),
        out_f32: i32::from(out.dtype == DType::F32),
    };
    // Large tiles where they fill a large device; the choice depends on sizes alone.
    let products: usize = space.len();
    let large = m.div_ceil(128) * n.div_ceil(128) * products >= 64 && m > 64 && n > 64;
    let (tile, block, shared) = match (half, large) {
        (true, true) => (128, 256, 4 * 256 * 32 * 2),
        (true, false) => (64, 128, 4 * 128 * 32 * 2),
        (false, true) => (128, 256, 0),
        (false, false) => (32, 256, 0),
    };
    let size = if large { "large" } else { "small" };
    let name = match (half, a_flipped, b_flipped) {
        (false, ..) => format!("gemm_{size}"),
        (true, false, false) => format!("gemm_{size}_nn"),
        (true, false, true) => format!("gemm_{size}_nt"),
        (true, true, _) => format!("gemm_{size}_tn"),
    };
    let launched = at.gpu.embedded(&format!("gemm_{}", a.dtype), &name).and_then(|kernel| {
        let tiles = m.div_ceil(tile) * n.div_ceil(tile);
        let launch = Launch { grid: [tiles as u32, products as u32, 1], block, shared };
        // SAFETY: the argument is the kernel's, and the call is checked.
        unsafe { at.gpu.launch(&kernel, launch, &gemm) }
    });
    launched.map_err(|failure| at.gpu.failed("matmul", failure))
}
