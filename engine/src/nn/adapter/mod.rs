//! Adapters: what is trained beside a linear layer whose own weight stays as it is.
//!
//! A plan says which layers have one ([`AdapterPlan`]); [`ModuleSelection`] chooses them by patterns. Models do not change.

mod dropout;
mod lora;
mod modules;

use std::collections::BTreeMap;

use super::{Param, ParamBuilder, ParamPlan, Placement};
use crate::{Result, Tensor};

pub use dropout::{Dropout, DropoutMasks, DropoutPosition};
pub(super) use lora::Lora;
pub use modules::{ModulePattern, ModuleSelection};

/// What an adapter computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum AdapterKind {
    /// `W x + scale B A x` (Hu et al. 2021).
    Lora,
    /// The same, with each output's weights kept at a trained length (Liu et al. 2024).
    Dora,
}

/// How `A` starts; `B` starts at zero, so that a new adapter changes nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LoraInit {
    /// Normal of variance `2 / (in + dim)`: PyTorch's `xavier_normal_`.
    #[default]
    Xavier,
    /// Uniform in `+-1 / sqrt(in)`: PyTorch's `kaiming_uniform_` with `a = sqrt(5)`, as peft starts it.
    Kaiming,
}

/// An adapter of one linear layer.
#[derive(Clone, Debug)]
pub struct AdapterSpec {
    /// What it computes.
    pub kind: AdapterKind,
    /// The rank.
    pub dim: usize,
    /// The product is scaled by `alpha / dim`.
    pub alpha: f64,
    /// How `A` starts.
    pub init: LoraInit,
    /// How its parameters are held; they compute in the dtype of the layer.
    pub placement: Placement,
    /// What is dropped in training, if anything.
    pub dropout: Option<Dropout>,
}

impl AdapterSpec {
    /// A LoRA without dropout.
    pub fn lora(dim: usize, alpha: f64, placement: Placement) -> Self {
        Self { kind: AdapterKind::Lora, dim, alpha, init: LoraInit::default(), placement, dropout: None }
    }

    /// The factor of the product.
    pub fn scale(&self) -> f64 {
        self.alpha / self.dim as f64
    }

    /// The weight with which a plain layer does what the layer does with its adapter. `part` gives the adapter's tensors by the
    /// names of its parameters.
    ///
    /// # Errors
    /// When a part is missing or shapes do not fit.
    pub fn merged(&self, weight: &Tensor, part: impl Fn(&str) -> Result<Tensor>) -> Result<Tensor> {
        lora::merged(self, weight, part)
    }
}

/// A model held one way, with adapters beside some of its linear layers.
#[derive(Clone, Debug)]
pub struct AdapterPlan {
    /// How the model's own parameters are held.
    pub base: Placement,
    /// The adapters by their layers' paths.
    pub adapters: BTreeMap<String, AdapterSpec>,
}

impl ParamPlan for AdapterPlan {
    fn place(&self, _: &str, _: &[usize]) -> Placement {
        self.base
    }

    fn adapter(&self, module: &str) -> Option<AdapterSpec> {
        self.adapters.get(module).cloned()
    }
}

/// The adapter of a layer.
#[derive(Clone, Debug)]
pub(super) enum Adapter {
    Lora(Lora),
}

impl Adapter {
    /// Beside a weight `[out, in]`.
    pub fn new(spec: &AdapterSpec, params: &ParamBuilder, weight: &Param) -> Result<Self> {
        Lora::new(spec, params, weight).map(Self::Lora)
    }

    /// What the layer computes with it: x `[.., in]` to `[.., out]`.
    pub fn forward(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Lora(lora) => lora.forward(x, weight, bias),
        }
    }
}
