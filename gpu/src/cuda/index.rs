//! Moving elements by `kernels/index.cu`: strided copies, rows by index.

use cust::sys;
use flowtape_engine::space::{Space, memory_order};
use flowtape_engine::{DType, Error, Result};

use super::gpu::checked;
use super::launch::Launch;
use super::pointwise::{At, count_of};
use super::view::{View, wrong_dtype};

/// Axes that a strided copy takes.
const AXES: usize = 6;
/// Side of the tiles of a transposing copy.
const TILE: usize = 32;

/// The argument of the copies: `struct Copy` of `index.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Copy {
    from: u64,
    to: u64,
    count: u32,
    dims: [u32; AXES],
    source: [i64; AXES],
    target: [i64; AXES],
}

/// The argument of gather and scatter: `struct Rows` of `index.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Rows {
    from: u64,
    index: u64,
    to: u64,
    fault: u64,
    count: u32,
    width: u32,
    rows: u32,
}

/// The largest element of up to 16 bytes that all of these counts of bytes are multiples of.
fn element(bytes: impl IntoIterator<Item = u64>) -> u64 {
    let all = bytes.into_iter().fold(16, |all, b| all | b);
    1 << all.trailing_zeros().min(4)
}

/// Copies a view to another of the same dims and dtype.
pub(super) fn copy(at: At<'_>, source: &View, target: &View) -> Result<()> {
    if source.dims != target.dims || source.dtype != target.dtype {
        return Err(Error::shape("copy", format!("{} {:?}", target.dtype, target.dims), &source.dims));
    }
    let size = source.dtype.size();
    let space = Space::new(&source.dims, &[&source.strides, &target.strides], memory_order(&target.strides));
    let count = space.len();
    if count == 0 {
        return Ok(());
    }
    let [from, to] = [&space.strides[0], &space.strides[1]];
    if space.dims.len() > AXES {
        // One axis more than the kernel walks: a copy for each of its positions.
        for i in 0..space.dims[0] {
            let part = |view: &View, strides: &[usize]| View {
                address: view.address + (i * strides[0] * size) as u64,
                dtype: view.dtype,
                dims: space.dims[1..].to_vec(),
                strides: strides[1..].to_vec(),
            };
            copy(at, &part(source, from), &part(target, to))?;
        }
        return Ok(());
    }
    let launched = if space.dims.is_empty() || (space.dims.len() == 1 && from[0] == 1 && to[0] == 1) {
        let stream = at.gpu.stream.as_inner();
        at.gpu.enter().and_then(|()| {
            // SAFETY: both views lie in their memory and have no gaps.
            checked(unsafe { sys::cuMemcpyDtoDAsync_v2(target.address, source.address, count * size, stream) })
        })
    } else {
        strided(at, source, target, &space)?
    };
    launched.map_err(|failure| at.gpu.failed("copy", failure))
}

fn strided(at: At<'_>, source: &View, target: &View, space: &Space) -> Result<Result<(), super::gpu::Failure>> {
    let rank = space.dims.len();
    let [from, to] = [&space.strides[0], &space.strides[1]];
    let size = source.dtype.size();
    let mut argument = Copy { from: source.address, to: target.address, dims: [1; AXES], ..Copy::default() };
    let lead = AXES - rank;
    for axis in 0..rank {
        argument.dims[lead + axis] = count_of("copy", space.dims[axis])?;
        argument.source[lead + axis] = from[axis] as i64;
        argument.target[lead + axis] = to[axis] as i64;
    }
    // Neighbours of the target are far apart in the source: exchange the source's innermost axis with the last but one.
    if let Some(row) = (0..rank - 1).find(|&a| from[a] == 1 && to[rank - 1] == 1).filter(|_| size <= 4) {
        for list in [&mut argument.source, &mut argument.target] {
            list[lead + row..=AXES - 2].rotate_left(1);
        }
        argument.dims[lead + row..=AXES - 2].rotate_left(1);
        let outer: u32 = argument.dims[..AXES - 2].iter().product();
        let [rows, cols] = [argument.dims[AXES - 2], argument.dims[AXES - 1]].map(|d| d.div_ceil(TILE as u32));
        if rows <= 65_535 && outer <= 65_535 {
            return Ok(at.gpu.embedded("index", &format!("transpose_{size}")).and_then(|kernel| {
                let launch = Launch { grid: [cols, rows, outer], block: 256, shared: 0 };
                // SAFETY: the argument is the kernel's, and both views lie in their memory.
                unsafe { at.gpu.launch(&kernel, launch, &argument) }
            }));
        }
    }
    // Runs without gaps move as larger elements.
    let mut unit = size as u64;
    if from[rank - 1] == 1 && to[rank - 1] == 1 {
        let strides = from[..rank - 1].iter().chain(&to[..rank - 1]).chain([&space.dims[rank - 1]]);
        unit = element(strides.map(|s| (s * size) as u64).chain([source.address, target.address]));
        let times = unit as usize / size;
        argument.dims[AXES - 1] /= times as u32;
        for list in [&mut argument.source, &mut argument.target] {
            list[..AXES - 1].iter_mut().for_each(|s| *s /= times as i64);
        }
    }
    argument.count = count_of("copy", space.len() * size / unit as usize)?;
    Ok(at.gpu.embedded("index", &format!("copy_{unit}")).and_then(|kernel| {
        let launch = Launch::blocks((argument.count as usize).div_ceil(256), 256);
        // SAFETY: the argument is the kernel's, and both views lie in their memory.
        unsafe { at.gpu.launch(&kernel, launch, &argument) }
    }))
}

/// `out[i, ..] = table[index[i], ..]`. An index past the end writes zeros, and itself plus one to `fault`.
pub(super) fn gather(at: At<'_>, table: &View, index: &View, out: &View, fault: u64) -> Result<()> {
    let row = (table.dims[1..].iter().product::<usize>() * table.dtype.size()) as u64;
    let unit = element([row, table.address, out.address]);
    let argument = Rows {
        from: table.address,
        index: index.address,
        to: out.address,
        fault,
        count: count_of("index_select", index.numel())?,
        width: count_of("index_select", (row / unit) as usize)?,
        rows: count_of("index_select", table.dims[0])?,
    };
    let launched = at.gpu.embedded("index", &format!("gather_{unit}")).and_then(|kernel| {
        // SAFETY: the argument is the kernel's; the views have no gaps, and the kernel checks the indices.
        unsafe { at.gpu.launch(&kernel, Launch::blocks(index.numel(), 256), &argument) }
    });
    launched.map_err(|failure| at.gpu.failed("index_select", failure))
}

/// `out[index[i], ..] += rows[i, ..]`, in the order of `i`.
pub(super) fn scatter_add(at: At<'_>, rows: &View, index: &View, out: &View, fault: u64) -> Result<()> {
    if rows.dtype == DType::F64 || rows.dtype != out.dtype {
        return Err(wrong_dtype("scatter_add", rows.dtype));
    }
    let width = out.dims[1..].iter().product::<usize>();
    let argument = Rows {
        from: rows.address,
        index: index.address,
        to: out.address,
        fault,
        count: count_of("scatter_add", index.numel())?,
        width: count_of("scatter_add", width)?,
        rows: count_of("scatter_add", out.dims[0])?,
    };
    let launched = at.gpu.embedded("index", &format!("scatter_add_{}", rows.dtype)).and_then(|kernel| {
        // SAFETY: the argument is the kernel's; the views have no gaps, and the kernel checks the indices.
        unsafe { at.gpu.launch(&kernel, Launch::blocks(width.div_ceil(256), 256), &argument) }
    });
    launched.map_err(|failure| at.gpu.failed("scatter_add", failure))
}
