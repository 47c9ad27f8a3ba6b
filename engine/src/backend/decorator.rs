//! Backends that watch another.

use std::fmt::Debug;
use std::ops::Range;

use super::call::{Checked, CopyTo, Gather, MatMul, Pointwise, PointwiseEach, Reduction, ScatterAdd, Upload};
use super::{Backend, Buffer, Fused, Pending, Ran};
use crate::Result;
use crate::pool::PoolUsage;

macro_rules! decorator {
    ($($(#[$doc:meta])* fn $name:ident(&self $(, $arg:ident: $t:ty)*) -> $out:ty;)*) => {
        /// A backend that hands everything on to another, and overrides what it wants to see: what runs is exactly what
        /// would run without it.
        pub trait Decorator: Debug + Send + Sync {
            /// Where the work is done.
            fn inner(&self) -> &dyn Backend;
            $(
                #[doc = concat!("As [`Backend::", stringify!($name), "`].")]
                $(#[$doc])*
                fn $name(&self $(, $arg: $t)*) -> $out {
                    self.inner().$name($($arg),*)
                }
            )*
        }

        impl<D: Decorator> Backend for D {$(
            fn $name(&self $(, $arg: $t)*) -> $out {
                Decorator::$name(self $(, $arg)*)
            }
        )*}
    };
}
decorator! {
    fn name(&self) -> &str;
    fn has_data(&self) -> bool;
    fn is_host(&self) -> bool;
    fn has_f64(&self) -> bool;
    fn memory(&self) -> PoolUsage;
    fn capacity(&self) -> Option<u64>;
    ///
    /// # Errors
    /// Those of the backend.
    fn alloc(&self, bytes: usize) -> Result<Box<dyn Buffer>>;
    ///
    /// # Errors
    /// Those of the backend.
    fn upload(&self, call: Checked<Upload<'_>>) -> Result<()>;
    ///
    /// # Errors
    /// Those of the backend.
    fn download(&self, buffer: &dyn Buffer, bytes: Range<usize>) -> Result<Vec<u8>>;
    ///
    /// # Errors
    /// Those of the backend.
    fn read_later(&self, buffer: &dyn Buffer, bytes: Range<usize>) -> Result<Box<dyn Pending>>;
    ///
    /// # Errors
    /// Those of the backend.
    fn copy(&self, call: Checked<CopyTo<'_>>) -> Result<()>;
    ///
    /// # Errors
    /// Those of the backend.
    fn pointwise(&self, call: Checked<Pointwise<'_>>) -> Result<()>;
    ///
    /// # Errors
    /// Those of the backend.
    fn pointwise_each(&self, call: Checked<PointwiseEach<'_>>) -> Result<()>;
    ///
    /// # Errors
    /// Those of the backend.
    fn reduce(&self, call: Checked<Reduction<'_>>) -> Result<()>;
    ///
    /// # Errors
    /// Those of the backend.
    fn matmul(&self, call: Checked<MatMul<'_>>) -> Result<()>;
    ///
    /// # Errors
    /// Those of the backend.
    fn gather(&self, call: Checked<Gather<'_>>) -> Result<()>;
    ///
    /// # Errors
    /// Those of the backend.
    fn scatter_add(&self, call: Checked<ScatterAdd<'_>>) -> Result<()>;
    ///
    /// # Errors
    /// Those of the backend.
    fn fused(&self, call: Checked<Fused<'_>>) -> Result<Ran>;
}
