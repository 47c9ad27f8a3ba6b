//! What the texts of attention's kernels share.

use std::sync::Arc;

use flowtape_engine::expr::{Expr, Function, Program};

use super::super::tile::{DEPTH, Side, Source, Tile};
use super::super::view::{Access, View};
use super::super::wgsl::{self, THREADS};

/// Threads along each side of a tile of scores.
pub(super) const SIDE: usize = 16;
/// Numbers of results that a thread may keep.
const REGISTERS: usize = 64;

/// What the kernels' texts depend on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    /// Widths of q and k, and of v.
    pub(super) d: usize,
    pub(super) dv: usize,
    pub(super) masked: bool,
    /// Queries and keys of a thread in a tile of scores.
    pub(super) queries: usize,
    pub(super) keys: usize,
}

impl Shape {
    /// The largest tiles that the sequences fill.
    pub(super) fn new(q: &View, k: &View, v: &View, masked: bool) -> Self {
        let each = |len: usize| match len {
            0..=16 => 1,
            17..=32 => 2,
            _ => 4,
        };
        Self { d: q.dims[3], dv: v.dims[3], masked, queries: each(q.dims[2]), keys: each(k.dims[2]) }
    }

    pub(super) fn key(&self) -> Vec<u64> {
        let sizes = [self.d, self.dv, self.queries, self.keys].map(|n| n as u64);
        sizes.into_iter().chain([u64::from(self.masked)]).collect()
    }

    /// The largest tiles up to these that pass `fits`.
    fn largest(self, fits: impl Fn(&Self) -> bool) -> Option<Self> {
        let at_most = |each| Self { queries: self.queries.min(each), keys: self.keys.min(each), ..self };
        [4, 2, 1].into_iter().map(at_most).find(fits)
    }

    /// What fits the workgroup memory and the registers of the forward kernel.
    pub(super) fn forward(self, shared: usize) -> Option<Self> {
        let registers = |s: &Self| s.queries * Side::columns(s.dv).each;
        self.largest(|s| s.bytes(s.query_side(), s.key_side(), s.dv) <= shared && registers(s) <= REGISTERS)
            .or_else(|| self.largest(|s| s.queries == 1 && s.bytes(s.query_side(), s.key_side(), s.dv) <= shared))
    }

    /// The same of both kernels of the backward pass.
    pub(super) fn backward(self, shared: usize) -> Option<Self> {
        let (d, dv) = (Side::columns(self.d), Side::columns(self.dv));
        let widest = self.d.max(self.dv);
        let fits = |s: &Self| {
            let (q, k) = (s.query_side(), s.key_side());
            s.bytes(q, k, widest).max(s.bytes(k, q, widest)) <= shared
        };
        let registers = |s: &Self| (s.keys * (d.each + dv.each)).max(s.queries * d.each);
        self.largest(|s| fits(s) && registers(s) <= REGISTERS)
            .or_else(|| self.largest(|s| s.queries == 1 && s.keys == 1 && fits(s)))
    }

    /// Workgroup memory: a tile of scores, slices of both factors.
    fn bytes(&self, rows: Side, cols: Side, width: usize) -> usize {
        let right = [cols, Side::columns(width)].map(|side| side.bytes(DEPTH));
        // Tiles of one vector width share memory; of two widths, both are there at the most.
        rows.bytes(cols.size()) + rows.bytes(DEPTH) + right[0].max(right[1]) + right[0].min(right[1]) / 2
    }

    pub(super) fn query_side(&self) -> Side {
        Side { threads: SIDE, each: self.queries }
    }

    pub(super) fn key_side(&self) -> Side {
        Side { threads: SIDE, each: self.keys }
    }
}

/// The tile of the right factor.
fn right_tile(side: Side) -> String {
    format!("right{}", side.width())
}

/// `exp1` and `log1`: one number in, an array of one number out.
fn functions() -> String {
    let exp: Arc<Program> = Program::of(&Function::build(|[x]| [Expr::exp(x)]));
    let log: Arc<Program> = Program::of(&Function::build(|[x]| [Expr::log(x)]));
    wgsl::function("exp1", exp.lowered()) + &wgsl::function("log1", log.lowered())
}

/// The text of a kernel whose tiles of scores have `scores.rows` of what its workgroups share out, and `scores.cols` of
/// what passes by. `ty` and `tx` are a thread's places.
pub(super) struct Text<'a> {
    operands: &'a [(&'a View, Access)],
    pub(super) scores: Tile,
    masked: bool,
    /// Sides of the right factor's tiles: those of one vector width share memory.
    right: Vec<Side>,
    main: String,
}

impl<'a> Text<'a> {
    pub(super) fn new(shape: Shape, scores: Tile, operands: &'a [(&'a View, Access)]) -> Self {
        let count = operands.len();
        let p = |i: usize| wgsl::param(count + i);
        let (heads, tiles) = (p(2), p(4));
        let mut main = format!(
            "  if group >= {} {{ return; }}
  let lq = {};
  let lk = {};
  let scale = {};
  let ty = index / {SIDE}u;
  let tx = index % {SIDE}u;
  let head = group / {tiles} % {heads};
  let batch = group / ({tiles} * {heads});
  let first = (group % {tiles}) * {}u;
",
            p(3),
            p(0),
            p(1),
            wgsl::float_param(count + 5),
            scores.rows.size()
        );
        for o in 0..count {
            let [sb, sh, ..] = Self::stride(count, o);
            main += &format!("  let o{o} = {} + batch * {sb} + head * {sh};\n", wgsl::param(o));
        }
        Self { operands, scores, masked: shape.masked, right: vec![scores.cols], main }
    }

    fn stride(operands: usize, o: usize) -> [String; 4] {
        std::array::from_fn(|axis| wgsl::param(operands + 6 + 4 * o + axis))
    }

    /// Where element (`row`, `col`) of operand `o` lies.
    pub(super) fn at(&self, o: usize, row: &str, col: &str) -> String {
        let [_, _, sr, sc] = Self::stride(self.operands.len(), o);
        format!("o{o} + ({row}) * {sr} + ({col}) * {sc}")
    }

    pub(super) fn push(&mut self, text: &str) {
        self.main += text;
    }

    pub(super) fn barrier(&mut self) {
        self.main += "  workgroupBarrier();\n";
    }

    fn quads(&self, o: usize) -> bool {
        self.operands[o].1 == Access::ReadQuads
    }

    /// `{name} = a b^T`, sums over `width` columns of both: rows `first..` of operand `a` and `passing..` of operand `b`.
    pub(super) fn product(&mut self, name: &str, (a, a_len): (usize, &str), (b, b_len): (usize, &str), width: usize) {
        let Tile { rows, cols } = self.scores;
        self.main += &self.scores.registers(name);
        self.main += &format!("  for (var d0 = 0u; d0 < {width}u; d0 += {DEPTH}u) {{\n");
        let right = right_tile(cols);
        for (side, tile, from, operand, len) in
            [(rows, "left", "first", a, a_len), (cols, &*right, "passing", b, b_len)]
        {
            let staged = side.stage(
                tile,
                DEPTH,
                THREADS,
                &Source {
                    operand,
                    at: &|s, d| self.at(operand, &format!("{from} + {s}"), &format!("d0 + {d}")),
                    there: &|s, d| format!("{from} + {s} < {len} && d0 + {d} < {width}u"),
                    along_depth: true,
                    quads: self.quads(operand),
                },
            );
            self.main += &staged;
        }
        self.barrier();
        self.main += &self.scores.multiply(name, ("left", "0u"), &right, DEPTH);
        self.barrier();
        self.main += "  }\n";
    }

    /// `{name} += tile b`, where `tile` holds numbers of all scores: rows `passing..` of operand `b`, `width` columns.
    pub(super) fn accumulate(&mut self, name: &str, (b, b_len): (usize, &str), width: usize) {
        let Tile { rows, cols } = self.scores;
        let side = Side::columns(width);
        let right = right_tile(side);
        self.right.push(side);
        self.barrier();
        self.main += &format!("  for (var t0 = 0u; t0 < {}u; t0 += {DEPTH}u) {{\n", cols.size());
        let staged = side.stage(
            &right,
            DEPTH,
            THREADS,
            &Source {
                operand: b,
                at: &|s, d| self.at(b, &format!("passing + t0 + {d}"), s),
                there: &|s, d| format!("passing + t0 + {d} < {b_len} && {s} < {width}u"),
                along_depth: false,
                quads: self.quads(b),
            },
        );
        self.main += &staged;
        self.barrier();
        self.main += &Tile { rows, cols: side }.multiply(name, ("tile", "t0"), &right, DEPTH);
        self.barrier();
        self.main += "  }\n";
    }

    /// `f` of each of a thread's scores: its row and column in the block, and their positions in the sequences.
    pub(super) fn each(&mut self, f: impl Fn(&Self, usize, usize, &str, &str) -> String) {
        let Tile { rows, cols } = self.scores;
        for i in 0..rows.each {
            for j in 0..cols.each {
                let row = format!("(first + {})", rows.position("ty", i));
                let col = format!("(passing + {})", cols.position("tx", j));
                let text = f(self, i, j, &row, &col);
                self.main += &text;
            }
        }
    }

    /// Turns the raw product `s` into scores: scaled, masked, -inf where there is no such query or key.
    pub(super) fn score(&mut self, mask: usize, rows_are_queries: bool) {
        self.each(|text, i, j, row, col| {
            let (q, k) = if rows_are_queries { (row, col) } else { (col, row) };
            let s = text.scores.element("s", i, j);
            let mask = if text.masked { format!(" + load{mask}({})", text.at(mask, q, k)) } else { String::new() };
            format!("  if {q} < lq && {k} < lk {{ {s} = {s} * scale{mask}; }} else {{ {s} = bits(0xff800000u); }}\n")
        });
    }

    /// Puts a thread's block of `name` into `tile`, for [`Text::accumulate`].
    pub(super) fn keep(&mut self, name: &str) {
        let Tile { rows, cols } = self.scores;
        for j in 0..cols.each {
            for b in 0..rows.blocks() {
                let w = rows.width();
                let values: Vec<String> = (0..w).map(|i| self.scores.element(name, b * w + i, j)).collect();
                let at = rows.at("tile", &cols.position("tx", j), b, "ty");
                self.main += &format!("  {at} = {}({});\n", rows.ty(), values.join(", "));
            }
        }
    }

    /// Joins what the threads of a row have in `{name}0`, …: `f` of two vectors, from `first` on.
    pub(super) fn across(&mut self, name: &str, first: &str, f: impl Fn(&str, &str) -> String) {
        let rows = self.scores.rows;
        for b in 0..rows.blocks() {
            self.main += &format!("  {} = {name}{b};\n", rows.at("left", "tx", b, "ty"));
        }
        self.barrier();
        for b in 0..rows.blocks() {
            self.main += &format!("  {name}{b} = {}({first});\n", rows.ty());
        }
        self.main += &format!("  for (var t = 0u; t < {SIDE}u; t++) {{\n");
        for b in 0..rows.blocks() {
            let joined = f(&format!("{name}{b}"), &rows.at("left", "t", b, "ty"));
            self.main += &format!("    {name}{b} = {joined};\n");
        }
        self.main += "  }\n";
        self.barrier();
    }

    /// Writes a thread's block of operand `o`, `width` columns wide; `factor` of a row.
    pub(super) fn write(&mut self, o: usize, name: &str, width: usize, len: &str, factor: impl Fn(usize) -> String) {
        let block = Tile { rows: self.scores.rows, cols: Side::columns(width) };
        let step = if self.operands[o].1 == Access::WritePairs { 2 } else { 1 };
        for i in 0..block.rows.each {
            let row = format!("(first + {})", block.rows.position("ty", i));
            self.main += &format!("  if {row} < {len} {{\n");
            for j in (0..block.cols.each).step_by(step) {
                let col = block.cols.position("tx", j);
                let value = |j: usize| format!("{}{}", block.element(name, i, j), factor(i));
                let at = self.at(o, &row, &col);
                self.main += &match step {
                    2 => format!("    if {col} < {width}u {{ store2_{o}({at}, {}, {}); }}\n", value(j), value(j + 1)),
                    _ => format!("    if {col} < {width}u {{ store{o}({at}, {}); }}\n", value(j)),
                };
            }
            self.main += "  }\n";
        }
    }

    /// The kernel's text after its declarations.
    pub(super) fn finish(self) -> String {
        let Tile { rows, cols } = self.scores;
        let mut out = functions();
        out += &rows.declare("left", DEPTH);
        out += &rows.declare("tile", cols.size());
        for width in [1, 2, 4] {
            let largest = self.right.iter().filter(|s| s.width() == width).max_by_key(|s| s.size());
            if let Some(side) = largest {
                out += &side.declare(&right_tile(*side), DEPTH);
            }
        }
        out + &wgsl::entry(&self.main)
    }
}
