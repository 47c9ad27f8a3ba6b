//! LayerNorm and RMSNorm, by themselves and with a modulation or a rotation after them, by `kernels/norm.cu`.

use flowtape_engine::backend::Ran;
use flowtape_engine::ops::RopeLayout;
use flowtape_engine::space::Space;
use flowtape_engine::{DType, Result};

use super::launch::Launch;
use super::memory::scratch;
use super::pointwise::At;
use super::view::View;

const THREADS: usize = 128;
/// Blocks that sum gradients over rows: a few for each multiprocessor of a large device. More would write more sums.
const BLOCKS: usize = 512;
/// Columns of a block of the kernel that adds up those sums, and its threads.
const TILE: [usize; 2] = [32, 1024];
/// Shared memory that a block may have on every device.
const SHARED: usize = 96 << 10;

/// An operand: `struct Rows` of `norm.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Rows {
    address: u64,
    strides: [i64; 3],
    wide: i32,
}

/// The argument of the kernels: `struct Norm` of `norm.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Norm {
    operands: [Rows; 9],
    mean: u64,
    deviation: u64,
    parts: u64,
    lead: [i32; 3],
    width: i32,
    rows: i32,
    size: i32,
    pieces: i32,
    sums: i32,
    aligned: i32,
    centred: i32,
    eps: f32,
}

/// What follows a norm in its kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum After {
    /// A weight and a bias, where there are such.
    Affine,
    /// A scale and a shift, as weight and bias.
    Modulated,
    /// A weight and a rotation.
    Rotated(RopeLayout),
}

impl After {
    fn name(self) -> &'static str {
        match self {
            Self::Affine => "norm",
            Self::Modulated => "modulated_norm",
            Self::Rotated(RopeLayout::Interleaved) => "norm_rope_interleaved",
            Self::Rotated(RopeLayout::Split) => "norm_rope_split",
        }
    }

    /// Threads of a row.
    fn lanes(self) -> usize {
        if matches!(self, Self::Rotated(_)) { 8 } else { THREADS }
    }

    /// Parts of a row that a thread reads side by side.
    fn parts(self) -> usize {
        if self == Self::Rotated(RopeLayout::Split) { 2 } else { 1 }
    }

    /// Gradients that are sums over rows.
    fn sums(self) -> usize {
        match self {
            Self::Affine => 0,
            Self::Modulated => 2,
            Self::Rotated(_) => 1,
        }
    }

    /// Bytes of a block's sums where a thread takes `run` numbers at a time.
    fn shared(self, width: usize, run: usize) -> usize {
        let chunks = (width / self.parts()).div_ceil(run * self.lanes());
        self.sums() * self.parts() * chunks * run * THREADS * size_of::<f32>()
    }
}

/// What a kernel reads and writes. All broadcast to x.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub x: &'a View,
    /// Of y.
    pub grad: Option<&'a View>,
    /// Or the gradient of x.
    pub y: &'a View,
    /// Or the scale of a modulation.
    pub weight: Option<&'a View>,
    /// Or its shift.
    pub bias: Option<&'a View>,
    /// Cosines and sines `[L, d]` of x `[B, L, H, d]`.
    pub tables: Option<[&'a View; 2]>,
    pub weight_grad: Option<&'a View>,
    pub bias_grad: Option<&'a View>,
    /// Of each row, where it is taken off.
    pub mean: Option<&'a View>,
    /// The reciprocal deviation of each row.
    pub deviation: &'a View,
}

impl<'a> Operands<'a> {
    /// What each norm has.
    pub fn new(x: &'a View, y: &'a View, deviation: &'a View) -> Self {
        let (grad, weight, bias, tables, weight_grad, bias_grad, mean) = (None, None, None, None, None, None, None);
        Self { x, grad, y, weight, bias, tables, weight_grad, bias_grad, mean, deviation }
    }
}

/// Strides along the leading axes of `x`.
fn leading(view: &View, x: &View) -> Vec<usize> {
    let shift = x.dims.len() - view.dims.len().min(x.dims.len());
    let stride = |axis: usize| match axis.checked_sub(shift).map(|i| (view.dims[i], view.strides[i])) {
        Some((size, stride)) if size != 1 => stride,
        _ => 0,
    };
    (0..x.dims.len() - 1).map(stride).collect()
}

/// The argument of forward; `None` where the kernels can't take the operands.
fn argument(after: After, operands: &Operands<'_>) -> Option<Norm> {
    let Operands { x, grad, y, weight, bias, tables, weight_grad, bias_grad, mean, deviation } = *operands;
    let width = *x.dims.last()?;
    // Of a token, for all its heads.
    let of_token = |t: &View| View {
        dims: vec![1, t.dims[0], 1, width],
        strides: vec![0, t.strides[0], 0, t.strides[1]],
        ..t.clone()
    };
    let tables = tables.map(|tables| tables.map(of_token));
    let [cos, sin] = [0, 1].map(|i| tables.as_ref().map(|t| &t[i]));
    let all = [Some(x), grad, Some(y), weight, bias, cos, sin, weight_grad, bias_grad];
    let present: Vec<&View> = all.into_iter().flatten().collect();
    let dense = |v: &View| v.dtype == DType::F32 && v.strides == View::dense(0, v.dtype, &v.dims).strides;
    let may_be_wide = |i: usize| i >= 3;
    let of_kind = |i: usize, v: &View| v.dtype == x.dtype || (may_be_wide(i) && v.dtype == DType::F32);
    let fits = matches!(x.dtype, DType::F32 | DType::BF16 | DType::F16)
        && x.numel() > 0
        && all
            .iter()
            .enumerate()
            .all(|(i, v)| v.is_none_or(|v| of_kind(i, v) && v.is_unit() && v.dims.last() == Some(&width)))
        && tables.iter().flatten().all(|t| t.dtype == DType::F32)
        && mean.into_iter().chain([deviation]).all(dense)
        && after.shared(width, 8) <= SHARED;
    let strides: Vec<Vec<usize>> = present.iter().map(|v| leading(v, x)).collect();
    // Rows are counted in the order of the statistics.
    let space = Space::new(&x.dims, &strides.iter().map(|s| &s[..]).collect::<Vec<_>>(), 0..x.dims.len() - 1);
    if !fits || space.dims.len() > 3 {
        return None;
    }
    let missing = 3 - space.dims.len();
    let mut argument = Norm { width: i32::try_from(width).ok()?, lead: [1; 3], ..Norm::default() };
    argument.rows = i32::try_from(space.len()).ok()?;
    for (to, &size) in argument.lead[missing..].iter_mut().zip(&space.dims) {
        *to = size as i32;
    }
    let mut strides = space.strides.iter();
    for (to, view) in argument.operands.iter_mut().zip(all) {
        let (Some(view), Some(strides)) = (view, view.and_then(|_| strides.next())) else { continue };
        *to = Rows { address: view.address, strides: [0; 3], wide: i32::from(view.dtype == DType::F32) };
        to.strides[missing..].iter_mut().zip(strides).for_each(|(to, &s)| *to = s as i64);
    }
    let eights = width.is_multiple_of(8 * after.parts());
    argument.aligned = i32::from(eights && present.iter().all(|v| v.rows_aligned()));
    argument.centred = i32::from(mean.is_some());
    (argument.mean, argument.deviation) = (mean.map_or(0, |m| m.address), deviation.address);
    Some(argument)
}

fn launch(at: At<'_>, dtype: DType, name: &str, launch: Launch, argument: &Norm) -> Result<()> {
    let launched = at.gpu.embedded(&format!("norm_{dtype}"), name).and_then(|kernel| {
        // SAFETY: the argument is the kernel's, and the call is checked.
        unsafe { at.gpu.launch(&kernel, launch, argument) }
    });
    launched.map_err(|failure| at.gpu.failed("norm", failure))
}

/// The norm with what follows it, and the statistics of each row.
pub(super) fn forward(at: At<'_>, after: After, operands: &Operands<'_>, eps: f64) -> Result<Ran> {
    let Some(plain) = argument(after, operands) else { return Ok(Ran::Declined) };
    let blocks = (plain.rows as usize).div_ceil(THREADS / after.lanes());
    let argument = Norm { eps: eps as f32, ..plain };
    launch(
        at,
        operands.x.dtype,
        &format!("{}_forward", after.name()),
        Launch::blocks(blocks, THREADS as u32),
        &argument,
    )?;
    Ok(Ran::Done)
}

/// The gradient of x, and those of the vectors of a modulation or the weight of a rotation.
pub(super) fn backward(at: At<'_>, after: After, operands: &Operands<'_>) -> Result<Ran> {
    let Some(plain) = argument(after, operands) else { return Ok(Ran::Declined) };
    let name = format!("{}_backward", after.name());
    let (x, all, width) = (operands.x, plain.rows as usize, plain.width as usize);
    // Rows that share a gradient: a sample's or all, or each has its own.
    let rows = match (after, operands.weight) {
        (After::Affine, _) => 1,
        (After::Modulated, Some(scale)) if scale.dims[1] == x.dims[1] => 1,
        (After::Modulated, _) => x.dims[1],
        (After::Rotated(_), _) => all,
    };
    let groups = THREADS / after.lanes();
    let most = (BLOCKS * rows / all).clamp(1, rows);
    let size = rows.div_ceil(most).next_multiple_of(groups);
    let pieces = rows.div_ceil(size);
    let sums = if after == After::Modulated && rows == 1 { 0 } else { after.sums() };
    let blocks = all / rows * pieces;
    let parts = (sums > 0).then(|| scratch(at.pool, size_of::<f32>() * blocks * sums * width)).transpose()?;
    let argument = Norm {
        rows: rows as i32,
        size: size as i32,
        pieces: pieces as i32,
        sums: sums as i32,
        parts: parts.as_ref().map_or(0, |p| *p.block()),
        ..plain
    };
    let run = if plain.aligned > 0 { 8 } else { 2 };
    let shared = if sums > 0 { after.shared(width, run) as u32 } else { 0 };
    let grid = Launch { shared, ..Launch::blocks(blocks, THREADS as u32) };
    launch(at, operands.x.dtype, &name, grid, &argument)?;
    if sums > 0 {
        let [columns, threads] = TILE;
        let grid = Launch::blocks(all / rows * (sums * width).div_ceil(columns), threads as u32);
        launch(at, operands.x.dtype, "norm_sums", grid, &argument)?;
    }
    Ok(Ran::Done)
}
