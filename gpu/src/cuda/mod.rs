//! NVIDIA GPUs through the CUDA driver alone.
//!
//! | file | what it does |
//! |---|---|
//! | `gpu.rs` | a device: context, stream, failures in words |
//! | `memory.rs`, `readback.rs` | the pool's raw memory, uploads and reads through pinned memory |
//! | `launch.rs` | modules, kernels, launches |
//! | `ptx.rs` | prints programs as PTX |
//! | `pointwise.rs`, `pointwise_each.rs`, `reduce.rs` | kernels printed from programs |
//! | `matmul.rs`, `attention.rs`, `norm.rs`, `index.rs`, `quant.rs`, `random.rs` | kernels of `kernels/*.cu`, embedded as PTX (`packed.rs`) |
//! | `nccl.rs` | collectives between GPUs, by NVIDIA's library |
//! | `backend.rs` | the engine's `Backend` |

mod attention;
mod backend;
mod gpu;
mod index;
mod launch;
mod matmul;
mod memory;
pub mod nccl;
mod norm;
mod packed;
mod pointwise;
mod pointwise_each;
mod ptx;
mod quant;
mod random;
mod readback;
mod reduce;
mod view;

pub use backend::{Cuda, CudaUsage};
pub use gpu::reports;
