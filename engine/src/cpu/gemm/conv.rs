//! Convolution as an implicit product. A task makes some rows of the result: it copies the part of x that they see to a
//! panel, padding included, with its channels innermost. There the taps of a kernel's row and the channels are one run of
//! memory for each place of the result, so the kernels of matrix products read them as rows that overlap.
//!
//! Every element is one chain of multiply-adds for each cut of the channels and row of the kernel, in an order that depends
//! on the sizes alone.

use std::marker::PhantomData;
use std::ops::Range;

use super::kernel::{Tile, kernels};
use super::pack::Narrow;
use super::scratch::Scratch;
use super::winograd;
use super::{KC, Kernels, Matrix, View, store, widened, with_narrow};
use crate::DType;
use crate::cpu::isa::{Isa, Work, dispatch};
use crate::cpu::team::{spread, threads};
use crate::ops::ConvAxis;

/// Places of a row of the result that a task makes, at most: a multiple of every kernel's height.
const PLACES: usize = 96;
/// Places of the result that a task makes in all: enough to read the weights seldom, and few enough for the caches.
const TASK: usize = 256;
/// Channels and results from which transforms pay.
const ENOUGH: usize = 16;
/// Channels of a cut, where they are transformed: their sums are seldom read again.
const DEEP: usize = 512;

/// One axis of space.
pub(super) struct Axis {
    /// Places of the result.
    out: usize,
    pub kernel: usize,
    stride: usize,
    dilation: usize,
    /// Where each place of the padded axis comes from.
    sources: Vec<Option<usize>>,
    /// Steps in x, in the weight and in the result.
    pub steps: [usize; 3],
}

impl Axis {
    /// An axis that is not there.
    fn none() -> Self {
        Self { out: 1, kernel: 1, stride: 1, dilation: 1, sources: vec![Some(0)], steps: [0; 3] }
    }

    /// Places of the padded axis that some places of the result see.
    fn reach(&self, places: usize) -> usize {
        (places - 1) * self.stride + (self.kernel - 1) * self.dilation + 1
    }

    /// Where the value comes from that tap `tap` of place `at` meets.
    fn source(&self, at: usize, tap: usize) -> Option<usize> {
        self.at(at * self.stride + tap * self.dilation)
    }

    /// Where a place of the padded axis comes from; past its end there are zeros.
    fn at(&self, place: usize) -> Option<usize> {
        self.sources.get(place).copied().flatten()
    }
}

/// A convolution, laid out for the kernels.
pub(super) struct Conv<'a> {
    pub isa: Isa,
    pub set: &'static Kernels,
    x: View<'a>,
    pub weight: View<'a>,
    pub bias: Option<Scratch>,
    pub y: View<'a>,
    /// Frames, rows, places.
    pub axes: [Axis; 3],
    groups: usize,
    /// Channels and results of a group.
    pub channels: usize,
    pub outputs: usize,
    /// Elements of a word of k: 1, or 2 where words are pairs.
    per: usize,
    /// Channels of a cut, a multiple of `per`.
    pub cut: usize,
    /// Taps of a row of the kernel that are one run of k.
    run: usize,
    /// Whether rows and places go by transforms ([`winograd`]).
    transformed: bool,
    /// Floats of the packed weights of a row of the kernel in a whole cut, or of a number of its transform.
    block: usize,
}

/// `y = x * weight + bias`.
///
/// # Safety
/// The views have the shapes of [`crate::ops::ConvForward`], lie in memory, no dtype is f64, and nobody else writes them
/// meanwhile; y overlaps no input, and no two of its elements are one.
pub(in crate::cpu) unsafe fn convolution(
    isa: Isa,
    [x, weight, y]: [&View<'_>; 3],
    bias: Option<&View<'_>>,
    axes: &[ConvAxis],
    groups: usize,
) {
    let mut walks = [Axis::none(), Axis::none(), Axis::none()];
    for (i, axis) in axes.iter().enumerate() {
        let (at, size) = (2 + i, x.dims[2 + i]);
        walks[3 - axes.len() + i] = Axis {
            out: y.dims[at],
            kernel: weight.dims[at],
            stride: axis.stride,
            dilation: axis.dilation,
            sources: (0..axis.before + size + axis.after).map(|place| axis.source(size, place)).collect(),
            steps: [x.strides[at], weight.strides[at], y.strides[at]],
        };
    }
    let set = kernels(isa, x.dtype == DType::BF16);
    let per = if set.pairs { 2 } else { 1 };
    let (channels, outputs) = (x.dims[1] / groups, y.dims[1] / groups);
    let [_, rows, columns] = &walks;
    let transformed = !set.pairs
        && [rows, columns].iter().all(|axis| (axis.kernel, axis.stride, axis.dilation) == (3, 1, 1))
        && channels.min(outputs) >= ENOUGH
        && rows.out * columns.out >= TASK;
    let run = if columns.dilation == 1 { columns.kernel } else { 1 };
    let most = if transformed { DEEP } else { (KC * per / run).max(16) };
    let pieces = channels.div_ceil(most).max(1);
    let cut = channels.div_ceil(pieces).next_multiple_of(per).max(per);
    let block = outputs.next_multiple_of(set.nr) * if transformed { 1 } else { columns.kernel } * cut / per;
    // SAFETY: as many elements of the bias as results exist.
    let bias = bias.map(|bias| unsafe {
        widened(isa, Matrix { ptr: bias.ptr, dtype: bias.dtype, rows: 0, cols: bias.strides[0] }, 1, y.dims[1])
    });
    let conv = Conv {
        isa,
        set,
        x: *x,
        weight: *weight,
        bias,
        y: *y,
        axes: walks,
        groups,
        channels,
        outputs,
        per,
        cut,
        run,
        transformed,
        block,
    };
    // SAFETY: the caller's promise.
    unsafe { conv.run() };
}

// SAFETY: scratch and views are addresses; tasks write parts of the result that do not overlap.
unsafe impl Sync for Conv<'_> {}

/// Some results: of a sample and a group, a frame, some rows and places of it, and some columns.
pub(super) struct Part {
    sample: usize,
    pub group: usize,
    frame: usize,
    pub rows: Range<usize>,
    pub places: Range<usize>,
    pub columns: Range<usize>,
}

impl Conv<'_> {
    fn cuts(&self) -> usize {
        self.channels.div_ceil(self.cut).max(1)
    }

    /// All cuts by number, with their channels.
    pub fn each_cut(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        (0..self.cuts()).map(|cut| (cut, cut * self.cut..self.channels.min((cut + 1) * self.cut)))
    }

    /// Packed weights of a group: by cut, frame of the kernel and row of the kernel, or number of its transform.
    pub fn packed_at(&self, group: usize, cut: usize, frame: usize, row: usize) -> usize {
        let [frames, rows, _] = &self.axes;
        let lines = if self.transformed { winograd::NUMBERS } else { rows.kernel };
        (((group * self.cuts() + cut) * frames.kernel + frame) * lines + row) * self.block
    }

    /// The frames of the kernel that meet anything but zeros, or one where none does.
    pub fn seen(&self, part: &Part) -> Vec<usize> {
        let frames = &self.axes[0];
        let mut seen: Vec<usize> = (0..frames.kernel).filter(|tap| frames.source(part.frame, *tap).is_some()).collect();
        if seen.is_empty() {
            seen.push(0);
        }
        seen
    }

    /// Safety: as for [`convolution`].
    unsafe fn run(&self) {
        let [frames, rows, columns] = &self.axes;
        let (batch, mr, nr) = (self.x.dims[0], self.set.mr, self.set.nr);
        let packed = Scratch::take(self.packed_at(self.groups, 0, 0, 0));
        let weights = packed.ptr() as usize;
        let panels = self.outputs.div_ceil(nr);
        spread(self.groups * panels, |task| {
            // SAFETY: the caller's promise; each task writes panels of its own.
            with_narrow!(self.weight.dtype, T => unsafe {
                let pack = if self.transformed { Self::pack_transforms::<T> } else { Self::pack_weights::<T> };
                pack(self, task / panels, task % panels, weights as *mut f32);
            });
        });
        // The unit of places, and of rows.
        let (widest, most, unit, side) = if self.transformed {
            (PLACES / 2, 4 * winograd::TILES, winograd::SIDE, winograd::SIDE)
        } else {
            (PLACES, TASK, mr, 1)
        };
        let wide = columns.out.div_ceil(columns.out.div_ceil(widest)).next_multiple_of(unit).min(columns.out);
        let high = (most / wide / side * side).clamp(1, rows.out);
        let high = rows.out.div_ceil(rows.out.div_ceil(high)).next_multiple_of(side);
        let (down, right) = (rows.out.div_ceil(high), columns.out.div_ceil(wide));
        let whole = batch * self.groups * frames.out * down * right;
        // Few tasks are cut by columns too.
        let parts = (4 * threads()).div_ceil(whole).clamp(1, panels);
        let some = panels.div_ceil(parts) * nr;
        let parts = self.outputs.div_ceil(some);
        let work = |task: usize| {
            let (part, task) = (task % parts, task / parts);
            let (place, task) = (task % right, task / right);
            let (row, task) = (task % down, task / down);
            let (frame, task) = (task % frames.out, task / frames.out);
            let part = Part {
                sample: task / self.groups,
                group: task % self.groups,
                frame,
                rows: row * high..rows.out.min((row + 1) * high),
                places: place * wide..columns.out.min((place + 1) * wide),
                columns: part * some..self.outputs.min((part + 1) * some),
            };
            // SAFETY: the caller's promise; tasks write parts of the result that do not overlap.
            unsafe {
                if self.transformed {
                    self.transformed_part(&part, weights as *const f32);
                } else {
                    self.part(&part, weights as *const f32);
                }
            }
        };
        spread(whole * parts, work);
    }

    /// A weight of a group's result and channel at a place of the kernel; 0 where there is no such result or channel.
    ///
    /// Safety: the weight is readable, and holds `T`.
    #[inline(always)]
    pub unsafe fn weight_at<T: Narrow>(&self, group: usize, output: usize, channel: usize, tap: [usize; 3]) -> f32 {
        if output >= self.outputs || channel >= self.channels {
            return 0.0;
        }
        let [of_output, of_channel] = [self.weight.strides[0], self.weight.strides[1]];
        let at = (group * self.outputs + output) * of_output + channel * of_channel;
        let taps: usize = tap.iter().zip(&self.axes).map(|(at, axis)| at * axis.steps[1]).sum();
        // SAFETY: the caller's promise; this weight exists.
        unsafe { (*self.weight.ptr.cast::<T>().wrapping_add(at + taps)).widen() }
    }

    /// Packs a panel of a group's weights, `nr` results wide, for all cuts: k in the order of the panels of x.
    ///
    /// Safety: the weight is readable, and `out` has room for all packed weights.
    unsafe fn pack_weights<T: Narrow>(&self, group: usize, panel: usize, out: *mut f32) {
        let (nr, [frames, rows, columns]) = (self.set.nr, &self.axes);
        for (cut, channels) in self.each_cut() {
            let padded = channels.len().next_multiple_of(self.per);
            let words = columns.kernel * padded / self.per;
            for channel in 0..padded {
                for (frame, row) in (0..frames.kernel).flat_map(|f| (0..rows.kernel).map(move |r| (f, r))) {
                    let to = out.wrapping_add(self.packed_at(group, cut, frame, row) + panel * nr * words);
                    for (tap, lane) in (0..columns.kernel).flat_map(|tap| (0..nr).map(move |lane| (tap, lane))) {
                        let k = tap * padded + channel;
                        // SAFETY: the caller's promise.
                        unsafe {
                            let at = channels.start + channel;
                            let value = self.weight_at::<T>(group, panel * nr + lane, at, [frame, row, tap]);
                            if self.per == 1 {
                                *to.add(k * nr + lane) = value;
                            } else {
                                let pair = to.add(k / 2 * nr + lane).cast::<half::bf16>();
                                *pair.add(k % 2) = half::bf16::round(value);
                            }
                        }
                    }
                }
            }
        }
    }

    /// Safety: as for [`convolution`]; nobody else writes the part.
    unsafe fn part(&self, part: &Part, weights: *const f32) {
        let (mr, nr, [_, rows, columns]) = (self.set.mr, self.set.nr, &self.axes);
        let (high, wide, results) = (part.rows.len(), part.places.len(), part.columns.len());
        let (panel_rows, panel_wide) = (rows.reach(high), columns.reach(wide));
        let seen = self.seen(part);
        let panel = Scratch::take(seen.len() * panel_rows * panel_wide * self.cut / self.per);
        let target = self.target(part);
        let direct = self.y.dtype == DType::F32 && self.y.strides[1] == 1;
        let width = results.next_multiple_of(nr);
        let sums = (!direct).then(|| Scratch::take(high * wide * width));
        let mut first_piece = true;
        for (cut, channels) in self.each_cut() {
            let words = channels.len().div_ceil(self.per);
            for (i, tap) in seen.iter().enumerate() {
                let to = panel.ptr().wrapping_add(i * panel_rows * panel_wide * words);
                self.gather(part, *tap, channels.clone(), [panel_rows, panel_wide], to);
            }
            let runs = columns.kernel / self.run;
            for (i, tap, row) in
                seen.iter().enumerate().flat_map(|(i, tap)| (0..rows.kernel).map(move |r| (i, *tap, r)))
            {
                for run in 0..runs {
                    let k = self.run * words;
                    let row_words = columns.kernel * words;
                    let packed = weights.wrapping_add(self.packed_at(part.group, cut, tap, row) + run * k * nr);
                    for column in part.columns.clone().step_by(nr) {
                        let b = packed.wrapping_add(column / nr * nr * row_words);
                        for (y, place) in (0..high).flat_map(|y| (0..wide).step_by(mr).map(move |place| (y, place))) {
                            let height = mr.min(wide - place);
                            let at = (i * panel_rows + y * rows.stride + row * rows.dilation) * panel_wide
                                + place * columns.stride
                                + run * columns.dilation;
                            let (c, c_stride) = match &sums {
                                None => {
                                    let at = target.moved(
                                        y * rows.steps[2] + place * columns.steps[2] + column - part.columns.start,
                                    );
                                    (at.ptr.cast::<f32>(), columns.steps[2])
                                }
                                Some(sums) => {
                                    let at = (y * wide + place) * width + column - part.columns.start;
                                    (sums.ptr().wrapping_add(at), width)
                                }
                            };
                            let bias = match &self.bias {
                                Some(bias) if first_piece => {
                                    bias.ptr().wrapping_add(part.group * self.outputs + column)
                                }
                                _ => std::ptr::null_mut(),
                            };
                            // SAFETY: the panel holds all rows that the places see, the packed weights whole panels.
                            unsafe {
                                self.set.row[height - 1](&Tile {
                                    k,
                                    a: panel.ptr().wrapping_add(at * words),
                                    a_stride: columns.stride * words,
                                    b,
                                    b_stride: nr,
                                    c,
                                    c_stride,
                                    live: nr.min(part.columns.end - column),
                                    add: !first_piece,
                                    bias,
                                });
                            }
                        }
                    }
                    first_piece = false;
                }
            }
        }
        if let Some(sums) = &sums {
            for y in 0..high {
                let from = sums.ptr().wrapping_add(y * wide * width).cast_const();
                // SAFETY: the caller's promise.
                unsafe { store(self.isa, (from, width), target.moved(y * rows.steps[2]), wide, results, false) };
            }
        }
    }

    /// Copies what a part sees to a panel of some rows and places, as they meet a frame of the kernel: channels innermost, in words.
    pub fn gather(&self, part: &Part, tap: usize, channels: Range<usize>, size: [usize; 2], to: *mut f32) {
        let frame = self.axes[0].source(part.frame, tap);
        let see = See { conv: self, part, frame, size, words: channels.len().div_ceil(self.per), channels };
        with_narrow!(self.x.dtype, T => match self.per {
            1 => dispatch(self.isa, Gather::<T, f32, _> { see, to, convert: T::widen, types: PhantomData }),
            _ => dispatch(self.isa, Gather::<T, half::bf16, _> {
                see, to: to.cast(), convert: |x: T| half::bf16::round(x.widen()), types: PhantomData,
            }),
        });
    }

    /// The part's results: places by columns, of its first row.
    pub fn target(&self, part: &Part) -> Matrix {
        let (steps, [frames, rows, columns]) = (self.y.strides, &self.axes);
        let start = part.sample * steps[0]
            + (part.group * self.outputs + part.columns.start) * steps[1]
            + part.frame * frames.steps[2]
            + part.rows.start * rows.steps[2]
            + part.places.start * columns.steps[2];
        Matrix { ptr: self.y.ptr, dtype: self.y.dtype, rows: columns.steps[2], cols: steps[1] }.moved(start)
    }
}

/// What a part sees of a frame, and some channels of it.
struct See<'a> {
    conv: &'a Conv<'a>,
    part: &'a Part,
    /// The frame of x, or nothing for zeros.
    frame: Option<usize>,
    channels: Range<usize>,
    /// Rows and places; those past the padded axes are zeros.
    size: [usize; 2],
    /// Words of a place in the panel.
    words: usize,
}

/// Copies what a part sees to a panel, channels innermost.
struct Gather<'a, T, U, F> {
    see: See<'a>,
    to: *mut U,
    convert: F,
    types: PhantomData<T>,
}

impl<T: Narrow, U: Copy + Default, F: Fn(T) -> U> Work for Gather<'_, T, U, F> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let See { conv, part, frame, channels, size: [high, wide], words } = self.see;
        let [frames, rows, columns] = &conv.axes;
        let (top, left) = (part.rows.start * rows.stride, part.places.start * columns.stride);
        let (count, padded, step) = (channels.len(), words * conv.per, conv.x.strides[1]);
        let start = part.sample * conv.x.strides[0] + (part.group * conv.channels + channels.start) * step;
        for y in 0..high {
            let line = frame.zip(rows.at(top + y));
            let line = line.map(|(frame, row)| start + frame * frames.steps[0] + row * rows.steps[0]);
            for x in 0..wide {
                // SAFETY: the panel has this place; x has the sources' places and a group's channels.
                unsafe {
                    let to = std::slice::from_raw_parts_mut(self.to.add((y * wide + x) * padded), padded);
                    let Some((line, place)) = line.zip(columns.at(left + x)) else {
                        to.fill(U::default());
                        continue;
                    };
                    let from = conv.x.ptr.cast::<T>().add(line + place * columns.steps[0]).cast_const();
                    if step == 1 {
                        let from = std::slice::from_raw_parts(from, count);
                        to.iter_mut().zip(from).for_each(|(to, from)| *to = (self.convert)(*from));
                    } else {
                        (0..count).for_each(|c| to[c] = (self.convert)(*from.add(c * step)));
                    }
                    to[count..].fill(U::default());
                }
            }
        }
    }
}
