//! Convolution by kernels of 3 x 3 in the way of Winograd: F(2 x 2, 3 x 3) of Lavin and Gray 2016. Four places of the result, 2 x 2, see
//! 4 x 4 of x. Both these and the kernel are transformed to 16 numbers, so that 16 products for each channel give the sums that
//! otherwise take 36; what they sum to is transformed back. Each of the 16 is a product of matrices, tiles by channels.
//!
//! The transforms are sums alone (and halves of the weights), so all instruction sets give the same bits.

use super::conv::{Conv, Part};
use super::kernel::Tile;
use super::pack::Narrow;
use super::scratch::Scratch;
use super::store;
use crate::DType;
use crate::cpu::isa::{Work, dispatch};

/// Numbers of a transformed tile.
pub(super) const NUMBERS: usize = 16;
/// Places of the result of a tile on each axis.
pub(super) const SIDE: usize = 2;
/// Tiles that a task makes at most: a multiple of every kernel's height.
pub(super) const TILES: usize = 48;

/// The transform `G w G^T` of a kernel of 3 x 3.
fn transformed_weight(w: [[f32; 3]; 3]) -> [[f32; 4]; 4] {
    let line = |[a, b, c]: [f32; 3]| {
        let outer = a + c;
        [a, 0.5 * (outer + b), 0.5 * (outer - b), c]
    };
    let rows = w.map(line);
    let columns: [[f32; 4]; 4] = std::array::from_fn(|x| line([rows[0][x], rows[1][x], rows[2][x]]));
    std::array::from_fn(|y| std::array::from_fn(|x| columns[x][y]))
}

type Lanes<const L: usize> = [f32; L];

#[inline(always)]
fn add<const L: usize>(a: Lanes<L>, b: Lanes<L>) -> Lanes<L> {
    std::array::from_fn(|i| a[i] + b[i])
}

#[inline(always)]
fn sub<const L: usize>(a: Lanes<L>, b: Lanes<L>) -> Lanes<L> {
    std::array::from_fn(|i| a[i] - b[i])
}

/// Safety: `L` floats can be read.
#[inline(always)]
unsafe fn load<const L: usize>(from: *const f32) -> Lanes<L> {
    // SAFETY: the caller's promise.
    unsafe { from.cast::<Lanes<L>>().read_unaligned() }
}

/// Safety: `L` floats can be written.
#[inline(always)]
unsafe fn save<const L: usize>(to: *mut f32, values: Lanes<L>) {
    // SAFETY: the caller's promise.
    unsafe { to.cast::<Lanes<L>>().write_unaligned(values) }
}

/// How many tiles lie below one another, and side by side.
#[derive(Clone, Copy)]
struct Grid {
    down: usize,
    right: usize,
}

impl Grid {
    fn tiles(self) -> usize {
        self.down * self.right
    }
}

/// What is done to tiles for some lanes side by side, which are channels or results.
trait Transform {
    /// Tiles, and lanes of each.
    fn size(&self) -> [usize; 2];

    /// Safety: what it reads and writes is there, `L` lanes of the tile from `lane` on.
    unsafe fn lanes<const L: usize>(&self, tile: usize, lane: usize);
}

/// All tiles and lanes of a transform, whose memory is there.
struct All<T>(T);

impl<T: Transform> Work for All<T> {
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let [tiles, lanes] = self.0.size();
        let whole = lanes / 16 * 16;
        for tile in 0..tiles {
            // SAFETY: whoever made it gave memory for these tiles and lanes.
            unsafe {
                (0..whole).step_by(16).for_each(|lane| self.0.lanes::<16>(tile, lane));
                (whole..lanes).for_each(|lane| self.0.lanes::<1>(tile, lane));
            }
        }
    }
}

/// `B^T d B` of tiles of a panel, for all channels.
struct Forward {
    grid: Grid,
    channels: usize,
    /// `[2 down + 2, 2 right + 2, channels]`.
    panel: *const f32,
    /// `[16, tiles, channels]`.
    out: *mut f32,
}

impl Transform for Forward {
    fn size(&self) -> [usize; 2] {
        [self.grid.tiles(), self.channels]
    }

    #[inline(always)]
    unsafe fn lanes<const L: usize>(&self, tile: usize, channel: usize) {
        let (y, x) = (tile / self.grid.right, tile % self.grid.right);
        let line = (SIDE * self.grid.right + 2) * self.channels;
        let from = self.panel.wrapping_add(SIDE * y * line + SIDE * x * self.channels + channel);
        let line_of = |d: [Lanes<L>; 4]| [sub(d[0], d[2]), add(d[1], d[2]), sub(d[2], d[1]), sub(d[1], d[3])];
        let values: [[Lanes<L>; 4]; 4] = std::array::from_fn(|i| {
            // SAFETY: the caller's promise.
            line_of(std::array::from_fn(|j| unsafe { load(from.add(i * line + j * self.channels)) }))
        });
        let columns: [[Lanes<L>; 4]; 4] = std::array::from_fn(|j| line_of(std::array::from_fn(|i| values[i][j])));
        let step = self.grid.tiles() * self.channels;
        let to = self.out.wrapping_add(tile * self.channels + channel);
        for (j, column) in columns.into_iter().enumerate() {
            for (i, value) in column.into_iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { save(to.add((4 * i + j) * step), value) };
            }
        }
    }
}

/// `A^T m A` of tiles, and the bias: places of the result.
struct Back<'a> {
    grid: Grid,
    results: usize,
    /// `[16, tiles, results]`.
    sums: *const f32,
    bias: Option<&'a [f32]>,
    /// Rows and places that exist, and from one to the next.
    size: [usize; 2],
    to: *mut f32,
    steps: [usize; 2],
}

impl Transform for Back<'_> {
    fn size(&self) -> [usize; 2] {
        [self.grid.tiles(), self.results]
    }

    #[inline(always)]
    unsafe fn lanes<const L: usize>(&self, tile: usize, at: usize) {
        let (top, left) = (SIDE * (tile / self.grid.right), SIDE * (tile % self.grid.right));
        let step = self.grid.tiles() * self.results;
        let from = self.sums.wrapping_add(tile * self.results + at);
        let line_of = |m: [Lanes<L>; 4]| [add(add(m[0], m[1]), m[2]), sub(sub(m[1], m[2]), m[3])];
        let columns: [[Lanes<L>; 2]; 4] = std::array::from_fn(|j| {
            // SAFETY: the caller's promise.
            line_of(std::array::from_fn(|i| unsafe { load(from.add((4 * i + j) * step)) }))
        });
        let rows: [[Lanes<L>; 2]; 2] = std::array::from_fn(|y| line_of(std::array::from_fn(|j| columns[j][y])));
        for (y, values) in rows.into_iter().enumerate().take(self.size[0] - top) {
            for (x, mut value) in values.into_iter().enumerate().take(self.size[1] - left) {
                if let Some(bias) = self.bias {
                    value = add(value, std::array::from_fn(|i| bias[at + i]));
                }
                // SAFETY: the caller's promise.
                unsafe { save(self.to.add((top + y) * self.steps[0] + (left + x) * self.steps[1] + at), value) };
            }
        }
    }
}

impl Conv<'_> {
    /// Packs the transforms of a panel of a group's weights, `nr` results wide, for all cuts.
    ///
    /// Safety: the weight is readable, and `out` has room for all packed weights.
    pub(super) unsafe fn pack_transforms<T: Narrow>(&self, group: usize, panel: usize, out: *mut f32) {
        let (nr, frames) = (self.set.nr, self.axes[0].kernel);
        for (cut, channels) in self.each_cut() {
            for (channel, frame) in channels.clone().flat_map(|c| (0..frames).map(move |f| (c, f))) {
                let first = panel * nr * channels.len() + (channel - channels.start) * nr;
                for lane in 0..nr {
                    // SAFETY: the caller's promise.
                    let tap = |y, x| unsafe { self.weight_at::<T>(group, panel * nr + lane, channel, [frame, y, x]) };
                    let weight = std::array::from_fn(|y| std::array::from_fn(|x| tap(y, x)));
                    for (number, value) in transformed_weight(weight).as_flattened().iter().enumerate() {
                        let to = self.packed_at(group, cut, frame, number) + first + lane;
                        // SAFETY: the caller's promise.
                        unsafe { *out.add(to) = *value };
                    }
                }
            }
        }
    }

    /// Makes a part by transforms.
    ///
    /// Safety: as for [`super::convolution`]; nobody else writes the part; `weights` are packed as transforms.
    pub(super) unsafe fn transformed_part(&self, part: &Part, weights: *const f32) {
        let (mr, nr, [_, rows, columns]) = (self.set.mr, self.set.nr, &self.axes);
        let size = [part.rows.len(), part.places.len()];
        let grid = Grid { down: size[0].div_ceil(SIDE), right: size[1].div_ceil(SIDE) };
        let (tiles, seen) = (grid.tiles(), self.seen(part));
        let seen_size = [SIDE * grid.down + 2, SIDE * grid.right + 2];
        let panel = Scratch::take(seen_size[0] * seen_size[1] * self.cut);
        let numbers = Scratch::take(NUMBERS * tiles * self.cut);
        let results = part.columns.len();
        let sums = Scratch::take(NUMBERS * tiles * results);
        let mut first_piece = true;
        for (cut, range) in self.each_cut() {
            let channels = range.len();
            for tap in &seen {
                self.gather(part, *tap, range.clone(), seen_size, panel.ptr());
                dispatch(self.isa, All(Forward { grid, channels, panel: panel.ptr(), out: numbers.ptr() }));
                for number in 0..NUMBERS {
                    let packed = weights.wrapping_add(self.packed_at(part.group, cut, *tap, number));
                    for column in part.columns.clone().step_by(nr) {
                        for tile in (0..tiles).step_by(mr) {
                            let c = (number * tiles + tile) * results + column - part.columns.start;
                            // SAFETY: the transforms of all tiles are there, the packed weights are whole panels.
                            unsafe {
                                self.set.row[mr.min(tiles - tile) - 1](&Tile {
                                    k: channels,
                                    a: numbers.ptr().wrapping_add((number * tiles + tile) * channels),
                                    a_stride: channels,
                                    b: packed.wrapping_add(column / nr * nr * channels),
                                    b_stride: nr,
                                    c: sums.ptr().wrapping_add(c),
                                    c_stride: results,
                                    live: nr.min(part.columns.end - column),
                                    add: !first_piece,
                                    bias: std::ptr::null(),
                                });
                            }
                        }
                    }
                }
                first_piece = false;
            }
        }
        let bias = self.bias.as_ref().map(|bias| {
            let first = bias.ptr().wrapping_add(part.group * self.outputs + part.columns.start);
            // SAFETY: the bias has as many elements as there are results.
            unsafe { std::slice::from_raw_parts(first, results) }
        });
        let target = self.target(part);
        let back = |to, steps| {
            let sums = sums.ptr().cast_const();
            dispatch(self.isa, All(Back { grid, results, sums, bias, size, to, steps }));
        };
        if self.y.dtype == DType::F32 && self.y.strides[1] == 1 {
            return back(target.ptr.cast(), [rows.steps[2], columns.steps[2]]);
        }
        let made = Scratch::take(size[0] * size[1] * results);
        back(made.ptr(), [size[1] * results, results]);
        for y in 0..size[0] {
            let from = made.ptr().wrapping_add(y * size[1] * results).cast_const();
            // SAFETY: the caller's promise.
            unsafe { store(self.isa, (from, results), target.moved(y * rows.steps[2]), size[1], results, false) };
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::cpu::gemm::convolution;
    use crate::cpu::isa::Isa;
    use crate::cpu::view;
    use crate::ops::{ConvAxis, Padding, conv};
    use crate::{DType, Device, Philox, Result, Tensor};

    /// Channels, results and groups; sizes; before, after and what is there, for each axis.
    type Case<'a> = ([usize; 3], &'a [usize], &'a [(usize, usize, Padding)]);

    #[test]
    fn a_convolution_by_transforms_is_that_of_f64_on_every_instruction_set() -> Result<()> {
        let cpu = Device::cpu();
        let [zeros, replicate, reflect] = [Padding::Zeros, Padding::Replicate, Padding::Reflect];
        let cases: [Case<'_>; 6] = [
            ([16, 16, 1], &[16, 16], &[(1, 1, zeros); 2]),
            ([40, 37, 1], &[19, 33], &[(1, 1, replicate), (0, 2, zeros)]),
            ([530, 18, 1], &[17, 21], &[(0, 0, zeros), (2, 1, reflect)]),
            ([48, 64, 2], &[100, 3], &[(1, 1, zeros); 2]),
            ([20, 70, 1], &[4, 30, 51], &[(2, 0, zeros), (1, 1, reflect), (1, 1, zeros)]),
            ([17, 33, 1], &[2, 5, 96], &[(0, 2, replicate), (2, 2, zeros), (1, 0, zeros)]),
        ];
        for (case, ([channels, outputs, groups], sizes, pads)) in cases.into_iter().enumerate() {
            let axis = |&(before, after, padding): &_| ConvAxis { before, after, padding, ..ConvAxis::default() };
            let axes: Vec<ConvAxis> = pads.iter().map(axis).collect();
            let mut random = Philox::new(11).fork(case as u64);
            for dtype in [DType::F32, DType::F16] {
                let mut draw = |dims: &[usize]| random.normal(dims, &cpu)?.to_dtype(dtype);
                let x = draw(&[&[2, channels], sizes].concat())?;
                let weight = draw(&[&[outputs, channels / groups][..], &vec![3; sizes.len()]].concat())?;
                let bias = draw(&[outputs])?;
                let wide = |t: &Tensor| t.to_dtype(DType::F64);
                let size =
                    |t: &Tensor| Tensor::from_vec(t.to_vec::<f64>()?.iter().map(|v| v.abs()).collect(), t.dims(), &cpu);
                let want = conv(&wide(&x)?, &wide(&weight)?, Some(&wide(&bias)?), &axes, groups)?;
                let terms = conv(&size(&x)?, &size(&weight)?, Some(&size(&bias)?), &axes, groups)?.to_vec::<f64>()?;
                let want_values = want.to_vec::<f64>()?;
                // Channels last, as results are, and channels first.
                for order in [want.to_dtype(dtype)?, Tensor::zeros(want.dims(), dtype, &cpu)?] {
                    let mut first: Option<Vec<f64>> = None;
                    for isa in Isa::available() {
                        // SAFETY: the set is one of the machine's; the target is the test's own.
                        unsafe {
                            convolution(
                                isa,
                                [&view(&x)?, &view(&weight)?, &view(&order)?],
                                Some(&view(&bias)?),
                                &axes,
                                groups,
                            );
                        }
                        let got = order.to_vec::<f64>()?;
                        for ((got, want), terms) in got.iter().zip(&want_values).zip(&terms) {
                            let rounding = if dtype == DType::F16 { want.abs() * 2f64.powi(-11) } else { 0.0 };
                            let bound = rounding + terms * 8.0 * f64::from(f32::EPSILON);
                            assert!(
                                (got - want).abs() <= bound,
                                "case {case}, {dtype:?}, {isa:?}: {got} instead of {want}"
                            );
                        }
                        if isa > Isa::Portable {
                            assert_eq!(*first.get_or_insert_with(|| got.clone()), got, "case {case}, {isa:?}");
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
