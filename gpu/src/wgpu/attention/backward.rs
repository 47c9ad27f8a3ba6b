//! Backward: probabilities are made again from scores and log-sum-exp. Operands q, k, v, the gradient of o, the
//! log-sum-exp, the sums of o times its gradient, maybe the mask, then results.

use super::super::tile::{Side, Tile};
use super::super::view::{Access, View};
use super::text::{Shape, Text};

/// A query's log-sum-exp and sum as `let {name}_lse` and `let {name}_delta`. A row without keys has log-sum-exp -inf.
fn statistics(text: &mut Text<'_>, name: &str, query: &str) {
    let (lse, delta) = (text.at(4, query, "0u"), text.at(5, query, "0u"));
    text.push(&format!(
        "  var {name}_lse = bits(0xff800000u);
  var {name}_delta = 0.0;
  if {query} < lq {{ {name}_lse = load4({lse}); {name}_delta = load5({delta}); }}
"
    ));
}

/// Probabilities in `s`, from scores; `of` names a score's query.
fn probabilities(text: &mut Text<'_>, of: impl Fn(usize, usize) -> String) {
    text.each(|text, i, j, _, _| {
        let (s, lse) = (text.scores.element("s", i, j), format!("{}_lse", of(i, j)));
        format!("  if {lse} > -3.4e38 {{ {s} = exp1({s} - {lse})[0]; }} else {{ {s} = 0.0; }}\n")
    });
}

/// The scores' gradients in `s`, from probabilities and the gradients `p` of these.
fn gradients(text: &mut Text<'_>, of: impl Fn(usize, usize) -> String) {
    text.each(|text, i, j, _, _| {
        let (s, p) = (text.scores.element("s", i, j), text.scores.element("p", i, j));
        format!("  {s} = {s} * ({p} - {}_delta) * scale;\n", of(i, j))
    });
}

/// dq: queries and their gradients stay, keys and values pass by.
pub(super) fn queries(shape: Shape, operands: &[(&View, Access)]) -> String {
    let Shape { d, dv, .. } = shape;
    let scores = Tile { rows: shape.query_side(), cols: shape.key_side() };
    let mut text = Text::new(shape, scores, operands);
    text.push(&Tile { rows: scores.rows, cols: Side::columns(d) }.registers("dq"));
    for i in 0..scores.rows.each {
        statistics(&mut text, &format!("q{i}"), &format!("(first + {})", scores.rows.position("ty", i)));
    }
    let of = |i: usize, _: usize| format!("q{i}");
    text.push(&format!("  for (var passing = 0u; passing < lk; passing += {}u) {{\n", scores.cols.size()));
    text.product("s", (0, "lq"), (1, "lk"), d);
    text.score(6, true);
    probabilities(&mut text, of);
    text.product("p", (3, "lq"), (2, "lk"), dv);
    gradients(&mut text, of);
    text.keep("s");
    text.accumulate("dq", (1, "lk"), d);
    text.push("  }\n");
    text.write(operands.len() - 1, "dq", d, "lq", |_| String::new());
    text.finish()
}

/// dk and dv: keys and values stay, queries and their gradients pass by.
pub(super) fn keys(shape: Shape, operands: &[(&View, Access)]) -> String {
    let Shape { d, dv, .. } = shape;
    let scores = Tile { rows: shape.key_side(), cols: shape.query_side() };
    let mut text = Text::new(shape, scores, operands);
    for (name, width) in [("dk", d), ("dv", dv)] {
        text.push(&Tile { rows: scores.rows, cols: Side::columns(width) }.registers(name));
    }
    let of = |_: usize, j: usize| format!("q{j}");
    text.push(&format!("  for (var passing = 0u; passing < lq; passing += {}u) {{\n", scores.cols.size()));
    for j in 0..scores.cols.each {
        statistics(&mut text, &format!("q{j}"), &format!("(passing + {})", scores.cols.position("tx", j)));
    }
    text.product("s", (1, "lk"), (0, "lq"), d);
    text.score(6, false);
    probabilities(&mut text, of);
    text.keep("s");
    text.accumulate("dv", (3, "lq"), dv);
    text.product("p", (2, "lk"), (3, "lq"), dv);
    gradients(&mut text, of);
    text.keep("s");
    text.accumulate("dk", (0, "lq"), d);
    text.push("  }\n");
    let out = operands.len() - 2;
    text.write(out, "dk", d, "lk", |_| String::new());
    text.write(out + 1, "dv", dv, "lk", |_| String::new());
    text.finish()
}
