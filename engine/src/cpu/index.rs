//! Moving elements: strided copies, rows by index.

use super::View;
use super::blocks::Space;
use super::team::{spread, threads};
use crate::DType;
use half::{bf16, f16};

/// Bytes below which one thread copies alone.
const GRAIN: usize = 16 * 1024;
/// Side of the tiles of a transposing copy: a tile's lines of both sides stay in the first cache.
const TILE: usize = 32;

/// Copies a view to another of the same dims and dtype.
///
/// # Safety
/// Both lie in their memory; nobody else uses the target; they do not overlap.
pub(super) unsafe fn copy(source: &View<'_>, target: &View<'_>) {
    // SAFETY: the caller's promise; elements move as words of their size.
    unsafe {
        match source.dtype.size() {
            2 => copy_as::<u16>(source, target),
            4 => copy_as::<u32>(source, target),
            _ => copy_as::<u64>(source, target),
        }
    }
}

/// Addresses that threads share.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);
// SAFETY: the copies' pieces do not overlap.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn at(&self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}

unsafe fn copy_as<T: Copy>(source: &View<'_>, target: &View<'_>) {
    if source.dims.contains(&0) {
        return;
    }
    let (from, to) = (Shared(source.ptr.cast::<T>()), Shared(target.ptr.cast::<T>()));
    let mut outer = Space::new(source.dims, &[source.strides, target.strides], 0..source.dims.len());
    let bytes = outer.len() * size_of::<T>();
    let (cols, col_strides) = outer.pop();
    let (rows, row_strides) = outer.pop();
    let (down, right) = ((row_strides[0], row_strides[1]), (col_strides[0], col_strides[1]));
    let strips = rows.div_ceil(TILE);
    let strip = |index: usize| {
        let mut at = [0, 0];
        outer.locate(index / strips, &mut at);
        let first = index % strips * TILE;
        let last = rows.min(first + TILE);
        let (from, to) = (from.at(at[0]), to.at(at[1]));
        // SAFETY: all positions lie in the views.
        unsafe {
            if right == (1, 1) || cols == 1 {
                for row in first..last {
                    std::ptr::copy_nonoverlapping(from.add(row * down.0), to.add(row * down.1), cols);
                }
                return;
            }
            for left in (0..cols).step_by(TILE) {
                for row in first..last {
                    let (from, to) = (from.add(row * down.0), to.add(row * down.1));
                    for col in left..cols.min(left + TILE) {
                        to.add(col * right.1).write(from.add(col * right.0).read());
                    }
                }
            }
        }
    };
    let pieces = outer.len() * strips;
    if bytes < GRAIN {
        (0..pieces).for_each(strip);
    } else {
        let tasks = pieces.min(4 * threads());
        spread(tasks, |t| (t * pieces / tasks..(t + 1) * pieces / tasks).for_each(strip));
    }
}

/// `out[i, ..] = table[index[i], ..]`.
///
/// # Safety
/// Contiguous views in their memory, indices in range, nobody else uses `out`.
pub(super) unsafe fn gather(table: &View<'_>, index: &[u32], out: &View<'_>) {
    let row = table.dims[1..].iter().product::<usize>() * table.dtype.size();
    for (i, &at) in index.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(table.ptr.add(at as usize * row), out.ptr.add(i * row), row) };
    }
}

/// `out[index[i], ..] += rows[i, ..]`, in the order of `i`.
///
/// # Safety
/// Contiguous views in their memory, indices in range, nobody else uses `out`.
pub(super) unsafe fn scatter_add(rows: &View<'_>, index: &[u32], out: &View<'_>) {
    let width = out.dims[1..].iter().product();
    // SAFETY: the caller's promise.
    unsafe {
        match out.dtype {
            DType::F32 => scatter_as(rows, index, out, width, |a: f32, b| a + b),
            DType::F64 => scatter_as(rows, index, out, width, |a: f64, b| a + b),
            DType::U32 => scatter_as(rows, index, out, width, |a: u32, b| a.wrapping_add(b)),
            DType::BF16 => scatter_as(rows, index, out, width, |a: bf16, b| a + b),
            DType::F16 => scatter_as(rows, index, out, width, |a: f16, b| a + b),
        }
    }
}

unsafe fn scatter_as<T: Copy>(rows: &View<'_>, index: &[u32], out: &View<'_>, width: usize, add: impl Fn(T, T) -> T) {
    for (i, &at) in index.iter().enumerate() {
        let from = rows.ptr.cast::<T>().wrapping_add(i * width);
        let to = out.ptr.cast::<T>().wrapping_add(at as usize * width);
        for col in 0..width {
            // SAFETY: the caller's promise.
            unsafe { to.add(col).write(add(to.add(col).read(), from.add(col).read())) };
        }
    }
}
