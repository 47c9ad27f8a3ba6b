//! Random numbers by `kernels/random.cu`.

use flowtape_engine::Result;
use flowtape_engine::backend::{Distribution, Ran};

use super::launch::Launch;
use super::pointwise::{At, count_of};
use super::view::View;

const THREADS: u32 = 256;

/// The argument of the kernels: `struct Random` of `random.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Random {
    out: u64,
    seed: u64,
    counter: u64,
    count: u32,
}

/// Fills a contiguous view from block `counter` on.
pub(super) fn fill(at: At<'_>, distribution: Distribution, seed: u64, counter: u64, out: &View) -> Result<Ran> {
    let argument = Random { out: out.address, seed, counter, count: count_of("random", out.numel())? };
    let name = match distribution {
        Distribution::Bits => "random_bits",
        Distribution::Uniform => "random_uniform",
        Distribution::Normal => "random_normal",
    };
    let launched = at.gpu.embedded("random", name).and_then(|kernel| {
        let blocks = out.numel().div_ceil(4).div_ceil(THREADS as usize);
        // SAFETY: the argument is the kernel's, and the call is checked.
        unsafe { at.gpu.launch(&kernel, Launch::blocks(blocks, THREADS), &argument) }
    });
    launched.map(|()| Ran::Done).map_err(|failure| at.gpu.failed("random", failure))
}
