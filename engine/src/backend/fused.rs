//! Operations that a backend may have a kernel for.

use super::call::{Call, Checked};
use super::{Backend, Ran};
use crate::ops::{
    AttentionBackward, AttentionForward, ConvForward, ModulatedNormBackward, ModulatedNormForward, NormBackward,
    NormForward, NormRopeBackward, NormRopeForward,
};
use crate::quant::Dequantise;
use crate::random::RandomFill;
use crate::{Result, Tensor};

/// What the ops say of a fused call; the operands by name are public fields.
pub trait FusedCall<'a> {
    /// Its name in profiles and errors.
    const NAME: &'static str;
    /// The operands that are read.
    fn inputs(&self) -> [Option<&'a Tensor>; 8];
    /// The operands that are written.
    fn outputs(&self) -> [Option<&'a Tensor>; 4];
    /// Whether shapes and dtypes are those of the contract.
    ///
    /// # Errors
    /// When they are not, with what is expected.
    fn fits(&self) -> Result<()>;
    /// Floating-point operations of its matrix products.
    fn flops(&self) -> f64 {
        0.0
    }
}

/// Operands in the order given, then nothing.
pub(crate) fn operands<const N: usize, const M: usize>(given: [Option<&Tensor>; N]) -> [Option<&Tensor>; M] {
    std::array::from_fn(|i| given.get(i).copied().flatten())
}

macro_rules! fused {
    ($($(#[$doc:meta])* $name:ident($call:ident);)*) => {
        /// Operations that a backend may have a kernel for. Each is defined by its composition, which runs where the backend
        /// declines, forward and backward alike: nobody has to know before.
        #[derive(Clone, Copy, Debug)]
        #[non_exhaustive]
        pub enum Fused<'a> {$(
            $(#[$doc])*
            $name($call<'a>),
        )*}

        impl<'a> Fused<'a> {
            /// Floating-point operations of its matrix products.
            pub fn flops(&self) -> f64 {
                match self {
                    $(Self::$name(call) => call.flops(),)*
                }
            }
        }

        impl<'a> Call<'a> for Fused<'a> {
            type Answer = Ran;

            fn name(&self) -> &'static str {
                match self {
                    $(Self::$name(_) => $call::NAME,)*
                }
            }

            fn reads(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
                match self {
                    $(Self::$name(call) => call.inputs(),)*
                }
                .into_iter()
                .flatten()
            }

            fn writes(&self) -> impl Iterator<Item = &'a Tensor> + Clone {
                match self {
                    $(Self::$name(call) => call.outputs(),)*
                }
                .into_iter()
                .flatten()
            }

            fn fits(&self) -> Result<()> {
                match self {
                    $(Self::$name(call) => call.fits(),)*
                }
            }

            fn send(call: Checked<Self>, backend: &dyn Backend) -> Result<Ran> {
                backend.fused(call)
            }
        }

        $(impl<'a> From<$call<'a>> for Fused<'a> {
            fn from(call: $call<'a>) -> Self {
                Self::$name(call)
            }
        })*
    };
}
fused! {
    /// `softmax(q k^T scale + mask) v`.
    AttentionForward(AttentionForward);
    /// Its gradient.
    AttentionBackward(AttentionBackward);
    /// A convolution.
    ConvForward(ConvForward);
    /// LayerNorm or RMSNorm.
    NormForward(NormForward);
    /// The gradient of its input.
    NormBackward(NormBackward);
    /// LayerNorm, then a modulation.
    ModulatedNormForward(ModulatedNormForward);
    /// Its gradient.
    ModulatedNormBackward(ModulatedNormBackward);
    /// RMSNorm, then a rotation.
    NormRopeForward(NormRopeForward);
    /// Its gradient.
    NormRopeBackward(NormRopeBackward);
    /// A panel of a quantised matrix, dense.
    Dequantise(Dequantise);
    /// Random numbers.
    Random(RandomFill);
}

/// Runs a kernel for a fused call where the backend has one.
///
/// # Errors
/// When the call breaks its contract, or the device fails.
pub fn run_fused<'a>(call: impl Into<Fused<'a>>) -> Result<Ran> {
    call.into().run()
}
