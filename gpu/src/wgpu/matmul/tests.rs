use std::sync::Arc;

use flowtape_engine::backend::Pending;
use flowtape_engine::{DType, Result};

use super::super::memory::Block;
use super::super::queue::Gpu;
use super::super::tuning::Tuning;
use super::super::view::View;
use super::super::{WgpuOptions, adapter};
use super::tiles::TILES;
use super::*;

fn gpu() -> Option<Gpu> {
    // Without an adapter there is nothing to test; the adapters' own test says so.
    adapter::open(None, WgpuOptions { tune: Some(false), ..WgpuOptions::default() }).ok()
}

/// Numbers in [-1, 1), as bits of a dtype and as they are then.
fn numbers(count: usize, dtype: DType, seed: u32) -> (Vec<u8>, Vec<f64>) {
    let mut state = seed;
    let mut bytes = Vec::new();
    let mut values = Vec::new();
    for _ in 0..count {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let x = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
        match dtype {
            DType::BF16 => {
                let h = half::bf16::from_f32(x);
                bytes.extend(h.to_le_bytes());
                values.push(h.to_f64());
            }
            DType::F16 => {
                let h = half::f16::from_f32(x);
                bytes.extend(h.to_le_bytes());
                values.push(h.to_f64());
            }
            _ => {
                bytes.extend(x.to_le_bytes());
                values.push(x.into());
            }
        }
    }
    (bytes, values)
}

/// A product's sizes and how its factors lie.
struct Case {
    dims: [usize; 4],
    a_along_k: bool,
    b_along_k: bool,
    dtypes: [DType; 3],
    bias: bool,
    accumulate: bool,
}

impl Case {
    /// What a kernel makes of it, as bytes; and the largest distance from the sum in f64, over the result's size.
    fn run(&self, gpu: &Arc<Gpu>, kernel: Kernel) -> Result<(Vec<u8>, f64)> {
        let ([batch, m, n, k], [da, db, dout]) = (self.dims, self.dtypes);
        let (a_bytes, a_values) = numbers(batch * m * k, da, 1);
        let (b_bytes, b_values) = numbers(batch * k * n, db, 2);
        let (bias_bytes, bias_values) = numbers(n, DType::F32, 3);
        let (out_bytes, out_values) = numbers(batch * m * n, dout, 4);
        let upload = |bytes: &[u8]| {
            let memory = gpu.alloc(bytes.len())?;
            gpu.upload(memory.block(), bytes)?;
            Ok(memory)
        };
        let memory = [upload(&a_bytes)?, upload(&b_bytes)?, upload(&out_bytes)?, upload(&bias_bytes)?];
        let at = |block: &Arc<Block>, dtype, rows: usize, cols: usize, by_rows: bool| {
            let [row, col] = if by_rows { [cols, 1] } else { [1, rows] };
            View::strided(block, dtype, &[batch, rows, cols], &[rows * cols, row, col])
        };
        let a = at(memory[0].block(), da, m, k, self.a_along_k);
        let b = at(memory[1].block(), db, k, n, !self.b_along_k);
        let out = at(memory[2].block(), dout, m, n, true);
        let bias = View::plain(memory[3].block(), DType::F32, &[n]);
        let bias = self.bias.then_some(&bias);
        Product { a: &a, b: &b, bias, accumulate: self.accumulate, out: &out }.launch(gpu, kernel)?;
        let bytes = Box::new(gpu.read_later(memory[2].block(), 0..out_bytes.len())?).wait()?;

        let value = |i: usize| match dout {
            DType::BF16 => half::bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f64(),
            DType::F16 => half::f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f64(),
            _ => f64::from(f32::from_le_bytes(std::array::from_fn(|j| bytes[4 * i + j]))),
        };
        let mut worst = 0.0f64;
        for (i, before) in out_values.iter().enumerate() {
            let (s, r, c) = (i / (m * n), i / n % m, i % n);
            let term = |d: usize| {
                let x = if self.a_along_k { r * k + d } else { d * m + r };
                let y = if self.b_along_k { c * k + d } else { d * n + c };
                a_values[s * m * k + x] * b_values[s * k * n + y]
            };
            let mut expected = (0..k).map(term).sum::<f64>();
            expected += if self.bias { bias_values[c] } else { 0.0 };
            expected += if self.accumulate { *before } else { 0.0 };
            worst = worst.max((value(i) - expected).abs());
        }
        Ok((bytes, worst / (k as f64).sqrt()))
    }
}

#[test]
fn all_members_of_the_family_give_the_same_bits() -> Result<()> {
    let Some(gpu) = gpu().map(Arc::new) else { return Ok(()) };
    use DType::{BF16, F16, F32};
    let case = |dims, along: [bool; 2], dtypes, bias, accumulate| Case {
        dims,
        a_along_k: along[0],
        b_along_k: along[1],
        dtypes,
        bias,
        accumulate,
    };
    // Sizes that fill tiles and that do not; all layouts; four at once and one by one.
    let cases = [
        case([1, 130, 68, 20], [true, true], [F32; 3], true, false),
        case([2, 33, 40, 36], [false, false], [F32; 3], false, true),
        case([1, 17, 131, 19], [true, false], [BF16, F32, F32], true, true),
        case([1, 64, 128, 24], [true, false], [BF16; 3], true, false),
        case([2, 40, 24, 8], [false, true], [F16; 3], false, true),
    ];
    for case in cases {
        let mut members: Vec<Kernel> = TILES.into_iter().map(Kernel::Tiles).collect();
        members.retain(|k| k.shared() <= gpu.bounds.shared);
        if gpu.abilities.subgroups {
            members.push(Kernel::Subgroup);
        }
        let (expected, error) = case.run(&gpu, members[0])?;
        let unit = case.dtypes.iter().map(|d| match d {
            BF16 => 1.0 / 64.0,
            F16 => 1.0 / 512.0,
            _ => 1e-6,
        });
        let allowed = unit.fold(0.0, f64::max);
        assert!(error < allowed, "{:?} {:?}: off by {error}", case.dims, case.dtypes);
        for member in &members[1..] {
            assert!(case.run(&gpu, *member)?.0 == expected, "{:?} {:?}: {member}", case.dims, case.dtypes);
        }
    }
    Ok(())
}

/// A product's choice is measured once and kept in the file, where another device finds it.
#[test]
fn measured_choices_are_kept() -> Result<()> {
    let Some(mut first) = gpu() else { return Ok(()) };
    let folder = tempfile::tempdir().map_err(|e| flowtape_engine::Error::argument("tempdir", "a folder", e))?;
    let file = folder.path().join("deep/tuning.json");
    let tuned = || Tuning::new(true, "an adapter", Some(file.clone()));
    let product = |gpu: &Gpu| -> Result<(Kernel, u64)> {
        let memory = gpu.alloc(4 * 3 * 24 * 24)?;
        let view = |i: usize| View { offset: i * 24 * 24, ..View::plain(memory.block(), DType::F32, &[24, 24]) };
        let (a, b, out) = (view(0), view(1), view(2));
        let before = gpu.counts().kernels;
        let product = Product { a: &a, b: &b, bias: None, accumulate: false, out: &out };
        Ok((choice::kernel(gpu, &product), gpu.counts().kernels - before))
    };
    first.tuning = tuned();
    let (chosen, kernels) = product(&first)?;
    assert!(kernels > 10, "{kernels} kernels were measured");
    assert_eq!(product(&first)?, (chosen, 0));
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains(&chosen.to_string()) && text.contains("1 of 32x32x32 K4S4 f32 f32 f32"), "{text}");
    let Some(mut second) = gpu() else { return Ok(()) };
    second.tuning = tuned();
    assert_eq!(product(&second)?, (chosen, 0));
    Ok(())
}

/// No adapter here has cooperative matrices: their texts are checked as far as that goes without one.
#[test]
fn cooperative_kernels_are_valid() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let memory = gpu.alloc(1 << 16)?;
    for (size, half, lanes) in [(16, true, 32), (8, true, 32), (8, false, 32), (16, true, 64), (8, false, 8)] {
        let kernel = Cooperative { size, half, lanes };
        let [height, width] = kernel.tile();
        assert_eq!(height * width, 256 / lanes * 4 * size * size);
        for (along, paired, bias, accumulate) in [(true, true, true, false), (false, false, false, true)] {
            let view = |dtype| View::plain(memory.block(), dtype, &[8, 8]);
            let factor = view(if half { DType::F16 } else { DType::F32 });
            let (out, row) = (view(DType::F16), view(DType::F32));
            let mut operands = vec![(&factor, Access::Read), (&factor, Access::Read), (&out, Access::pairs_if(paired))];
            if bias {
                operands.push((&row, Access::Read));
            }
            let common = Common {
                operands: operands.len(),
                along_k: [along; 2],
                quads: [false; 2],
                bias,
                accumulate,
                paired,
                batch: 1,
            };
            let plan = gpu.bounds.binding.plan(&operands);
            let text = kernel.directives().to_owned()
                + &wgsl::header(&operands, &plan, common.operands + 20)
                + &kernel.source(&common);
            validate(&text);
        }
    }
    Ok(())
}

/// What cooperative matrices must pass before they are used.
#[test]
fn kernels_agree_on_small_integers() -> Result<()> {
    let Some(gpu) = gpu().map(Arc::new) else { return Ok(()) };
    for dtype in [DType::F32, DType::F16] {
        assert!(choice::agrees(&gpu, Kernel::Tiles(TILES[4]), dtype)?);
    }
    Ok(())
}

/// naga's front end and its validator take a text.
fn validate(text: &str) {
    use ::wgpu::naga;
    let module = naga::front::wgsl::parse_str(text).unwrap_or_else(|e| panic!("{}", e.emit_to_string(text)));
    let capabilities = naga::valid::Capabilities::all();
    let mut validator = naga::valid::Validator::new(naga::valid::ValidationFlags::all(), capabilities);
    validator.validate(&module).unwrap_or_else(|e| panic!("{}", e.emit_to_string(text)));
}
