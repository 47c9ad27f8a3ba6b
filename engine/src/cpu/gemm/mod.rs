//! Matrix products. Tiles of the output are spread over the threads; each packs what it reads and runs the kernels.
//!
//! The cut along k depends on k alone, and every element is one chain of multiply-adds per cut: neither the number of
//! threads nor the shape of the tiles changes a bit.

mod kernel;
mod pack;
pub(super) mod scratch;

use rayon::prelude::*;

use self::kernel::{Kernels, Tile, kernels};
use self::pack::{Narrow, Source, panels, rows, with_narrow};
use self::scratch::Scratch;
use super::View;
use super::blocks::Space;
use super::isa::{Isa, isa};
use crate::DType;

/// Longest run of k: a panel of B stays in the first-level cache.
const KC: usize = 320;
/// Rows of A that are packed at once: they stay in the second-level cache.
const MC: usize = 144;
/// Rows or depth up to which an operand is read where it lies: packing would cost more than it saves.
const SMALL: usize = 64;
/// Greatest tile of one task.
const TILE: (usize, usize) = (8 * MC, 512);
/// Floating-point operations below which a second thread costs more than it saves.
const GRAIN: usize = 200_000;
/// Columns of f64 that are summed at once.
const COLUMNS_F64: usize = 8;

/// One matrix: `(i, j)` is at `ptr + (i * rows + j * cols) * size`.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
    pub ptr: *mut u8,
    pub dtype: DType,
    pub rows: usize,
    pub cols: usize,
}

// SAFETY: an address; `matmul` states what may be read and written through it.
unsafe impl Send for Matrix {}
// SAFETY: as above.
unsafe impl Sync for Matrix {}

impl Matrix {
    pub fn of(view: &View<'_>) -> Self {
        let r = view.strides.len() - 2;
        Self { ptr: view.ptr, dtype: view.dtype, rows: view.strides[r], cols: view.strides[r + 1] }
    }

    /// Row-major f32.
    pub fn dense(ptr: *mut f32, cols: usize) -> Self {
        Self { ptr: ptr.cast(), dtype: DType::F32, rows: cols, cols: 1 }
    }

    /// The matrix that starts at element `(i, j)`.
    pub fn at(self, i: usize, j: usize) -> Self {
        self.moved(i * self.rows + j * self.cols)
    }

    pub fn moved(self, elements: usize) -> Self {
        Self { ptr: self.ptr.wrapping_add(elements * self.dtype.size()), ..self }
    }

    /// A window of it to pack, with `k` along the rows.
    fn source<T>(self, k: usize, n: usize) -> Source<T> {
        Source { ptr: self.ptr.cast(), ks: self.rows, ns: self.cols, k, n }
    }

    pub fn flipped(self) -> Self {
        Self { rows: self.cols, cols: self.rows, ..self }
    }
}

/// One product `c (+)= a b + bias`.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub a: Matrix,
    pub b: Matrix,
    /// A row vector: its `cols` alone counts.
    pub bias: Option<Matrix>,
    pub c: Matrix,
    pub k: usize,
    pub accumulate: bool,
}

/// `c (+)= a b`, `[m, k]` by `[k, n]`, on this thread.
///
/// # Safety
/// As for [`matmul`]; no dtype is f64.
pub(super) unsafe fn multiply(isa: Isa, a: Matrix, b: Matrix, c: Matrix, [m, k, n]: [usize; 3], accumulate: bool) {
    // SAFETY: the caller's promise.
    unsafe { product(isa, kernels(isa), &Product { a, b, bias: None, c, k, accumulate }, m, n) }
}

/// A copy of an `[m, n]` matrix as dense f32 rows.
///
/// # Safety
/// The matrix lies in memory that nobody writes meanwhile, and is not f64.
pub(super) unsafe fn widened(isa: Isa, from: Matrix, m: usize, n: usize) -> Scratch {
    let out = Scratch::take(m * n);
    // SAFETY: the caller's promise.
    with_narrow!(from.dtype, T => unsafe { rows::<T>(isa, &from.flipped().source(n, m), out.ptr(), n) });
    out
}

/// Rounds dense f32 rows into an `[m, n]` matrix.
///
/// # Safety
/// Both lie in memory; nobody else uses the target.
pub(super) unsafe fn rounded(from: *const f32, to: Matrix, m: usize, n: usize) {
    // SAFETY: the caller's promise.
    with_narrow!(to.dtype, T => unsafe { store::<T>(from, n, to, m, n) });
}

/// `out[.., m, n] (+)= a[.., m, k] b[.., k, n] + bias[n]`. Narrow floats are widened, and all sums kept in f32;
/// f64 stays f64.
///
/// # Safety
/// The views have these shapes, lie in memory, and nobody else writes them meanwhile; `out` overlaps no input, and no
/// two of its elements are one.
pub(super) unsafe fn matmul(a: &View<'_>, b: &View<'_>, bias: Option<&View<'_>>, accumulate: bool, out: &View<'_>) {
    let rank = out.dims.len();
    let (m, n, k) = (out.dims[rank - 2], out.dims[rank - 1], a.dims[rank - 1]);
    let lead = rank - 2;
    let strides = [&a.strides[..lead], &b.strides[..lead], &out.strides[..lead]];
    let batch = Space::new(&out.dims[..lead], &strides, 0..lead);
    if m == 0 || n == 0 || batch.is_empty() {
        return;
    }
    let bias = bias.map(|v| Matrix { ptr: v.ptr, dtype: v.dtype, rows: 0, cols: v.strides[0] });
    let (a, b, c) = (Matrix::of(a), Matrix::of(b), Matrix::of(out));
    let at = |index: usize| {
        let mut offsets = [0; 3];
        batch.locate(index, &mut offsets);
        Product { a: a.moved(offsets[0]), b: b.moved(offsets[1]), bias, c: c.moved(offsets[2]), k, accumulate }
    };
    let parallel = 2 * batch.len() * m * n * k >= GRAIN && rayon::current_num_threads() > 1;
    if out.dtype == DType::F64 {
        let tasks = batch.len() * m;
        // SAFETY: the caller's promise; rows do not overlap.
        let run = |task: usize| unsafe { row_f64(&at(task / m), task % m, n) };
        return if parallel { (0..tasks).into_par_iter().for_each(run) } else { (0..tasks).for_each(run) };
    }
    let isa = isa();
    let set = kernels(isa);
    let (high, wide) = cut(set, batch.len(), m, n, if parallel { rayon::current_num_threads() } else { 1 });
    let (down, across) = (m.div_ceil(high), n.div_ceil(wide));
    let run = |task: usize| {
        let (i, j) = (task / across % down * high, task % across * wide);
        let p = at(task / across / down);
        let bias = p.bias.map(|bias| bias.at(0, j));
        let tile = Product { a: p.a.at(i, 0), b: p.b.at(0, j), bias, c: p.c.at(i, j), ..p };
        // SAFETY: the caller's promise; tiles do not overlap.
        unsafe { product(isa, set, &tile, high.min(m - i), wide.min(n - j)) };
    };
    let tasks = batch.len() * down * across;
    if parallel { (0..tasks).into_par_iter().for_each(run) } else { (0..tasks).for_each(run) }
}

/// Sizes of a task's tile: as large as the caches like, small enough that every thread gets work.
fn cut(set: &Kernels, batch: usize, m: usize, n: usize, threads: usize) -> (usize, usize) {
    let even = |size: usize, parts: usize, unit: usize| size.div_ceil(parts).next_multiple_of(unit);
    let (mut down, mut across) = (m.div_ceil(TILE.0), n.div_ceil(TILE.1));
    while batch * down * across < threads {
        // Rather rows than columns: what is packed twice then is the narrower side.
        if m / down >= 2 * n / across && m / down >= 8 * set.mr {
            down *= 2;
        } else if n / across >= 8 * set.nr {
            across *= 2;
        } else if m / down >= 8 * set.mr {
            down *= 2;
        } else {
            break;
        }
    }
    (even(m, down, set.mr), even(n, across, set.nr))
}

/// One tile of the output, `[m, n]`.
unsafe fn product(isa: Isa, set: &Kernels, p: &Product, m: usize, n: usize) {
    let pieces = p.k.div_ceil(KC).max(1);
    let depth = p.k.div_ceil(pieces);
    let width = n.next_multiple_of(set.nr);
    // What the kernels can't write in place goes through f32 rows.
    let direct = p.c.dtype == DType::F32 && p.c.cols == 1;
    let out = (!direct).then(|| Scratch::take(m * width));
    let c = match &out {
        Some(s) => Matrix::dense(s.ptr(), width),
        None => p.c,
    };
    let bias = p.bias.map(|bias| {
        let row = Scratch::take(width);
        // SAFETY: n floats of the bias exist.
        with_narrow!(bias.dtype, T => unsafe { rows::<T>(isa, &bias.flipped().source(n, 1), row.ptr(), width) });
        row
    });
    let packed_b = Scratch::take(depth * width);
    let packed_a = Scratch::take(depth * MC.next_multiple_of(set.mr));
    // SAFETY: the caller's promise; each piece of scratch holds what is written to it here.
    unsafe {
        if !direct && p.accumulate {
            with_narrow!(p.c.dtype, T => rows(isa, &p.c.flipped().source::<T>(n, m), c.ptr.cast(), width));
        }
        for piece in 0..pieces {
            let from = piece * depth;
            let k = depth.min(p.k - from);
            let b = p.b.at(from, 0);
            let (b_ptr, b_stride, b_step) =
                if b.dtype == DType::F32 && b.cols == 1 && m <= SMALL && n.is_multiple_of(set.nr) {
                    (b.ptr.cast::<f32>().cast_const(), b.rows, 1)
                } else {
                    with_narrow!(b.dtype, T => panels(isa, set.nr, &b.source::<T>(k, n), packed_b.ptr()));
                    (packed_b.ptr().cast_const(), set.nr, k)
                };
            for i in (0..m).step_by(MC) {
                let high = MC.min(m - i);
                let a = p.a.at(i, from);
                let by_rows = a.cols == 1;
                let wide = a.dtype == DType::F32;
                let (a_ptr, a_stride, a_step) = if by_rows && wide {
                    (a.ptr.cast::<f32>().cast_const(), a.rows, a.rows)
                } else if by_rows {
                    with_narrow!(a.dtype, T => rows(isa, &a.flipped().source::<T>(k, high), packed_a.ptr(), k));
                    (packed_a.ptr().cast_const(), k, k)
                } else if wide && a.rows == 1 && k <= SMALL {
                    (a.ptr.cast::<f32>().cast_const(), a.cols, 1)
                } else {
                    let source = a.flipped();
                    with_narrow!(a.dtype, T => panels(isa, set.mr, &source.source::<T>(k, high), packed_a.ptr()));
                    (packed_a.ptr().cast_const(), set.mr, k)
                };
                let tile = Tile {
                    k,
                    a: a_ptr,
                    a_stride,
                    b: b_ptr,
                    b_stride,
                    c: c.at(i, 0).ptr.cast(),
                    c_stride: c.rows,
                    add: p.accumulate || piece > 0,
                    bias: bias.as_ref().filter(|_| piece == 0).map_or(std::ptr::null(), |s| s.ptr().cast_const()),
                };
                strip(set, &tile, by_rows, (a_step, b_step), high, n);
            }
        }
        if !direct {
            with_narrow!(p.c.dtype, T => store::<T>(c.ptr.cast(), width, p.c, m, n));
        }
    }
}

/// All micro-tiles of up to [`MC`] rows; `first` is the one at the origin, and `steps` are what A moves by from row to
/// row and B from column to column.
unsafe fn strip(set: &Kernels, first: &Tile, by_rows: bool, steps: (usize, usize), m: usize, n: usize) {
    let mut edge = [0f32; 12 * 32];
    // SAFETY: the caller's promise; the last panel of B is filled up, and its results go through `edge`.
    unsafe {
        for j in (0..n).step_by(set.nr) {
            let live = set.nr.min(n - j);
            for i in (0..m).step_by(set.mr) {
                let high = set.mr.min(m - i);
                let c = first.c.add(i * first.c_stride + j);
                let mut tile = Tile {
                    a: first.a.add(i * steps.0),
                    b: first.b.add(j * steps.1),
                    c,
                    bias: if first.bias.is_null() { first.bias } else { first.bias.add(j) },
                    ..*first
                };
                let kernel = if by_rows { set.row } else { set.col }[high - 1];
                if live == set.nr {
                    kernel(&tile);
                    continue;
                }
                tile.c = edge.as_mut_ptr();
                tile.c_stride = set.nr;
                for row in 0..if tile.add { high } else { 0 } {
                    std::ptr::copy_nonoverlapping(c.add(row * first.c_stride), tile.c.add(row * set.nr), live);
                }
                kernel(&tile);
                for row in 0..high {
                    std::ptr::copy_nonoverlapping(tile.c.add(row * set.nr), c.add(row * first.c_stride), live);
                }
            }
        }
    }
}

/// Rounds f32 rows into any matrix.
unsafe fn store<T: Narrow>(from: *const f32, ld: usize, to: Matrix, m: usize, n: usize) {
    let out = to.ptr.cast::<T>();
    // SAFETY: the caller's promise: both hold `[m, n]`.
    unsafe {
        for i in 0..m {
            let (from, out) = (from.add(i * ld), out.add(i * to.rows));
            if to.cols == 1 {
                for j in 0..n {
                    *out.add(j) = T::round(*from.add(j));
                }
            } else {
                for j in 0..n {
                    *out.add(j * to.cols) = T::round(*from.add(j));
                }
            }
        }
    }
}

/// One row in f64, for gradient checks.
unsafe fn row_f64(p: &Product, row: usize, n: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let get = |m: Matrix, i: usize, j: usize| *m.at(i, j).ptr.cast::<f64>();
        // Columns side by side in registers; each is one chain of sums, whatever the block.
        for from in (0..n).step_by(COLUMNS_F64) {
            let columns = COLUMNS_F64.min(n - from);
            let mut acc = [0.0; COLUMNS_F64];
            let column = |l: usize| from + l.min(columns - 1);
            if let Some(bias) = p.bias {
                acc.iter_mut().enumerate().for_each(|(l, acc)| *acc = get(bias, 0, column(l)));
            }
            let starts: [Matrix; COLUMNS_F64] = std::array::from_fn(|l| p.b.at(0, column(l)));
            for k in 0..p.k {
                let x = get(p.a, row, k);
                acc.iter_mut().zip(&starts).for_each(|(acc, start)| *acc += x * get(*start, k, 0));
            }
            for (l, acc) in acc.into_iter().enumerate().take(columns) {
                let c = p.c.at(row, from + l).ptr.cast::<f64>();
                *c = if p.accumulate { *c + acc } else { acc };
            }
        }
    }
}

#[cfg(test)]
mod tests;
