//! LayerNorm and RMSNorm, forward and backward: some lanes of a workgroup take a row.

use flowtape_engine::Result;
use flowtape_engine::space::Space;

use super::queue::{Gpu, Launch};
use super::view::{Access, View};
use super::wgsl::{self, SpaceParams, THREADS};

/// Which operands there are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts {
    pub(super) centred: bool,
    pub(super) weight: bool,
    pub(super) bias: bool,
}

impl Parts {
    fn key(&self) -> [u64; 3] {
        [self.centred, self.weight, self.bias].map(u64::from)
    }
}

/// Lanes of a row.
fn lanes(width: usize) -> usize {
    (width / 4).next_power_of_two().clamp(8, THREADS)
}

/// How the rows of all operands lie: those of the first three walk along, the others have one row.
struct Rows {
    space: Space,
    width: usize,
    lanes: usize,
}

impl Rows {
    fn new(walking: &[&View]) -> Self {
        let axes = walking[0].dims.len() - 1;
        let strides: Vec<&[usize]> = walking.iter().map(|v| &v.strides[..axes]).collect();
        let width = walking[0].dims[axes];
        Self { space: Space::new(&walking[0].dims[..axes], &strides, 0..axes), width, lanes: lanes(width) }
    }

    fn workgroups(&self) -> usize {
        self.space.len().div_ceil(THREADS / self.lanes)
    }

    /// Parameters: rows, width, epsilon, the last strides of the walking operands and of the single rows, the space.
    fn params(&self, walking: &[&View], single: &[&View], eps: f32) -> Vec<u32> {
        let mut params = vec![self.space.len() as u32, self.width as u32, eps.to_bits()];
        params.extend(walking.iter().chain(single).map(|v| v.strides.last().copied().unwrap_or(0) as u32));
        params.extend(wgsl::space_values(&self.space));
        params
    }
}

/// The text around a row's work: where the row lies, and the sum of all its lanes.
fn kernel(operands: usize, walking: usize, rank: usize, lanes: usize, body: &str) -> String {
    let space = SpaceParams { first: operands + 3 + operands, rank, operands: walking };
    let mut main = format!(
        "  let lane = index % L;
  let row = group * {}u + index / L;
  let there = row < {};
  let width = {};
",
        THREADS / lanes,
        wgsl::param(operands),
        wgsl::param(operands + 1)
    );
    for o in 0..operands {
        main += &format!("  var o{o} = {};\n", wgsl::param(o));
        main += &format!("  let s{o} = {};\n", wgsl::param(operands + 3 + o));
    }
    main += "  if there {\n";
    main += &space.locate("row", "o");
    main += "  }\n  let end = select(0u, width, there);\n";
    main += body;
    format!(
        "const L = {lanes}u;
var<workgroup> part: array<f32, {THREADS}>;
fn total(index: u32, value: f32) -> f32 {{
  part[index] = value;
  workgroupBarrier();
  for (var half = L / 2u; half > 0u; half /= 2u) {{
    if index % L < half {{ part[index] += part[index + half]; }}
    workgroupBarrier();
  }}
  let sum = part[index / L * L];
  workgroupBarrier();
  return sum;
}}
"
    ) + &wgsl::entry(&main)
}

/// `y = norm(x) * weight + bias` and the statistics of each row.
pub(super) fn forward(gpu: &Gpu, parts: Parts, eps: f64, inputs: &[View], outputs: &[View]) -> Result<bool> {
    let (x, y, statistics) = (&inputs[0], &outputs[0], &outputs[1..]);
    let walking: Vec<&View> = [x, y].into_iter().chain(statistics).collect();
    let single: Vec<&View> = inputs[1..].iter().collect();
    if !gpu.holds(&[&walking[..], &single].concat()) {
        return Ok(false);
    }
    let rows = Rows::new(&walking);
    let operands: Vec<(&View, Access)> = [(x, Access::Read), (y, Access::Write)]
        .into_iter()
        .chain(statistics.iter().map(|v| (v, Access::Write)))
        .chain(single.iter().map(|v| (*v, Access::Read)))
        .collect();
    let params = rows.params(&walking, &single, eps as f32);
    let rank = rows.space.dims.len();
    let mut shape = vec![rows.lanes as u64, rank as u64];
    shape.extend(parts.key());
    let launch =
        Launch { name: "norm_forward", shape, operands: &operands, params: &params, workgroups: rows.workgroups() };
    gpu.launch(&launch, || {
        let (n, walk) = (operands.len(), walking.len());
        let eps = wgsl::float_param(n + 2);
        let mut body = String::new();
        if parts.centred {
            body += "  var sum = 0.0;
  for (var i = lane; i < end; i += L) { sum += load0(o0 + i * s0); }
  let mean = total(index, sum) / f32(width);
";
        } else {
            body += "  let mean = 0.0;\n";
        }
        body += &format!(
            "  var squares = 0.0;
  for (var i = lane; i < end; i += L) {{ let d = load0(o0 + i * s0) - mean; squares = fma(d, d, squares); }}
  let scale = 1.0 / sqrt(total(index, squares) / f32(width) + {eps});
"
        );
        let (mean, scale) = (2, if parts.centred { 3 } else { 2 });
        if parts.centred {
            body += &format!("  if there && lane == 0u {{ store{mean}(o{mean}, mean); }}\n");
        }
        body += &format!("  if there && lane == 0u {{ store{scale}(o{scale}, scale); }}\n");
        let mut value = "(load0(o0 + i * s0) - mean) * scale".to_owned();
        if parts.weight {
            value += &format!(" * load{walk}(o{walk} + i * s{walk})");
        }
        if parts.bias {
            let b = walk + usize::from(parts.weight);
            value += &format!(" + load{b}(o{b} + i * s{b})");
        }
        body += &format!("  for (var i = lane; i < end; i += L) {{ store1(o1 + i * s1, {value}); }}\n");
        kernel(n, walk, rank, rows.lanes, &body)
    })?;
    Ok(true)
}

/// `dx = s (gw - mean(gw) - x̂ mean(gw x̂))`; RMSNorm has no middle term. Inputs x, grad, scale, mean and weight.
pub(super) fn backward(gpu: &Gpu, parts: Parts, inputs: &[View], dx: &View) -> Result<bool> {
    let at_weight = 3 + usize::from(parts.centred);
    let walking: Vec<&View> = inputs[..at_weight].iter().chain([dx]).collect();
    let single: Vec<&View> = inputs[at_weight..].iter().collect();
    if !gpu.holds(&[&walking[..], &single].concat()) {
        return Ok(false);
    }
    let rows = Rows::new(&walking);
    let mut operands: Vec<(&View, Access)> = inputs[..at_weight].iter().map(|v| (v, Access::Read)).collect();
    operands.push((dx, Access::Write));
    operands.extend(single.iter().map(|v| (*v, Access::Read)));
    let params = rows.params(&walking, &single, 0.0);
    let rank = rows.space.dims.len();
    let mut shape = vec![rows.lanes as u64, rank as u64];
    shape.extend(parts.key());
    let launch =
        Launch { name: "norm_backward", shape, operands: &operands, params: &params, workgroups: rows.workgroups() };
    gpu.launch(&launch, || {
        let (n, walk) = (operands.len(), walking.len());
        let out = walk - 1;
        let weight = if parts.weight { format!(" * load{walk}(o{walk} + i * s{walk})") } else { String::new() };
        let mut body = String::from("  var scale = 0.0;\n  var mean = 0.0;\n  if there {\n    scale = load2(o2);\n");
        if parts.centred {
            body += "    mean = load3(o3);\n";
        }
        body += "  }\n  var sum = 0.0;\n  var dot = 0.0;\n";
        let (g, hat) = (format!("load1(o1 + i * s1){weight}"), "(load0(o0 + i * s0) - mean) * scale");
        body += &format!(
            "  for (var i = lane; i < end; i += L) {{
    let g = {g};
    sum += g;
    dot = fma(g, {hat}, dot);
  }}
  let b = total(index, dot) / f32(width);
"
        );
        body += if parts.centred { "  let a = total(index, sum) / f32(width);\n" } else { "  let a = 0.0;\n" };
        body += &format!(
            "  for (var i = lane; i < end; i += L) {{
    store{out}(o{out} + i * s{out}, scale * ({g} - a - {hat} * b));
  }}
"
        );
        kernel(n, walk, rank, rows.lanes, &body)
    })?;
    Ok(true)
}
