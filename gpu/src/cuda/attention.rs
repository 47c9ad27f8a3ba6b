//! Attention by `kernels/attention.cu` (bf16 and f16) and `kernels/attention_f32.cu`: head dims up to 256. Else the
//! composition runs.

use flowtape_engine::backend::Ran;
use flowtape_engine::{DType, Result};

use super::launch::Launch;
use super::memory::scratch;
use super::pointwise::At;
use super::view::View;

const THREADS: u32 = 128;

/// The argument of the kernels: `struct Attention` of `attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Attention {
    q: u64,
    k: u64,
    v: u64,
    o: u64,
    grad: u64,
    mask: u64,
    out: u64,
    dq: u64,
    dk: u64,
    dv: u64,
    lse: u64,
    delta: u64,
    heads: i32,
    queries: i32,
    keys: i32,
    depth: i32,
    width: i32,
    q_s: [i64; 3],
    k_s: [i64; 3],
    v_s: [i64; 3],
    o_s: [i64; 3],
    grad_s: [i64; 3],
    dq_s: [i64; 3],
    dk_s: [i64; 3],
    dv_s: [i64; 3],
    mask_s: [i64; 4],
    scale: f32,
    q_aligned: i32,
    k_aligned: i32,
    v_aligned: i32,
    grad_aligned: i32,
    out_aligned: i32,
}

/// The kernels of a dtype and a head dim.
struct Kernels {
    module: String,
    /// Queries, or keys, of a block.
    rows: usize,
    /// Bytes of shared memory: forward, and of the gradient's two kernels, of keys and of queries.
    shared: [usize; 3],
    /// Parts of the columns that the kernel of keys makes, each in a block of its own.
    parts: usize,
}

impl Kernels {
    /// Those that take the operands, where there are such.
    fn of(views: &[&View], mask: Option<&View>) -> Option<Self> {
        let [q, _, v, ..] = views else { return None };
        let depth = [32, 64, 128, 256].into_iter().find(|&d| d >= q.dims[3].max(v.dims[3]))?;
        let fits = views.iter().all(|x| x.dtype == q.dtype && x.is_unit())
            && mask.is_none_or(|m| m.dtype == DType::F32)
            && q.dims[0] * q.dims[1] <= 65_535;
        if !fits {
            return None;
        }
        let module = format!("attention_{}_{depth}", q.dtype);
        match q.dtype {
            DType::BF16 | DType::F16 => {
                // Sixteen rows for each of four warps; the other operand in blocks that fit beside them, twice.
                let keys = if depth <= 128 { 64 } else { 32 };
                let step = match depth {
                    32 | 64 => 64,
                    128 => 32,
                    _ => 16,
                };
                let backward = (2 * 64 + 4 * step) * depth * 2;
                let shared = [(64 + 4 * keys) * depth * 2, backward + 8 * step, backward];
                Some(Self { module, rows: 64, shared, parts: depth.div_ceil(128) })
            }
            DType::F32 => {
                let rows = if depth <= 128 { 32 } else { 16 };
                let (tile, weights) = (rows * (depth + 4) * 4, rows * (if rows == 16 { 24 } else { 36 }) * 4);
                let shared = [2 * tile + weights, 4 * tile + 2 * weights, 4 * tile + weights];
                Some(Self { module, rows, shared, parts: 1 })
            }
            DType::F64 | DType::U32 => None,
        }
    }
}

/// The common part of the arguments.
fn argument(q: &View, k: &View, v: &View, mask: Option<&View>, lse: &View, scale: f64) -> Attention {
    let aligned = |view: &View| i32::from(view.rows_aligned());
    Attention {
        q: q.address,
        k: k.address,
        v: v.address,
        mask: mask.map_or(0, |m| m.address),
        lse: lse.address,
        heads: q.dims[1] as i32,
        queries: q.dims[2] as i32,
        keys: k.dims[2] as i32,
        depth: q.dims[3] as i32,
        width: v.dims[3] as i32,
        q_s: q.leading(),
        k_s: k.leading(),
        v_s: v.leading(),
        mask_s: mask.map_or([0; 4], View::leading),
        scale: scale as f32,
        q_aligned: aligned(q),
        k_aligned: aligned(k),
        v_aligned: aligned(v),
        ..Attention::default()
    }
}

fn is_dense(view: &View) -> bool {
    view.strides == View::dense(0, view.dtype, &view.dims).strides
}

/// Outputs o and the log-sum-exp.
pub(super) fn forward(
    at: At<'_>,
    [q, k, v]: [&View; 3],
    mask: Option<&View>,
    scale: f64,
    [o, lse]: [&View; 2],
) -> Result<Ran> {
    let Some(kernels) = Kernels::of(&[q, k, v, o], mask).filter(|_| is_dense(lse)) else { return Ok(Ran::Declined) };
    let argument = Attention {
        out: o.address,
        o_s: o.leading(),
        out_aligned: i32::from(o.rows_aligned()),
        ..argument(q, k, v, mask, lse, scale)
    };
    let launched = at.gpu.embedded(&kernels.module, "attention_forward").and_then(|kernel| {
        let grid = [q.dims[2].div_ceil(kernels.rows) as u32, (q.dims[0] * q.dims[1]) as u32, 1];
        // SAFETY: the argument is the kernel's, and the call is checked.
        unsafe { at.gpu.launch(&kernel, Launch { grid, block: THREADS, shared: kernels.shared[0] as u32 }, &argument) }
    });
    launched.map(|()| Ran::Done).map_err(|failure| at.gpu.failed("attention", failure))
}

/// Outputs dq, dk, dv.
pub(super) fn backward(
    at: At<'_>,
    [q, k, v, o, grad, lse]: [&View; 6],
    mask: Option<&View>,
    scale: f64,
    [dq, dk, dv]: [&View; 3],
) -> Result<Ran> {
    let views = [q, k, v, o, grad, dq, dk, dv];
    let Some(kernels) = Kernels::of(&views, mask).filter(|_| is_dense(lse)) else { return Ok(Ran::Declined) };
    let (heads, queries, keys) = (q.dims[0] * q.dims[1], q.dims[2], k.dims[2]);
    let delta = scratch(at.pool, 4 * heads * queries)?;
    let argument = Attention {
        o: o.address,
        grad: grad.address,
        dq: dq.address,
        dk: dk.address,
        dv: dv.address,
        delta: *delta.block(),
        o_s: o.leading(),
        grad_s: grad.leading(),
        dq_s: dq.leading(),
        dk_s: dk.leading(),
        dv_s: dv.leading(),
        grad_aligned: i32::from(grad.rows_aligned()),
        out_aligned: i32::from([dq, dk, dv].iter().all(|view| view.rows_aligned())),
        ..argument(q, k, v, mask, lse, scale)
    };
    let Kernels { module, rows, shared: [_, of_keys, of_queries], parts } = kernels;
    let launch = |name: &str, blocks: usize, depth: usize, shared: usize| {
        let kernel = at.gpu.embedded(&module, name)?;
        let grid = [blocks as u32, heads as u32, depth as u32];
        // SAFETY: as in `forward`; the scratch holds a number for each query.
        unsafe { at.gpu.launch(&kernel, Launch { grid, block: THREADS, shared: shared as u32 }, &argument) }
    };
    launch("attention_delta", queries.div_ceil(4), 1, 0)
        .and_then(|()| launch("attention_keys", keys.div_ceil(rows), parts, of_keys))
        .and_then(|()| launch("attention_queries", queries.div_ceil(rows), 1, of_queries))
        .map(|()| Ran::Done)
        .map_err(|failure| at.gpu.failed("attention", failure))
}
