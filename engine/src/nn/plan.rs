//! Who decides how each parameter is held.

use std::fmt::Debug;

use super::{AdapterSpec, Role};
use crate::DType;
use crate::quant::Format;

/// How a parameter is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Placement {
    /// Whether it is trained.
    pub role: Role,
    /// What models compute with it in.
    pub compute: DType,
    /// The dtype of a wider copy, which an optimiser updates and which is saved; none where it is that of `compute`.
    pub master: Option<DType>,
    /// How the weight of a linear layer that is not trained is quantised, if it is.
    pub format: Option<Format>,
}

impl Placement {
    /// Trained in one dtype.
    pub fn trained(compute: DType) -> Self {
        Self { role: Role::Trained, compute, master: None, format: None }
    }

    /// Not trained.
    pub fn frozen(compute: DType) -> Self {
        Self { role: Role::Frozen, ..Self::trained(compute) }
    }

    /// With the weights of linear layers quantised where they are not trained.
    #[must_use]
    pub fn quantised(self, format: Option<Format>) -> Self {
        Self { format, ..self }
    }

    /// With a wider copy, where that is another dtype.
    #[must_use]
    pub fn with_master(self, dtype: DType) -> Self {
        Self { master: Some(dtype).filter(|d| *d != self.compute), ..self }
    }
}

/// Decides by path how each parameter of a model is held. A [`ParamBuilder`](super::ParamBuilder) asks it; models do not change.
pub trait ParamPlan: Send + Sync {
    /// The placement of a parameter.
    fn place(&self, path: &str, dims: &[usize]) -> Placement;

    /// The adapter beside the linear layer of that path, if it has one.
    fn adapter(&self, module: &str) -> Option<AdapterSpec> {
        let _ = module;
        None
    }
}

/// All alike.
impl ParamPlan for Placement {
    fn place(&self, _: &str, _: &[usize]) -> Placement {
        *self
    }
}

/// By a function of path and dims.
impl<F: Fn(&str, &[usize]) -> Placement + Send + Sync> ParamPlan for F {
    fn place(&self, path: &str, dims: &[usize]) -> Placement {
        self(path, dims)
    }
}

impl Debug for dyn ParamPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ParamPlan")
    }
}
