//! Forward: queries stay, keys and values pass by; each row's maximum and sum are kept up to date.

use super::super::tile::{Side, Tile};
use super::super::view::{Access, View};
use super::text::{Shape, Text};

/// Operands q, k, v, maybe the mask, o, the log-sum-exp.
pub(super) fn source(shape: Shape, operands: &[(&View, Access)]) -> String {
    let Shape { d, dv, .. } = shape;
    let out = operands.len() - 2;
    let scores = Tile { rows: shape.query_side(), cols: shape.key_side() };
    let (rows, block) = (scores.rows, Tile { rows: scores.rows, cols: Side::columns(dv) });
    let blocks = || 0..rows.blocks();
    let mut text = Text::new(shape, scores, operands);
    text.push(&block.registers("o_"));
    for b in blocks() {
        let ty = rows.ty();
        text.push(&format!(
            "  var top{b} = {ty}(bits(0xff800000u));\n  var next{b} = top{b};\n  var sum{b} = {ty}();\n"
        ));
    }
    text.push(&format!("  for (var passing = 0u; passing < lk; passing += {}u) {{\n", scores.cols.size()));
    text.product("s", (0, "lq"), (1, "lk"), d);
    text.score(3, true);
    blocks().for_each(|b| text.push(&format!("  next{b} = top{b};\n")));
    text.each(|_, i, j, _, _| {
        let next = rows.component("next", i);
        format!("  {next} = max({next}, {});\n", scores.element("s", i, j))
    });
    text.across("next", "bits(0xff800000u)", |a, b| format!("max({a}, {b})"));
    // A row without keys so far has maximum -inf: 0 stands for it, so that no inf - inf appears.
    for i in 0..rows.each {
        let (next, top, sum) = (rows.component("next", i), rows.component("top", i), rows.component("sum", i));
        text.push(&format!(
            "  let shift{i} = select({next}, 0.0, {next} < -3.4e38);
  let decay{i} = exp1({top} - shift{i})[0];
  {sum} *= decay{i};
"
        ));
        (0..block.cols.blocks()).for_each(|b| text.push(&format!("  o_{i}_{b} *= decay{i};\n")));
    }
    blocks().for_each(|b| text.push(&format!("  top{b} = next{b};\n")));
    text.each(|_, i, j, _, _| {
        let (s, sum) = (scores.element("s", i, j), rows.component("sum", i));
        format!("  {s} = exp1({s} - shift{i})[0];\n  {sum} += {s};\n")
    });
    text.keep("s");
    text.accumulate("o_", (2, "lk"), dv);
    text.push("  }\n");
    text.across("sum", "0.0", |a, b| format!("{a} + {b}"));
    for i in 0..rows.each {
        let sum = rows.component("sum", i);
        text.push(&format!("  var factor{i} = 0.0;\n  if {sum} > 0.0 {{ factor{i} = 1.0 / {sum}; }}\n"));
    }
    text.write(out, "o_", dv, "lq", |i| format!(" * factor{i}"));
    for i in 0..rows.each {
        let row = format!("first + {}", rows.position("ty", i));
        let (top, sum) = (rows.component("top", i), rows.component("sum", i));
        let at = text.at(out + 1, &row, "0u");
        text.push(&format!(
            "  if tx == 0u && {row} < lq {{ store{}({at}, select({top}, 0.0, {top} < -3.4e38) + log1({sum})[0]); }}\n",
            out + 1
        ));
    }
    text.finish()
}
