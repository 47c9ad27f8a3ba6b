//! Rows by index. An index past the end reads NaN (or the largest u32) and adds nothing; the device keeps the largest such
//! index, and the next values that are read tell of it.

use flowtape_engine::Result;

use super::queue::{Gpu, Launch};
use super::view::{Access, View};
use super::wgsl::{self, THREADS};

/// Elements of a row.
fn width(rows: &View) -> usize {
    rows.dims[1..].iter().product()
}

/// `len` rows from `start` of a contiguous view.
fn rows(view: &View, start: usize, len: usize) -> View {
    view.narrow(0, start, len)
}

/// `out[i, ..] = table[index[i], ..]`. A table that no binding holds is read in parts: each writes the rows that it has.
pub(super) fn gather(gpu: &Gpu, table: &View, at: &View, out: &View) -> Result<()> {
    let (width, count) = (width(table), at.numel());
    let (whole, fault) = (table.dims[0], gpu.fault());
    let mut parts = vec![(0, whole)];
    while let Some((start, len)) = parts.pop() {
        let part = rows(table, start, len);
        if !gpu.bounds.binding.fits(&part) && len > 1 {
            parts.extend([(start, len / 2), (start + len / 2, len - len / 2)]);
            continue;
        }
        let operands = [(&part, Access::Read), (at, Access::Read), (out, Access::Write), (&fault, Access::Raise)];
        let total = count * width;
        let params = [total, width, at.strides[0], start, len, whole].map(|n| n as u32);
        let launch = Launch {
            name: "gather",
            shape: vec![],
            operands: &operands,
            params: &params,
            workgroups: total.div_ceil(THREADS),
        };
        gpu.launch(&launch, || {
            let [total, width, step, start, len, whole] = std::array::from_fn(|i| wgsl::param(4 + i));
            let fault = wgsl::param(3);
            let (table, at, out) = (wgsl::param(0), wgsl::param(1), wgsl::param(2));
            wgsl::entry(&format!(
                "  let i = group * {THREADS}u + index;
  if i >= {total} {{ return; }}
  let row = raw1({at} + (i / {width}) * {step});
  if row >= {start} && row - {start} < {len} {{
    put2({out} + i, raw0({table} + (row - {start}) * {width} + i % {width}));
  }} else if row >= {whole} && {start} == 0u {{
    put2({out} + i, 0xffffffffu);
    raise3({fault}, min(row, 0xfffffffeu) + 1u);
  }}
"
            ))
        })?;
    }
    Ok(())
}

/// `out[index[i], ..] += rows[i, ..]` in the order of `i`: the thread of an index's first place adds those of all others.
pub(super) fn scatter_add(gpu: &Gpu, from: &View, at: &View, out: &View) -> Result<()> {
    let (width, count) = (width(out), at.numel());
    let (whole, fault) = (out.dims[0], gpu.fault());
    let mut parts = vec![(0, whole)];
    while let Some((start, len)) = parts.pop() {
        let part = rows(out, start, len);
        if !gpu.bounds.binding.fits(&part) && len > 1 {
            parts.extend([(start, len / 2), (start + len / 2, len - len / 2)]);
            continue;
        }
        let operands = [(from, Access::Read), (at, Access::Read), (&part, Access::Write), (&fault, Access::Raise)];
        let total = count * width;
        let params = [total, width, at.strides[0], start, len, whole, count].map(|n| n as u32);
        let launch = Launch {
            name: "scatter_add",
            shape: vec![],
            operands: &operands,
            params: &params,
            workgroups: total.div_ceil(THREADS),
        };
        gpu.launch(&launch, || {
            let [total, width, step, start, len, whole, count] = std::array::from_fn(|i| wgsl::param(4 + i));
            let fault = wgsl::param(3);
            let (from, at, out) = (wgsl::param(0), wgsl::param(1), wgsl::param(2));
            wgsl::entry(&format!(
                "  let i = group * {THREADS}u + index;
  if i >= {total} {{ return; }}
  let place = i / {width};
  let col = i % {width};
  let row = raw1({at} + place * {step});
  if row >= {whole} {{ raise3({fault}, min(row, 0xfffffffeu) + 1u); }}
  if row < {start} || row - {start} >= {len} {{ return; }}
  for (var j = 0u; j < place; j++) {{ if raw1({at} + j * {step}) == row {{ return; }} }}
  let to = {out} + (row - {start}) * {width} + col;
  var sum = load2(to);
  for (var j = place; j < {count}; j++) {{
    if raw1({at} + j * {step}) == row {{ sum += load0({from} + j * {width} + col); }}
  }}
  store2(to, sum);
"
            ))
        })?;
    }
    Ok(())
}
