//! Products of few rows, or of a short k: each element of the large operand counts a few times only. So it is streamed
//! from memory in its own order, where packing it would cost more than the product.
//!
//! Every element's sum has an order that depends on the sizes alone.

use std::marker::PhantomData;

use super::scratch::Scratch;
use super::{Matrix, Narrow, Product, store, widened, with_narrow};
use crate::cpu::isa::{Isa, Work, dispatch};
use crate::cpu::lanes::{LANES, fold};
use crate::cpu::math::Real;
use crate::cpu::team::{spread, threads};

/// Rows, or length of k, up to which streaming is faster.
const FEW: usize = 4;
/// Elements of the large matrix from which it is: smaller ones stay in the caches.
const LARGE: usize = 128 * 1024;
/// Columns of B that are taken at once: the sums over them stay in the first-level cache.
const COLUMNS: usize = 1024;
/// Rows of B that one task adds: a run of memory by itself, which the machine sees coming.
const PIECE: usize = 256;

/// How the large matrix lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// Few rows, and rows of B are dense: sums of rows of B.
    Rows,
    /// Few rows, and columns of B are dense: dot products.
    Columns,
    /// A short k: sums of few rows of B, each row of the result by itself.
    Outer,
}

impl Kind {
    fn of(p: &Product, m: usize, n: usize) -> Option<Self> {
        let dtypes = p.a.dtype == p.b.dtype && (p.c.dtype == p.b.dtype || p.c.dtype == crate::DType::F32);
        match () {
            () if !dtypes || n < 4 * LANES || p.c.cols != 1 => None,
            () if p.k <= FEW && p.b.cols == 1 && m * n >= LARGE => Some(Self::Outer),
            () if m > FEW || p.k * n < LARGE => None,
            () if p.b.cols == 1 => Some(Self::Rows),
            () if p.b.rows == 1 => Some(Self::Columns),
            () => None,
        }
    }
}

/// Runs `c (+)= a b + bias` if it is such a product.
///
/// # Safety
/// As for [`super::matmul`]; no dtype is f64.
pub(super) unsafe fn product(isa: Isa, p: &Product, m: usize, n: usize) -> bool {
    let Some(kind) = Kind::of(p, m, n) else { return false };
    // SAFETY: the caller's promise.
    let (a, bias) = unsafe { (widened(isa, p.a, m, p.k), p.bias.map(|bias| widened(isa, bias, 1, n))) };
    let bias = bias.as_ref().map(|bias| Matrix::dense(bias.ptr(), n));
    let p = Product { a: Matrix::dense(a.ptr(), p.k), bias, ..*p };
    let parts = |size: usize| {
        let part = size.div_ceil(threads()).next_multiple_of(LANES);
        (part, size.div_ceil(part))
    };
    match kind {
        Kind::Outer => {
            let (high, tasks) = parts(m);
            spread(tasks, |task| {
                let i = task * high;
                // SAFETY: the caller's promise; tasks write rows that do not overlap.
                unsafe { stream(isa, kind, &Product { a: p.a.at(i, 0), c: p.c.at(i, 0), ..p }, high.min(m - i), n) };
            });
        }
        Kind::Columns => {
            let (wide, tasks) = parts(n);
            spread(tasks, |task| {
                let j = task * wide;
                let bias = p.bias.map(|bias| bias.at(0, j));
                // SAFETY: the caller's promise; tasks write columns that do not overlap.
                unsafe {
                    stream(isa, kind, &Product { b: p.b.at(0, j), c: p.c.at(0, j), bias, ..p }, m, wide.min(n - j));
                }
            });
        }
        Kind::Rows => {
            // How k is cut depends on k alone, so threads change no bit.
            let pieces = p.k.div_ceil(PIECE);
            let scratch = Scratch::take(pieces * m * n);
            let sums = Matrix::dense(scratch.ptr(), n);
            spread(pieces, |piece| {
                let from = piece * PIECE;
                let (a, b, c) = (p.a.at(0, from), p.b.at(from, 0), sums.at(piece * m, 0));
                let part = Product { a, b, c, bias: None, k: PIECE.min(p.k - from), accumulate: false };
                // SAFETY: the caller's promise; each task has sums of its own.
                unsafe { stream(isa, kind, &part, m, n) };
            });
            let mut ones = vec![1f32; pieces];
            let a = Matrix::dense(ones.as_mut_ptr(), pieces);
            for i in 0..m {
                let b = Matrix { rows: m * n, ..sums.at(i, 0) };
                // SAFETY: as above.
                unsafe { stream(isa, kind, &Product { a, b, c: p.c.at(i, 0), k: pieces, ..p }, 1, n) };
            }
        }
    }
    true
}

/// `c (+)= a b + bias`, `[m, n]`, on this thread; A and the bias are dense f32.
///
/// Safety: as for [`product`].
unsafe fn stream(isa: Isa, kind: Kind, p: &Product, m: usize, n: usize) {
    // Rows that are summed side by side: each row of B is read once for all of them.
    let group = m.min(FEW);
    let sums = Scratch::take(group * COLUMNS);
    for j in (0..n).step_by(COLUMNS) {
        let columns = COLUMNS.min(n - j);
        for i in (0..m).step_by(group) {
            let rows = group.min(m - i);
            // SAFETY: the caller's promise.
            unsafe {
                for row in (0..rows).map(|row| sums.ptr().add(row * COLUMNS)) {
                    match p.bias {
                        Some(bias) => row.copy_from_nonoverlapping(bias.at(0, j).ptr.cast(), columns),
                        None => row.write_bytes(0, columns),
                    }
                }
                let (a, b) = (p.a.at(i, 0), p.b.at(0, j));
                let tile = Streamed { a: a.ptr.cast(), a_stride: a.rows, b, rows, columns, k: p.k, sums: sums.ptr() };
                with_narrow!(b.dtype, T => match kind {
                    Kind::Columns => dispatch(isa, Dots::<T>(tile, PhantomData)),
                    Kind::Rows | Kind::Outer => dispatch(isa, Sums::<T>(tile, PhantomData)),
                });
                store(isa, (sums.ptr(), COLUMNS), p.c.at(i, j), rows, columns, p.accumulate);
            }
        }
    }
}

/// `sums[rows, columns] += a[rows, k] b[k, columns]`; rows of the sums are [`COLUMNS`] apart.
struct Streamed {
    a: *const f32,
    a_stride: usize,
    b: Matrix,
    rows: usize,
    columns: usize,
    k: usize,
    sums: *mut f32,
}

/// Where rows of B are dense.
struct Sums<T>(Streamed, PhantomData<T>);

impl<T: Narrow> Work for Sums<T> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let t = &self.0;
        for k in 0..t.k {
            for i in 0..t.rows {
                // SAFETY: made for windows of these sizes.
                unsafe { t.add_row::<T, FMA>(i, k) };
            }
        }
    }
}

/// Where columns of B are dense.
struct Dots<T>(Streamed, PhantomData<T>);

impl<T: Narrow> Work for Dots<T> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let t = &self.0;
        for j in 0..t.columns {
            // SAFETY: made for windows of these sizes.
            unsafe {
                match t.rows {
                    1 => t.add_dots::<T, 1, FMA>(j),
                    2 => t.add_dots::<T, 2, FMA>(j),
                    3 => t.add_dots::<T, 3, FMA>(j),
                    _ => t.add_dots::<T, FEW, FMA>(j),
                }
            }
        }
    }
}

/// The elements from `from` on.
#[inline(always)]
unsafe fn widen<T: Narrow>(from: *const T) -> [f32; LANES] {
    // SAFETY: the caller's promise: there are that many.
    let narrow = unsafe { from.cast::<[T; LANES]>().read_unaligned() };
    let mut wide = [0f32; LANES];
    for l in 0..LANES {
        wide[l] = narrow[l].widen();
    }
    wide
}

impl Streamed {
    /// Adds row `k` of B to row `i` of the sums. The plainest of loops: the compiler makes SIMD of no other.
    #[inline(always)]
    unsafe fn add_row<T: Narrow, const FMA: bool>(&self, i: usize, k: usize) {
        // SAFETY: the caller's promise.
        let (factor, row, sums) = unsafe {
            let row = self.b.at(k, 0).ptr.cast::<T>().cast_const();
            let sums = std::slice::from_raw_parts_mut(self.sums.add(i * COLUMNS), self.columns);
            (*self.a.add(i * self.a_stride + k), std::slice::from_raw_parts(row, self.columns), sums)
        };
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum = Real::mul_add::<FMA>(factor, x.widen(), *sum));
    }

    /// Adds the dot products of `M` rows of A with column `j` of B.
    #[inline(always)]
    unsafe fn add_dots<T: Narrow, const M: usize, const FMA: bool>(&self, j: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let rows: [*const f32; M] = std::array::from_fn(|i| self.a.add(i * self.a_stride));
            let column = self.b.at(0, j).ptr.cast::<T>().cast_const();
            // Two chains a row: one would wait for itself.
            let mut chains = [[[0f32; LANES]; M]; 2];
            let whole = self.k - self.k % (2 * LANES);
            for k in (0..whole).step_by(2 * LANES) {
                for (half, chains) in chains.iter_mut().enumerate() {
                    let at = k + half * LANES;
                    let block = widen(column.add(at));
                    for (row, chain) in rows.iter().zip(chains) {
                        let row = widen(row.add(at));
                        for l in 0..LANES {
                            chain[l] = Real::mul_add::<FMA>(row[l], block[l], chain[l]);
                        }
                    }
                }
            }
            for i in 0..M {
                let rest: f32 = (whole..self.k).map(|k| *rows[i].add(k) * (*column.add(k)).widen()).sum();
                let [a, b] = chains.map(|chains| fold(chains[i], |a, b| a + b));
                *self.sums.add(i * COLUMNS + j) += a + b + rest;
            }
        }
    }
}
