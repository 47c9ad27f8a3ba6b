//! Products of few rows: a thread has a column, and the lanes of a subgroup hand each other the left factor. No workgroup
//! memory, no barriers; the order of accumulation is that of the tiles.

use super::super::wgsl::{self, THREADS};
use super::text::Common;

/// Rows of a thread.
pub(super) const ROWS: usize = 8;

/// The kernel's text after its declarations. Whole subgroups run to the end together: no thread leaves the loop early.
pub(super) fn source(common: &Common) -> String {
    let [m, n, k] = common.sizes();
    let mut main = common.start(ROWS, THREADS);
    main += "  let col = col0 + index;\n";
    (0..ROWS).for_each(|r| main += &format!("  var c{r} = 0.0;\n"));
    main += &format!("  for (var k0 = 0u; k0 < {k}; k0 += lanes) {{\n");
    for r in 0..ROWS {
        let row = format!("(row0 + {r}u)");
        let at = common.at_a(&row, "(k0 + lane)");
        main += &format!("    var x{r} = 0.0;\n    if {row} < {m} && k0 + lane < {k} {{ x{r} = load0({at}); }}\n");
    }
    main += &format!(
        "    for (var d = 0u; d < lanes; d++) {{
      var y = 0.0;
      if col < {n} && k0 + d < {k} {{ y = load1({}); }}
",
        common.at_b("(k0 + d)", "col")
    );
    (0..ROWS).for_each(|r| main += &format!("      c{r} = fma(subgroupShuffle(x{r}, d), y, c{r});\n"));
    main += "    }\n  }\n";
    for r in 0..ROWS {
        main += &common.write(&format!("(row0 + {r}u)"), &[("col".into(), format!("c{r}"))]);
    }
    let lanes = ", @builtin(subgroup_invocation_id) lane: u32, @builtin(subgroup_size) lanes: u32";
    wgsl::entry_of(THREADS, lanes, &main)
}
