//! Flowtape's trainer for programs in C (`include/flowtape.h`), and for whatever calls C: Python's `ctypes`, Julia, Go, C++.
//!
//! | file | what it holds |
//! |---|---|
//! | `call.rs` | what stands around each function: errors as text, panics that stop here |
//! | `tensor.rs` | tensors, batches and bytes that a caller hands over |
//! | `trainer.rs` | the functions |
//!
//! Every function that can fail returns a [`FlowtapeStatus`]; the text of what failed is [`flowtape_last_error`]'s. Pointers that must
//! not be null are looked at, sizes and names are checked, and no panic leaves a function. What can't be checked is the caller's: that
//! pointers point to what they say, and that nothing is used after it was freed.

mod call;
mod tensor;
mod trainer;

pub use call::{FlowtapeStatus, flowtape_last_error};
pub use tensor::{FlowtapeBytes, FlowtapeDtype, FlowtapeTensor, flowtape_bytes_free};
pub use trainer::*;

/// The version of this interface. It grows when a function or a struct changes in a way that old callers would not survive.
pub const FLOWTAPE_ABI_VERSION: u32 = 1;

/// The version of the interface that the library has; the header's is `FLOWTAPE_ABI_VERSION`.
#[unsafe(no_mangle)]
pub extern "C" fn flowtape_abi_version() -> u32 {
    FLOWTAPE_ABI_VERSION
}
