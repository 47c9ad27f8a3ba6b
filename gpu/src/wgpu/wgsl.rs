//! Kernels as text: bindings, loads and stores of each dtype, programs.
//!
//! All memory is bound as words. Operand `i` is read by `load{i}(at) -> f32` or `raw{i}(at) -> u32` and written by
//! `store{i}`, `put{i}` or, two at once, `store2_{i}` and `put2_{i}`; `at` counts elements from the binding's start. Four
//! neighbours are read by `load4_{i}(at) -> vec4<f32>`, where `at` is a multiple of four; `rounded{i}(x) -> f32` is what
//! `store{i}` would keep of a number; `raise{i}` keeps a word's maximum.

use std::fmt::Write;

use flowtape_engine::DType;
use flowtape_engine::expr::{Lowered, Reduce, Step};

use super::view::{Access, Binding, Plan, View};

/// Threads of a workgroup.
pub(super) const THREADS: usize = 256;

/// What every kernel may use. Bits that are not finite are no constants in WGSL: they pass through a function.
const PRELUDE: &str = "
fn bits(b: u32) -> f32 { return bitcast<f32>(b); }
fn integer(b: u32) -> i32 { return bitcast<i32>(b); }
fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }
fn larger(a: f32, b: f32) -> f32 { return select(select(b, a, a > b), a, is_nan(a)); }
fn smaller(a: f32, b: f32) -> f32 { return select(select(b, a, a < b), a, is_nan(a)); }
fn widen_bf16(h: u32) -> f32 { return bitcast<f32>(h << 16u); }
fn quad_bf16(h: vec2<u32>) -> vec4<f32> {
  return bitcast<vec4<f32>>(vec4<u32>(h.x << 16u, h.x & 0xffff0000u, h.y << 16u, h.y & 0xffff0000u));
}
fn quad_f16(h: vec2<u32>) -> vec4<f32> {
  return vec4<f32>(widen_f16(h.x & 0xffffu), widen_f16(h.x >> 16u), widen_f16(h.y & 0xffffu), widen_f16(h.y >> 16u));
}
fn narrow_bf16(x: f32) -> u32 {
  let b = bitcast<u32>(x);
  return select((b + 0x7fffu + ((b >> 16u) & 1u)) >> 16u, (b >> 16u) | 0x40u, is_nan(x));
}
fn widen_f16(h: u32) -> f32 {
  let sign = (h & 0x8000u) << 16u;
  let rest = h & 0x7fffu;
  let special = (rest << 13u) + 0x70000000u;
  let normal = (rest << 13u) + 0x38000000u;
  let small = bitcast<u32>(f32(rest) * 0x1p-24);
  return bitcast<f32>(sign | select(select(normal, special, rest >= 0x7c00u), small, rest < 0x400u));
}
fn narrow_f16(x: f32) -> u32 {
  let b = bitcast<u32>(x);
  let sign = (b >> 16u) & 0x8000u;
  let rest = b & 0x7fffffffu;
  let normal = ((rest + 0xfffu + ((rest >> 13u) & 1u)) - 0x38000000u) >> 13u;
  let small = u32(round(bitcast<f32>(rest) * 0x1p24));
  let finite = min(select(normal, small, rest < 0x38800000u), 0x7c00u);
  return sign | select(select(finite, 0x7c00u, rest >= 0x47800000u), 0x7e00u, rest > 0x7f800000u);
}
";

/// The text of parameter `i`, a u32.
pub(super) fn param(i: usize) -> String {
    format!("P[{}][{}]", i / 4, i % 4)
}

/// The same as an f32.
pub(super) fn float_param(i: usize) -> String {
    format!("bits({})", param(i))
}

/// The declarations of a kernel: parameters, bindings, and how each operand is read and written.
pub(super) fn header(operands: &[(&View, Access)], plan: &Plan, params: usize) -> String {
    let mut out = String::from(PRELUDE);
    let vectors = params.div_ceil(4).max(1);
    let _ = writeln!(out, "@group(0) @binding(0) var<uniform> P: array<vec4<u32>, {vectors}>;");
    for (i, binding) in plan.bindings.iter().enumerate() {
        let access = if binding.written { "read_write" } else { "read" };
        let word = match binding.vector {
            1 if binding.atomic => "atomic<u32>",
            1 => "u32",
            2 => "vec2<u32>",
            _ => "vec4<u32>",
        };
        let _ = writeln!(out, "@group(0) @binding({}) var<storage, {access}> B{i}: array<{word}>;", i + 1);
    }
    for (i, ((view, access), &b)) in operands.iter().zip(&plan.places).enumerate() {
        let Binding { atomic, vector, .. } = plan.bindings[b];
        out += &accessors(i, view, *access, b, (atomic, vector));
    }
    out
}

fn accessors(i: usize, view: &View, access: Access, b: usize, (atomic, vector): (bool, usize)) -> String {
    let word = |at: &str| match vector {
        1 if atomic => format!("atomicLoad(&B{b}[{at}])"),
        1 => format!("B{b}[{at}]"),
        _ => format!("B{b}[({at}) / {vector}u][({at}) % {vector}u]"),
    };
    let set =
        |at: &str, v: &str| if atomic { format!("atomicStore(&B{b}[{at}], {v})") } else { format!("B{b}[{at}] = {v}") };
    let (widen, narrow) = match view.dtype {
        DType::BF16 => ("widen_bf16(h)", "narrow_bf16(x)"),
        DType::F16 => ("widen_f16(h)", "narrow_f16(x)"),
        DType::U32 => ("f32(h)", "u32(x)"),
        DType::F32 | DType::F64 => ("bits(h)", "bitcast<u32>(x)"),
    };
    let mut out = String::new();
    let read =
        if view.is_half() { format!("({} >> ((at & 1u) << 4u)) & 0xffffu", word("at >> 1u")) } else { word("at") };
    let _ = writeln!(out, "fn raw{i}(at: u32) -> u32 {{ return {read}; }}");
    let _ = writeln!(out, "fn load{i}(at: u32) -> f32 {{ let h = raw{i}(at); return {widen}; }}");
    if access == Access::ReadQuads {
        let _ = writeln!(out, "fn load4_{i}(at: u32) -> vec4<f32> {{ {} }}", quad(i, view, b, vector));
    }
    if matches!(access, Access::Read | Access::ReadQuads) {
        return out;
    }
    if access == Access::Raise {
        let _ = writeln!(out, "fn raise{i}(at: u32, h: u32) {{ atomicMax(&B{b}[at], h); }}");
        return out;
    }
    let (put, put2) = if !view.is_half() {
        (format!("{};", set("at", "h")), format!("{}; {};", set("at", "h0"), set("at + 1u", "h1")))
    } else {
        let pair = format!("{};", set("at >> 1u", "h0 | (h1 << 16u)"));
        let one = format!(
            "let s = (at & 1u) << 4u; atomicAnd(&B{b}[at >> 1u], ~(0xffffu << s)); atomicOr(&B{b}[at >> 1u], (h & 0xffffu) << s);"
        );
        match (access, atomic) {
            (Access::WritePairs, _) => (String::new(), pair),
            _ => (one, format!("put{i}(at, h0); put{i}(at + 1u, h1);")),
        }
    };
    if !put.is_empty() {
        let _ = writeln!(out, "fn put{i}(at: u32, h: u32) {{ {put} }}");
        let _ = writeln!(out, "fn store{i}(at: u32, x: f32) {{ put{i}(at, {narrow}); }}");
    }
    let _ = writeln!(out, "fn narrow{i}(x: f32) -> u32 {{ return {narrow}; }}");
    let _ = writeln!(out, "fn rounded{i}(x: f32) -> f32 {{ let h = narrow{i}(x); return {widen}; }}");
    let _ = writeln!(out, "fn put2_{i}(at: u32, h0: u32, h1: u32) {{ {put2} }}");
    let _ = writeln!(out, "fn store2_{i}(at: u32, x: f32, y: f32) {{ put2_{i}(at, narrow{i}(x), narrow{i}(y)); }}");
    out
}

/// Four neighbours of operand `i`.
fn quad(i: usize, view: &View, b: usize, vector: usize) -> String {
    let widen = if view.dtype == DType::BF16 { "quad_bf16" } else { "quad_f16" };
    match (vector, view.is_half()) {
        (4, false) => format!("return bitcast<vec4<f32>>(B{b}[at / 4u]);"),
        (4, true) => format!("let h = B{b}[at / 8u]; return {widen}(select(h.xy, h.zw, (at & 4u) != 0u));"),
        (2, true) => format!("return {widen}(B{b}[at / 4u]);"),
        _ => format!("return vec4<f32>(load{i}(at), load{i}(at + 1u), load{i}(at + 2u), load{i}(at + 3u));"),
    }
}

/// A program as `fn {name}(x0: f32, …, s0: f32, …) -> array<f32, outputs>`.
pub(super) fn function(name: &str, program: &Lowered) -> String {
    let arguments: Vec<String> = (0..program.inputs)
        .map(|i| format!("x{i}: f32"))
        .chain((0..program.scalars).map(|i| format!("s{i}: f32")))
        .collect();
    let count = program.outputs.len();
    let mut out = format!("fn {name}({}) -> array<f32, {count}> {{\n", arguments.join(", "));
    for (at, step) in program.steps.iter().enumerate() {
        let _ = writeln!(out, "  let v{at} = {};", expression(*step));
    }
    let results: Vec<String> = program.outputs.iter().map(|v| format!("v{v}")).collect();
    let _ = writeln!(out, "  return array<f32, {count}>({});\n}}", results.join(", "));
    out
}

fn expression(step: Step) -> String {
    match step {
        Step::Input(i) => format!("x{i}"),
        Step::Scalar(i) => format!("s{i}"),
        Step::Const(b) => format!("bits({b}u)"),
        Step::Neg(a) => format!("-v{a}"),
        Step::Abs(a) => format!("abs(v{a})"),
        Step::Sqrt(a) => format!("sqrt(v{a})"),
        Step::Round(a) => format!("round(v{a})"),
        Step::Add(a, b) | Step::IntAdd(a, b) => format!("v{a} + v{b}"),
        Step::Sub(a, b) | Step::IntSub(a, b) => format!("v{a} - v{b}"),
        Step::Mul(a, b) => format!("v{a} * v{b}"),
        Step::Div(a, b) => format!("v{a} / v{b}"),
        Step::Max(a, b) => format!("larger(v{a}, v{b})"),
        Step::Min(a, b) => format!("smaller(v{a}, v{b})"),
        Step::MulAdd(a, b, c) => format!("fma(v{a}, v{b}, v{c})"),
        Step::Select(a, b, c, d) => format!("select(v{d}, v{c}, v{a} < v{b})"),
        Step::Float(a) => format!("bitcast<f32>(v{a})"),
        Step::FromInt(a) => format!("f32(v{a})"),
        Step::Bits(a) => format!("bitcast<i32>(v{a})"),
        Step::ToInt(a) => format!("i32(v{a})"),
        Step::Int(n) => format!("integer({}u)", n as u32),
        Step::And(a, b) => format!("v{a} & v{b}"),
        Step::Xor(a, b) => format!("v{a} ^ v{b}"),
        Step::ShiftLeft(a, n) => format!("v{a} << {n}u"),
        Step::ShiftRight(a, n) => format!("v{a} >> {n}u"),
    }
}

/// Whether a program reads input `i`.
pub(super) fn reads(program: &Lowered, i: usize) -> bool {
    let at = program.steps.iter().position(|s| *s == Step::Input(i as u32));
    at.is_some_and(|at| {
        let at = at as u32;
        program.outputs.contains(&at) || program.steps.iter().any(|s| s.operands().any(|v| v == at))
    })
}

/// How two partial results become one.
pub(super) fn combined(kind: Reduce, a: &str, b: &str) -> String {
    match kind {
        Reduce::Sum => format!("{a} + {b}"),
        Reduce::Max => format!("larger({a}, {b})"),
    }
}

/// The result of no element.
pub(super) fn neutral(kind: Reduce) -> &'static str {
    match kind {
        Reduce::Sum => "0.0",
        Reduce::Max => "bits(0xff800000u)",
    }
}

/// A kernel of `threads` threads a workgroup: `index` is the thread's place in its workgroup, `group` that of the
/// workgroup among all, however they are folded. `more` are further arguments.
pub(super) fn entry_of(threads: usize, more: &str, body: &str) -> String {
    format!(
        "@compute @workgroup_size({threads})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) index: u32{more}) {{
  let group = (wg.z * wgs.y + wg.y) * wgs.x + wg.x;
{body}}}
"
    )
}

/// The same, of [`THREADS`].
pub(super) fn entry(body: &str) -> String {
    entry_of(THREADS, "", body)
}

/// Parameters of an iteration space: sizes, then strides by operand; and the code that walks it.
#[derive(Clone, Copy, Debug)]
pub(super) struct SpaceParams {
    /// The first parameter.
    pub(super) first: usize,
    pub(super) rank: usize,
    pub(super) operands: usize,
}

impl SpaceParams {
    /// The parameter after the last.
    pub(super) fn end(&self) -> usize {
        self.first + self.rank * (1 + self.operands)
    }

    /// The stride of an operand along an axis.
    pub(super) fn stride(&self, operand: usize, axis: usize) -> String {
        param(self.first + self.rank * (1 + operand) + axis)
    }

    /// Adds to `{to}{operand}` where position `{index}` lies, row-major.
    pub(super) fn locate(&self, index: &str, to: &str) -> String {
        let mut out = String::new();
        if self.rank == 0 {
            return out;
        }
        let _ = writeln!(out, "  {{ var rest = {index};");
        for axis in (0..self.rank).rev() {
            if axis == 0 {
                let _ = writeln!(out, "  let c0 = rest;");
            } else {
                let size = param(self.first + axis);
                let _ = writeln!(out, "  let c{axis} = rest % {size}; rest = rest / {size};");
            }
            for operand in 0..self.operands {
                let _ = writeln!(out, "  {to}{operand} += c{axis} * {};", self.stride(operand, axis));
            }
        }
        out + "  }\n"
    }
}

/// The values of [`SpaceParams`].
pub(super) fn space_values(space: &flowtape_engine::space::Space) -> Vec<u32> {
    let strides = space.strides.iter().flatten();
    space.dims.iter().chain(strides).map(|&n| n as u32).collect()
}
