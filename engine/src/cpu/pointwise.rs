//! Pointwise programs and reductions over strided views.

use super::View;
use super::blocks::{BLOCK, Cut, Space, memory_order};
use super::eval::{Arithmetic, Evaluator, Sink, Window, combine, neutral};
use super::isa::Isa;
use super::team::{self, threads};
use crate::DType;
use crate::expr::{Program, Reduce};

/// Elements below which a thread's start costs more than it saves.
const GRAIN: usize = 4 * 1024;
/// Columns of a block whose rows are summed.
const COLUMNS: usize = 64;

/// Whether a program runs in f64: when any operand holds f64.
fn is_wide(views: &[View<'_>]) -> bool {
    views.iter().any(|v| v.dtype == DType::F64)
}

/// Runs `work` on `0..pieces`, in several threads where there are `elements` enough.
fn spread(pieces: usize, elements: usize, work: impl Fn(std::ops::Range<usize>) + Sync + Send) {
    let tasks = (elements / GRAIN).clamp(1, 2 * threads()).min(pieces);
    if tasks <= 1 || threads() == 1 {
        return work(0..pieces);
    }
    team::spread(tasks, |t| work(t * pieces / tasks..(t + 1) * pieces / tasks));
}

/// `outputs = program(inputs)`.
///
/// # Safety
/// The views have one shape and lie in memory that nobody else writes meanwhile; an output is one of the inputs
/// exactly or overlaps none.
pub(super) unsafe fn pointwise(
    program: &Program,
    inputs: &[View<'_>],
    scalars: &[f64],
    outputs: &[View<'_>],
    isa: Isa,
) {
    let views: Vec<View<'_>> = inputs.iter().chain(outputs).copied().collect();
    // SAFETY: the caller's promise.
    unsafe {
        if is_wide(&views) {
            pointwise_in::<f64>(program, inputs.len(), scalars, &views, isa);
        } else {
            pointwise_in::<f32>(program, inputs.len(), scalars, &views, isa);
        }
    }
}

unsafe fn pointwise_in<A: Arithmetic>(program: &Program, count: usize, scalars: &[f64], views: &[View<'_>], isa: Isa) {
    let Some(target) = views.last() else { return };
    let strides: Vec<&[usize]> = views.iter().map(|v| v.strides).collect();
    let mut outer = Space::new(target.dims, &strides, memory_order(target.strides));
    let elements = outer.len();
    let (width, col_strides) = outer.pop();
    let (height, row_strides) = if width < BLOCK { outer.pop_rows(width) } else { (1, vec![0; views.len()]) };
    let cols = Cut::new(width, BLOCK, 16);
    let rows = Cut::new(height, BLOCK / width.min(BLOCK), 1);
    let pieces = outer.len() * rows.pieces() * cols.pieces();
    spread(pieces, elements, |range| {
        let mut evaluator = Evaluator::<A>::new(program, scalars, isa);
        let mut windows = Vec::with_capacity(views.len());
        let mut offsets = vec![0; views.len()];
        for piece in range {
            let (col, n_cols) = cols.piece(piece % cols.pieces());
            let rest = piece / cols.pieces();
            let (row, n_rows) = rows.piece(rest % rows.pieces());
            offsets.fill(0);
            outer.locate(rest / rows.pieces(), &mut offsets);
            windows.clear();
            windows.extend(views.iter().enumerate().map(|(i, view)| {
                let (down, right) = (row_strides[i], col_strides[i]);
                Window::new(view, offsets[i] + row * down + col * right, down, right)
            }));
            let (inputs, outputs) = windows.split_at(count);
            // SAFETY: the caller's promise; pieces do not overlap.
            unsafe { evaluator.run(inputs, n_rows, n_cols, Sink::Store(outputs)) };
        }
    });
}

/// `outputs = kind of program(inputs)` over the axes where the outputs have size 1.
///
/// Sums are cut by shape alone, so that the bits do not depend on the number of threads.
///
/// # Safety
/// As for [`pointwise`]; outputs overlap no input.
pub(super) unsafe fn reduce(
    program: &Program,
    kind: Reduce,
    inputs: &[View<'_>],
    scalars: &[f64],
    outputs: &[View<'_>],
    isa: Isa,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if is_wide(inputs) || is_wide(outputs) {
            reduce_in::<f64>(program, kind, inputs, scalars, outputs, isa);
        } else {
            reduce_in::<f32>(program, kind, inputs, scalars, outputs, isa);
        }
    }
}

unsafe fn reduce_in<A: Arithmetic>(
    program: &Program,
    kind: Reduce,
    inputs: &[View<'_>],
    scalars: &[f64],
    outputs: &[View<'_>],
    isa: Isa,
) {
    let (Some(first), Some(target)) = (inputs.first(), outputs.first()) else { return };
    let dims = first.dims;
    let reduced = |axis: usize| target.dims[axis] == 1 && dims[axis] != 1;
    // Outputs walk along as operands; their strides matter on kept axes alone.
    let strides: Vec<&[usize]> = inputs.iter().chain(outputs).map(|v| v.strides).collect();
    let order = memory_order(first.strides);
    let mut kept = Space::new(dims, &strides, order.iter().copied().filter(|&a| !reduced(a)));
    let mut summed = Space::new(dims, &strides[..inputs.len()], order.iter().copied().filter(|&a| reduced(a)));
    let elements = kept.len() * summed.len();
    let inner = order.into_iter().rev().find(|&a| dims[a] != 1);
    // The innermost axis is a block's columns, the innermost of the other kind its rows.
    let along_cols = inner.is_none_or(reduced);
    let (width, col_strides) = if along_cols { summed.pop() } else { kept.pop() };
    // Where rows are summed, a block has several of them: they are added before their sum becomes f64.
    let cols = Cut::new(width, if along_cols { BLOCK } else { COLUMNS }, 16);
    let width = cols.piece(0).1;
    let (height, row_strides) = if along_cols { kept.pop_rows(width) } else { summed.pop_rows(width) };
    let rows = Cut::new(height, BLOCK / width, 1);
    let (kept_cut, summed_cut) = if along_cols { (rows, cols) } else { (cols, rows) };
    let n_out = outputs.len();

    // A group is a block's worth of results; its steps walk the reduced positions; a chunk is some of its steps.
    let groups = kept.len() * kept_cut.pieces();
    let steps = summed.len() * summed_cut.pieces();
    let chunk = Cut::new(steps, 32, 1);
    let partial = |group: usize, chunk_index: usize, evaluator: &mut Evaluator<'_, A>| -> Vec<f64> {
        let (at, len) = kept_cut.piece(group % kept_cut.pieces());
        let mut base = vec![0; inputs.len()];
        kept.locate(group / kept_cut.pieces(), &mut base);
        let mut acc = vec![neutral(kind); n_out * len];
        let (start, count) = chunk.piece(chunk_index);
        let mut windows = Vec::with_capacity(inputs.len());
        let mut offsets = base.clone();
        for step in start..start + count {
            let (from, n) = summed_cut.piece(step % summed_cut.pieces());
            offsets.copy_from_slice(&base);
            summed.locate(step / summed_cut.pieces(), &mut offsets);
            let (row, n_rows, col, n_cols) = if along_cols { (at, len, from, n) } else { (from, n, at, len) };
            windows.clear();
            windows.extend(inputs.iter().enumerate().map(|(i, view)| {
                let (down, right) = (row_strides[i], col_strides[i]);
                Window::new(view, offsets[i] + row * down + col * right, down, right)
            }));
            let sink = if along_cols { Sink::Rows(kind, &mut acc) } else { Sink::Cols(kind, &mut acc) };
            // SAFETY: the caller's promise.
            unsafe { evaluator.run(&windows, n_rows, n_cols, sink) };
        }
        acc
    };
    let finish = |group: usize, acc: &[f64]| {
        let (at, len) = kept_cut.piece(group % kept_cut.pieces());
        let mut offsets = vec![0; inputs.len() + n_out];
        kept.locate(group / kept_cut.pieces(), &mut offsets);
        for (k, view) in outputs.iter().enumerate() {
            let operand = inputs.len() + k;
            let step = if along_cols { row_strides[operand] } else { col_strides[operand] };
            for (i, &value) in acc[k * len..(k + 1) * len].iter().enumerate() {
                // SAFETY: the position lies in the output, and groups do not overlap.
                unsafe { write(view, offsets[operand] + (at + i) * step, value) };
            }
        }
    };
    if chunk.pieces() == 1 {
        return spread(groups, elements, |range| {
            let mut evaluator = Evaluator::<A>::new(program, scalars, isa);
            range.for_each(|group| finish(group, &partial(group, 0, &mut evaluator)));
        });
    }
    let work = |index: usize| {
        let mut evaluator = Evaluator::<A>::new(program, scalars, isa);
        partial(index / chunk.pieces(), index % chunk.pieces(), &mut evaluator)
    };
    let partials = team::collect(groups * chunk.pieces(), work);
    for (group, parts) in partials.chunks(chunk.pieces()).enumerate() {
        let mut acc = parts[0].clone();
        for part in &parts[1..] {
            acc.iter_mut().zip(part).for_each(|(a, b)| *a = combine(kind, *a, *b));
        }
        finish(group, &acc);
    }
}

/// Writes one number in a view's dtype.
pub(super) unsafe fn write(view: &View<'_>, offset: usize, value: f64) {
    let to = view.ptr.wrapping_add(offset * view.dtype.size());
    // SAFETY: the caller's promise: the element is writable.
    unsafe {
        match view.dtype {
            DType::F32 => to.cast::<f32>().write(value as f32),
            DType::F64 => to.cast::<f64>().write(value),
            DType::BF16 => to.cast::<half::bf16>().write(half::bf16::from_f32(value as f32)),
            DType::F16 => to.cast::<half::f16>().write(half::f16::from_f32(value as f32)),
            DType::U32 => to.cast::<u32>().write(value as u32),
        }
    }
}
