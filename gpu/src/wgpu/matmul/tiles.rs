//! Products in tiles: the family of one order of accumulation, from which a shape's fastest member is chosen.

use super::super::tile::{DEPTH, Side, Source, Tile};
use super::super::wgsl;
use super::text::Common;

const fn tile(row_threads: usize, rows: usize, col_threads: usize, cols: usize) -> Tile {
    Tile { rows: Side { threads: row_threads, each: rows }, cols: Side { threads: col_threads, each: cols } }
}

/// All tiles, the smallest first.
pub(super) const TILES: [Tile; 11] = [
    tile(16, 1, 16, 1),
    tile(16, 1, 16, 4),
    tile(16, 4, 16, 1),
    tile(16, 2, 16, 2),
    tile(8, 4, 8, 4),
    tile(16, 2, 16, 4),
    tile(16, 4, 16, 4),
    tile(8, 8, 8, 8),
    tile(16, 4, 16, 8),
    tile(16, 8, 16, 4),
    tile(16, 8, 16, 8),
];

impl Tile {
    pub(super) fn threads(self) -> usize {
        self.rows.threads * self.cols.threads
    }

    /// Bytes of workgroup memory.
    pub(super) fn shared(self) -> usize {
        self.rows.bytes(DEPTH) + self.cols.bytes(DEPTH)
    }
}

/// The kernel's text after its declarations.
pub(super) fn source(tile: Tile, common: &Common) -> String {
    let Tile { rows, cols } = tile;
    let [m, n, k] = common.sizes();
    let mut main = common.start(rows.size(), cols.size());
    main += &format!("  let tx = index % {}u;\n  let ty = index / {}u;\n", cols.threads, cols.threads);
    main += &tile.registers("c");
    main += &format!("  for (var k0 = 0u; k0 < {k}; k0 += {DEPTH}u) {{\n");
    let [a_along, b_along] = common.along_k;
    let [a_quads, b_quads] = common.quads;
    main += &rows.stage(
        "left",
        DEPTH,
        tile.threads(),
        &Source {
            operand: 0,
            at: &|s, d| common.at_a(&format!("(row0 + {s})"), &format!("(k0 + {d})")),
            there: &|s, d| format!("row0 + {s} < {m} && k0 + {d} < {k}"),
            along_depth: a_along,
            quads: a_quads,
        },
    );
    main += &cols.stage(
        "right",
        DEPTH,
        tile.threads(),
        &Source {
            operand: 1,
            at: &|s, d| common.at_b(&format!("(k0 + {d})"), &format!("(col0 + {s})")),
            there: &|s, d| format!("col0 + {s} < {n} && k0 + {d} < {k}"),
            along_depth: b_along,
            quads: b_quads,
        },
    );
    main += "  workgroupBarrier();\n";
    main += &tile.multiply("c", ("left", "0u"), "right", DEPTH);
    main += "  workgroupBarrier();\n  }\n";
    for i in 0..rows.each {
        let columns: Vec<_> =
            (0..cols.each).map(|j| (format!("(col0 + {})", cols.position("tx", j)), tile.element("c", i, j))).collect();
        main += &common.write(&format!("(row0 + {})", rows.position("ty", i)), &columns);
    }
    rows.declare("left", DEPTH) + &cols.declare("right", DEPTH) + &wgsl::entry_of(tile.threads(), "", &main)
}
