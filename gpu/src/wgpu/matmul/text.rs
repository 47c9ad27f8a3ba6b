//! What the kernels of all products share: parameters, where a workgroup's tile lies, how a result is written.

use super::super::wgsl::{self, SpaceParams};

/// What a kernel's text depends on, beside the kernel itself and the operands' dtypes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Common {
    /// Operands: a, b, out and maybe the bias.
    pub(super) operands: usize,
    /// Neighbours in memory are neighbours along k: of a, of b.
    pub(super) along_k: [bool; 2],
    /// Four neighbours are read at once: of a, of b.
    pub(super) quads: [bool; 2],
    pub(super) bias: bool,
    pub(super) accumulate: bool,
    /// Halves are written in pairs along the columns.
    pub(super) paired: bool,
    /// Axes of the batch.
    pub(super) batch: usize,
}

/// Parameters: m, n, k, tiles along rows and columns, workgroups, seven strides; then the batch's space.
const PARAMS: usize = 13;

impl Common {
    pub(super) fn key(&self) -> Vec<u64> {
        let [ak, bk] = self.along_k;
        let [aq, bq] = self.quads;
        let flags = [ak, bk, aq, bq, self.bias, self.accumulate, self.paired].map(u64::from);
        flags.into_iter().chain([self.batch as u64]).collect()
    }

    fn param(&self, i: usize) -> String {
        wgsl::param(self.operands + i)
    }

    /// m, n or k.
    pub(super) fn sizes(&self) -> [String; 3] {
        std::array::from_fn(|i| self.param(i))
    }

    /// Element (`row`, `depth`) of a.
    pub(super) fn at_a(&self, row: &str, depth: &str) -> String {
        format!("o0 + {row} * {} + {depth} * {}", self.param(6), self.param(7))
    }

    /// Element (`depth`, `col`) of b.
    pub(super) fn at_b(&self, depth: &str, col: &str) -> String {
        format!("o1 + {depth} * {} + {col} * {}", self.param(8), self.param(9))
    }

    /// `row0`, `col0` and the operands' starts, of tiles of `height` x `width`.
    pub(super) fn start(&self, height: usize, width: usize) -> String {
        let [tile_rows, tile_cols, workgroups] = std::array::from_fn(|i| self.param(3 + i));
        let mut out = format!(
            "  if group >= {workgroups} {{ return; }}
  let row0 = (group / {tile_cols} % {tile_rows}) * {height}u;
  let col0 = (group % {tile_cols}) * {width}u;
"
        );
        (0..3).for_each(|o| out += &format!("  var o{o} = {};\n", wgsl::param(o)));
        let batch = SpaceParams { first: self.operands + PARAMS, rank: self.batch, operands: 3 };
        out + &batch.locate(&format!("(group / ({tile_rows} * {tile_cols}))"), "o")
    }

    /// Writes results of a row: `columns` are their columns and values; neighbours where halves are written in pairs.
    pub(super) fn write(&self, row: &str, columns: &[(String, String)]) -> String {
        let [m, n, _] = self.sizes();
        let (om, on) = (self.param(10), self.param(11));
        let value = |(col, sum): &(String, String)| {
            let mut value = sum.clone();
            if self.bias {
                value += &format!(" + load3({} + {col} * {})", wgsl::param(3), self.param(12));
            }
            if self.accumulate {
                value += &format!(" + load2(to + {col} * {on})");
            }
            value
        };
        let mut out = format!("  if {row} < {m} {{ let to = o2 + {row} * {om};\n");
        for group in columns.chunks(if self.paired { 2 } else { 1 }) {
            let col = &group[0].0;
            out += &match group {
                [one, two] => {
                    format!("    if {col} < {n} {{ store2_2(to + {col} * {on}, {}, {}); }}\n", value(one), value(two))
                }
                _ => format!("    if {col} < {n} {{ store2(to + {col} * {on}, {}); }}\n", value(&group[0])),
            };
        }
        out + "  }\n"
    }
}
