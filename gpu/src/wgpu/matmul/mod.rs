//! Matrix products.
//!
//! | file | what is in it |
//! |---|---|
//! | `tiles`, `subgroup` | the family: a result is one sum over k in ascending order, so all members give the same bits |
//! | `cooperative` | cooperative matrices, whose order of accumulation is the hardware's |
//! | `choice` | which kernel a product gets: by adapter, dtype and sizes, and among the family by measurement |
//! | `text` | what their texts share |

mod choice;
mod cooperative;
mod subgroup;
mod text;
mod tiles;

use flowtape_engine::Result;
use flowtape_engine::expr::{Function, Program};
use flowtape_engine::space::Space;

pub(super) use self::choice::check_cooperative;
pub(super) use self::cooperative::Cooperative;
use self::text::Common;
use super::pointwise::{self, Body};
use super::queue::{Gpu, Launch};
use super::tile::Tile;
use super::view::{Access, View};
use super::wgsl;

/// The last two axes' sizes.
fn sides(v: &View) -> (usize, usize) {
    let r = v.dims.len();
    (v.dims[r - 2], v.dims[r - 1])
}

/// `out[.., m, n] (+)= a[.., m, k] b[.., k, n] + bias[n]`.
pub(super) fn run(gpu: &Gpu, a: &View, b: &View, bias: Option<&View>, accumulate: bool, out: &View) -> Result<()> {
    if out.numel() == 0 {
        return Ok(());
    }
    if let Some(large) = [out, a, b].into_iter().find(|v| !gpu.bounds.binding.fits(v))
        && let Some(axis) = large.longest_axis()
    {
        return in_parts(gpu, [a, b, out], bias, accumulate, large, axis);
    }
    let product = Product { a, b, bias, accumulate, out };
    product.launch(gpu, choice::kernel(gpu, &product))
}

/// A kernel for products.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Kernel {
    Tiles(Tile),
    Subgroup,
    Cooperative(Cooperative),
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tiles(Tile { rows, cols }) => {
                write!(f, "{}x{} of {}x{}", rows.size(), cols.size(), rows.each, cols.each)
            }
            Self::Subgroup => write!(f, "subgroup"),
            Self::Cooperative(of) => write!(f, "cooperative {}", of.size),
        }
    }
}

impl Kernel {
    /// Rows and columns of a workgroup.
    fn tile(self) -> [usize; 2] {
        match self {
            Self::Tiles(tile) => [tile.rows.size(), tile.cols.size()],
            Self::Subgroup => [subgroup::ROWS, wgsl::THREADS],
            Self::Cooperative(of) => of.tile(),
        }
    }

    /// Whether a thread has two neighbouring columns.
    fn writes_pairs(self) -> bool {
        match self {
            Self::Tiles(tile) => tile.cols.each > 1,
            Self::Subgroup => false,
            Self::Cooperative(_) => true,
        }
    }

    /// Bytes of workgroup memory.
    fn shared(self) -> usize {
        match self {
            Self::Tiles(tile) => tile.shared(),
            Self::Subgroup => 0,
            Self::Cooperative(of) => of.shared(),
        }
    }

    fn key(self) -> Vec<u64> {
        let numbers = match self {
            Self::Tiles(Tile { rows, cols }) => vec![0, rows.threads, rows.each, cols.threads, cols.each],
            Self::Subgroup => vec![1],
            Self::Cooperative(of) => vec![2, of.size, usize::from(of.half), of.lanes],
        };
        numbers.into_iter().map(|n| n as u64).collect()
    }
}

/// A product whose operands fit bindings.
#[derive(Clone, Copy, Debug)]
struct Product<'a> {
    a: &'a View,
    b: &'a View,
    bias: Option<&'a View>,
    accumulate: bool,
    out: &'a View,
}

/// An operand's stride along an axis counted from the end.
fn stride(v: &View, from_end: usize) -> usize {
    v.strides[v.dims.len() - from_end]
}

/// Whether neighbours in memory are neighbours along k: of a, of b.
fn along_k(a: &View, b: &View) -> [bool; 2] {
    [stride(a, 1) <= stride(a, 2), stride(b, 2) < stride(b, 1)]
}

impl Product<'_> {
    /// Neighbours in memory and, for each factor, whether it is read four elements at once.
    fn reads(&self) -> ([bool; 2], [bool; 2]) {
        let along = along_k(self.a, self.b);
        let rank = self.out.dims.len();
        let axis = |v: &View, last: bool| v.quads(if last { rank - 1 } else { rank - 2 });
        (along, [axis(self.a, along[0]), axis(self.b, !along[1])])
    }

    /// Batch times m, n and k.
    fn sizes(&self) -> [usize; 4] {
        let ((m, n), (_, k)) = (sides(self.out), sides(self.a));
        [self.out.numel() / (m * n), m, n, k]
    }

    fn launch(&self, gpu: &Gpu, kernel: Kernel) -> Result<()> {
        let Self { a, b, bias, accumulate, out } = *self;
        let rank = out.dims.len();
        let [_, m, n, k] = self.sizes();
        let batch = Space::new(&out.dims[..rank - 2], &[a, b, out].map(|v| &v.strides[..rank - 2]), 0..rank - 2);
        let paired = kernel.writes_pairs() && out.pairs(rank - 1);
        let (along_k, mut quads) = self.reads();
        if !matches!(kernel, Kernel::Tiles(_)) {
            quads = [false; 2];
        }
        let access = [Access::quads_if(quads[0]), Access::quads_if(quads[1]), Access::pairs_if(paired), Access::Read];
        let views = [Some(a), Some(b), Some(out), bias];
        let operands: Vec<(&View, Access)> = views.into_iter().zip(access).filter_map(|(v, a)| Some((v?, a))).collect();
        let [height, width] = kernel.tile();
        let (tile_rows, tile_cols) = (m.div_ceil(height), n.div_ceil(width));
        let workgroups = batch.len() * tile_rows * tile_cols;
        let sizes = [m, n, k, tile_rows, tile_cols, workgroups];
        let strides = [stride(a, 2), stride(a, 1), stride(b, 2), stride(b, 1), stride(out, 2), stride(out, 1)];
        let bias_stride = bias.map_or(0, |b| b.strides[0]);
        let mut params: Vec<u32> = sizes.into_iter().chain(strides).chain([bias_stride]).map(|n| n as u32).collect();
        params.extend(wgsl::space_values(&batch));
        let common = Common {
            operands: operands.len(),
            along_k,
            quads,
            bias: bias.is_some(),
            accumulate,
            paired,
            batch: batch.dims.len(),
        };
        let shape = [kernel.key(), common.key()].concat();
        let launch = Launch { name: "matmul", shape, operands: &operands, params: &params, workgroups };
        match kernel {
            Kernel::Tiles(tile) => gpu.launch(&launch, || tiles::source(tile, &common)),
            Kernel::Subgroup => gpu.launch(&launch, || subgroup::source(&common)),
            Kernel::Cooperative(of) => gpu.launch_with(of.directives(), &launch, || of.source(&common)),
        }
    }
}

/// What does not fit a binding is done in halves of m, n, k or the batch.
fn in_parts(
    gpu: &Gpu,
    [a, b, out]: [&View; 3],
    bias: Option<&View>,
    accumulate: bool,
    large: &View,
    axis: usize,
) -> Result<()> {
    let rank = out.dims.len();
    let (rows, cols) = (rank - 2, rank - 1);
    let is_a = std::ptr::eq(large, a);
    let shared = if is_a { axis == cols } else { axis == rows && !std::ptr::eq(large, out) };
    if shared && out.is_half() {
        // Parts of a sum are rounded once.
        let (_memory, wide) = gpu.scratch(&out.dims)?;
        run(gpu, a, b, bias, false, &wide)?;
        let add = Program::of(&Function::build(|[x, y]| [x + y]));
        let round = Program::of(&Function::build(|[x]| [x]));
        let (program, inputs) = if accumulate { (add, vec![wide, out.clone()]) } else { (round, vec![wide]) };
        return pointwise::run(gpu, Body::Program(&program), &inputs, &[], std::slice::from_ref(out));
    }
    let size = large.dims[axis];
    let cut = (size / 2).next_multiple_of(2).min(size - 1);
    for (part, (start, len)) in [(0, cut), (cut, size - cut)].into_iter().enumerate() {
        let along = |v: &View, axis: usize| v.narrow(axis, start, len);
        if axis < rows {
            run(gpu, &along(a, axis), &along(b, axis), bias, accumulate, &along(out, axis))?;
        } else if shared {
            // The second half of the sum adds to the first.
            let bias = bias.filter(|_| part == 0);
            run(gpu, &along(a, cols), &along(b, rows), bias, accumulate || part > 0, out)?;
        } else if axis == rows {
            run(gpu, &along(a, rows), b, bias, accumulate, &along(out, rows))?;
        } else {
            let bias = bias.map(|b| b.narrow(0, start, len));
            run(gpu, a, &along(b, cols), bias.as_ref(), accumulate, &along(out, cols))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
