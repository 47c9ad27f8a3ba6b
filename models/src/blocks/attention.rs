//! Projections to queries, keys and values, and attention over them.

use flowtape_engine::nn::{Linear, ParamBuilder, RmsNorm};
use flowtape_engine::ops::{attention, pointwise};
use flowtape_engine::{DType, Error, Result, Tensor};

use super::RopeTables;

/// diffusers' names of the projections and norms of a stream's own attention.
pub const QKV: [&str; 5] = ["to_q", "to_k", "to_v", "norm_q", "norm_k"];
/// The same of the stream that is added to it: the text.
pub const ADDED_QKV: [&str; 5] = ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"];

/// Below this a mask holds no token: it holds 0 or 1.
pub(crate) const TOKEN: f64 = f32::MIN_POSITIVE as f64;

/// How queries and keys are normalised by their root mean square.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum QkNorm {
    /// Not at all.
    None,
    /// Each head by itself, after the split.
    PerHead,
    /// The same, with a weight that counts from 1.
    PerHeadFromOne,
    /// All heads together, before the split.
    AcrossHeads,
}

/// Sizes and options of [`QkvHeads`].
#[derive(Clone, Copy, Debug)]
pub struct QkvConfig {
    /// Width of what queries are made of.
    pub query_dim: usize,
    /// Width of what keys and values are made of.
    pub context_dim: usize,
    /// Number of heads.
    pub heads: usize,
    /// Heads of keys and values: a divisor of the number of heads, each shared by as many as follow each other (grouped
    /// queries; Ainslie et al. 2023).
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether the projections have a bias.
    pub bias: bool,
    /// The norm of queries and keys.
    pub norm: QkNorm,
    /// Added to the mean square.
    pub eps: f64,
}

impl QkvConfig {
    /// Attention of `dim` to itself, normalised per head: what the double-stream models have.
    pub fn joint(dim: usize, heads: usize) -> Self {
        let head_dim = dim / heads;
        let (query_dim, context_dim, kv_heads) = (dim, dim, heads);
        Self { query_dim, context_dim, heads, kv_heads, head_dim, bias: true, norm: QkNorm::PerHead, eps: 1e-6 }
    }

    /// Width of all heads together.
    pub fn inner_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// The same of keys or values.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// Projections to the queries of one sequence and the keys and values of the same or another.
#[derive(Clone, Debug)]
pub struct QkvHeads {
    query: Option<(Linear, Option<RmsNorm>)>,
    key: (Linear, Option<RmsNorm>),
    value: Linear,
    config: QkvConfig,
}

impl QkvHeads {
    /// `names` are those of the three projections and the two norms, such as [`QKV`].
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn new(params: &ParamBuilder, names: [&str; 5], config: QkvConfig) -> Result<Self> {
        let [q, k, v, norm_q, norm_k] = names;
        let query = Self::projection(params, q, norm_q, [config.query_dim, config.inner_dim()], config)?;
        Ok(Self { query: Some(query), ..Self::context_only(params, [k, v, norm_k], config)? })
    }

    /// Keys and values alone, for queries that are made elsewhere; the names of their projections and of the keys' norm.
    ///
    /// # Errors
    /// When a parameter can't be made.
    pub fn context_only(params: &ParamBuilder, names: [&str; 3], config: QkvConfig) -> Result<Self> {
        let [k, v, norm_k] = names;
        let key = Self::projection(params, k, norm_k, [config.context_dim, config.kv_dim()], config)?;
        let value = Linear::new(&params.sub(v), config.context_dim, config.kv_dim(), config.bias)?;
        Ok(Self { query: None, key, value, config })
    }

    fn projection(
        params: &ParamBuilder,
        name: &str,
        norm: &str,
        [from, to]: [usize; 2],
        config: QkvConfig,
    ) -> Result<(Linear, Option<RmsNorm>)> {
        let norm = match config.norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some(RmsNorm::new(&params.sub(norm), config.head_dim, config.eps)?),
            QkNorm::PerHeadFromOne => Some(RmsNorm::from_one(&params.sub(norm), config.head_dim, config.eps)?),
            QkNorm::AcrossHeads => Some(RmsNorm::new(&params.sub(norm), to, config.eps)?),
        };
        Ok((Linear::new(&params.sub(name), from, to, config.bias)?, norm))
    }

    /// Queries, keys and values `[B, H, L, D]` of x `[B, L, dim]`, with rotated queries and keys where there are tables.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn forward(&self, x: &Tensor, rope: Option<&RopeTables>) -> Result<[Tensor; 3]> {
        let queries = self.queries(x, rope)?;
        let [keys, values] = self.keys_values(x, rope)?;
        Ok([queries, keys, values])
    }

    /// Queries `[B, H, L, D]` of x `[B, L, query_dim]`, rotated where there are tables.
    ///
    /// # Errors
    /// When a shape does not fit, or there are keys and values alone.
    pub fn queries(&self, x: &Tensor, rope: Option<&RopeTables>) -> Result<Tensor> {
        let query = self.query.as_ref();
        let (linear, norm) = query.ok_or_else(|| Error::argument("queries", "a projection to queries", "none"))?;
        self.split(linear.forward(x)?, self.config.heads, norm.as_ref(), rope)
    }

    /// Keys and values `[B, H, T, D]` of a context `[B, T, context_dim]`; the keys are rotated where there are tables.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn keys_values(&self, context: &Tensor, rope: Option<&RopeTables>) -> Result<[Tensor; 2]> {
        let (linear, norm) = &self.key;
        let QkvConfig { heads, kv_heads, .. } = self.config;
        let keys = self.split(linear.forward(context)?, kv_heads, norm.as_ref(), rope)?;
        let values = self.split(self.value.forward(context)?, kv_heads, None, None)?;
        Ok([shared_heads(&keys, heads)?, shared_heads(&values, heads)?])
    }

    fn split(
        &self,
        projected: Tensor,
        heads: usize,
        norm: Option<&RmsNorm>,
        rope: Option<&RopeTables>,
    ) -> Result<Tensor> {
        let across = self.config.norm == QkNorm::AcrossHeads;
        let projected = norm.filter(|_| across).map_or(Ok(projected.clone()), |norm| norm.forward(&projected))?;
        let heads = split_heads(&projected, heads)?;
        match (norm.filter(|_| !across), rope) {
            (Some(norm), Some(rope)) => norm.rotated(&heads, &rope.cos, &rope.sin, rope.layout)?.transpose(1, 2),
            (Some(norm), None) => norm.forward(&heads)?.transpose(1, 2),
            (None, Some(rope)) => rope.apply(&heads.transpose(1, 2)?),
            (None, None) => heads.transpose(1, 2),
        }
    }
}

/// `[B, L, H D]` to `[B, L, H, D]`.
///
/// # Errors
/// When the shape does not fit.
pub fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    x.reshape(&[x.dim(0)?, x.dim(1)?, heads, x.dim(2)? / heads])
}

/// Keys or values `[B, K, L, D]` for each of `heads` heads: as many as follow each other share one.
///
/// # Errors
/// When K is no divisor of the heads.
pub fn shared_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    match *x.dims() {
        [_, shared, _, _] if shared == heads => Ok(x.clone()),
        [batch, shared, len, width] if shared > 0 && heads.is_multiple_of(shared) => {
            let repeated = x.unsqueeze(2)?.expand(&[batch, shared, heads / shared, len, width])?;
            repeated.reshape(&[batch, heads, len, width])
        }
        _ => Err(Error::shape("attention", format!("keys and values [B, a divisor of {heads}, L, D]"), x.dims())),
    }
}

/// Attention over `[B, H, L, D]`, its heads joined to `[B, L, H D]`. The mask is added to the scores.
///
/// # Errors
/// When the shapes do not fit.
pub fn attend([q, k, v]: [Tensor; 3], mask: Option<&Tensor>) -> Result<Tensor> {
    attention(&q, &k, &v, mask, None)?.transpose(1, 2)?.flatten(2, 3)
}

/// What is added to attention's scores so that only tokens are attended to: f32 `[B, 1, 1, T]` of a mask `[B, T]` of any
/// dtype, 0 at padding.
///
/// diffusers also bars padding from attending in some models. No token sees what padding becomes, so neither a prediction
/// nor a gradient changes, and a mask of one row takes `T` numbers a sample instead of `T^2`.
///
/// # Errors
/// When the mask has another rank.
pub fn key_mask(mask: &Tensor) -> Result<Tensor> {
    let bias =
        pointwise([&mask.detach().to_dtype(DType::F32)?], |[m]| m.abs().select_lt(TOKEN, f64::NEG_INFINITY, 0.0))?;
    bias.unsqueeze(1)?.unsqueeze(1)
}
