//! Which kernel a product gets. Cooperative matrices where adapter and dtypes have them; else a member of the family: by
//! rule, or by measurement of all members, once for each class of shapes.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use flowtape_engine::backend::Pending;
use flowtape_engine::platform::Instant;
use flowtape_engine::{DType, Result};

use super::super::queue::Gpu;
use super::super::view::View;
use super::tiles::TILES;
use super::{Cooperative, Kernel, Product, subgroup};

/// Registers of a thread that suit few workgroups.
const REGISTERS: usize = 16;
/// The least side of a product that cooperative matrices take.
const COOPERATIVE: usize = 32;
/// What a measurement should take, so that the time of a submission does not count.
const TIME: Duration = Duration::from_millis(2);
/// The most launches of a measurement.
const LAUNCHES: u32 = 64;

pub(super) fn kernel(gpu: &Gpu, product: &Product<'_>) -> Kernel {
    let members = family(gpu, product);
    if let Some(cooperative) = cooperative(gpu, product) {
        return Kernel::Cooperative(cooperative);
    }
    let rule = by_rule(&members, product, gpu.abilities.busy);
    if !gpu.tuning.is_on() {
        return rule;
    }
    let class = Class::of(product);
    let measure = || class.fastest(gpu, &members).map(|kernel| kernel.to_string());
    let name = gpu.tuning.choice(&format!("matmul {class}"), measure);
    name.and_then(|name| members.into_iter().find(|k| k.to_string() == name)).unwrap_or(rule)
}

/// The cooperative matrices for a product, where there are such.
fn cooperative(gpu: &Gpu, product: &Product<'_>) -> Option<Cooperative> {
    let [_, m, n, k] = product.sizes();
    if m.min(n).min(k) < COOPERATIVE {
        return None;
    }
    let fits = |c: &&Cooperative| {
        c.takes(product.a.dtype, product.b.dtype) && Kernel::Cooperative(**c).shared() <= gpu.bounds.shared
    };
    gpu.cooperative.get()?.iter().find(fits).copied()
}

/// Tries what an adapter offers: only that is used whose results are the tiles'. Small integers have one sum in any order.
pub(in super::super) fn check_cooperative(gpu: &Arc<Gpu>) -> Result<()> {
    let mut good = Vec::new();
    for offer in &gpu.abilities.cooperative {
        let dtype = if offer.half { DType::F16 } else { DType::F32 };
        match agrees(gpu, Kernel::Cooperative(*offer), dtype) {
            Ok(true) => good.push(*offer),
            Ok(false) => tracing::warn!("{}: {offer:?} multiplies wrongly and is not used", gpu.name),
            Err(error) => tracing::warn!("{}: {offer:?} is not used: {error}", gpu.name),
        }
    }
    let _ = gpu.cooperative.set(good);
    gpu.check()
}

/// Whether a kernel's product of small integers is exactly that of the smallest tiles, in both layouts.
pub(super) fn agrees(gpu: &Arc<Gpu>, kernel: Kernel, dtype: DType) -> Result<bool> {
    let (m, n, k) = (72, 56, 40);
    // 0 to 2 in words of halves or of floats.
    let numbers = |count: usize, step: usize| -> Vec<u8> {
        let bits = |i: usize| match dtype {
            DType::F16 => [0u32, 0x3c00, 0x4000][i * step % 7 % 3].to_le_bytes()[..2].to_vec(),
            _ => ([0.0f32, 1.0, 2.0][i * step % 7 % 3]).to_le_bytes().to_vec(),
        };
        (0..count).flat_map(bits).collect()
    };
    let (a, b) = (numbers(m * k, 3), numbers(k * n, 5));
    let memory = [gpu.alloc(a.len())?, gpu.pool.alloc(b.len())?, gpu.pool.alloc(4 * m * n)?];
    gpu.upload(memory[0].block(), &a)?;
    gpu.upload(memory[1].block(), &b)?;
    let view = |i: usize, dtype, rows, cols, by_rows: bool| {
        let strides = if by_rows { [cols, 1] } else { [1, rows] };
        View::strided(memory[i].block(), dtype, &[rows, cols], &strides)
    };
    let out = view(2, DType::F32, m, n, true);
    for by_rows in [true, false] {
        let (a, b) = (view(0, dtype, m, k, by_rows), view(1, dtype, k, n, by_rows));
        let product = Product { a: &a, b: &b, bias: None, accumulate: false, out: &out };
        let result = |kernel| {
            product.launch(gpu, kernel)?;
            Box::new(gpu.read_later(&out.block, 0..4 * m * n)?).wait()
        };
        if result(kernel)? != result(Kernel::Tiles(TILES[0]))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Kernels of one order of accumulation that can run a product and are not absurd for it.
fn family(gpu: &Gpu, product: &Product<'_>) -> Vec<Kernel> {
    let [_, m, n, _] = product.sizes();
    // A tile may be at most about twice the result along a side.
    let near = |tile: usize, size: usize| tile <= 16 || tile < 2 * size.next_multiple_of(16);
    let tiles = TILES.into_iter().filter(|t| near(t.rows.size(), m) && near(t.cols.size(), n)).map(Kernel::Tiles);
    let few_rows = m <= 2 * subgroup::ROWS && n > 64;
    let subgroup = (gpu.abilities.subgroups && few_rows).then_some(Kernel::Subgroup);
    tiles.chain(subgroup).filter(|k| k.shared() <= gpu.bounds.shared).collect()
}

/// Few rows go through subgroups; else the smallest tile with as many registers as leave enough workgroups to keep the
/// device busy.
fn by_rule(members: &[Kernel], product: &Product<'_>, busy: usize) -> Kernel {
    let [batch, m, n, _] = product.sizes();
    let suits = |kernel: &&Kernel| {
        let [height, width] = kernel.tile();
        let enough = batch * m.div_ceil(height) * n.div_ceil(width) >= busy;
        let registers = match kernel {
            Kernel::Tiles(t) => t.rows.each * t.cols.each,
            _ => usize::MAX,
        };
        (if enough { registers } else { registers.min(REGISTERS) }, std::cmp::Reverse(height * width))
    };
    members.iter().max_by_key(suits).copied().unwrap_or(Kernel::Tiles(TILES[0]))
}

/// Products that share a choice: sizes up to powers of two, how the factors lie, dtypes.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Class {
    batch: usize,
    /// m, n, k.
    sizes: [usize; 3],
    along_k: [bool; 2],
    quads: [bool; 2],
    /// Of a, b and the result.
    dtypes: [DType; 3],
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([m, n, k], [a, b, out]) = (self.sizes, self.dtypes);
        let letter = |along: bool, quads: bool| match (along, quads) {
            (true, true) => "K4",
            (true, false) => "K",
            (false, true) => "S4",
            (false, false) => "S",
        };
        let side = |i: usize| letter(self.along_k[i], self.quads[i]);
        write!(f, "{} of {m}x{n}x{k} {}{} {a} {b} {out}", self.batch, side(0), side(1))
    }
}

impl Class {
    fn of(product: &Product<'_>) -> Self {
        let [batch, m, n, k] = product.sizes();
        let up = |size: usize, least: usize, most: usize| size.next_power_of_two().clamp(least, most);
        let (along_k, quads) = product.reads();
        Self {
            batch: up(batch, 1, 16),
            sizes: [up(m, 4, 2048), up(n, 16, 2048), up(k, 16, 1024)],
            along_k,
            quads,
            dtypes: [product.a, product.b, product.out].map(|v| v.dtype),
        }
    }

    /// The fastest member on operands of the class's sizes; `None` where they can't be made or run.
    fn fastest(&self, gpu: &Gpu, members: &[Kernel]) -> Option<Kernel> {
        let [m, n, k] = self.sizes;
        let memory = |dtype: DType, rows: usize, cols: usize| {
            gpu.alloc(self.batch * (rows + 1) * (cols + 1) * dtype.size()).ok()
        };
        let [a, b, out] = self.dtypes;
        let (a_memory, b_memory, out_memory) = (memory(a, m, k)?, memory(b, k, n)?, memory(out, m, n)?);
        // As in the products: along k or not, with rows of whole quads or an element longer.
        let view = |memory: &_, dtype: DType, [rows, cols]: [usize; 2], by_rows: bool, quads: bool| {
            let (fast, slow) = if by_rows { (cols, rows) } else { (rows, cols) };
            let step = fast + usize::from(!quads);
            let [row, col] = if by_rows { [step, 1] } else { [1, step] };
            View::strided(memory, dtype, &[self.batch, rows, cols], &[step * slow, row, col])
        };
        let a = view(a_memory.block(), a, [m, k], self.along_k[0], self.quads[0]);
        let b = view(b_memory.block(), b, [k, n], !self.along_k[1], self.quads[1]);
        let out = view(out_memory.block(), out, [m, n], true, true);
        let product = Product { a: &a, b: &b, bias: None, accumulate: false, out: &out };
        let timed = |kernel: &Kernel| {
            let time = time(gpu, &product, *kernel).ok()?;
            tracing::debug!("matmul {self}: {kernel} takes {time:?}");
            Some((time, *kernel))
        };
        members.iter().filter_map(timed).min_by_key(|(time, _)| *time).map(|(_, kernel)| kernel)
    }
}

/// What a launch takes: the shortest of three measurements.
fn time(gpu: &Gpu, product: &Product<'_>, kernel: Kernel) -> Result<Duration> {
    let run = |launches: u32| -> Result<Duration> {
        gpu.finish()?;
        let started = Instant::now();
        (0..launches).try_for_each(|_| product.launch(gpu, kernel))?;
        gpu.finish()?;
        Ok(started.elapsed() / launches)
    };
    // The first compiles.
    run(1)?;
    let once = run(1)?.max(Duration::from_nanos(100));
    let launches = (TIME.as_nanos() / once.as_nanos()).clamp(1, LAUNCHES.into()) as u32;
    let mut best = run(launches)?;
    for _ in 0..2 {
        best = best.min(run(launches)?);
    }
    Ok(best)
}
