//! Tables of rotary position embeddings, made on the host in f64.

use flowtape_engine::ops::{RopeLayout, rope};
use flowtape_engine::{Device, Result, Tensor};

/// Cosines and sines `[L, D]`, f32, each angle at both places of its pair `(2i, 2i + 1)`.
#[derive(Clone, Debug)]
pub struct RopeTables {
    /// Cosines.
    pub cos: Tensor,
    /// Sines.
    pub sin: Tensor,
}

impl RopeTables {
    /// Of positions `[L, axes]` (row-major): axis `a` fills `axes_dim[a]` columns with `position / theta^(2i / dim)`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(positions: &[f32], axes_dim: &[usize], theta: f64, device: &Device) -> Result<Self> {
        let width: usize = axes_dim.iter().sum();
        let frequencies: Vec<(usize, f64)> = axes_dim
            .iter()
            .enumerate()
            .flat_map(|(axis, &dim)| (0..dim / 2).map(move |i| (axis, theta.powf(-2.0 * i as f64 / dim as f64))))
            .collect();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions.chunks(axes_dim.len()) {
            for &(axis, frequency) in &frequencies {
                let (s, c) = (f64::from(position[axis]) * frequency).sin_cos();
                cos.extend([c as f32; 2]);
                sin.extend([s as f32; 2]);
            }
        }
        let dims = [positions.len() / axes_dim.len(), width];
        Ok(Self { cos: Tensor::from_vec(cos, &dims, device)?, sin: Tensor::from_vec(sin, &dims, device)? })
    }

    /// Rotates x `[B, H, L, D]`.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        rope(x, &self.cos, &self.sin, RopeLayout::Interleaved)
    }
}
