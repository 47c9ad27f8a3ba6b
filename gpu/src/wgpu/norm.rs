//! LayerNorm and RMSNorm, forward and backward, plain, with a modulation or with a rotation: some lanes of a workgroup take a
//! row.
//!
//! What the composition would write between the norm and what comes after it is rounded here as well. Sums over rows, the
//! gradients of shift, scale and a rotated norm's weight, are reductions of their own, whose terms are not rounded.

use std::ops::Range;

use flowtape_engine::Result;
use flowtape_engine::expr::{Function, Program, Reduce};
use flowtape_engine::ops::RopeLayout;
use flowtape_engine::space::Space;

use super::pointwise::{self, Body, halves};
use super::queue::{Gpu, Launch};
use super::reduce;
use super::view::{Access, View};
use super::wgsl::{self, SpaceParams, THREADS};

/// What becomes of a normalised row.
#[derive(Clone, Copy, Debug)]
pub(super) enum Then {
    /// `x weight + bias`, where there are such.
    Affine { weight: bool, bias: bool },
    /// `x (1 + scale) + shift`; operands shift and scale, of which the gradient needs scale alone.
    Modulation,
    /// `x weight`, its pairs turned; operands weight, cosines and sines.
    Rotation(RopeLayout),
}

/// LayerNorm (`centred`) or RMSNorm, and what comes after it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norm {
    pub(super) centred: bool,
    pub(super) then: Then,
}

impl Norm {
    /// LayerNorm with a modulation.
    pub(super) const MODULATED: Self = Self { centred: true, then: Then::Modulation };

    /// RMSNorm with a rotation.
    pub(super) fn rotated(layout: RopeLayout) -> Self {
        Self { centred: false, then: Then::Rotation(layout) }
    }

    /// What the text depends on.
    fn key(&self) -> u64 {
        let then = match self.then {
            Then::Affine { weight, bias } => u64::from(weight) + 2 * u64::from(bias),
            Then::Modulation => 4,
            Then::Rotation(RopeLayout::Interleaved) => 5,
            Then::Rotation(RopeLayout::Split) => 6,
        };
        2 * then + u64::from(self.centred)
    }

    /// Element `i` turned forward or back by the operands `cos` and `sin`, `value` being that of an element not yet turned.
    fn turned(&self, back: bool, [cos, sin]: [usize; 2], i: &str, value: impl Fn(&str) -> String) -> String {
        let Then::Rotation(layout) = self.then else { return value(i) };
        let (partner, first) = match layout {
            RopeLayout::Interleaved => (format!("({i} ^ 1u)"), format!("({i} & 1u) == 0u")),
            RopeLayout::Split => {
                let first = format!("{i} < width / 2u");
                (format!("select({i} - width / 2u, {i} + width / 2u, {first})"), first)
            }
        };
        // Forward a pair's first element loses, back its second one.
        let sine = at(sin, if back { &partner } else { i });
        let signed = if back {
            format!("select(-{sine}, {sine}, {first})")
        } else {
            format!("select({sine}, -{sine}, {first})")
        };
        format!("({} * {} + {} * {signed})", value(i), at(cos, i), value(&partner))
    }
}

/// Element `i` of a row of operand `o`.
fn at(o: usize, i: &str) -> String {
    format!("load{o}(o{o} + ({i}) * s{o})")
}

/// Writes a row of operand `o`, element by element or in pairs; `value` is the text of element `i`.
fn written(o: usize, pairs: bool, value: impl Fn(&str) -> String) -> String {
    if pairs {
        let [a, b] = ["i", "(i + 1u)"].map(value);
        return format!("  for (var i = 2u * lane; i < end; i += 2u * L) {{ store2_{o}(o{o} + i, {a}, {b}); }}\n");
    }
    format!("  for (var i = lane; i < end; i += L) {{ store{o}(o{o} + i * s{o}, {}); }}\n", value("i"))
}

/// Lanes of a row.
fn lanes(width: usize) -> usize {
    (width / 4).next_power_of_two().clamp(8, THREADS)
}

/// The text around a row's work: where the row lies, and the sum of all its lanes.
fn source(operands: usize, rank: usize, lanes: usize, body: &str) -> String {
    let space = SpaceParams { first: 2 * operands + 3, rank, operands };
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

/// A kernel on rows.
struct Kernel<'a> {
    name: &'static str,
    norm: Norm,
    eps: f64,
    /// The operands that are written: first one with rows, then numbers.
    written: Range<usize>,
    /// Its text, given whether rows are written in pairs.
    body: &'a dyn Fn(bool) -> String,
}

impl Kernel<'_> {
    /// Runs it on operands that have a row, or a value, for each row of the first; `false` where a row fits no binding. What a
    /// binding does not hold is done in halves.
    fn run(&self, gpu: &Gpu, operands: &[View]) -> Result<bool> {
        let last = operands[0].dims.len() - 1;
        if let Some(large) = operands.iter().find(|v| !gpu.bounds.binding.fits(v)) {
            let Some(axis) = large.narrow(last, 0, 1).longest_axis() else { return Ok(false) };
            let [first, second] = halves(operands, axis);
            return Ok(self.run(gpu, &first)? && self.run(gpu, &second)?);
        }
        let strides: Vec<&[usize]> = operands.iter().map(|v| &v.strides[..last]).collect();
        let space = Space::new(&operands[0].dims[..last], &strides, 0..last);
        let (rows, rank, width) = (space.len(), space.dims.len(), operands[0].dims[last]);
        let lanes = lanes(width);
        let pairs = operands[self.written.start].pairs(last);
        let access = |o: usize| match o {
            _ if o == self.written.start => Access::pairs_if(pairs),
            _ if self.written.contains(&o) => Access::Write,
            _ => Access::Read,
        };
        let bound: Vec<(&View, Access)> = operands.iter().enumerate().map(|(o, v)| (v, access(o))).collect();
        let mut params = vec![rows as u32, width as u32, (self.eps as f32).to_bits()];
        params.extend(operands.iter().map(|v| v.strides[last] as u32));
        params.extend(wgsl::space_values(&space));
        let launch = Launch {
            name: self.name,
            shape: vec![lanes as u64, rank as u64, self.norm.key()],
            operands: &bound,
            params: &params,
            workgroups: rows.div_ceil(THREADS / lanes),
        };
        gpu.launch(&launch, || source(operands.len(), rank, lanes, &(self.body)(pairs)))?;
        Ok(true)
    }
}

/// A vector for each row of `dims`, from one that many rows share.
fn shared(vector: &View, dims: &[usize]) -> Result<View> {
    match vector.dims.len() {
        // Tables `[L, d]` of rows `[B, L, H, d]`.
        2 => vector.unsqueezed(1).expanded(dims),
        _ => vector.expanded(dims),
    }
}

/// What [`Norm`] says of x, and the statistics of each row. Inputs x, then what [`Then`] names; outputs y, then the mean where
/// centred, and the reciprocal deviation.
pub(super) fn forward(gpu: &Gpu, norm: Norm, eps: f64, inputs: &[View], outputs: &[View]) -> Result<bool> {
    let x = &inputs[0];
    let mut operands: Vec<View> = [x].into_iter().chain(outputs).cloned().collect();
    for vector in &inputs[1..] {
        operands.push(shared(vector, &x.dims)?);
    }
    let scale = outputs.len();
    let more = scale + 1;
    let normed = |i: &str| format!("(({} - mean) * scale)", at(0, i));
    let value = |i: &str| match norm.then {
        Then::Affine { weight, bias } => {
            let weighted = if weight { format!("{} * {}", normed(i), at(more, i)) } else { normed(i) };
            if bias { format!("{weighted} + {}", at(more + usize::from(weight), i)) } else { weighted }
        }
        Then::Modulation => format!("fma(rounded1({}), 1.0 + {}, {})", normed(i), at(more + 1, i), at(more, i)),
        Then::Rotation(_) => {
            norm.turned(false, [more + 1, more + 2], i, |i| format!("rounded1({} * {})", normed(i), at(more, i)))
        }
    };
    let body = |pairs| {
        let mut body = String::new();
        if norm.centred {
            body += "  var sum = 0.0;
  for (var i = lane; i < end; i += L) { sum += load0(o0 + i * s0); }
  let mean = total(index, sum) / f32(width);
  if there && lane == 0u { store2(o2, mean); }
";
        } else {
            body += "  let mean = 0.0;\n";
        }
        body += &format!(
            "  var squares = 0.0;
  for (var i = lane; i < end; i += L) {{ let d = load0(o0 + i * s0) - mean; squares = fma(d, d, squares); }}
  let scale = 1.0 / sqrt(total(index, squares) / f32(width) + {});
  if there && lane == 0u {{ store{scale}(o{scale}, scale); }}
",
            wgsl::float_param(operands.len() + 2)
        );
        body + &written(1, pairs, value)
    };
    Kernel { name: "norm_forward", norm, eps, written: 1..more, body: &body }.run(gpu, &operands)
}

/// `dx = s (gw - mean(gw) - x̂ mean(gw x̂))`; RMSNorm has no middle term. Inputs x, grad, scale, mean where centred, then what
/// [`Then`] names; gw is the gradient of the normalised row.
pub(super) fn backward(gpu: &Gpu, norm: Norm, inputs: &[View], dx: &View) -> Result<bool> {
    let out = 3 + usize::from(norm.centred);
    let more = out + 1;
    let mut operands: Vec<View> = inputs[..out].iter().chain([dx]).cloned().collect();
    for vector in &inputs[out..] {
        operands.push(shared(vector, &dx.dims)?);
    }
    let grad = |i: &str| match norm.then {
        Then::Affine { weight: true, .. } => format!("{} * {}", at(1, i), at(more, i)),
        Then::Affine { .. } => at(1, i),
        Then::Modulation => format!("rounded{out}({} * (1.0 + {}))", at(1, i), at(more, i)),
        Then::Rotation(_) => {
            let turned = norm.turned(true, [more + 1, more + 2], i, |i| at(1, i));
            format!("rounded{out}({turned}) * {}", at(more, i))
        }
    };
    let body = |pairs| {
        let mut body = String::from("  var scale = 0.0;\n  var mean = 0.0;\n  if there {\n    scale = load2(o2);\n");
        if norm.centred {
            body += "    mean = load3(o3);\n";
        }
        body += "  }\n  var sum = 0.0;\n  var dot = 0.0;\n";
        let hat = |i: &str| format!("({} - mean) * scale", at(0, i));
        body += &format!(
            "  for (var i = lane; i < end; i += L) {{
    let g = {};
    sum += g;
    dot = fma(g, {}, dot);
  }}
  let b = total(index, dot) / f32(width);
",
            grad("i"),
            hat("i")
        );
        body += if norm.centred { "  let a = total(index, sum) / f32(width);\n" } else { "  let a = 0.0;\n" };
        body + &written(out, pairs, |i| format!("scale * ({} - a - {} * b)", grad(i), hat(i)))
    };
    Kernel { name: "norm_backward", norm, eps: 0.0, written: out..more, body: &body }.run(gpu, &operands)
}

/// The gradients of x, shift and scale; the latter are sums over the rows that share them. Inputs x, grad, mean, the
/// reciprocal deviation and scale.
pub(super) fn modulated_backward(gpu: &Gpu, inputs: &[View], outputs: &[View]) -> Result<bool> {
    let ([x, grad, mean, deviation, scale], [dx, sums @ ..]) = (inputs, outputs) else { return Ok(false) };
    let program = Program::of(&Function::build(|[x, g, m, s]| [g, g * ((x - m) * s)]));
    let terms = inputs[..4].iter().map(|v| v.expanded(&x.dims)).collect::<Result<Vec<_>>>()?;
    if scale.dims == x.dims {
        pointwise::run(gpu, Body::Program(&program), &terms, &[], sums)?;
    } else {
        reduce::run(gpu, &program, Reduce::Sum, &terms, &[], sums)?;
    }
    backward(gpu, Norm::MODULATED, &[x, grad, deviation, mean, scale].map(View::clone), dx)
}

/// The gradients of x and the weight; the latter is a sum over all rows, of both elements of each pair at once. Inputs x,
/// grad, the reciprocal root mean square, weight, cosines and sines.
pub(super) fn rotated_backward(gpu: &Gpu, layout: RopeLayout, inputs: &[View], outputs: &[View]) -> Result<bool> {
    let ([x, grad, scale, _, cos, sin], [dx, dw]) = (inputs, outputs) else { return Ok(false) };
    let program = Program::of(&Function::build(|[x0, x1, g0, g1, c0, c1, s0, s1, scale]| {
        [(g0 * c0 + g1 * s1) * (x0 * scale), (g1 * c1 - g0 * s0) * (x1 * scale)]
    }));
    let pairs = [x, grad, &shared(cos, &x.dims)?, &shared(sin, &x.dims)?].map(|v| v.halved(layout));
    let scale = scale.expanded(&pairs[0][0].dims)?;
    let terms: Vec<View> = pairs.into_iter().flatten().chain([scale]).collect();
    let sums = dw.expanded(&[1, 1, 1, dw.dims[0]])?.halved(layout);
    reduce::run(gpu, &program, Reduce::Sum, &terms, &[], &sums)?;
    backward(gpu, Norm::rotated(layout), inputs, dx)
}
