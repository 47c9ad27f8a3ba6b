//! Matrix products. Tiles of the output are spread over the threads; each packs what it reads and runs the kernels.
//!
//! The cut along k depends on k alone, and every element is one chain of multiply-adds per cut: neither the number of
//! threads nor the shape of the tiles changes a bit. Products of few rows go another way, by their sizes alone ([`streamed`]).

mod conv;
mod kernel;
mod pack;
pub(super) mod scratch;
mod streamed;
mod winograd;

pub(super) use self::conv::convolution;
#[cfg(target_arch = "aarch64")]
pub(super) use self::kernel::neon::dot_pairs;
use self::kernel::{Kernels, Tile, kernels};
pub(super) use self::pack::{Narrow, with_narrow};
use self::pack::{Source, panels, rows};
use self::scratch::Scratch;
use super::View;
use super::blocks::Space;
use super::isa::{Isa, Work, dispatch, isa};
use super::team::{spread, threads};
use crate::DType;

/// Longest run of k, in words.
const KC: usize = 384;
/// Columns whose panels of B are packed at once: they stay in the second-level cache.
const NC: usize = 512;
/// Rows of A that are packed at once, where A can't be read in place: a multiple of every kernel's height.
const MC: usize = 48;
/// Rows up to which B is read where it lies: packing would cost more than it saves.
const SMALL: usize = 320;
/// Floating-point operations below which a second thread costs more than it saves.
const GRAIN: usize = 100_000;
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
    unsafe { product(isa, &Product { a, b, bias: None, c, k, accumulate }, m, n) }
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

/// Rounds an `[m, n]` matrix of f32 with dense rows into another.
///
/// # Safety
/// Both lie in memory; nobody else uses the target.
pub(super) unsafe fn rounded(from: Matrix, to: Matrix, m: usize, n: usize) {
    // SAFETY: the caller's promise.
    unsafe { store(isa(), (from.ptr.cast(), from.rows), to, m, n, false) };
}

/// `out[.., m, n] (+)= a[.., m, k] b[.., k, n] + bias[n]`. Narrow floats are widened, and all sums kept in f32;
/// f64 stays f64.
///
/// # Safety
/// The views have these shapes, lie in memory, and nobody else writes them meanwhile; `out` overlaps no input, and no
/// two of its elements are one.
pub(super) unsafe fn matmul(
    isa: Isa,
    a: &View<'_>,
    b: &View<'_>,
    bias: Option<&View<'_>>,
    accumulate: bool,
    out: &View<'_>,
) {
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
    let parallel = 2 * batch.len() * m * n * k >= GRAIN && threads() > 1;
    if out.dtype == DType::F64 {
        let tasks = batch.len() * m;
        // SAFETY: the caller's promise; rows do not overlap.
        let run = |task: usize| unsafe { row_f64(&at(task / m), task % m, n) };
        return if parallel { spread(tasks, run) } else { (0..tasks).for_each(run) };
    }
    // SAFETY: the caller's promise.
    if batch.len() == 1 && unsafe { streamed::product(isa, &at(0), m, n) } {
        return;
    }
    let set = Packer::new(isa, a.dtype, b.dtype).set;
    let (high, wide) = if parallel { cut(set, batch.len(), m, n, threads()) } else { (m, n) };
    let (down, across) = (m.div_ceil(high), n.div_ceil(wide));
    let run = |task: usize| {
        let (i, j) = (task / across % down * high, task % across * wide);
        let p = at(task / across / down);
        let bias = p.bias.map(|bias| bias.at(0, j));
        let tile = Product { a: p.a.at(i, 0), b: p.b.at(0, j), bias, c: p.c.at(i, j), ..p };
        // SAFETY: the caller's promise; tiles do not overlap.
        unsafe { product(isa, &tile, high.min(m - i), wide.min(n - j)) };
    };
    let tasks = batch.len() * down * across;
    if parallel { spread(tasks, run) } else { (0..tasks).for_each(run) }
}

/// Rows that cost as much to multiply as a column costs to pack.
const PACKING: usize = 6;

/// Sizes of a task's tile: as many tasks as threads, cut so that the longest is as short as can be.
fn cut(set: &Kernels, batch: usize, m: usize, n: usize, threads: usize) -> (usize, usize) {
    let even = |size: usize, parts: usize, unit: usize| size.div_ceil(parts).next_multiple_of(unit);
    let mut best = (usize::MAX, (m, n));
    for down in 1..=threads.min(m.div_ceil(set.mr)) {
        for across in [threads / down, threads.div_ceil(down)] {
            let across = across.clamp(1, n.div_ceil(set.nr));
            let (high, wide) = (even(m, down, set.mr), even(n, across, set.nr));
            let tasks = batch * m.div_ceil(high) * n.div_ceil(wide);
            let cost = tasks.div_ceil(threads) * wide * (high + PACKING);
            if cost < best.0 {
                best = (cost, (high, wide));
            }
        }
    }
    best.1
}

/// Floats between the rows of a packed strip of A: no multiple of a page, where all rows fall on the same cache lines.
fn strip_stride(depth: usize) -> usize {
    let stride = depth.next_multiple_of(16) + 16;
    if collides(stride) { stride + 16 } else { stride }
}

/// Whether rows this many words apart fall on the same cache lines.
fn collides(stride: usize) -> bool {
    stride.is_multiple_of(1024)
}

/// How the kernels read some rows of A.
struct Rows {
    a: *const f32,
    /// From row to row for row kernels, from k to k for column kernels.
    stride: usize,
    /// From the first row of a kernel to that of the next.
    step: usize,
    by_rows: bool,
}

/// A kind of kernels and what they work on.
struct Packer {
    isa: Isa,
    set: &'static Kernels,
}

impl Packer {
    fn new(isa: Isa, a: DType, b: DType) -> Self {
        Self { isa, set: kernels(isa, a == DType::BF16 && b == DType::BF16) }
    }

    /// Elements of a word of k.
    fn per_word(&self) -> usize {
        if self.set.pairs { 2 } else { 1 }
    }

    /// `[m, k]` of A for a product of `n` columns, where it lies or copied to `packed`.
    ///
    /// Safety: the matrix is readable, and `packed` has room for [`Packer::room`].
    unsafe fn pack_a(&self, a: Matrix, [m, k, n]: [usize; 3], packed: *mut f32) -> Rows {
        let (isa, mr, words) = (self.isa, self.set.mr, k.div_ceil(self.per_word()));
        let by_rows = |a: *const f32, stride| Rows { a, stride, step: mr * stride, by_rows: true };
        let to = strip_stride(words);
        // SAFETY: the caller's promise.
        unsafe {
            if self.set.pairs {
                if a.cols == 1 {
                    let whole = k.is_multiple_of(2) && (a.rows.is_multiple_of(2) || m == 1);
                    if whole && (!collides(a.rows / 2) || m <= 4) {
                        return by_rows(a.ptr.cast::<f32>().cast_const(), a.rows / 2);
                    }
                    pack::pair_rows(&a.flipped().source(k, m), packed, to);
                    return by_rows(packed, to);
                }
                pack::pair_panels(mr, &a.flipped().source(k, m), packed);
                return Rows { a: packed, stride: mr, step: mr * words, by_rows: false };
            }
            let source = a.flipped();
            // Where each k falls on the same lines, packing pays, but not again and again for many columns.
            if a.rows == 1 && a.dtype == DType::F32 && (n >= 512 || !collides(a.cols)) {
                return Rows { a: a.ptr.cast(), stride: a.cols, step: mr, by_rows: false };
            }
            if a.cols != 1 {
                with_narrow!(a.dtype, T => panels::<T>(isa, mr, &source.source(k, m), packed));
                return Rows { a: packed, stride: mr, step: mr * words, by_rows: false };
            }
            if a.dtype == DType::F32 && (!collides(a.rows) || m <= 4) {
                return by_rows(a.ptr.cast(), a.rows);
            }
            with_narrow!(a.dtype, T => rows::<T>(isa, &source.source(k, m), packed, to));
            by_rows(packed, to)
        }
    }

    /// Floats that [`Packer::pack_a`] may write.
    fn room(&self, m: usize, words: usize) -> usize {
        m.next_multiple_of(self.set.mr) * strip_stride(words) + 16
    }

    /// Panels of `[k, n]` of B.
    ///
    /// Safety: the matrix is readable, and `out` has room for the words of `k` times `n`, rounded up to whole panels.
    unsafe fn pack_b(&self, b: Matrix, k: usize, n: usize, out: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.set.pairs {
                return pack::pair_panels(self.set.nr, &b.source(k, n), out);
            }
            with_narrow!(b.dtype, T => panels::<T>(self.isa, self.set.nr, &b.source(k, n), out));
        }
    }
}

/// One tile of the output, `[m, n]`.
unsafe fn product(isa: Isa, p: &Product, m: usize, n: usize) {
    let packer = Packer::new(isa, p.a.dtype, p.b.dtype);
    let (set, per) = (packer.set, packer.per_word());
    let words = p.k.div_ceil(per);
    let depth = words.div_ceil(words.div_ceil(KC).max(1)).next_multiple_of(8).max(8);
    let pieces = words.div_ceil(depth).max(1);
    // What the kernels can't write in place goes through f32 rows.
    let direct = p.c.dtype == DType::F32 && p.c.cols == 1;
    let width = n.min(NC).next_multiple_of(set.nr);
    let out = (!direct).then(|| Scratch::take(if pieces > 1 { m } else { set.mr } * width));
    // SAFETY: n elements of the bias exist.
    let bias = p.bias.map(|bias| unsafe { widened(isa, bias, 1, n) });
    let in_place = !set.pairs && p.b.dtype == DType::F32 && p.b.cols == 1 && m <= SMALL && n.is_multiple_of(set.nr);
    let packed_b = (!in_place).then(|| Scratch::take(depth * width));
    let packed_a = Scratch::take(packer.room(MC.min(m), depth));
    for (j, piece) in (0..n).step_by(NC).flat_map(|j| (0..pieces).map(move |piece| (j, piece))) {
        let wide = NC.min(n - j);
        let from = piece * depth * per;
        let k = (depth * per).min(p.k - from);
        let words = k.div_ceil(per);
        let b = p.b.at(from, j);
        // SAFETY: the caller's promise; each piece of scratch holds what is written to it here.
        unsafe {
            let (b, b_stride, b_step) = match &packed_b {
                None => (b.ptr.cast::<f32>().cast_const(), b.rows, set.nr),
                Some(packed) => {
                    packer.pack_b(b, k, wide, packed.ptr());
                    (packed.ptr().cast_const(), set.nr, set.nr * words)
                }
            };
            for chunk in (0..m).step_by(MC) {
                let rows = MC.min(m - chunk);
                let a = packer.pack_a(p.a.at(chunk, from), [rows, k, n], packed_a.ptr());
                let kernels = if a.by_rows { set.row } else { set.col };
                for i in (0..rows).step_by(set.mr) {
                    let high = set.mr.min(rows - i);
                    let (c, c_stride) = match &out {
                        None => (p.c.at(chunk + i, j).ptr.cast::<f32>(), p.c.rows),
                        Some(out) if pieces > 1 => (out.ptr().add((chunk + i) * width), width),
                        Some(out) => (out.ptr(), width),
                    };
                    for (panel, column) in (0..wide).step_by(set.nr).enumerate() {
                        kernels[high - 1](&Tile {
                            k: words,
                            a: a.a.wrapping_add(i / set.mr * a.step),
                            a_stride: a.stride,
                            b: b.add(panel * b_step),
                            b_stride,
                            c: c.add(column),
                            c_stride,
                            live: set.nr.min(wide - column),
                            add: piece > 0 || (direct && p.accumulate),
                            bias: match &bias {
                                Some(bias) if piece == 0 => bias.ptr().add(j + column),
                                _ => std::ptr::null(),
                            },
                        });
                    }
                    if !direct && piece + 1 == pieces {
                        store(isa, (c, c_stride), p.c.at(chunk + i, j), high, wide, p.accumulate);
                    }
                }
            }
        }
    }
}

/// Rounds f32 rows into any matrix, or adds them to it.
struct Store<T> {
    from: *const f32,
    ld: usize,
    to: *mut T,
    rows: usize,
    cols: usize,
    m: usize,
    n: usize,
    add: bool,
}

impl<T: Narrow> Work for Store<T> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for i in 0..self.m {
            let (from, out) = (self.from.wrapping_add(i * self.ld), self.to.wrapping_add(i * self.rows));
            // SAFETY: made for `[m, n]` of both.
            unsafe {
                match (self.cols, self.add) {
                    (1, false) => (0..self.n).for_each(|j| *out.add(j) = T::round(*from.add(j))),
                    (1, true) => (0..self.n).for_each(|j| *out.add(j) = T::round((*out.add(j)).widen() + *from.add(j))),
                    (step, false) => (0..self.n).for_each(|j| *out.add(j * step) = T::round(*from.add(j))),
                    (step, true) => (0..self.n).for_each(|j| {
                        let out = out.add(j * step);
                        *out = T::round((*out).widen() + *from.add(j));
                    }),
                }
            }
        }
    }
}

/// Stores f32 rows `[m, n]`, `ld` apart.
///
/// Safety: both hold `[m, n]`; nobody else uses the target.
unsafe fn store(isa: Isa, (from, ld): (*const f32, usize), to: Matrix, m: usize, n: usize, add: bool) {
    let Matrix { ptr, rows, cols, .. } = to;
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512Bf16 && to.dtype == DType::BF16 && cols == 1 && !add {
        // SAFETY: the caller's promise, and the machine has the instruction.
        return (0..m).for_each(|i| unsafe { pack::round_row(from.add(i * ld), to.at(i, 0).ptr.cast(), n) });
    }
    with_narrow!(to.dtype, T => dispatch(isa, Store::<T> { from, ld, to: ptr.cast(), rows, cols, m, n, add }));
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
