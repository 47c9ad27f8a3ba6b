//! Attention in blocks of queries and keys: only one block of scores exists at a time (FlashAttention's scheme).

use super::View;
use super::gemm::scratch::Scratch;
use super::gemm::{Matrix, multiply, rounded, widened};
use super::isa::{Work, dispatch, isa};
use super::lanes::{LANES, fold, sum};
use super::math::Real;
use super::team::{self, threads};
use crate::DType;

/// Most queries and keys of a block of scores.
const QUERIES: usize = 96;
const KEYS: usize = 256;

/// The size of blocks that are nearly equal and at most `most`.
fn even(size: usize, most: usize) -> usize {
    size.div_ceil(size.div_ceil(most).max(1)).max(1)
}

/// One head of a `[B, H, ..]` view.
fn head(view: &View<'_>, index: usize) -> Matrix {
    let (b, h) = (index / view.dims[1], index % view.dims[1]);
    Matrix::of(view).moved(b * view.strides[0] + h * view.strides[1])
}

/// A matrix without a second row, for `[B, H, L]`.
fn head_rows(view: &View<'_>, index: usize) -> *mut f32 {
    let wide = View { dims: &[view.dims, &[1]].concat(), strides: &[view.strides, &[1]].concat(), ..*view };
    head(&wide, index).ptr.cast()
}

/// A block of scores `[rows, cols]`, its rows padded to a multiple of [`LANES`].
#[derive(Clone, Copy)]
struct Scores {
    s: *mut f32,
    rows: usize,
    cols: usize,
    scale: f32,
    /// The mask at the block's origin.
    mask: Option<Matrix>,
}

impl Scores {
    /// From row to row.
    fn stride(&self) -> usize {
        self.cols.next_multiple_of(LANES)
    }

    fn matrix(&self) -> Matrix {
        Matrix::dense(self.s, self.stride())
    }

    /// Row `i`, masked, and the factor that it still lacks. The padding is masked out.
    ///
    /// Safety: the block is writable, and the mask has as many elements.
    #[inline(always)]
    unsafe fn row(&self, i: usize) -> (&'static mut [f32], f32) {
        // SAFETY: the caller's promise.
        unsafe {
            let row = std::slice::from_raw_parts_mut(self.s.add(i * self.stride()), self.stride());
            row[self.cols..].fill(f32::NEG_INFINITY);
            let live = &mut row[..self.cols];
            match self.mask {
                None if self.scale > 0.0 => return (row, self.scale),
                None => live.iter_mut().for_each(|s| *s *= self.scale),
                Some(mask) => {
                    let from = mask.at(i, 0).ptr.cast::<f32>();
                    live.iter_mut().enumerate().for_each(|(j, s)| *s = *s * self.scale + *from.add(j * mask.cols));
                }
            }
            (row, 1.0)
        }
    }
}

/// The largest element; rows are whole lanes.
#[inline(always)]
fn largest(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for block in row.as_chunks::<LANES>().0 {
        lanes.iter_mut().zip(block).for_each(|(m, &s)| *m = if s > *m { s } else { *m });
    }
    fold(lanes, |m, s| if s > m { s } else { m })
}

/// A maximum that may be subtracted: 0 stands for that of a row without keys.
#[inline(always)]
fn finite(max: f32) -> f32 {
    if max < f32::MIN { 0.0 } else { max }
}

/// Turns scores into numerators, and moves maximum, sum and result on to this block.
struct Softmax<'a> {
    scores: Scores,
    max: &'a mut [f32],
    sum: &'a mut [f32],
    /// The result so far; nothing at the first block.
    acc: Option<&'a mut [f32]>,
}

impl Work for Softmax<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(mut self) {
        for i in 0..self.scores.rows {
            // SAFETY: made for a whole block.
            let (row, factor) = unsafe { self.scores.row(i) };
            let before = self.max[i];
            let next = (largest(row) * factor).max(before);
            let shift = finite(next);
            let mut sums = [0f32; LANES];
            for block in row.as_chunks_mut::<LANES>().0 {
                for l in 0..LANES {
                    block[l] = Real::exp_normal::<FMA>(Real::mul_add::<FMA>(block[l], factor, -shift));
                    sums[l] += block[l];
                }
            }
            self.max[i] = next;
            let sum = fold(sums, |a, b| a + b);
            let Some(acc) = &mut self.acc else {
                self.sum[i] = sum;
                continue;
            };
            let (decay, width) = (Real::exp_normal::<FMA>(before - shift), acc.len() / self.max.len());
            self.sum[i] = self.sum[i] * decay + sum;
            acc[i * width..][..width].iter_mut().for_each(|o| *o *= decay);
        }
    }
}

/// Divides the result by the sums, which become log-sum-exps.
struct Finish<'a> {
    max: &'a [f32],
    sum: &'a mut [f32],
    acc: &'a mut [f32],
}

impl Work for Finish<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let width = self.acc.len() / self.max.len();
        for (row, &sum) in self.acc.chunks_exact_mut(width.max(1)).zip(&*self.sum) {
            let factor = if sum > 0.0 { 1.0 / sum } else { 0.0 };
            row.iter_mut().for_each(|o| *o *= factor);
        }
        self.sum.iter_mut().zip(self.max).for_each(|(sum, &max)| *sum = finite(max) + Real::log::<FMA>(*sum));
    }
}

/// Turns scores into probabilities, and the gradient of the probabilities into that of the scores.
struct Derivative<'a> {
    scores: Scores,
    lse: &'a [f32],
    delta: &'a [f32],
    /// Rows like those of the scores.
    dp: *mut f32,
}

impl Work for Derivative<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (stride, cols, scale) = (self.scores.stride(), self.scores.cols, self.scores.scale);
        for i in 0..self.scores.rows {
            // SAFETY: made for a whole block.
            let (row, factor) = unsafe { self.scores.row(i) };
            let lse = if self.lse[i] < f32::MIN { f32::INFINITY } else { self.lse[i] };
            let delta = self.delta[i];
            // SAFETY: as above.
            let dp = unsafe { std::slice::from_raw_parts_mut(self.dp.add(i * stride), stride) };
            dp[cols..].fill(0.0);
            for (block, dp) in row.as_chunks_mut::<LANES>().0.iter_mut().zip(dp.as_chunks_mut::<LANES>().0) {
                for l in 0..LANES {
                    block[l] = Real::exp_normal::<FMA>(Real::mul_add::<FMA>(block[l], factor, -lse));
                    dp[l] = block[l] * (dp[l] - delta) * scale;
                }
            }
        }
    }
}

/// The products of two matrices' rows, `[m, n]` each.
struct RowDots<'a> {
    a: &'a [f32],
    b: &'a [f32],
    out: &'a mut [f32],
}

impl Work for RowDots<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let width = self.a.len() / self.out.len();
        for (i, out) in self.out.iter_mut().enumerate() {
            let [a, b] = [self.a, self.b].map(|rows| &rows[i * width..][..width]);
            *out = sum([a, b], |[a, b]| a * b);
        }
    }
}

/// Floats of scratch as a slice, all `value`.
#[expect(clippy::mut_from_ref)] // a scratch lends its memory out by pointer
fn filled(scratch: &Scratch, len: usize, value: f32) -> &mut [f32] {
    // SAFETY: the scratch is that large, initialised, and used through this slice alone.
    let slice = unsafe { std::slice::from_raw_parts_mut(scratch.ptr(), len) };
    slice.fill(value);
    slice
}

fn spread(tasks: usize, flops: usize, work: impl Fn(usize) + Sync + Send) {
    if flops < 200_000 || threads() == 1 {
        (0..tasks).for_each(work);
    } else {
        team::spread(tasks, work);
    }
}

/// Blocks of numbers for the next product, as bf16 where the operands are.
struct Narrowed(Option<Scratch>);

impl Narrowed {
    /// For `len` numbers.
    fn new(len: usize, dtype: DType) -> Self {
        Self((dtype == DType::BF16).then(|| Scratch::take(len.div_ceil(2))))
    }

    /// An f32 block, or its copy here.
    ///
    /// Safety: the block is readable, and not larger than what this is for.
    unsafe fn of(&self, wide: Matrix, m: usize, n: usize) -> Matrix {
        let Some(own) = &self.0 else { return wide };
        let narrow = Matrix { ptr: own.ptr().cast(), dtype: DType::BF16, ..wide };
        // SAFETY: the caller's promise.
        unsafe { rounded(wide, narrow, m, n) };
        narrow
    }
}

/// A result that products add up: in place where it is f32, else in f32 rows that are rounded at the end.
struct Sum {
    to: Matrix,
    own: Option<Scratch>,
    rows: usize,
    cols: usize,
}

impl Sum {
    fn new(to: Matrix, rows: usize, cols: usize) -> Self {
        let own = (to.dtype != DType::F32).then(|| Scratch::take(rows * cols));
        Self { to, own, rows, cols }
    }

    fn matrix(&self) -> Matrix {
        self.own.as_ref().map_or(self.to, |own| Matrix::dense(own.ptr(), self.cols))
    }

    /// Safety: the result is writable and summed up.
    unsafe fn finish(self) {
        if self.own.is_some() {
            // SAFETY: the caller's promise.
            unsafe { rounded(self.matrix(), self.to, self.rows, self.cols) };
        }
    }
}

/// `o = softmax(q k^T scale + mask) v` and the log-sum-exp of each row of scores; no dtype is f64.
///
/// # Safety
/// The views have the shapes of `Fused::AttentionForward` and lie in memory; nobody else uses the outputs.
pub(super) unsafe fn attention_forward(
    q: &View<'_>,
    k: &View<'_>,
    v: &View<'_>,
    mask: Option<&View<'_>>,
    scale: f64,
    o: &View<'_>,
    lse: &View<'_>,
) {
    let isa = isa();
    let (heads, queries, keys) = (q.dims[0] * q.dims[1], q.dims[2], k.dims[2]);
    let (depth, width) = (q.dims[3], v.dims[3]);
    let (high, wide) = (even(queries, QUERIES), even(keys, KEYS));
    let blocks = queries.div_ceil(high);
    spread(heads * blocks, 2 * heads * queries * keys * (depth + width), |task| {
        let (at, i) = (task / blocks, task % blocks * high);
        let m = high.min(queries - i);
        let (q, k, v, o) = (head(q, at).at(i, 0), head(k, at), head(v, at), head(o, at).at(i, 0));
        let stride = wide.next_multiple_of(LANES);
        let state = [Scratch::take(m), Scratch::take(m), Scratch::take(m * width), Scratch::take(m * stride)];
        let (max, sum) = (filled(&state[0], m, f32::NEG_INFINITY), filled(&state[1], m, 0.0));
        // SAFETY: the scratch is that large, initialised, and used through this slice and the products alone.
        let acc = unsafe { std::slice::from_raw_parts_mut(state[2].ptr(), m * width) };
        let narrowed = Narrowed::new(m * stride, v.dtype);
        for j in (0..keys).step_by(wide) {
            let n = wide.min(keys - j);
            let mask = mask.map(|mask| head(mask, at).at(i, j));
            let scores = Scores { s: state[3].ptr(), rows: m, cols: n, scale: scale as f32, mask };
            // SAFETY: the caller's promise; the scratch holds `[m, n]` and `[m, width]`.
            unsafe {
                multiply(isa, q, k.at(j, 0).flipped(), scores.matrix(), [m, depth, n], false);
                let acc_so_far = (j > 0).then_some(&mut *acc);
                dispatch(isa, Softmax { scores, max, sum, acc: acc_so_far });
                let p = narrowed.of(scores.matrix(), m, n);
                multiply(isa, p, v.at(j, 0), Matrix::dense(acc.as_mut_ptr(), width), [m, n, width], j > 0);
            }
        }
        dispatch(isa, Finish { max, sum, acc });
        // SAFETY: the caller's promise; blocks of queries do not overlap.
        unsafe {
            rounded(Matrix::dense(acc.as_mut_ptr(), width), o, m, width);
            std::ptr::copy_nonoverlapping(sum.as_ptr(), head_rows(lse, at).add(i), m);
        }
    });
}

/// The gradients of q, k and v; no dtype is f64.
///
/// # Safety
/// The views have the shapes of `Fused::AttentionBackward` and lie in memory; nobody else uses the outputs.
#[allow(clippy::too_many_arguments)] // the inputs and outputs of the fused op
pub(super) unsafe fn attention_backward(
    q: &View<'_>,
    k: &View<'_>,
    v: &View<'_>,
    o: &View<'_>,
    grad: &View<'_>,
    lse: &View<'_>,
    mask: Option<&View<'_>>,
    scale: f64,
    dq: &View<'_>,
    dk: &View<'_>,
    dv: &View<'_>,
) {
    let isa = isa();
    let (heads, queries, keys) = (q.dims[0] * q.dims[1], q.dims[2], k.dims[2]);
    let (depth, width) = (q.dims[3], v.dims[3]);
    let (high, wide) = (even(queries, QUERIES), even(keys, KEYS));
    spread(heads, 2 * heads * queries * keys * (3 * depth + 2 * width), |at| {
        let (q, k, v, g) = (head(q, at), head(k, at), head(v, at), head(grad, at));
        let stride = wide.next_multiple_of(LANES);
        let state = [queries, high * stride, high * stride].map(Scratch::take);
        let narrowed = [(); 2].map(|()| Narrowed::new(high * stride, q.dtype));
        let delta = filled(&state[0], queries, 0.0);
        // SAFETY: the caller's promise; the copies are of this size.
        let lse = unsafe {
            let [o, g] = [head(o, at), g].map(|x| widened(isa, x, queries, width));
            let [a, b] = [&o, &g].map(|x| std::slice::from_raw_parts(x.ptr().cast_const(), queries * width));
            dispatch(isa, RowDots { a, b, out: &mut *delta });
            std::slice::from_raw_parts(head_rows(lse, at).cast_const(), queries)
        };
        let d_q = Sum::new(head(dq, at), queries, depth);
        for j in (0..keys).step_by(wide) {
            let n = wide.min(keys - j);
            let (d_k, d_v) = (Sum::new(head(dk, at).at(j, 0), n, depth), Sum::new(head(dv, at).at(j, 0), n, width));
            let (k, v) = (k.at(j, 0), v.at(j, 0));
            for i in (0..queries).step_by(high) {
                let m = high.min(queries - i);
                let (q, g) = (q.at(i, 0), g.at(i, 0));
                let mask = mask.map(|mask| head(mask, at).at(i, j));
                let scores = Scores { s: state[1].ptr(), rows: m, cols: n, scale: scale as f32, mask };
                let dp = Matrix::dense(state[2].ptr(), scores.stride());
                // SAFETY: the caller's promise; the scratch holds two blocks of scores, and the sums what they are for.
                unsafe {
                    multiply(isa, q, k.flipped(), scores.matrix(), [m, depth, n], false);
                    multiply(isa, g, v.flipped(), dp, [m, width, n], false);
                    let (lse, delta) = (&lse[i..i + m], &delta[i..i + m]);
                    dispatch(isa, Derivative { scores, lse, delta, dp: state[2].ptr() });
                    let (p, ds) = (narrowed[0].of(scores.matrix(), m, n), narrowed[1].of(dp, m, n));
                    multiply(isa, ds, k, d_q.matrix().at(i, 0), [m, n, depth], j > 0);
                    multiply(isa, ds.flipped(), q, d_k.matrix(), [n, m, depth], i > 0);
                    multiply(isa, p.flipped(), g, d_v.matrix(), [n, m, width], i > 0);
                }
            }
            // SAFETY: the caller's promise; blocks of keys do not overlap.
            unsafe {
                d_k.finish();
                d_v.finish();
            }
        }
        // SAFETY: as above.
        unsafe { d_q.finish() };
    });
}
