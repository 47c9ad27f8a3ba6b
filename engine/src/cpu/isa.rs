//! Which vector instructions the kernels may use, decided once at run time.

use std::sync::OnceLock;

/// An instruction set of the target's machines, poorest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Isa {
    /// What every machine of the target has.
    Portable,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL beside all of [`Isa::Avx2`].
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// Dot products of bf16 pairs beside all of [`Isa::Avx512`].
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// Kernels of our own for NEON, which every machine of 64-bit ARM has.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// Dot products of bf16 pairs beside all of [`Isa::Neon`].
    #[cfg(target_arch = "aarch64")]
    NeonBf16,
}

/// Whether code without an instruction set of its own has a fused multiply-add; else `mul_add` is a call into libm.
pub(crate) const FUSED: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

impl Isa {
    /// All of them, by the names that `FLOWTAPE_ISA` takes.
    pub const NAMES: &[(&str, Self)] = &[
        ("portable", Self::Portable),
        #[cfg(target_arch = "x86_64")]
        ("avx2", Self::Avx2),
        #[cfg(target_arch = "x86_64")]
        ("avx512", Self::Avx512),
        #[cfg(target_arch = "x86_64")]
        ("avx512bf16", Self::Avx512Bf16),
        #[cfg(target_arch = "aarch64")]
        ("neon", Self::Neon),
        #[cfg(target_arch = "aarch64")]
        ("neonbf16", Self::NeonBf16),
    ];

    /// Those that the machine has.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::NAMES.iter().map(|(_, isa)| *isa).filter(|isa| *isa <= detect())
    }
}

/// The instruction set of this process: the machine's best, or less if `FLOWTAPE_ISA` names less.
pub(crate) fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| {
        let wanted = std::env::var("FLOWTAPE_ISA").unwrap_or_default();
        let named = Isa::NAMES.iter().find(|(name, _)| *name == wanted);
        named.map_or(detect(), |(_, isa)| *isa).min(detect())
    })
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")) {
        Isa::Portable
    } else if !(is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl"))
    {
        Isa::Avx2
    } else if is_x86_feature_detected!("avx512bf16") {
        Isa::Avx512Bf16
    } else {
        Isa::Avx512
    }
}

#[cfg(target_arch = "aarch64")]
fn detect() -> Isa {
    if std::arch::is_aarch64_feature_detected!("bf16") { Isa::NeonBf16 } else { Isa::Neon }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detect() -> Isa {
    Isa::Portable
}

/// Work whose loops become the SIMD of an instruction set: `run` is `inline(always)`, as is all that it calls.
pub(crate) trait Work {
    /// `FMA` says whether there is a fused multiply-add.
    fn run<const FMA: bool>(self);
}

/// Runs `work` compiled for `isa`, which the machine must have.
pub(crate) fn dispatch(isa: Isa, work: impl Work) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2(work: impl Work) {
            work.run::<true>();
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn avx512(work: impl Work) {
            work.run::<true>();
        }
        // SAFETY: `isa()` gives only what the machine has.
        unsafe {
            match isa {
                Isa::Portable => work.run::<FUSED>(),
                Isa::Avx2 => avx2(work),
                Isa::Avx512 | Isa::Avx512Bf16 => avx512(work),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        // Loops become NEON without being asked: it is part of the target.
        let _ = isa;
        work.run::<FUSED>();
    }
}
