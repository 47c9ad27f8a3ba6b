//! What the machine's arithmetic units reach at best: multiply-adds on registers alone.

use std::hint::black_box;
use std::time::Duration;

use super::isa::{FUSED, isa};
use super::math::Real;
use super::team::{spread, threads};
use crate::DType;
use crate::platform::Instant;

/// Independent sums: more than a multiply-add's latency times what is started in a cycle, and few enough for 16 registers.
const CHAINS: usize = 12;
/// Multiply-adds of each sum in one measurement: a fraction of a millisecond.
const ROUNDS: usize = 1 << 17;
/// Measurements, of which the best counts.
const REPEATS: usize = 60;

/// One thread's loop, and the floating-point operations of one of its multiply-adds.
type Loop = (fn(), usize);

/// Floating-point operations a second of matrix products at best, with `dtype` for operands, on all threads of the current
/// pool: the best of some milliseconds, so another process on the machine matters little.
pub fn peak_flops(dtype: DType) -> f64 {
    let (work, each) = fastest(dtype);
    let flops = (CHAINS * ROUNDS * each * threads()) as f64;
    let time = || {
        let started = Instant::now();
        spread(threads(), |_| work());
        started.elapsed()
    };
    flops / (0..REPEATS).map(|_| time()).min().unwrap_or(Duration::MAX).as_secs_f64()
}

fn fastest(dtype: DType) -> Loop {
    let pairs = dtype == DType::BF16;
    let wide = dtype == DType::F64;
    #[cfg(target_arch = "x86_64")]
    {
        use super::isa::Isa;
        // SAFETY: `isa()` gives only what the machine has.
        unsafe {
            match isa() {
                Isa::Avx512Bf16 if pairs => return (|| x86::bf16_avx512(), 64),
                Isa::Avx512 | Isa::Avx512Bf16 if wide => return (|| x86::f64_avx512(), 16),
                Isa::Avx512 | Isa::Avx512Bf16 => return (|| x86::f32_avx512(), 32),
                Isa::Avx2 if wide => return (|| x86::f64_avx2(), 8),
                Isa::Avx2 => return (|| x86::f32_avx2(), 16),
                Isa::Portable => {}
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    if pairs && isa() == super::isa::Isa::NeonBf16 {
        return (neon_pairs, 16);
    }
    let _ = (isa(), pairs);
    if wide { (portable::<f64>, 2 * LANES) } else { (portable::<f32>, 2 * LANES) }
}

/// Lanes of a sum of the portable loop.
const LANES: usize = 4;

fn portable<T: Real>() {
    let mut chains = [[T::ZERO; LANES]; CHAINS];
    let factors = black_box([T::ZERO; LANES]);
    for _ in 0..ROUNDS {
        for chain in &mut chains {
            chain.iter_mut().zip(factors).for_each(|(sum, f)| *sum = f.mul_add::<FUSED>(f, *sum));
        }
    }
    black_box(chains);
}

#[cfg(target_arch = "aarch64")]
fn neon_pairs() {
    use std::arch::aarch64::vdupq_n_f32;
    // SAFETY: `fastest` asked for the instruction.
    unsafe {
        let mut chains = [vdupq_n_f32(0.0); CHAINS];
        let factor = black_box(vdupq_n_f32(0.0));
        for _ in 0..ROUNDS {
            for chain in &mut chains {
                *chain = super::gemm::dot_pairs(factor, factor, *chain);
            }
        }
        black_box(chains);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _mm256_fmadd_pd, _mm256_fmadd_ps, _mm256_setzero_pd, _mm256_setzero_ps, _mm512_dpbf16_ps, _mm512_fmadd_pd,
        _mm512_fmadd_ps, _mm512_setzero_pd, _mm512_setzero_ps,
    };

    use super::{CHAINS, ROUNDS, black_box};

    macro_rules! loops {
        ($($name:ident, $features:literal, $zero:ident, |$sum:ident, $factor:ident| $step:expr;)*) => {$(
            #[target_feature(enable = $features)]
            pub fn $name() {
                let mut chains = [$zero(); CHAINS];
                let $factor = black_box($zero());
                for _ in 0..ROUNDS {
                    for chain in &mut chains {
                        let $sum = *chain;
                        *chain = $step;
                    }
                }
                black_box(chains);
            }
        )*};
    }
    loops! {
        f32_avx2, "avx2,fma", _mm256_setzero_ps, |sum, f| _mm256_fmadd_ps(f, f, sum);
        f64_avx2, "avx2,fma", _mm256_setzero_pd, |sum, f| _mm256_fmadd_pd(f, f, sum);
        f32_avx512, "avx512f", _mm512_setzero_ps, |sum, f| _mm512_fmadd_ps(f, f, sum);
        f64_avx512, "avx512f", _mm512_setzero_pd, |sum, f| _mm512_fmadd_pd(f, f, sum);
        bf16_avx512, "avx512f,avx512bf16", _mm512_setzero_ps, |sum, f| {
            // SAFETY: 512 bits either way.
            let pairs = unsafe { std::mem::transmute::<std::arch::x86_64::__m512, std::arch::x86_64::__m512bh>(f) };
            _mm512_dpbf16_ps(sum, pairs, pairs)
        };
    }
}

/// Bytes of memory that are free for this process, on Linux: the machine's, or its container's.
pub(super) fn memory() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let info = read("/proc/meminfo")?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let machine = line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? << 10;
    let number = |path| read(path)?.trim().parse::<u64>().ok();
    let container = number("/sys/fs/cgroup/memory.max")
        .map(|most| most.saturating_sub(number("/sys/fs/cgroup/memory.current").unwrap_or(0)));
    let free = container.map_or(machine, |container| container.min(machine));
    // No process has more than its address space.
    Some(free.min(usize::MAX as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_is_below_the_peak_and_not_far_below() -> crate::Result<()> {
        use crate::cpu::isa::Isa;
        if isa() == Isa::Portable || cfg!(not(target_arch = "x86_64")) {
            // What the compiler makes of plain loops is no machine's peak, and an emulator's time says nothing of instructions.
            return Ok(());
        }
        let random = |seed| crate::Philox::new(seed).normal(&[256, 256], &crate::Device::cpu());
        let (a, b) = (random(1)?, random(2)?);
        let time = || {
            let started = Instant::now();
            a.matmul(&b).map(|_| started.elapsed())
        };
        // On one thread: a share of a busy machine has its full rate for a while.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        // In turns, so that both have the machine's good moments.
        let (mut peak, mut best) = (0.0f64, Duration::MAX);
        for _ in 0..5 {
            peak = pool.install(|| peak_flops(DType::F32)).max(peak);
            for _ in 0..10 {
                best = pool.install(time)?.min(best);
            }
        }
        let rate = 2.0 * 256f64.powi(3) / best.as_secs_f64();
        assert!(rate < 1.1 * peak && rate > 0.05 * peak, "{rate:e} of {peak:e}");
        Ok(())
    }
}
