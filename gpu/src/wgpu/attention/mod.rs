//! Attention in tiles: only one tile of scores exists at a time (FlashAttention's scheme), made of products of tiles.
//!
//! | file | what is in it |
//! |---|---|
//! | `text` | what the kernels' texts share: parameters, scores, sums over a row of threads |
//! | `forward`, `backward` | a kernel forward; two backward, for dq and for dk with dv |

mod backward;
mod forward;
mod text;

use flowtape_engine::Result;
use flowtape_engine::expr::{Function, Program, Reduce};

use self::text::{SIDE, Shape};
use super::queue::{Gpu, Launch};
use super::reduce;
use super::view::{Access, View};

/// Operand `i`'s strides along batch, head, row and column are parameters.
fn strides(views: &[(&View, Access)]) -> Vec<u32> {
    let four = |v: &View| {
        let mut four = [0; 4];
        four[..v.strides.len()].copy_from_slice(&v.strides);
        four.map(|s| s as u32)
    };
    views.iter().flat_map(|(v, _)| four(v)).collect()
}

/// Rows of q, k, v and gradients are read by fours where they lie so.
fn rows(v: &View) -> (&View, Access) {
    (v, Access::quads_if(v.quads(3)))
}

/// The last axis of a result is written in pairs where it lies so.
fn result(v: &View) -> (&View, Access) {
    (v, Access::pairs_if(v.pairs(3)))
}

/// Parameters: Lq, Lk, heads, workgroups, tiles, scale, then strides. `rows` are those that workgroups share out.
fn params(q: &View, k: &View, tiles: usize, scale: f64, operands: &[(&View, Access)]) -> (Vec<u32>, usize) {
    let workgroups = q.dims[0] * q.dims[1] * tiles;
    let sizes = [q.dims[2], k.dims[2], q.dims[1], workgroups, tiles].map(|n| n as u32);
    ([&sizes[..], &[(scale as f32).to_bits()], &strides(operands)].concat(), workgroups)
}

/// `o = softmax(q k^T scale + mask) v` and the log-sum-exp of each row. Inputs q, k, v and maybe the mask.
pub(super) fn forward(gpu: &Gpu, scale: f64, inputs: &[View], o: &View, lse: &View) -> Result<bool> {
    let (q, k, v) = (&inputs[0], &inputs[1], &inputs[2]);
    let views: Vec<&View> = inputs.iter().chain([o, lse]).collect();
    let shape = Shape::new(q, k, v, inputs.len() > 3).forward(gpu.bounds.shared);
    let Some(shape) = shape.filter(|_| gpu.holds(&views)) else { return Ok(false) };
    let masks = inputs.get(3).map(|m| (m, Access::Read));
    let operands: Vec<(&View, Access)> =
        [rows(q), rows(k), rows(v)].into_iter().chain(masks).chain([result(o), (lse, Access::Write)]).collect();
    let tiles = q.dims[2].div_ceil(SIDE * shape.queries);
    let (params, workgroups) = params(q, k, tiles, scale, &operands);
    let launch =
        Launch { name: "attention_forward", shape: shape.key(), operands: &operands, params: &params, workgroups };
    gpu.launch(&launch, || forward::source(shape, &operands))?;
    Ok(true)
}

/// The gradients of q, k and v. Inputs q, k, v, o, the gradient of o, the log-sum-exp and maybe the mask.
pub(super) fn backward(gpu: &Gpu, scale: f64, inputs: &[View], outputs: &[View]) -> Result<bool> {
    let [q, k, v, o, g, lse] = std::array::from_fn(|i| &inputs[i]);
    let mask = inputs.get(6);
    let views: Vec<&View> = inputs.iter().chain(outputs).collect();
    let shape = Shape::new(q, k, v, mask.is_some()).backward(gpu.bounds.shared);
    // One more than the views: the sums of each row.
    let Some(shape) = shape.filter(|_| gpu.holds(&views)) else { return Ok(false) };
    // The sum of o g of each row, which every probability's gradient is taken off.
    let (_memory, delta) = gpu.scratch(&[&q.dims[..3], &[1]].concat())?;
    let product = Program::of(&Function::build(|[o, g]| [o * g]));
    reduce::run(gpu, &product, Reduce::Sum, &[o.clone(), g.clone()], &[], std::slice::from_ref(&delta))?;

    let common = [rows(q), rows(k), rows(v), rows(g), (lse, Access::Read), (&delta, Access::Read)];
    let masks = mask.map(|m| (m, Access::Read));
    let [dq, dk, dv] = std::array::from_fn(|i| result(&outputs[i]));
    for (name, results, len, each) in [
        ("attention_backward_queries", vec![dq], q.dims[2], shape.queries),
        ("attention_backward_keys", vec![dk, dv], k.dims[2], shape.keys),
    ] {
        let operands: Vec<(&View, Access)> = common.into_iter().chain(masks).chain(results.iter().copied()).collect();
        let (params, workgroups) = params(q, k, len.div_ceil(SIDE * each), scale, &operands);
        let launch = Launch { name, shape: shape.key(), operands: &operands, params: &params, workgroups };
        gpu.launch(&launch, || match results.len() {
            1 => backward::queries(shape, &operands),
            _ => backward::keys(shape, &operands),
        })?;
    }
    Ok(true)
}
