//! Panels of quantised matrices, dense: a thread has four neighbours of the panel. Codes and scales are the matrix's words.

use flowtape_engine::Result;
use flowtape_engine::quant::{BLOCK, Dequantise, Format, GROUP, NF4, Parts};

use super::queue::{Gpu, Launch};
use super::view::{Access, View};
use super::wgsl::{self, THREADS};

/// Elements of a thread.
const RUN: usize = 4;

/// Makes a panel dense. Rows whose codes no binding holds together are done in parts; false where a single one is too much.
pub(super) fn dequantise(gpu: &Gpu, call: &Dequantise<'_>, words: &View, out: &View) -> Result<bool> {
    let mut parts = vec![(0, out.dims[0])];
    while let Some((first, rows)) = parts.pop() {
        let panel = Panel::new(call, words, out, first, rows);
        if panel.operands().iter().all(|(view, _)| gpu.bounds.binding.fits(view)) {
            panel.launch(gpu)?;
        } else if rows > 1 {
            parts.extend([(first + rows / 2, rows - rows / 2), (first, rows / 2)]);
        } else {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Some rows of a panel, and the windows on what they need.
struct Panel {
    format: Format,
    codes: View,
    blocks: View,
    scales: View,
    out: View,
    /// The place in the matrix of the first element, and the width of a row.
    origin: usize,
    width: usize,
    /// The first code, the first block and the first scale of the windows.
    starts: [usize; 3],
}

impl Panel {
    fn new(call: &Dequantise<'_>, words: &View, out: &View, first: usize, rows: usize) -> Self {
        let Dequantise { format, dims, start, .. } = *call;
        let (parts, width, columns) = (Parts::of(format, dims), dims[1], out.dims[1]);
        let row = start[0] + first;
        let origin = row * width + start[1];
        let end = origin + (rows - 1) * width + columns;
        let window = |start: usize, first: usize, end: usize| words.narrow(0, start + first, end - first);
        let (from_blocks, from_scales) = (parts.codes, parts.codes + parts.blocks);
        let per_word = if format == Format::Nf4 { 8 } else { 4 };
        let (code, block) = (origin / per_word, origin / BLOCK / 4);
        let (blocks, scales, scale) = match format {
            Format::Nf4 => {
                let blocks = window(from_blocks, block, end.div_ceil(BLOCK).div_ceil(4));
                (blocks, window(from_scales, 0, parts.scales), 0)
            }
            _ => {
                let scales = window(from_scales, row, row + rows);
                (scales.clone(), scales, row)
            }
        };
        Self {
            format,
            codes: window(0, code, end.div_ceil(per_word)),
            blocks,
            scales,
            out: out.narrow(0, first, rows),
            origin,
            width,
            starts: [code * per_word, 4 * block, scale],
        }
    }

    fn operands(&self) -> [(&View, Access); 4] {
        let even = [self.out.numel(), self.out.offset].iter().all(|n| n.is_multiple_of(2));
        let written = Access::pairs_if(self.out.is_half() && even);
        [(&self.codes, Access::Read), (&self.blocks, Access::Read), (&self.scales, Access::Read), (&self.out, written)]
    }

    fn launch(&self, gpu: &Gpu) -> Result<()> {
        let operands = self.operands();
        let (total, columns) = (self.out.numel(), self.out.dims[1]);
        let [code, block, scale] = self.starts;
        let sizes = [total, columns, self.origin, self.width, code, block, scale].map(|n| n as u32);
        let table = NF4.map(f32::to_bits);
        let params = [&sizes[..], if self.format == Format::Nf4 { &table } else { &[] }].concat();
        let launch = Launch {
            name: "dequantise",
            shape: vec![self.format as u64],
            operands: &operands,
            params: &params,
            workgroups: total.div_ceil(RUN).div_ceil(THREADS),
        };
        gpu.launch(&launch, || source(self.format, operands[3].1 == Access::WritePairs))
    }
}

const E4M3: &str = "
fn e4m3(c: u32) -> f32 {
  let rest = c & 127u;
  let normal = (rest << 20u) + (120u << 23u);
  let small = bitcast<u32>(f32(rest) * 0x1p-9);
  let size = select(select(normal, small, rest < 8u), 0x7fc00000u, rest == 127u);
  return bitcast<f32>(size | ((c & 128u) << 24u));
}
";

/// The kernel's text: `number(at, row)` is an element of the matrix by its place, and the row that it is in.
fn source(format: Format, pairs: bool) -> String {
    let [total, columns, origin, width, code, block, scale] = std::array::from_fn(|i| wgsl::param(4 + i));
    let [codes, blocks, scales, out] = std::array::from_fn(wgsl::param);
    let of_row = format!("bits(raw2({scales} + row - {scale}))");
    let byte = format!("(raw0({codes} + (at - {code}) / 4u) >> ((at & 3u) * 8u)) & 255u");
    let number = match format {
        Format::Int8 => format!("  return f32(i32(({byte}) << 24u) >> 24u) * {of_row};\n"),
        Format::Fp8 => format!("  return e4m3({byte}) * {of_row};\n"),
        Format::Nf4 => {
            let table = 4 + 7;
            format!(
                "  let code = (raw0({codes} + (at - {code}) / 8u) >> ((at & 7u) * 4u)) & 15u;
  let block = at / {BLOCK}u;
  let byte = (raw1({blocks} + (block - {block}) / 4u) >> ((block & 3u) * 8u)) & 255u;
  let factor = bits(raw2({scales} + 1u + block / {GROUP}u));
  let scale = bits(raw2({scales})) + f32(i32(byte << 24u) >> 24u) * factor;
  return bits(P[(code + {table}u) / 4u][(code + {table}u) % 4u]) * scale;
"
            )
        }
    };
    let store = if pairs {
        // As many elements as fill words.
        format!(
            "  store2_3({out} + first, x[0], x[1]);
  if first + 2u < {total} {{ store2_3({out} + first + 2u, x[2], x[3]); }}
"
        )
    } else {
        format!("  for (var j = 0u; j < min({RUN}u, {total} - first); j++) {{ store3({out} + first + j, x[j]); }}\n")
    };
    let main = format!(
        "  let first = (group * {THREADS}u + index) * {RUN}u;
  if first >= {total} {{ return; }}
  var x: array<f32, {RUN}>;
  for (var j = 0u; j < {RUN}u; j++) {{
    let i = min(first + j, {total} - 1u);
    let row = i / {columns};
    x[j] = number({origin} + row * {width} + i % {columns}, {origin} / {width} + row);
  }}
{store}"
    );
    let more = if format == Format::Fp8 { E4M3 } else { "" };
    format!("{more}fn number(at: u32, row: u32) -> f32 {{\n{number}}}\n{}", wgsl::entry(&main))
}
