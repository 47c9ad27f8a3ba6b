//! Attention in tiles of 16 queries and 16 keys: only one tile of scores exists at a time (FlashAttention's scheme).
//!
//! Sixteen threads share a row of a tile. In a result `[row, d]` each of them keeps the columns `2 c`, `2 c + 1` of every
//! 32: pairs, so that halves are written in words.

use std::sync::Arc;

use flowtape_engine::Result;
use flowtape_engine::expr::{Expr, Function, Program, Reduce};

use super::queue::{Gpu, Launch};
use super::reduce;
use super::view::{Access, View};
use super::wgsl;

/// Rows and columns of a tile of scores.
const TILE: usize = 16;

/// Registers of a thread for a row of `width` columns.
fn registers(width: usize) -> usize {
    width.div_ceil(2 * TILE) * 2
}

/// What the kernels' texts depend on: widths of q and k, and of v; whether there is a mask.
#[derive(Clone, Copy, Debug)]
struct Shape {
    d: usize,
    dv: usize,
    masked: bool,
}

impl Shape {
    /// Words of workgroup memory: `tiles` that stay of q, k or v, and one that is filled anew; scores.
    fn words(&self, resident: usize, scores: usize) -> usize {
        TILE * (resident + self.d.max(self.dv)) + scores * TILE * TILE
    }

    fn key(&self) -> Vec<u64> {
        vec![self.d as u64, self.dv as u64, u64::from(self.masked)]
    }
}

fn exp() -> Arc<Program> {
    Program::of(&Function::build(|[x]| [Expr::exp(x)]))
}

fn log() -> Arc<Program> {
    Program::of(&Function::build(|[x]| [Expr::log(x)]))
}

/// Operand `i`'s strides along batch, head, row and column are parameters.
fn strides(views: &[(&View, Access)]) -> Vec<u32> {
    let four = |v: &View| {
        let mut four = [0; 4];
        four[..v.strides.len()].copy_from_slice(&v.strides);
        four.map(|s| s as u32)
    };
    views.iter().flat_map(|(v, _)| four(v)).collect()
}

/// Whether the last axis of a result is written in pairs.
fn pairs(v: &View) -> Access {
    let even = v.offset.is_multiple_of(2) && v.dims[3].is_multiple_of(2) && v.strides[3] == 1;
    let outer = v.strides[..3].iter().zip(&v.dims).all(|(s, d)| *d == 1 || s % 2 == 0);
    Access::pairs_if(v.is_half() && even && outer)
}

/// The text of a kernel: parameters are the offsets, then Lq, Lk, heads, workgroups, tiles, scale, then strides.
struct Text {
    operands: usize,
    shape: Shape,
    main: String,
    shared: String,
}

impl Text {
    fn new(operands: usize, shape: Shape) -> Self {
        let p = |i: usize| wgsl::param(operands + i);
        let mut main = format!(
            "  if group >= {} {{ return; }}
  let lq = {};
  let lk = {};
  let scale = {};
  let r = index / {TILE}u;
  let c = index % {TILE}u;
  let head = group / {tiles} % {heads};
  let batch = group / ({tiles} * {heads});
  let first = (group % {tiles}) * {TILE}u;
",
            p(3),
            p(0),
            p(1),
            wgsl::float_param(operands + 5),
            heads = p(2),
            tiles = p(4)
        );
        for o in 0..operands {
            let [sb, sh, ..] = Self::stride(operands, o);
            main += &format!("  let o{o} = {} + batch * {sb} + head * {sh};\n", wgsl::param(o));
        }
        Self { operands, shape, main, shared: String::new() }
    }

    fn stride(operands: usize, o: usize) -> [String; 4] {
        std::array::from_fn(|axis| wgsl::param(operands + 6 + 4 * o + axis))
    }

    /// Where element (`row`, `col`) of operand `o` lies.
    fn at(&self, o: usize, row: &str, col: &str) -> String {
        let [_, _, sr, sc] = Self::stride(self.operands, o);
        format!("o{o} + ({row}) * {sr} + ({col}) * {sc}")
    }

    fn tile(&mut self, name: &str, width: usize) {
        self.shared += &format!("var<workgroup> {name}: array<f32, {}>;\n", TILE * width);
    }

    /// Fills a tile with rows `first..` of operand `o`; what is past the end is zero.
    fn fill(&mut self, tile: &str, o: usize, width: usize, first: &str, len: &str) {
        let at = self.at(o, &format!("{first} + e / {width}u"), &format!("e % {width}u"));
        self.main += &format!(
            "  for (var e = index; e < {}u; e += 256u) {{
    var v = 0.0;
    if {first} + e / {width}u < {len} {{ v = load{o}({at}); }}
    {tile}[e] = v;
  }}
",
            TILE * width
        );
    }

    fn barrier(&mut self) {
        self.main += "  workgroupBarrier();\n";
    }

    fn push(&mut self, text: &str) {
        self.main += text;
    }

    /// `{to} = sum over d of a[row_a, d] * b[row_b, d]`.
    fn dot(&mut self, to: &str, (a, row_a): (&str, &str), (b, row_b): (&str, &str), width: usize) {
        self.main += &format!(
            "  var {to} = 0.0;
  for (var d = 0u; d < {width}u; d++) {{ {to} = fma({a}[{row_a} * {width}u + d], {b}[{row_b} * {width}u + d], {to}); }}
"
        );
    }

    /// The score of query `q` and key `k`, from the raw product `s`: scaled, masked, -inf past the end.
    fn score(&mut self, mask: usize, q: &str, k: &str) {
        let masked = if self.shape.masked {
            format!("s = s * scale + load{mask}({});", self.at(mask, q, k))
        } else {
            "s = s * scale;".into()
        };
        self.main += &format!("  if {q} < lq && {k} < lk {{ {masked} }} else {{ s = bits(0xff800000u); }}\n");
    }

    fn registers(&mut self, name: &str, width: usize) {
        (0..registers(width)).for_each(|j| self.main += &format!("  var {name}{j} = 0.0;\n"));
    }

    /// `{name}[r, ..] = fma(factor, tile[row, ..], {name}[r, ..])` for this thread's columns, over 16 rows `t`.
    fn accumulate(&mut self, name: &str, factor: &str, tile: &str, width: usize) {
        self.main += &format!("  for (var t = 0u; t < {TILE}u; t++) {{ let f = {factor};\n");
        for j in 0..registers(width) {
            let col = column(j);
            let guard = if width.is_multiple_of(2 * TILE) { String::new() } else { format!("if {col} < {width}u ") };
            self.main += &format!("    {guard}{{ {name}{j} = fma(f, {tile}[t * {width}u + {col}], {name}{j}); }}\n");
        }
        self.main += "  }\n";
    }

    /// Writes this thread's columns of row `row` of operand `o`, times `factor`.
    fn write(&mut self, o: usize, access: Access, name: &str, factor: &str, (row, len): (&str, &str), width: usize) {
        self.main += &format!("  if {row} < {len} {{\n");
        let step = if access == Access::WritePairs { 2 } else { 1 };
        for j in (0..registers(width)).step_by(step) {
            let (col, at) = (column(j), self.at(o, row, &column(j)));
            let value = |j: usize| format!("{name}{j} * {factor}");
            self.main += &format!("    if {col} < {width}u {{ ");
            self.main += &match step {
                2 => format!("store2_{o}({at}, {}, {});", value(j), value(j + 1)),
                _ => format!("store{o}({at}, {});", value(j)),
            };
            self.main += " }\n";
        }
        self.main += "  }\n";
    }

    fn finish(self) -> String {
        let functions = wgsl::function("exp1", exp().lowered()) + &wgsl::function("log1", log().lowered());
        functions + &self.shared + &wgsl::entry(&self.main)
    }
}

/// The column of register `j`.
fn column(j: usize) -> String {
    format!("({}u + 2u * c)", j / 2 * 2 * TILE + j % 2)
}

fn sizes(q: &View, k: &View, tiles: usize, scale: f64) -> (Vec<u32>, usize) {
    let workgroups = q.dims[0] * q.dims[1] * tiles;
    let sizes = [q.dims[2], k.dims[2], q.dims[1], workgroups, tiles].map(|n| n as u32);
    ([&sizes[..], &[(scale as f32).to_bits()]].concat(), workgroups)
}

/// `o = softmax(q k^T scale + mask) v` and the log-sum-exp of each row. Inputs q, k, v and maybe the mask.
pub(super) fn forward(gpu: &Gpu, scale: f64, inputs: &[View], o: &View, lse: &View) -> Result<bool> {
    let (q, k, v) = (&inputs[0], &inputs[1], &inputs[2]);
    let shape = Shape { d: q.dims[3], dv: v.dims[3], masked: inputs.len() > 3 };
    let views: Vec<&View> = inputs.iter().chain([o, lse]).collect();
    if !gpu.holds(&views) || 4 * shape.words(shape.d, 1) > gpu.bounds.shared {
        return Ok(false);
    }
    let n = inputs.len();
    let mut operands: Vec<(&View, Access)> = inputs.iter().map(|v| (v, Access::Read)).collect();
    operands.extend([(o, pairs(o)), (lse, Access::Write)]);
    let (mut params, workgroups) = sizes(q, k, q.dims[2].div_ceil(TILE), scale);
    params.extend(strides(&operands));
    let launch =
        Launch { name: "attention_forward", shape: shape.key(), operands: &operands, params: &params, workgroups };
    gpu.launch(&launch, || {
        let Shape { d, dv, .. } = shape;
        let mut text = Text::new(operands.len(), shape);
        text.tile("queries", d);
        text.tile("other", d.max(dv));
        text.tile("scores", TILE);
        text.fill("queries", 0, d, "first", "lq");
        text.push("  var largest = bits(0xff800000u);\n  var sum = 0.0;\n");
        text.registers("acc", dv);
        text.push(&format!("  for (var k0 = 0u; k0 < lk; k0 += {TILE}u) {{\n"));
        text.fill("other", 1, d, "k0", "lk");
        text.barrier();
        text.dot("s", ("queries", "r"), ("other", "c"), d);
        text.score(3, "(first + r)", "(k0 + c)");
        text.push("  scores[index] = s;\n");
        text.barrier();
        text.fill("other", 2, dv, "k0", "lk");
        // A row without keys so far has maximum -inf: 0 stands for it, so that no inf - inf appears.
        text.push(&format!(
            "  var next = largest;
  for (var t = 0u; t < {TILE}u; t++) {{ next = max(next, scores[r * {TILE}u + t]); }}
  let shift = select(next, 0.0, next < -3.4e38);
  let decay = exp1(largest - shift)[0];
  largest = next;
"
        ));
        text.barrier();
        text.push("  scores[index] = exp1(s - shift)[0];\n");
        text.barrier();
        text.push("  sum *= decay;\n");
        (0..registers(dv)).for_each(|j| text.push(&format!("  acc{j} *= decay;\n")));
        text.push(&format!("  for (var t = 0u; t < {TILE}u; t++) {{ sum += scores[r * {TILE}u + t]; }}\n"));
        text.accumulate("acc", &format!("scores[r * {TILE}u + t]"), "other", dv);
        text.barrier();
        text.push("  }\n  var factor = 0.0;\n  if sum > 0.0 { factor = 1.0 / sum; }\n");
        text.write(n, operands[n].1, "acc", "factor", ("(first + r)", "lq"), dv);
        let at = text.at(n + 1, "first + r", "0u");
        text.push(&format!(
            "  if c == 0u && first + r < lq {{
    store{}({at}, select(largest, 0.0, largest < -3.4e38) + log1(sum)[0]);
  }}
",
            n + 1
        ));
        text.finish()
    })?;
    Ok(true)
}

/// The gradients of q, k and v. Inputs q, k, v, o, the gradient of o, the log-sum-exp and maybe the mask.
pub(super) fn backward(gpu: &Gpu, scale: f64, inputs: &[View], outputs: &[View]) -> Result<bool> {
    let [q, k, v, o, g, lse] = std::array::from_fn(|i| &inputs[i]);
    let mask = inputs.get(6);
    let shape = Shape { d: q.dims[3], dv: v.dims[3], masked: mask.is_some() };
    let views: Vec<&View> = inputs.iter().chain(outputs).collect();
    if !gpu.holds(&views) || 4 * shape.words(shape.d + shape.dv, 2) > gpu.bounds.shared {
        return Ok(false);
    }
    // The sum of o g of each row, which every probability's gradient is taken off.
    let (_memory, delta) = gpu.scratch(&[&q.dims[..3], &[1]].concat())?;
    let product = Program::of(&Function::build(|[o, g]| [o * g]));
    reduce::run(gpu, &product, Reduce::Sum, &[o.clone(), g.clone()], &[], std::slice::from_ref(&delta))?;

    let common = [q, k, v, g, lse, &delta].map(|v| (v, Access::Read));
    let masks = mask.map(|m| (m, Access::Read));
    let (dq, dk, dv) = (&outputs[0], &outputs[1], &outputs[2]);
    for queries in [true, false] {
        let results: Vec<(&View, Access)> =
            if queries { vec![(dq, pairs(dq))] } else { vec![(dk, pairs(dk)), (dv, pairs(dv))] };
        let operands: Vec<(&View, Access)> =
            common.iter().copied().chain(masks).chain(results.iter().copied()).collect();
        let rows = if queries { q.dims[2] } else { k.dims[2] };
        let (mut params, workgroups) = sizes(q, k, rows.div_ceil(TILE), scale);
        params.extend(strides(&operands));
        let name = if queries { "attention_backward_queries" } else { "attention_backward_keys" };
        let launch = Launch { name, shape: shape.key(), operands: &operands, params: &params, workgroups };
        let out = operands.len() - results.len();
        gpu.launch(&launch, || {
            let text = Text::new(operands.len(), shape);
            if queries {
                backward_queries(text, out, results[0].1)
            } else {
                backward_keys(text, out, [results[0].1, results[1].1])
            }
        })?;
    }
    Ok(true)
}

/// A row without keys has log-sum-exp -inf; its probabilities are zero.
fn probability(text: &mut Text, query: &str) {
    let at = text.at(4, query, "0u");
    let at_delta = text.at(5, query, "0u");
    text.push(&format!(
        "  var p = 0.0;
  var delta = 0.0;
  if {query} < lq {{
    let lse = load4({at});
    delta = load5({at_delta});
    if lse > -3.4e38 {{ p = exp1(s - lse)[0]; }}
  }}
"
    ));
}

/// dq: queries and their gradients stay, keys and values pass by.
fn backward_queries(mut text: Text, out: usize, access: Access) -> String {
    let Shape { d, dv, .. } = text.shape;
    text.tile("queries", d);
    text.tile("grads", dv);
    text.tile("other", d.max(dv));
    text.tile("ds", TILE);
    text.fill("queries", 0, d, "first", "lq");
    text.fill("grads", 3, dv, "first", "lq");
    text.registers("acc", d);
    text.push(&format!("  for (var k0 = 0u; k0 < lk; k0 += {TILE}u) {{\n"));
    text.fill("other", 2, dv, "k0", "lk");
    text.barrier();
    text.dot("dp", ("grads", "r"), ("other", "c"), dv);
    text.barrier();
    text.fill("other", 1, d, "k0", "lk");
    text.barrier();
    text.dot("s", ("queries", "r"), ("other", "c"), d);
    text.score(6, "(first + r)", "(k0 + c)");
    probability(&mut text, "(first + r)");
    text.push("  ds[index] = p * (dp - delta) * scale;\n");
    text.barrier();
    text.accumulate("acc", &format!("ds[r * {TILE}u + t]"), "other", d);
    text.barrier();
    text.push("  }\n");
    text.write(out, access, "acc", "1.0", ("(first + r)", "lq"), d);
    text.finish()
}

/// dk and dv: keys and values stay, queries and their gradients pass by. Thread (r, c) has key r and query c.
fn backward_keys(mut text: Text, out: usize, access: [Access; 2]) -> String {
    let Shape { d, dv, .. } = text.shape;
    text.tile("keys", d);
    text.tile("values", dv);
    text.tile("other", d.max(dv));
    text.tile("ps", TILE);
    text.tile("ds", TILE);
    text.fill("keys", 1, d, "first", "lk");
    text.fill("values", 2, dv, "first", "lk");
    text.registers("acc", d);
    text.registers("out", dv);
    text.push(&format!("  for (var q0 = 0u; q0 < lq; q0 += {TILE}u) {{\n"));
    text.fill("other", 0, d, "q0", "lq");
    text.barrier();
    text.dot("s", ("other", "c"), ("keys", "r"), d);
    text.score(6, "(q0 + c)", "(first + r)");
    probability(&mut text, "(q0 + c)");
    text.push("  ps[index] = p;\n");
    text.barrier();
    text.fill("other", 3, dv, "q0", "lq");
    text.barrier();
    text.dot("dp", ("other", "c"), ("values", "r"), dv);
    text.push("  ds[index] = p * (dp - delta) * scale;\n");
    text.accumulate("out", &format!("ps[r * {TILE}u + t]"), "other", dv);
    text.barrier();
    text.fill("other", 0, d, "q0", "lq");
    text.barrier();
    text.accumulate("acc", &format!("ds[r * {TILE}u + t]"), "other", d);
    text.barrier();
    text.push("  }\n");
    text.write(out, access[0], "acc", "1.0", ("(first + r)", "lk"), d);
    text.write(out + 1, access[1], "out", "1.0", ("(first + r)", "lk"), dv);
    text.finish()
}
