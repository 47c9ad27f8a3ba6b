//! The element types of tensors.

use std::borrow::Cow;

use half::{bf16, f16};

/// An element type.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// bfloat16: the upper half of an f32.
    BF16,
    /// IEEE half precision.
    F16,
    /// 64-bit float: gradient checks on the CPU.
    F64,
    /// 32-bit unsigned integer: indices and masks.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::BF16 | Self::F16 => 2,
            Self::F32 | Self::U32 => 4,
            Self::F64 => 8,
        }
    }

    /// The short name, such as `f32`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::BF16 => "bf16",
            Self::F16 => "f16",
            Self::F64 => "f64",
            Self::U32 => "u32",
        }
    }

    /// Whether it is a floating-point type.
    pub const fn is_float(self) -> bool {
        !matches!(self, Self::U32)
    }

    /// Elements from the machine's order of bytes to little-endian or back: the same bytes on nearly all machines.
    pub(crate) fn little_endian(self, bytes: Cow<'_, [u8]>) -> Cow<'_, [u8]> {
        if cfg!(target_endian = "little") {
            return bytes;
        }
        let mut swapped = bytes.into_owned();
        swapped.chunks_exact_mut(self.size()).for_each(<[u8]>::reverse);
        swapped.into()
    }

    /// The type that holds the result of an operation on both: the wider float;
    /// bf16 with f16 gives f32, as in PyTorch.
    pub fn promote(self, other: Self) -> Self {
        use DType::{F32, F64, U32};
        match (self, other) {
            (a, b) if a == b => a,
            (F64, _) | (_, F64) => F64,
            (U32, x) | (x, U32) => x,
            _ => F32,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that is the element of a tensor.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// Its dtype.
    const DTYPE: DType;
    /// The value as f64, exact.
    fn to_f64(self) -> f64;
    /// The nearest value to `v`.
    fn from_f64(v: f64) -> Self;
}

macro_rules! element {
    ($($t:ty, $d:ident, $to:expr, $from:expr;)*) => {$(
        impl Element for $t {
            const DTYPE: DType = DType::$d;
            fn to_f64(self) -> f64 { ($to)(self) }
            fn from_f64(v: f64) -> Self { ($from)(v) }
        }
    )*};
}
element! {
    f32, F32, f64::from, |v| v as f32;
    f64, F64, |v| v, |v| v;
    u32, U32, f64::from, |v| v as u32;
    bf16, BF16, bf16::to_f64, |v| bf16::from_f32(v as f32);
    f16, F16, f16::to_f64, |v| f16::from_f32(v as f32);
}
