//! Attention with normalised queries and keys.

use flowtape_engine::nn::{Linear, ParamBuilder, RmsNorm};
use flowtape_engine::ops::attention;
use flowtape_engine::{Result, Tensor};

use super::RopeTables;

/// The projections of one stream to queries, keys and values of several heads; queries and keys go through RMSNorm.
#[derive(Clone, Debug)]
pub struct QkvHeads {
    projections: [Linear; 3],
    norms: [RmsNorm; 2],
    heads: usize,
}

impl QkvHeads {
    /// `names` are those of the three projections and the two norms.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, names: [&str; 5], dim: usize, heads: usize, eps: f64) -> Result<Self> {
        let linear = |name| Linear::new(&params.sub(name), dim, dim, true);
        let norm = |name| RmsNorm::new(&params.sub(name), dim / heads, eps);
        let [q, k, v, norm_q, norm_k] = names;
        Ok(Self { projections: [linear(q)?, linear(k)?, linear(v)?], norms: [norm(norm_q)?, norm(norm_k)?], heads })
    }

    /// Queries, keys and values `[B, H, L, D]` of x `[B, L, dim]`.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let (batch, len) = (x.dim(0)?, x.dim(1)?);
        let split = |linear: &Linear| {
            let y = linear.forward(x)?;
            y.reshape(&[batch, len, self.heads, y.dim(2)? / self.heads])
        };
        let [q, k, v] = &self.projections;
        let (q, k) = (self.norms[0].forward(&split(q)?)?, self.norms[1].forward(&split(k)?)?);
        Ok([q.transpose(1, 2)?, k.transpose(1, 2)?, split(v)?.transpose(1, 2)?])
    }
}

/// Attention over `[B, H, L, D]` with rotated queries and keys, its heads joined to `[B, L, dim]`.
///
/// # Errors
/// When the shapes do not fit.
pub fn attend([q, k, v]: [Tensor; 3], rope: &RopeTables) -> Result<Tensor> {
    attention(&rope.apply(&q)?, &rope.apply(&k)?, &v, None, None)?.transpose(1, 2)?.flatten(2, 3)
}
