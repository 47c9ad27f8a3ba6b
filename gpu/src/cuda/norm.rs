//! LayerNorm and RMSNorm by `kernels/norm.cu`.

use flowtape_engine::backend::Ran;
use flowtape_engine::space::Space;
use flowtape_engine::{DType, Result};

use super::launch::Launch;
use super::pointwise::At;
use super::view::View;

const THREADS: u32 = 128;

/// The argument of the kernels: `struct Norm` of `norm.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Norm {
    x: u64,
    weight: u64,
    bias: u64,
    grad: u64,
    y: u64,
    mean: u64,
    scale: u64,
    width: i32,
    lead: [i32; 3],
    x_strides: [i64; 3],
    grad_strides: [i64; 3],
    y_strides: [i64; 3],
    weight_type: i32,
    bias_type: i32,
    aligned: i32,
    centred: i32,
    eps: f32,
}

fn type_of(dtype: DType) -> Option<i32> {
    match dtype {
        DType::F32 => Some(0),
        DType::BF16 => Some(1),
        DType::F16 => Some(2),
        DType::F64 | DType::U32 => None,
    }
}

/// What forward and backward have in common: rows of `x`, `other` and `y`, and vectors; `None` where the kernels can't
/// take them.
fn argument(x: &View, other: &View, y: &View, vectors: [Option<&View>; 2], statistics: &[&View]) -> Option<Norm> {
    let rows = [x, other, y];
    let rank = x.dims.len() - 1;
    type_of(x.dtype)?;
    let plain = rows.iter().all(|v| v.dtype == x.dtype && v.is_unit())
        && vectors.iter().flatten().all(|v| v.is_unit())
        && statistics.iter().all(|v| v.dtype == DType::F32 && v.strides == View::dense(0, v.dtype, &v.dims).strides);
    // Rows are counted in the order of the statistics.
    let space = Space::new(&x.dims, &rows.map(|v| &v.strides[..]), 0..rank);
    if !plain || space.dims.len() > 3 || x.numel() == 0 {
        return None;
    }
    let lead = 3 - space.dims.len();
    let strides = |operand: usize| -> [i64; 3] {
        std::array::from_fn(|i| i.checked_sub(lead).map_or(0, |i| space.strides[operand][i] as i64))
    };
    let mut dims = [1; 3];
    dims[lead..].iter_mut().zip(&space.dims).for_each(|(to, &d)| *to = d as i32);
    let vector = |v: Option<&View>| Some(v.map_or((0, 0), |v| (v.address, type_of(v.dtype).unwrap_or(-1))));
    let ((weight, weight_type), (bias, bias_type)) = (vector(vectors[0])?, vector(vectors[1])?);
    if weight_type < 0 || bias_type < 0 {
        return None;
    }
    Some(Norm {
        x: x.address,
        weight,
        bias,
        grad: other.address,
        y: y.address,
        width: x.dims[rank] as i32,
        lead: dims,
        x_strides: strides(0),
        grad_strides: strides(1),
        y_strides: strides(2),
        weight_type,
        bias_type,
        aligned: i32::from(rows.iter().all(|v| v.rows_aligned())),
        ..Norm::default()
    })
}

fn launch(at: At<'_>, name: &str, x: &View, argument: &Norm) -> Result<Ran> {
    let launched = at.gpu.embedded("norm", &format!("norm_{name}_{}", x.dtype)).and_then(|kernel| {
        let rows = argument.lead.iter().map(|&d| d as usize).product();
        // SAFETY: the argument is the kernel's; the op has checked the shapes, and nobody else uses the outputs.
        unsafe { at.gpu.launch(&kernel, Launch::blocks(rows, THREADS), argument) }
    });
    launched.map(|()| Ran::Done).map_err(|failure| at.gpu.failed("norm", failure))
}

/// `y = norm(x) * weight + bias`, and the statistics of each row.
pub(super) fn forward(
    at: At<'_>,
    x: &View,
    [weight, bias]: [Option<&View>; 2],
    eps: f64,
    y: &View,
    mean: Option<&View>,
    scale: &View,
) -> Result<Ran> {
    let statistics: Vec<&View> = mean.into_iter().chain([scale]).collect();
    let Some(plain) = argument(x, x, y, [weight, bias], &statistics) else { return Ok(Ran::Declined) };
    let (centred, mean) = (i32::from(mean.is_some()), mean.map_or(0, |m| m.address));
    launch(at, "forward", x, &Norm { mean, scale: scale.address, centred, eps: eps as f32, ..plain })
}

/// The gradient of x.
pub(super) fn backward(
    at: At<'_>,
    x: &View,
    mean: Option<&View>,
    scale: &View,
    weight: Option<&View>,
    grad: &View,
    dx: &View,
) -> Result<Ran> {
    let statistics: Vec<&View> = mean.into_iter().chain([scale]).collect();
    let Some(plain) = argument(x, grad, dx, [weight, None], &statistics) else { return Ok(Ran::Declined) };
    let (centred, mean) = (i32::from(mean.is_some()), mean.map_or(0, |m| m.address));
    launch(at, "backward", x, &Norm { mean, scale: scale.address, centred, ..plain })
}
