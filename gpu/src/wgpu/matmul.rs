//! Matrix products: tiles of both factors in workgroup memory, a small block of the result in each thread's registers.
//!
//! A result is one sum over k in ascending order, whatever the tile: all tilings give the same bits.

use flowtape_engine::Result;
use flowtape_engine::expr::{Function, Program};
use flowtape_engine::space::Space;

use super::pointwise::{self, Body};
use super::queue::{Gpu, Launch};
use super::view::{Access, View};
use super::wgsl::{self, SpaceParams};

/// Depth of a tile.
const DEPTH: usize = 16;
/// Threads along each side of a tile.
const SIDE: usize = 16;

/// Rows and columns of a thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Tiling {
    rows: usize,
    cols: usize,
}

impl Tiling {
    /// As large as the result keeps busy.
    fn of(m: usize, n: usize) -> Self {
        let each = |size: usize| match size {
            0..=16 => 1,
            17..=32 => 2,
            _ => 4,
        };
        Self { rows: each(m), cols: each(n) }
    }
}

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
    let rank = out.dims.len();
    let ((m, n), (_, k)) = (sides(out), sides(a));
    if let Some(large) = [out, a, b].into_iter().find(|v| !gpu.bounds.binding.fits(v))
        && let Some(axis) = large.longest_axis()
    {
        return in_parts(gpu, [a, b, out], bias, accumulate, large, axis);
    }
    let views = [Some(a), Some(b), Some(out), bias];
    let batch = Space::new(&out.dims[..rank - 2], &[a, b, out].map(|v| &v.strides[..rank - 2]), 0..rank - 2);
    let tiling = Tiling::of(m, n);
    let stride = |v: &View, from_end: usize| v.strides[v.dims.len() - from_end];
    let outer_even = out.strides[..rank - 1].iter().all(|s| s % 2 == 0);
    let paired = out.is_half()
        && tiling.cols > 1
        && n % 2 == 0
        && stride(out, 1) == 1
        && out.offset.is_multiple_of(2)
        && (outer_even || (m == 1 && rank == 2));
    let access = [Access::Read, Access::Read, Access::pairs_if(paired), Access::Read];
    let operands: Vec<(&View, Access)> = views.into_iter().zip(access).filter_map(|(v, a)| Some((v?, a))).collect();
    let (tile_rows, tile_cols) = (m.div_ceil(SIDE * tiling.rows), n.div_ceil(SIDE * tiling.cols));
    let workgroups = batch.len() * tile_rows * tile_cols;
    let mut params: Vec<u32> = [
        m,
        n,
        k,
        tile_rows,
        tile_cols,
        workgroups,
        stride(a, 2),
        stride(a, 1),
        stride(b, 2),
        stride(b, 1),
        stride(out, 2),
        stride(out, 1),
        bias.map_or(0, |b| b.strides[0]),
    ]
    .map(|n| n as u32)
    .to_vec();
    params.extend(wgsl::space_values(&batch));
    // Neighbouring threads load neighbouring elements.
    let text = Text {
        tiling,
        a_along_k: stride(a, 1) <= stride(a, 2),
        b_along_n: stride(b, 1) <= stride(b, 2),
        bias: bias.is_some(),
        accumulate,
        paired,
        batch: batch.dims.len(),
    };
    let launch = Launch { name: "matmul", shape: text.key(), operands: &operands, params: &params, workgroups };
    gpu.launch(&launch, || text.source(operands.len()))
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

/// What the kernel's text depends on.
#[derive(Clone, Copy, Debug)]
struct Text {
    tiling: Tiling,
    a_along_k: bool,
    b_along_n: bool,
    bias: bool,
    accumulate: bool,
    paired: bool,
    batch: usize,
}

impl Text {
    fn key(&self) -> Vec<u64> {
        let flags = [self.a_along_k, self.b_along_n, self.bias, self.accumulate, self.paired];
        let sizes = [self.tiling.rows, self.tiling.cols, self.batch].map(|n| n as u64);
        sizes.into_iter().chain(flags.map(u64::from)).collect()
    }

    fn source(&self, operands: usize) -> String {
        let Tiling { rows, cols } = self.tiling;
        let p = |i: usize| wgsl::param(operands + i);
        let [m, n, k, tile_rows, tile_cols, workgroups] = std::array::from_fn(p);
        let [am, ak, bk, bn, om, on, bias] = std::array::from_fn(|i| p(6 + i));
        let batch = SpaceParams { first: operands + 13, rank: self.batch, operands: 3 };
        let (height, width) = (SIDE * rows, SIDE * cols);
        let mut main = format!(
            "  if group >= {workgroups} {{ return; }}
  let row0 = (group / {tile_cols} % {tile_rows}) * {height}u;
  let col0 = (group % {tile_cols}) * {width}u;
  let tx = index % {SIDE}u;
  let ty = index / {SIDE}u;
  var o0 = {};
  var o1 = {};
  var o2 = {};
",
            wgsl::param(0),
            wgsl::param(1),
            wgsl::param(2)
        );
        main += &batch.locate(&format!("(group / ({tile_rows} * {tile_cols}))"), "o");
        for (i, j) in cells(rows, cols) {
            main += &format!("  var c{i}_{j} = 0.0;\n");
        }
        let place = |along: bool, size: usize| {
            if along {
                format!("e % {DEPTH}u; let s = e / {DEPTH}u;")
            } else {
                format!("e / {size}u; let s = e % {size}u;")
            }
        };
        let b_place = if self.b_along_n { place(false, width) } else { place(true, width) };
        main += &format!(
            "  for (var k0 = 0u; k0 < {k}; k0 += {DEPTH}u) {{
    for (var e = index; e < {}u; e += 256u) {{
      let d = {}
      var v = 0.0;
      if row0 + s < {m} && k0 + d < {k} {{ v = load0(o0 + (row0 + s) * {am} + (k0 + d) * {ak}); }}
      left[d * {height}u + s] = v;
    }}
    for (var e = index; e < {}u; e += 256u) {{
      let d = {b_place}
      var v = 0.0;
      if col0 + s < {n} && k0 + d < {k} {{ v = load1(o1 + (k0 + d) * {bk} + (col0 + s) * {bn}); }}
      right[d * {width}u + s] = v;
    }}
    workgroupBarrier();
    for (var d = 0u; d < {DEPTH}u; d++) {{
",
            DEPTH * height,
            place(self.a_along_k, height),
            DEPTH * width,
        );
        (0..rows).for_each(|i| main += &format!("      let a{i} = left[d * {height}u + ty * {rows}u + {i}u];\n"));
        (0..cols).for_each(|j| main += &format!("      let b{j} = right[d * {width}u + tx * {cols}u + {j}u];\n"));
        for (i, j) in cells(rows, cols) {
            main += &format!("      c{i}_{j} = fma(a{i}, b{j}, c{i}_{j});\n");
        }
        main += "    }\n    workgroupBarrier();\n  }\n";
        for i in 0..rows {
            main += &format!("  {{ let row = row0 + ty * {rows}u + {i}u;\n  if row < {m} {{\n");
            for j in (0..cols).step_by(if self.paired { 2 } else { 1 }) {
                let at = |j: usize| format!("o2 + row * {om} + (col + {j}u) * {on}");
                let value = |j: usize, step: usize| {
                    let mut value = format!("c{i}_{j}");
                    if self.bias {
                        value += &format!(" + load3({} + (col + {step}u) * {bias})", wgsl::param(3));
                    }
                    if self.accumulate {
                        value += &format!(" + load2({})", at(step));
                    }
                    value
                };
                main += &format!("  {{ let col = col0 + tx * {cols}u + {j}u;\n  if col < {n} {{ ");
                main += &if self.paired {
                    format!("store2_2({}, {}, {});", at(0), value(j, 0), value(j + 1, 1))
                } else {
                    format!("store2({}, {});", at(0), value(j, 0))
                };
                main += " } }\n";
            }
            main += "  } }\n";
        }
        let shared = format!(
            "var<workgroup> left: array<f32, {}>;\nvar<workgroup> right: array<f32, {}>;\n",
            DEPTH * height,
            DEPTH * width
        );
        shared + &wgsl::entry(&main)
    }
}

fn cells(rows: usize, cols: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).flat_map(move |i| (0..cols).map(move |j| (i, j)))
}
