//! Flowtape on GPUs: backends behind the engine's [`Backend`](flowtape_engine::backend::Backend).
//!
//! | feature | what it reaches |
//! |---|---|
//! | `wgpu` (default) | any GPU with Vulkan, Metal or DirectX 12; in a browser, any with WebGPU |
//! | `cuda` | NVIDIA GPUs, through the driver alone |

#[cfg(feature = "cuda")]
pub mod cuda;
mod device;
mod ranks;
mod report;
#[cfg(feature = "wgpu")]
pub mod wgpu;

pub use device::device;
pub use ranks::{Fail, join_ranks, ranks_id};
pub use report::{DeviceReport, reports};
