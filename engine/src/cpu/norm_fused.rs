//! LayerNorm with modulation and RMSNorm with rotation, each in one pass over a row, forward and backward.
//!
//! Sums over rows are taken in pieces that depend on the shape alone, and added in order. What the composition would write
//! between its two operations is rounded here as well, so that a narrow dtype means the same with and without a kernel.

use super::View;
use super::gemm::scratch::Scratch;
use super::gemm::{Matrix, Narrow, rounded, widened, with_narrow};
use super::isa::{Isa, Work, dispatch, isa};
use super::lanes::sum;
use super::math::Real;
use super::team;
use crate::DType;
use crate::ops::RopeLayout;

/// Rows of one task.
const ROWS: usize = 32;

/// Rows of `[B, L, d]` or `[B, L, H, d]`, the last axis dense.
#[derive(Clone, Copy)]
struct Rows<T> {
    ptr: *mut T,
    /// From sample to sample, from token to token, from head to head.
    strides: [usize; 3],
}

impl<T> Rows<T> {
    fn of(view: &View<'_>) -> Self {
        let heads = if view.dims.len() == 4 { view.strides[2] } else { 0 };
        Self { ptr: view.ptr.cast(), strides: [view.strides[0], view.strides[1], heads] }
    }

    /// Safety: the row is readable, and nobody writes it meanwhile.
    #[inline(always)]
    unsafe fn row<'a>(&self, at: [usize; 3], d: usize) -> &'a [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start(at), d) }
    }

    /// Safety: the row is writable, and nobody else uses it.
    #[inline(always)]
    unsafe fn row_mut<'a>(&self, at: [usize; 3], d: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start(at), d) }
    }

    fn start(&self, at: [usize; 3]) -> *mut T {
        self.ptr.wrapping_add(at.iter().zip(self.strides).map(|(i, stride)| i * stride).sum())
    }
}

/// Tokens of one sample that are one task.
#[derive(Clone, Copy)]
struct Piece {
    index: usize,
    sample: usize,
    first: usize,
    tokens: usize,
}

/// The tokens `[B, L]` in pieces of about [`ROWS`] rows.
#[derive(Clone, Copy)]
struct Pieces {
    samples: usize,
    tokens: usize,
    /// Tokens of a piece.
    size: usize,
}

impl Pieces {
    fn new(samples: usize, tokens: usize, rows_per_token: usize) -> Self {
        let pieces = tokens.div_ceil((ROWS / rows_per_token).max(1)).max(1);
        Self { samples, tokens, size: tokens.div_ceil(pieces).max(1) }
    }

    /// Pieces of one sample.
    fn each(&self) -> usize {
        self.tokens.div_ceil(self.size)
    }

    fn len(&self) -> usize {
        self.samples * self.each()
    }

    /// Runs `work` on all of them.
    fn spread(&self, work: impl Fn(Piece) + Sync + Send) {
        team::spread(self.len(), |index| {
            let first = index % self.each() * self.size;
            work(Piece { index, sample: index / self.each(), first, tokens: self.size.min(self.tokens - first) });
        });
    }
}

/// An f32 vector for each token: in place, or widened.
struct Vectors {
    ptr: *const f32,
    /// From token to token: 0 where they share one.
    step: usize,
    #[expect(dead_code)] // keeps the memory
    own: Option<Scratch>,
}

impl Vectors {
    /// Of a piece, from `[B, 1, d]` or `[B, L, d]`.
    ///
    /// Safety: the view is readable.
    unsafe fn new(isa: Isa, view: &View<'_>, piece: Piece) -> Self {
        let shared = view.dims[1] == 1;
        let row = if shared { 0 } else { view.strides[1] };
        let matrix = Matrix { ptr: view.ptr, dtype: view.dtype, rows: row, cols: 1 };
        let matrix = matrix.moved(piece.sample * view.strides[0]).at(piece.first, 0);
        if view.dtype == DType::F32 {
            return Self { ptr: matrix.ptr.cast(), step: row, own: None };
        }
        let d = view.dims[2];
        // SAFETY: the caller's promise.
        let own = unsafe { widened(isa, matrix, if shared { 1 } else { piece.tokens }, d) };
        Self { ptr: own.ptr(), step: if shared { 0 } else { d }, own: Some(own) }
    }

    /// Safety: the vector is readable.
    #[inline(always)]
    unsafe fn row<'a>(&self, token: usize, d: usize) -> &'a [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.ptr.add(token * self.step), d) }
    }
}

/// `N` rows of `d` numbers of a scratch.
#[expect(clippy::mut_from_ref)] // a scratch lends its memory out by pointer
fn buffers<const N: usize>(scratch: &Scratch, d: usize) -> [&mut [f32]; N] {
    // SAFETY: the scratch holds them, initialised, and they do not overlap.
    std::array::from_fn(|i| unsafe { std::slice::from_raw_parts_mut(scratch.ptr().add(i * d), d) })
}

#[inline(always)]
fn widen<T: Narrow>(from: &[T], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, x)| *to = x.widen());
}

/// `sums += a b`
#[inline(always)]
fn add_products<const FMA: bool>(a: &[f32], b: &[f32], sums: &mut [f32]) {
    sums.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum = Real::mul_add::<FMA>(*a, *b, *sum));
}

struct ModulatedForward<'a, T> {
    x: Rows<T>,
    y: Rows<T>,
    shift: Vectors,
    scale: Vectors,
    /// Of the piece's first token.
    mean: *mut f32,
    deviation: *mut f32,
    piece: Piece,
    eps: f32,
    buffer: &'a mut [f32],
}

impl<T: Narrow> Work for ModulatedForward<'_, T> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let buffer = self.buffer;
        let d = buffer.len();
        let n = d as f32;
        for token in 0..self.piece.tokens {
            let at = [self.piece.sample, self.piece.first + token, 0];
            // SAFETY: made for these tokens.
            let (x, y) = unsafe { (self.x.row(at, d), self.y.row_mut(at, d)) };
            // SAFETY: as above.
            let (shift, scale) = unsafe { (self.shift.row(token, d), self.scale.row(token, d)) };
            widen(x, buffer);
            let mean = sum([&*buffer], |[x]| x) / n;
            let variance = sum([&*buffer], |[x]| (x - mean) * (x - mean)) / n;
            let deviation = 1.0 / (variance + self.eps).sqrt();
            for ((y, x), (shift, scale)) in y.iter_mut().zip(&*buffer).zip(shift.iter().zip(scale)) {
                let normed = T::round((x - mean) * deviation).widen();
                *y = T::round(Real::mul_add::<FMA>(normed, 1.0 + scale, *shift));
            }
            // SAFETY: as above.
            unsafe {
                self.mean.add(token).write(mean);
                self.deviation.add(token).write(deviation);
            }
        }
    }
}

struct ModulatedBackward<'a, T> {
    x: Rows<T>,
    grad: Rows<T>,
    dx: Rows<T>,
    scale: Vectors,
    mean: *const f32,
    deviation: *const f32,
    piece: Piece,
    /// Sums of the gradients of shift and scale: `step` apart from token to token.
    sums: [*mut f32; 2],
    step: usize,
    buffers: [&'a mut [f32]; 2],
}

impl<T: Narrow> Work for ModulatedBackward<'_, T> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let [normed, weighted] = self.buffers;
        let d = normed.len();
        let n = d as f32;
        for token in 0..self.piece.tokens {
            let at = [self.piece.sample, self.piece.first + token, 0];
            // SAFETY: made for these tokens.
            let (x, grad, dx) = unsafe { (self.x.row(at, d), self.grad.row(at, d), self.dx.row_mut(at, d)) };
            // SAFETY: as above; the two sums do not overlap.
            let (scale, mean, s, [d_shift, d_scale]) = unsafe {
                let sums = self.sums.map(|p| std::slice::from_raw_parts_mut(p.add(token * self.step), d));
                (self.scale.row(token, d), self.mean.add(token).read(), self.deviation.add(token).read(), sums)
            };
            normed.iter_mut().zip(x).for_each(|(normed, x)| *normed = (x.widen() - mean) * s);
            widen(grad, weighted);
            d_shift.iter_mut().zip(&*weighted).for_each(|(sum, g)| *sum += g);
            let rounded = normed.iter().map(|x| T::round(*x).widen());
            d_scale.iter_mut().zip(&*weighted).zip(rounded).for_each(|((sum, g), x)| *sum += g * x);
            weighted.iter_mut().zip(scale).for_each(|(g, scale)| *g = T::round(*g * (1.0 + scale)).widen());
            let a = sum([&*weighted], |[g]| g) / n;
            let b = sum([&*weighted, &*normed], |[g, x]| g * x) / n;
            for ((dx, g), x) in dx.iter_mut().zip(&*weighted).zip(&*normed) {
                *dx = T::round(s * Real::mul_add::<FMA>(*x, -b, g - a));
            }
        }
    }
}

/// `layer_norm(x) (1 + scale) + shift`, and the statistics of each row.
///
/// # Safety
/// The views are what `fuses` accepts for `Fused::ModulatedNormForward`; nobody else uses the outputs.
pub(super) unsafe fn modulated_forward(
    [x, shift, scale]: [&View<'_>; 3],
    eps: f64,
    [y, mean, deviation]: [&View<'_>; 3],
) {
    let (isa, d) = (isa(), x.dims[2]);
    Pieces::new(x.dims[0], x.dims[1], 1).spread(|piece| {
        let own = Scratch::take(d);
        let [buffer] = buffers(&own, d);
        let row = piece.sample * x.dims[1] + piece.first;
        let [mean, deviation] = [mean, deviation].map(|v| v.ptr.cast::<f32>().wrapping_add(row));
        // SAFETY: the caller's promise.
        let (shift, scale) = unsafe { (Vectors::new(isa, shift, piece), Vectors::new(isa, scale, piece)) };
        with_narrow!(x.dtype, T => {
            let (x, y) = (Rows::<T>::of(x), Rows::<T>::of(y));
            dispatch(isa, ModulatedForward { x, y, shift, scale, mean, deviation, piece, eps: eps as f32, buffer });
        });
    });
}

/// The gradients of x, shift and scale.
///
/// # Safety
/// As for [`modulated_forward`].
pub(super) unsafe fn modulated_backward(
    [x, grad, mean, deviation, scale]: [&View<'_>; 5],
    [dx, d_shift, d_scale]: [&View<'_>; 3],
) {
    let (isa, d) = (isa(), x.dims[2]);
    let pieces = Pieces::new(x.dims[0], x.dims[1], 1);
    let shared = scale.dims[1] == 1;
    // Two sums for each piece, or for each token.
    let all = Scratch::take(if shared { 2 * d * pieces.len() } else { 0 });
    let to = Shared(all.ptr());
    pieces.spread(|piece| {
        let sums_of = if shared { 1 } else { piece.tokens };
        let own = Scratch::take(2 * d * (1 + if shared { 0 } else { sums_of }));
        let [a, b] = buffers(&own, d);
        let base = if shared { to.at(2 * d * piece.index) } else { own.ptr().wrapping_add(2 * d) };
        let sums = [base, base.wrapping_add(d * sums_of)];
        let row = piece.sample * x.dims[1] + piece.first;
        let [mean, deviation] = [mean, deviation].map(|v| v.ptr.cast::<f32>().cast_const().wrapping_add(row));
        // SAFETY: the caller's promise; the sums are this piece's own.
        unsafe {
            std::slice::from_raw_parts_mut(base, 2 * d * sums_of).fill(0.0);
            let (scale, step) = (Vectors::new(isa, scale, piece), if shared { 0 } else { d });
            with_narrow!(x.dtype, T => {
                let [x, grad, dx] = [x, grad, dx].map(Rows::<T>::of);
                let buffers = [a, b];
                dispatch(isa, ModulatedBackward { x, grad, dx, scale, mean, deviation, piece, sums, step, buffers });
            });
            if !shared {
                for (sum, view) in sums.into_iter().zip([d_shift, d_scale]) {
                    let to = Matrix::of(view).moved(piece.sample * view.strides[0]).at(piece.first, 0);
                    rounded(Matrix::dense(sum, d), to, piece.tokens, d);
                }
            }
        }
    });
    if shared {
        for sample in 0..pieces.samples {
            let total = add_up(to.at(2 * d * pieces.each() * sample), pieces.each(), 2 * d);
            for (k, view) in [d_shift, d_scale].into_iter().enumerate() {
                let to = Matrix::of(view).moved(sample * view.strides[0]);
                // SAFETY: the caller's promise.
                unsafe { rounded(Matrix::dense(total.cast_mut().wrapping_add(k * d), d), to, 1, d) };
            }
        }
    }
}

/// An address that the pieces share, each writing its own part.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: an address; the pieces' parts do not overlap.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn at(&self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// Adds `count` runs of `len` numbers into the first, in order.
fn add_up(first: *mut f32, count: usize, len: usize) -> *const f32 {
    // SAFETY: the runs lie one behind the other, written, and nobody else uses them any more.
    let all = unsafe { std::slice::from_raw_parts_mut(first, count * len) };
    let (total, rest) = all.split_at_mut(len.min(count * len));
    for run in rest.chunks_exact(len.max(1)) {
        total.iter_mut().zip(run).for_each(|(total, x)| *total += x);
    }
    first
}

/// Factors of the partners of a token's elements, so that `x cos + partner(x) turn` rotates, or rotates back.
#[inline(always)]
fn turn(layout: RopeLayout, back: bool, sin: &[f32], out: &mut [f32]) {
    let half = sin.len() / 2;
    match layout {
        RopeLayout::Interleaved => {
            let pairs = out.as_chunks_mut::<2>().0.iter_mut().zip(sin.as_chunks::<2>().0);
            pairs.for_each(|(out, [s0, s1])| *out = if back { [*s1, -s0] } else { [-s0, *s1] });
        }
        RopeLayout::Split => {
            let ((first, second), (s0, s1)) = (out.split_at_mut(half), sin.split_at(half));
            let (minus, plus) = if back { (second, first) } else { (first, second) };
            minus.iter_mut().zip(s0).for_each(|(out, s)| *out = -s);
            plus.copy_from_slice(s1);
        }
    }
}

/// The partners of rows of `d` numbers.
#[inline(always)]
fn partners_of(layout: RopeLayout, d: usize, x: &[f32], partners: &mut [f32]) {
    match layout {
        RopeLayout::Interleaved => {
            // A pair is eight bytes, and its halves change places.
            let (from, to) = (x.as_ptr().cast::<u64>(), partners.as_mut_ptr().cast::<u64>());
            for pair in 0..x.len().min(partners.len()) / 2 {
                // SAFETY: both hold as many pairs.
                unsafe { to.add(pair).write_unaligned(from.add(pair).read_unaligned().rotate_left(32)) };
            }
        }
        RopeLayout::Split => {
            for (x, partners) in x.chunks_exact(d).zip(partners.chunks_exact_mut(d)) {
                let (first, second) = partners.split_at_mut(d / 2);
                first.copy_from_slice(&x[d / 2..]);
                second.copy_from_slice(&x[..d / 2]);
            }
        }
    }
}

/// `x cos + partner turn`, as `T` rounds it.
#[inline(always)]
fn rotated<'a, T: Narrow>([x, partners, cos, turn]: [&'a [f32]; 4]) -> impl Iterator<Item = T> + 'a {
    let angles = cos.iter().zip(turn);
    x.iter().zip(partners).zip(angles).map(|((x, partner), (c, t))| T::round(x * c + partner * t))
}

/// What both directions of RMSNorm with rotation have.
struct NormRope<'a> {
    weight: &'a [f32],
    cos: Rows<f32>,
    sin: Rows<f32>,
    /// Reciprocal root mean squares, from the piece's first row on.
    deviation: *mut f32,
    piece: Piece,
    heads: usize,
    layout: RopeLayout,
}

impl NormRope<'_> {
    /// The cosines of a token, and the factors of its elements' partners.
    ///
    /// Safety: made for these tokens.
    #[inline(always)]
    unsafe fn angles(&self, token: usize, back: bool, turns: &mut [f32]) -> &[f32] {
        let (at, d) = ([self.piece.first + token, 0, 0], self.weight.len());
        // SAFETY: the caller's promise.
        unsafe {
            turn(self.layout, back, self.sin.row(at, d), turns);
            self.cos.row(at, d)
        }
    }
}

struct NormRopeForward<'a, T> {
    shared: NormRope<'a>,
    x: Rows<T>,
    y: Rows<T>,
    eps: f32,
    /// Room for the heads of a token.
    rows: [&'a mut [f32]; 2],
    turns: &'a mut [f32],
}

impl<T: Narrow> Work for NormRopeForward<'_, T> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (shared, [normed, partners], turns) = (self.shared, self.rows, self.turns);
        let (d, heads, piece) = (turns.len(), shared.heads, shared.piece);
        for token in 0..piece.tokens {
            // SAFETY: made for these tokens.
            let cos = unsafe { shared.angles(token, false, turns) };
            let at = |head: usize| [piece.sample, piece.first + token, head];
            // SAFETY: as above.
            let deviations = unsafe { std::slice::from_raw_parts_mut(shared.deviation.add(token * heads), heads) };
            // Head by head in each step: what one waits for is no other's business.
            for (head, (row, s)) in normed.chunks_exact_mut(d).zip(&mut *deviations).enumerate() {
                // SAFETY: as above.
                widen(unsafe { self.x.row(at(head), d) }, row);
                *s = sum([&*row], |[x]| x * x) / d as f32;
            }
            deviations.iter_mut().for_each(|s| *s = 1.0 / (*s + self.eps).sqrt());
            for (row, s) in normed.chunks_exact_mut(d).zip(&*deviations) {
                row.iter_mut().zip(shared.weight).for_each(|(x, w)| *x = T::round(*x * s * w).widen());
            }
            partners_of(shared.layout, d, normed, partners);
            for (head, (row, partners)) in normed.chunks_exact(d).zip(partners.chunks_exact(d)).enumerate() {
                // SAFETY: as above.
                let y = unsafe { self.y.row_mut(at(head), d) };
                y.iter_mut().zip(rotated::<T>([row, partners, cos, turns])).for_each(|(y, x)| *y = x);
            }
        }
    }
}

struct NormRopeBackward<'a, T> {
    shared: NormRope<'a>,
    x: Rows<T>,
    grad: Rows<T>,
    dx: Rows<T>,
    /// The piece's sum of the weight's gradients.
    dw: &'a mut [f32],
    buffers: [&'a mut [f32]; 4],
}

impl<T: Narrow> Work for NormRopeBackward<'_, T> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (shared, [normed, row, weighted, turns]) = (self.shared, self.buffers);
        let (d, heads, piece) = (normed.len(), shared.heads, shared.piece);
        for token in 0..piece.tokens {
            // SAFETY: made for these tokens.
            let cos = unsafe { shared.angles(token, true, turns) };
            for head in 0..heads {
                let at = [piece.sample, piece.first + token, head];
                // SAFETY: as above.
                let (x, grad, dx) = unsafe { (self.x.row(at, d), self.grad.row(at, d), self.dx.row_mut(at, d)) };
                // SAFETY: as above.
                let s = unsafe { shared.deviation.add(token * heads + head).read() };
                widen(grad, row);
                partners_of(shared.layout, d, row, normed);
                let back = rotated::<T>([row, normed, cos, turns]);
                weighted.iter_mut().zip(back).for_each(|(g, x)| *g = x.widen());
                normed.iter_mut().zip(x).for_each(|(normed, x)| *normed = x.widen() * s);
                add_products::<FMA>(weighted, normed, self.dw);
                weighted.iter_mut().zip(shared.weight).for_each(|(g, w)| *g *= w);
                let b = sum([&*weighted, &*normed], |[g, x]| g * x) / d as f32;
                for ((dx, g), x) in dx.iter_mut().zip(&*weighted).zip(&*normed) {
                    *dx = T::round(s * Real::mul_add::<FMA>(*x, -b, *g));
                }
            }
        }
    }
}

impl<'a> NormRope<'a> {
    /// Of one piece of x `[B, L, H, d]`.
    fn new(
        weight: &'a [f32],
        [cos, sin, deviation]: [&View<'_>; 3],
        piece: Piece,
        [tokens, heads]: [usize; 2],
        layout: RopeLayout,
    ) -> Self {
        let row = (piece.sample * tokens + piece.first) * heads;
        let deviation = deviation.ptr.cast::<f32>().wrapping_add(row);
        Self { weight, cos: Rows::of(cos), sin: Rows::of(sin), deviation, piece, heads, layout }
    }
}

/// A weight `[d]` as f32.
///
/// Safety: the view is readable.
unsafe fn widened_weight(isa: Isa, view: &View<'_>) -> Scratch {
    let row = Matrix { ptr: view.ptr, dtype: view.dtype, rows: 0, cols: view.strides[0] };
    // SAFETY: the caller's promise.
    unsafe { widened(isa, row, 1, view.dims[0]) }
}

/// `rope(rms_norm(x) weight)`, and the reciprocal root mean square of each row.
///
/// # Safety
/// The views are what `fuses` accepts for `Fused::NormRopeForward`; nobody else uses the outputs.
pub(super) unsafe fn norm_rope_forward(
    [x, weight, cos, sin]: [&View<'_>; 4],
    eps: f64,
    layout: RopeLayout,
    [y, deviation]: [&View<'_>; 2],
) {
    let (isa, [samples, tokens, heads, d]) = (isa(), [0, 1, 2, 3].map(|axis| x.dims[axis]));
    // SAFETY: the caller's promise.
    let own_weight = unsafe { widened_weight(isa, weight) };
    let [weight] = buffers(&own_weight, d).map(|w| &*w);
    Pieces::new(samples, tokens, heads).spread(|piece| {
        let (own, turns) = (Scratch::take(2 * heads * d), Scratch::take(d));
        let (rows, [turns]) = (buffers(&own, heads * d), buffers(&turns, d));
        let shared = NormRope::new(weight, [cos, sin, deviation], piece, [tokens, heads], layout);
        with_narrow!(x.dtype, T => {
            let (x, y) = (Rows::<T>::of(x), Rows::<T>::of(y));
            dispatch(isa, NormRopeForward { shared, x, y, eps: eps as f32, rows, turns });
        });
    });
}

/// The gradients of x and the weight.
///
/// # Safety
/// As for [`norm_rope_forward`].
pub(super) unsafe fn norm_rope_backward(
    [x, grad, deviation, weight, cos, sin]: [&View<'_>; 6],
    layout: RopeLayout,
    [dx, dw]: [&View<'_>; 2],
) {
    let (isa, [samples, tokens, heads, d]) = (isa(), [0, 1, 2, 3].map(|axis| x.dims[axis]));
    // SAFETY: the caller's promise.
    let own_weight = unsafe { widened_weight(isa, weight) };
    let [weight] = buffers(&own_weight, d).map(|w| &*w);
    let pieces = Pieces::new(samples, tokens, heads);
    let sums = Scratch::take(d * pieces.len());
    let to = Shared(sums.ptr());
    pieces.spread(|piece| {
        let own = Scratch::take(4 * d);
        let shared = NormRope::new(weight, [cos, sin, deviation], piece, [tokens, heads], layout);
        // SAFETY: this piece's own part of the sums.
        let dw = unsafe { std::slice::from_raw_parts_mut(to.at(d * piece.index), d) };
        dw.fill(0.0);
        with_narrow!(x.dtype, T => {
            let [x, grad, dx] = [x, grad, dx].map(Rows::<T>::of);
            dispatch(isa, NormRopeBackward { shared, x, grad, dx, dw, buffers: buffers(&own, d) });
        });
    });
    let total = add_up(to.at(0), pieces.len(), d);
    let row = Matrix { ptr: dw.ptr, dtype: dw.dtype, rows: 0, cols: dw.strides[0] };
    // SAFETY: the caller's promise.
    unsafe { rounded(Matrix::dense(total.cast_mut(), d), row, 1, d) };
}
