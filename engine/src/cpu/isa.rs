//! Which vector instructions the kernels may use, decided once at run time.

use std::sync::OnceLock;

/// An instruction set, poorest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Isa {
    /// What every machine of the target has.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL beside all of [`Isa::Avx2`].
    Avx512,
    /// Dot products of bf16 pairs beside all of [`Isa::Avx512`].
    Avx512Bf16,
}

/// Whether code without an instruction set of its own has a fused multiply-add; else `mul_add` is a call into libm.
pub(crate) const FUSED: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

impl Isa {
    /// All of them, by the names that `FLOWTAPE_ISA` takes.
    pub const NAMES: [(&str, Self); 4] = [
        ("portable", Self::Portable),
        ("avx2", Self::Avx2),
        ("avx512", Self::Avx512),
        ("avx512bf16", Self::Avx512Bf16),
    ];

    /// Those that the machine has.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::NAMES.into_iter().map(|(_, isa)| isa).filter(|isa| *isa <= detect())
    }
}

/// The instruction set of this process: the machine's best, or less if `FLOWTAPE_ISA` names less.
pub(crate) fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| {
        let wanted = std::env::var("FLOWTAPE_ISA").unwrap_or_default();
        let named = Isa::NAMES.into_iter().find(|(name, _)| *name == wanted);
        named.map_or(Isa::Avx512Bf16, |(_, isa)| isa).min(detect())
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

#[cfg(not(target_arch = "x86_64"))]
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
                Isa::Portable => work.run::<{ cfg!(target_feature = "fma") }>(),
                Isa::Avx2 => avx2(work),
                Isa::Avx512 | Isa::Avx512Bf16 => avx512(work),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = isa;
        work.run::<{ cfg!(target_arch = "aarch64") }>();
    }
}
