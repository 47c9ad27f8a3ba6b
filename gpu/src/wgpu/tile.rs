//! Products of tiles: both factors pass through workgroup memory in slices along k, and each thread keeps a block of
//! the result in registers. Matrix products and attention are made of these.
//!
//! A side of a tile is cut into vectors of up to 4 positions; thread `t` of a side has the vectors `t`, `t + threads`, …
//! Every sum runs over k in ascending order, whatever the tile.

/// Slices along k of a tile.
pub(super) const DEPTH: usize = 16;

/// One side of a tile.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Side {
    /// Threads along it.
    pub(super) threads: usize,
    /// Positions of a thread: 1, 2 or a multiple of 4.
    pub(super) each: usize,
}

/// How a factor's elements are read.
pub(super) struct Source<'a> {
    /// The operand.
    pub(super) operand: usize,
    /// Where the element at a position along the side and a depth lies.
    pub(super) at: &'a dyn Fn(&str, &str) -> String,
    /// Whether there is such an element; zero stands for others.
    pub(super) there: &'a dyn Fn(&str, &str) -> String,
    /// Whether neighbours in memory are neighbours along k.
    pub(super) along_depth: bool,
    /// Whether four neighbours are read at once.
    pub(super) quads: bool,
}

fn vector(width: usize) -> String {
    if width == 1 { "f32".into() } else { format!("vec{width}<f32>") }
}

fn component(name: &str, width: usize, i: usize) -> String {
    if width == 1 { name.into() } else { format!("{name}[{i}]") }
}

impl Side {
    /// Positions in all.
    pub(super) const fn size(self) -> usize {
        self.threads * self.each
    }

    /// A side of 16 threads for `size` columns; each has at least a pair of neighbours.
    pub(super) fn columns(size: usize) -> Self {
        let each = size.div_ceil(16);
        Self { threads: 16, each: if each <= 4 { each.next_power_of_two().max(2) } else { each.next_multiple_of(4) } }
    }

    /// The type of a vector.
    pub(super) fn ty(self) -> String {
        vector(self.width())
    }

    /// Position `i` of a thread's vectors `{name}0`, `{name}1`, …
    pub(super) fn component(self, name: &str, i: usize) -> String {
        component(&format!("{name}{}", i / self.width()), self.width(), i % self.width())
    }

    /// Vector `b` of thread `thread` in slice `depth` of a tile.
    pub(super) fn at(self, name: &str, depth: &str, b: usize, thread: &str) -> String {
        format!("{name}[({depth}) * {}u + {}u + {thread}]", self.vectors(), b * self.threads)
    }

    /// Positions of a vector.
    pub(super) fn width(self) -> usize {
        self.each.min(4)
    }

    /// Vectors of a thread.
    pub(super) fn blocks(self) -> usize {
        self.each / self.width()
    }

    /// Vectors in all.
    fn vectors(self) -> usize {
        self.size() / self.width()
    }

    /// Position `i` of thread `thread`.
    pub(super) fn position(self, thread: &str, i: usize) -> String {
        let w = self.width();
        format!("({thread} * {w}u + {}u)", i / w * self.threads * w + i % w)
    }

    /// Bytes of workgroup memory.
    pub(super) fn bytes(self, depth: usize) -> usize {
        4 * depth * self.size()
    }

    /// The declaration of its tile.
    pub(super) fn declare(self, name: &str, depth: usize) -> String {
        format!("var<workgroup> {name}: array<{}, {}>;\n", vector(self.width()), depth * self.vectors())
    }

    /// Fills `depth` slices of its tile with the threads of a workgroup.
    pub(super) fn stage(self, name: &str, depth: usize, threads: usize, source: &Source<'_>) -> String {
        let (w, vectors) = (self.width(), self.vectors());
        let Source { operand, at, there, along_depth, quads } = source;
        let deep = if *along_depth && *quads { 4 } else { 1 };
        let count = vectors * depth / deep;
        let (d, v) = if *along_depth {
            (format!("e % {}u * {deep}u", depth / deep), format!("e / {}u", depth / deep))
        } else {
            (format!("e / {vectors}u"), format!("e % {vectors}u"))
        };
        let mut out = format!("  for (var e = index; e < {count}u; e += {threads}u) {{ let d = {d}; let v = {v};\n");
        if !along_depth && *quads && w == 4 {
            let s = "(v * 4u)";
            out += &format!(
                "    var x = vec4<f32>();
    if {} {{ x = load4_{operand}({}); }}
    {name}[d * {vectors}u + v] = x;
  }}
",
                there(s, "d"),
                at(s, "d")
            );
            return out;
        }
        for i in 0..w {
            let s = format!("(v * {w}u + {i}u)");
            let load = if deep == 4 { format!("load4_{operand}") } else { format!("load{operand}") };
            out += &format!(
                "    var x{i} = {}();\n    if {} {{ x{i} = {load}({}); }}\n",
                vector(deep),
                there(&s, "d"),
                at(&s, "d")
            );
        }
        for c in 0..deep {
            let values: Vec<String> = (0..w).map(|i| component(&format!("x{i}"), deep, c)).collect();
            out += &format!("    {name}[(d + {c}u) * {vectors}u + v] = {}({});\n", vector(w), values.join(", "));
        }
        out + "  }\n"
    }
}

/// A product of tiles: rows of the left factor, columns of the right one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Tile {
    pub(super) rows: Side,
    pub(super) cols: Side,
}

impl Tile {
    /// `var {name}… = 0`: a thread's block of the result.
    pub(super) fn registers(self, name: &str) -> String {
        let ty = vector(self.cols.width());
        let one = |(i, b)| format!("  var {name}{i}_{b} = {ty}();\n");
        self.vectors().map(one).collect()
    }

    /// A thread's vectors: row, block of columns.
    pub(super) fn vectors(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.rows.each).flat_map(move |i| (0..self.cols.blocks()).map(move |b| (i, b)))
    }

    /// Element (`i`, `j`) of a thread's block.
    pub(super) fn element(self, name: &str, i: usize, j: usize) -> String {
        let w = self.cols.width();
        component(&format!("{name}{i}_{}", j / w), w, j % w)
    }

    /// Adds `depth` slices to a thread's block, from slice `first` of the left tile on; `ty` and `tx` are its places along
    /// rows and columns.
    pub(super) fn multiply(self, name: &str, (left, first): (&str, &str), right: &str, depth: usize) -> String {
        let Self { rows, cols } = self;
        let mut out = format!("  for (var d = 0u; d < {depth}u; d++) {{\n");
        for b in 0..rows.blocks() {
            out += &format!("    let a{b} = {};\n", rows.at(left, &format!("{first} + d"), b, "ty"));
        }
        for b in 0..cols.blocks() {
            out += &format!("    let b{b} = {};\n", cols.at(right, "d", b, "tx"));
        }
        for (i, b) in self.vectors() {
            let a = rows.component("a", i);
            out += &format!("    {name}{i}_{b} = fma({}({a}), b{b}, {name}{i}_{b});\n", cols.ty());
        }
        out + "  }\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threads_of_a_side_have_all_its_positions_once() {
        for (threads, each) in [(16, 1), (8, 2), (16, 4), (8, 8), (16, 8)] {
            let side = Side { threads, each };
            let value = |text: String| -> usize {
                let inner = text.trim_matches(['(', ')']).replace('u', "");
                let (product, plus) = inner.split_once(" + ").unwrap();
                let (thread, width) = product.split_once(" * ").unwrap();
                thread.parse::<usize>().unwrap() * width.parse::<usize>().unwrap() + plus.parse::<usize>().unwrap()
            };
            let positions = (0..threads).flat_map(|t| (0..each).map(move |i| side.position(&t.to_string(), i)));
            let mut all: Vec<usize> = positions.map(value).collect();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..side.size()), "{side:?}");
        }
    }
}
