//! Attention in blocks of queries and keys: only one block of scores exists at a time (FlashAttention's scheme).

use super::View;
use super::gemm::scratch::Scratch;
use super::gemm::{Matrix, multiply, rounded, widened};
use super::isa::{Work, dispatch, isa};
use super::math::Real;
use super::team::{self, threads};

/// Queries and keys of a block of scores.
const QUERIES: usize = 64;
const KEYS: usize = 256;
/// Numbers that a loop takes at once: one or two vectors.
const LANES: usize = 16;

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

/// A block of scores that become probabilities.
struct Scores {
    s: *mut f32,
    rows: usize,
    cols: usize,
    scale: f32,
    /// The mask at the block's origin.
    mask: Option<Matrix>,
}

impl Scores {
    /// Row `i`, scaled and masked in place.
    #[inline(always)]
    unsafe fn row(&self, i: usize) -> &'static mut [f32] {
        // SAFETY: the caller's promise: the block is `[rows, cols]`, and the mask has as many elements.
        unsafe {
            let row = std::slice::from_raw_parts_mut(self.s.add(i * self.cols), self.cols);
            match self.mask {
                None => row.iter_mut().for_each(|s| *s *= self.scale),
                Some(mask) => {
                    let from = mask.at(i, 0).ptr.cast::<f32>();
                    row.iter_mut().enumerate().for_each(|(j, s)| *s = *s * self.scale + *from.add(j * mask.cols));
                }
            }
            row
        }
    }
}

/// The largest element.
#[inline(always)]
fn largest(row: &[f32]) -> f32 {
    let (blocks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for block in blocks {
        lanes.iter_mut().zip(block).for_each(|(m, &s)| *m = if s > *m { s } else { *m });
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &s| if s > m { s } else { m })
}

/// The sum, in a fixed order.
#[inline(always)]
fn sum(row: &[f32]) -> f32 {
    let (blocks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for block in blocks {
        lanes.iter_mut().zip(block).for_each(|(m, s)| *m += s);
    }
    lanes.iter().chain(rest).sum()
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
    acc: &'a mut [f32],
}

impl Work for Softmax<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let width = self.acc.len() / self.max.len();
        for i in 0..self.scores.rows {
            // SAFETY: made for a whole block.
            let row = unsafe { self.scores.row(i) };
            let before = self.max[i];
            let next = largest(row).max(before);
            let shift = finite(next);
            row.iter_mut().for_each(|s| *s = Real::exp::<FMA>(*s - shift));
            let decay = Real::exp::<FMA>(before - shift);
            self.max[i] = next;
            self.sum[i] = self.sum[i] * decay + sum(row);
            self.acc[i * width..][..width].iter_mut().for_each(|o| *o *= decay);
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
        for (i, (sum, &max)) in self.sum.iter_mut().zip(self.max).enumerate() {
            let factor = if *sum > 0.0 { 1.0 / *sum } else { 0.0 };
            self.acc[i * width..][..width].iter_mut().for_each(|o| *o *= factor);
            *sum = finite(max) + Real::log::<FMA>(*sum);
        }
    }
}

/// Turns scores into probabilities, and the gradient of the probabilities into that of the scores.
struct Derivative<'a> {
    scores: Scores,
    lse: &'a [f32],
    delta: &'a [f32],
    dp: &'a mut [f32],
}

impl Work for Derivative<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (cols, scale) = (self.scores.cols, self.scores.scale);
        for i in 0..self.scores.rows {
            // SAFETY: made for a whole block.
            let p = unsafe { self.scores.row(i) };
            let lse = if self.lse[i] < f32::MIN { f32::INFINITY } else { self.lse[i] };
            let delta = self.delta[i];
            for (p, dp) in p.iter_mut().zip(&mut self.dp[i * cols..][..cols]) {
                *p = Real::exp::<FMA>(*p - lse);
                *dp = *p * (*dp - delta) * scale;
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
            let (a, b) = (&self.a[i * width..][..width], &self.b[i * width..][..width]);
            let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
            let mut lanes = [0f32; LANES];
            for (a, b) in a.iter().zip(b) {
                lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(s, (a, b))| *s = Real::mul_add::<FMA>(*a, *b, *s));
            }
            *out = lanes.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>();
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
    let blocks = queries.div_ceil(QUERIES);
    spread(heads * blocks, 2 * heads * queries * keys * (depth + width), |task| {
        let (at, i) = (task / blocks, task % blocks * QUERIES);
        let m = QUERIES.min(queries - i);
        let (q, k, v, o) = (head(q, at).at(i, 0), head(k, at), head(v, at), head(o, at).at(i, 0));
        let state = [Scratch::take(m), Scratch::take(m), Scratch::take(m * width), Scratch::take(m * KEYS.min(keys))];
        let (max, sum) = (filled(&state[0], m, f32::NEG_INFINITY), filled(&state[1], m, 0.0));
        let acc = filled(&state[2], m * width, 0.0);
        for j in (0..keys).step_by(KEYS) {
            let n = KEYS.min(keys - j);
            let s = Matrix::dense(state[3].ptr(), n);
            let mask = mask.map(|mask| head(mask, at).at(i, j));
            let scores = Scores { s: state[3].ptr(), rows: m, cols: n, scale: scale as f32, mask };
            // SAFETY: the caller's promise; the scratch holds `[m, n]` and `[m, width]`.
            unsafe {
                multiply(isa, q, k.at(j, 0).flipped(), s, [m, depth, n], false);
                dispatch(isa, Softmax { scores, max, sum, acc });
                multiply(isa, s, v.at(j, 0), Matrix::dense(acc.as_mut_ptr(), width), [m, n, width], true);
            }
        }
        dispatch(isa, Finish { max, sum, acc });
        // SAFETY: the caller's promise; blocks of queries do not overlap.
        unsafe {
            rounded(acc.as_ptr(), o, m, width);
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
    spread(heads, 2 * heads * queries * keys * (3 * depth + 2 * width), |at| {
        let (q, k, v) = (head(q, at), head(k, at), head(v, at));
        let (rows, cols) = (QUERIES.min(queries), KEYS.min(keys));
        let sizes = [queries, queries * depth, cols * depth, cols * width, rows * cols, rows * cols];
        let state = sizes.map(Scratch::take);
        let (delta, d_q) = (filled(&state[0], queries, 0.0), filled(&state[1], queries * depth, 0.0));
        // SAFETY: the caller's promise; the scratch holds what is written to it.
        let (lse, o, g) = unsafe {
            let lse = std::slice::from_raw_parts(head_rows(lse, at).cast_const(), queries);
            (lse, widened(isa, head(o, at), queries, width), widened(isa, head(grad, at), queries, width))
        };
        let [o, g_rows] = [&o, &g].map(|x| {
            // SAFETY: just made, of this size.
            unsafe { std::slice::from_raw_parts(x.ptr().cast_const(), queries * width) }
        });
        dispatch(isa, RowDots { a: o, b: g_rows, out: delta });
        let g = Matrix::dense(g.ptr(), width);
        for j in (0..keys).step_by(KEYS) {
            let n = KEYS.min(keys - j);
            filled(&state[2], n * depth, 0.0);
            filled(&state[3], n * width, 0.0);
            let (d_k, d_v) = (Matrix::dense(state[2].ptr(), depth), Matrix::dense(state[3].ptr(), width));
            let (k, v) = (k.at(j, 0), v.at(j, 0));
            for i in (0..queries).step_by(QUERIES) {
                let m = QUERIES.min(queries - i);
                let (p, ds) = (Matrix::dense(state[4].ptr(), n), Matrix::dense(state[5].ptr(), n));
                let mask = mask.map(|mask| head(mask, at).at(i, j));
                let scores = Scores { s: state[4].ptr(), rows: m, cols: n, scale: scale as f32, mask };
                // SAFETY: the caller's promise; the scratch holds two blocks of scores and the three gradients.
                unsafe {
                    multiply(isa, q.at(i, 0), k.flipped(), p, [m, depth, n], false);
                    multiply(isa, g.at(i, 0), v.flipped(), ds, [m, width, n], false);
                    let dp = std::slice::from_raw_parts_mut(state[5].ptr(), m * n);
                    dispatch(isa, Derivative { scores, lse: &lse[i..i + m], delta: &delta[i..i + m], dp });
                    let d_q = Matrix::dense(d_q.as_mut_ptr(), depth).at(i, 0);
                    multiply(isa, ds, k, d_q, [m, n, depth], true);
                    multiply(isa, ds.flipped(), q.at(i, 0), d_k, [n, m, depth], true);
                    multiply(isa, p.flipped(), g.at(i, 0), d_v, [n, m, width], true);
                }
            }
            // SAFETY: the caller's promise; blocks of keys do not overlap.
            unsafe {
                rounded(state[2].ptr(), head(dk, at).at(j, 0), n, depth);
                rounded(state[3].ptr(), head(dv, at).at(j, 0), n, width);
            }
        }
        // SAFETY: as above.
        unsafe { rounded(d_q.as_ptr(), head(dq, at), queries, depth) };
    });
}
