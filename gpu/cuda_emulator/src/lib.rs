//! A machine that runs PTX on the CPU, behind the functions of the CUDA driver: for tests without a GPU.
//!
//! It knows the part of PTX that Flowtape prints and that its checked-in kernels use, and refuses any other. It checks
//! that each access of global and shared memory lies inside of what was allocated and is aligned, that the threads of
//! a warp or a block meet at the same collective instruction, that no two warps use the same shared memory between two
//! barriers if one of them writes, and it lets `cp.async` arrive no sooner than it is waited for. Fresh memory is filled with NaN. It says nothing about speed, and it is no proof: blocks run one after another,
//! warps in one order of many, and the threads of a warp in step as far as they go the same way.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)] // runs in tests alone

mod arithmetic;
mod driver;
mod machine;
mod parse;
mod shared;

pub use driver::{Settings, Usage, complaint, install, launched, set, stand_in, usage};
pub use parse::Module;
