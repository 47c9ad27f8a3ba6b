//! Panels of quantised matrices by `kernels/quant.cu`.

use flowtape_engine::backend::Ran;
use flowtape_engine::quant::{Dequantise, Format, NF4, Parts};
use flowtape_engine::{DType, Result};

use super::launch::Launch;
use super::pointwise::{At, count_of};
use super::view::View;

const THREADS: u32 = 256;
/// Elements of a thread.
const RUN: usize = 8;

/// The argument of the kernels: `struct Panel` of `quant.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Panel {
    codes: u64,
    blocks: u64,
    scales: u64,
    out: u64,
    width: u64,
    start: [u32; 2],
    size: [u32; 2],
    whole: u32,
    table: [f32; 16],
}

/// Makes a panel dense.
pub(super) fn dequantise(at: At<'_>, call: &Dequantise<'_>, words: &View, out: &View) -> Result<Ran> {
    let Dequantise { format, dims, start, .. } = *call;
    if out.dtype == DType::F64 {
        return Ok(Ran::Declined);
    }
    let op = "dequantise";
    let parts = Parts::of(format, dims);
    let blocks = words.address + 4 * parts.codes as u64;
    let [rows, columns] = [out.dims[0], out.dims[1]];
    let in_runs = [dims[1], start[1], columns].iter().all(|n| n.is_multiple_of(RUN));
    let argument = Panel {
        codes: words.address,
        blocks,
        scales: blocks + 4 * parts.blocks as u64,
        out: out.address,
        width: dims[1] as u64,
        start: [count_of(op, start[0])?, count_of(op, start[1])?],
        size: [count_of(op, rows)?, count_of(op, columns)?],
        whole: u32::from(in_runs && words.address.is_multiple_of(8) && out.address.is_multiple_of(16)),
        table: NF4,
    };
    let name = match format {
        Format::Int8 => "int8",
        Format::Fp8 => "fp8",
        Format::Nf4 => "nf4",
    };
    let threads = rows * columns.div_ceil(RUN);
    count_of(op, threads)?;
    let launched = at.gpu.embedded("quant", &format!("dequantise_{name}_{}", out.dtype)).and_then(|kernel| {
        // SAFETY: the argument is the kernel's, and the call is checked.
        unsafe { at.gpu.launch(&kernel, Launch::blocks(threads.div_ceil(THREADS as usize), THREADS), &argument) }
    });
    launched.map(|()| Ran::Done).map_err(|failure| at.gpu.failed(op, failure))
}
