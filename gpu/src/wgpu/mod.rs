//! Any GPU that wgpu reaches: Vulkan, Metal or DirectX 12.

mod adapter;

pub use adapter::reports;
