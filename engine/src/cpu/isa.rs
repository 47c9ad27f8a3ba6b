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
}

/// The instruction set of this process: the machine's best, or less if `FLOWTAPE_ISA` (portable, avx2, avx512)
/// names less.
pub(crate) fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| {
        let wanted = match std::env::var("FLOWTAPE_ISA").as_deref() {
            Ok("portable") => Isa::Portable,
            Ok("avx2") => Isa::Avx2,
            _ => Isa::Avx512,
        };
        wanted.min(detect())
    })
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")) {
        Isa::Portable
    } else if is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
    {
        Isa::Avx512
    } else {
        Isa::Avx2
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
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        unsafe fn avx512(work: impl Work) {
            work.run::<true>();
        }
        // SAFETY: `isa()` gives only what the machine has.
        unsafe {
            match isa {
                Isa::Portable => work.run::<{ cfg!(target_feature = "fma") }>(),
                Isa::Avx2 => avx2(work),
                Isa::Avx512 => avx512(work),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = isa;
        work.run::<{ cfg!(target_arch = "aarch64") }>();
    }
}
