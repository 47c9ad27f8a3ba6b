//! LayerNorm and RMSNorm in one pass over each row.

use super::View;
use super::blocks::Space;
use super::gemm::scratch::Scratch;
use super::gemm::{Matrix, rounded, widened};
use super::isa::{Isa, Work, dispatch, isa};
use super::lanes::sum;
use super::math::Real;
use super::team::{self, threads};
use crate::DType;

/// Elements of one task.
const GRAIN: usize = 4 * 1024;

/// The rows of views of one shape, found by their number in row-major order.
struct Rows<'a, const N: usize> {
    space: Space,
    views: [View<'a>; N],
    width: usize,
}

impl<'a, const N: usize> Rows<'a, N> {
    /// `None` where the last axis of a view is not dense.
    fn new(views: [View<'a>; N]) -> Option<Self> {
        let last = views[0].dims.len() - 1;
        let width = views[0].dims[last];
        let dense = views.iter().all(|v| v.strides[last] == 1 || width == 1);
        let strides = views.map(|v| v.strides);
        let space = Space::new(views[0].dims, &strides, 0..last);
        dense.then_some(Self { space, views, width })
    }

    /// Runs `work` on all rows, several threads where there is enough of it.
    fn spread(&self, work: impl Fn(std::ops::Range<usize>) + Sync + Send) {
        let rows = self.space.len();
        let tasks = (rows * self.width / GRAIN).clamp(1, 2 * threads()).min(rows.max(1));
        if tasks == 1 || threads() == 1 {
            return work(0..rows);
        }
        team::spread(tasks, |t| work(t * rows / tasks..(t + 1) * rows / tasks));
    }

    /// A row of each view.
    fn at(&self, row: usize) -> [Matrix; N] {
        let mut offsets = [0; N];
        self.space.locate(row, &mut offsets);
        std::array::from_fn(|i| {
            let View { ptr, dtype, .. } = self.views[i];
            Matrix { ptr: ptr.wrapping_add(offsets[i] * dtype.size()), dtype, rows: self.width, cols: 1 }
        })
    }
}

/// A row to read: in place where it is f32.
struct Input(*const f32, #[expect(dead_code)] Option<Scratch>);

impl Input {
    /// Safety: the row is readable, and outlives this.
    unsafe fn new(isa: Isa, row: Matrix, n: usize) -> Self {
        if row.dtype == DType::F32 {
            return Self(row.ptr.cast(), None);
        }
        // SAFETY: the caller's promise.
        let wide = unsafe { widened(isa, row, 1, n) };
        Self(wide.ptr(), Some(wide))
    }

    fn row(&self, n: usize) -> &[f32] {
        // SAFETY: made for n elements.
        unsafe { std::slice::from_raw_parts(self.0, n) }
    }
}

/// Lets `write` fill a row, in place where it is f32.
///
/// Safety: the row is writable, and nobody else uses it.
unsafe fn fill(to: Matrix, n: usize, write: impl FnOnce(&mut [f32])) {
    // SAFETY: the caller's promise; scratch holds n elements.
    unsafe {
        if to.dtype == DType::F32 {
            return write(std::slice::from_raw_parts_mut(to.ptr.cast(), n));
        }
        let wide = Scratch::take(n);
        write(std::slice::from_raw_parts_mut(wide.ptr(), n));
        rounded(Matrix::dense(wide.ptr(), n), to, 1, n);
    }
}

/// Mean and reciprocal deviation of a row, and the row normalised.
struct RowForward<'a> {
    x: &'a [f32],
    affine: [Option<&'a [f32]>; 2],
    centred: bool,
    eps: f32,
    y: &'a mut [f32],
    mean: &'a mut f32,
    scale: &'a mut f32,
}

impl Work for RowForward<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let n = self.x.len() as f32;
        let mean = if self.centred { sum([self.x], |[x]| x) / n } else { 0.0 };
        let variance = sum([self.x], |[x]| (x - mean) * (x - mean)) / n;
        let scale = 1.0 / (variance + self.eps).sqrt();
        for (y, x) in self.y.iter_mut().zip(self.x) {
            *y = (x - mean) * scale;
        }
        if let Some(weight) = self.affine[0] {
            self.y.iter_mut().zip(weight).for_each(|(y, w)| *y *= w);
        }
        if let Some(bias) = self.affine[1] {
            self.y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
        (*self.mean, *self.scale) = (mean, scale);
    }
}

/// The gradient of a row: `s (gw - mean(gw) - x̂ mean(gw x̂))`, for RMSNorm without the middle term.
struct RowBackward<'a> {
    x: &'a [f32],
    grad: &'a [f32],
    weight: Option<&'a [f32]>,
    mean: f32,
    scale: f32,
    centred: bool,
    dx: &'a mut [f32],
}

impl Work for RowBackward<'_> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let n = self.x.len() as f32;
        let (m, s) = (self.mean, self.scale);
        // dx holds gw meanwhile.
        match self.weight {
            Some(w) => self.dx.iter_mut().zip(self.grad).zip(w).for_each(|((d, g), w)| *d = g * w),
            None => self.dx.copy_from_slice(self.grad),
        }
        let a = if self.centred { sum([&*self.dx], |[g]| g) / n } else { 0.0 };
        let b = sum([&*self.dx, self.x], |[g, x]| g * ((x - m) * s)) / n;
        for (d, x) in self.dx.iter_mut().zip(self.x) {
            *d = s * Real::mul_add::<FMA>((x - m) * s, -b, *d - a);
        }
    }
}

/// A weight or bias as f32, if there is one.
///
/// Safety: the view is readable.
unsafe fn vector(isa: Isa, view: Option<&View<'_>>) -> Option<Input> {
    let row = |v: &View<'_>| Matrix { ptr: v.ptr, dtype: v.dtype, rows: 0, cols: v.strides[0] };
    // SAFETY: the caller's promise.
    view.map(|v| unsafe {
        let wide = widened(isa, row(v), 1, v.dims[0]);
        Input(wide.ptr(), Some(wide))
    })
}

/// The f32 statistics of all rows, dense; or nothing.
#[derive(Clone, Copy)]
struct Statistics<'a>(Option<View<'a>>);

impl Statistics<'_> {
    /// Where that of one row lies.
    fn at(&self, row: usize) -> Option<*mut f32> {
        self.0.map(|v| v.ptr.cast::<f32>().wrapping_add(row))
    }
}

/// `y = norm(x) * weight + bias`, with the statistics of each row; `false` where the layout is none of ours.
///
/// # Safety
/// The views have the shapes of `Fused::NormForward` and lie in memory; nobody else uses the outputs.
pub(super) unsafe fn norm_forward(
    x: &View<'_>,
    [weight, bias]: [Option<&View<'_>>; 2],
    eps: f64,
    y: &View<'_>,
    mean: Option<&View<'_>>,
    scale: &View<'_>,
) -> bool {
    let Some(rows) = Rows::new([*x, *y]) else { return false };
    let (isa, n) = (isa(), rows.width);
    // SAFETY: the caller's promise.
    let (weight, bias) = unsafe { (vector(isa, weight), vector(isa, bias)) };
    let weight = weight.as_ref().map(|w| w.row(n));
    let bias = bias.as_ref().map(|b| b.row(n));
    let (mean, scale) = (Statistics(mean.copied()), Statistics(Some(*scale)));
    rows.spread(|range| {
        for row in range {
            let at = rows.at(row);
            let (mut m, mut s) = (0.0, 0.0);
            // SAFETY: the caller's promise; rows do not overlap.
            unsafe {
                let x = Input::new(isa, at[0], n);
                fill(at[1], n, |y| {
                    let (x, affine, centred) = (x.row(n), [weight, bias], mean.0.is_some());
                    let (mean, scale) = (&mut m, &mut s);
                    dispatch(isa, RowForward { x, affine, centred, eps: eps as f32, y, mean, scale });
                });
                if let Some(to) = mean.at(row) {
                    to.write(m);
                }
                if let Some(to) = scale.at(row) {
                    to.write(s);
                }
            }
        }
    });
    true
}

/// The gradient of x; `false` where the layout is none of ours.
///
/// # Safety
/// The views have the shapes of `Fused::NormBackward` and lie in memory; nobody else uses the output.
pub(super) unsafe fn norm_backward(
    x: &View<'_>,
    mean: Option<&View<'_>>,
    scale: &View<'_>,
    weight: Option<&View<'_>>,
    grad: &View<'_>,
    dx: &View<'_>,
) -> bool {
    let Some(rows) = Rows::new([*x, *grad, *dx]) else { return false };
    let (isa, n) = (isa(), rows.width);
    // SAFETY: the caller's promise.
    let weight = unsafe { vector(isa, weight) };
    let weight = weight.as_ref().map(|w| w.row(n));
    let (mean, scale) = (Statistics(mean.copied()), Statistics(Some(*scale)));
    rows.spread(|range| {
        for row in range {
            let at = rows.at(row);
            // SAFETY: the caller's promise; rows do not overlap.
            unsafe {
                let (x, grad) = (Input::new(isa, at[0], n), Input::new(isa, at[1], n));
                let read = |p: Option<*mut f32>| p.map_or(0.0, |p| p.read());
                let (m, s) = (read(mean.at(row)), read(scale.at(row)));
                fill(at[2], n, |dx| {
                    let (x, grad, centred) = (x.row(n), grad.row(n), mean.0.is_some());
                    dispatch(isa, RowBackward { x, grad, weight, mean: m, scale: s, centred, dx });
                });
            }
        }
    });
    true
}
