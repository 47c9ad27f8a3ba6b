//! What flows where in training.

use flowtape_engine::nn::{ParamBuilder, Placement};
use flowtape_engine::optim::{LossScale, LossScaleConfig, Rounding};
use flowtape_engine::{DType, Device, Philox};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The stream of what weights are rounded by, a fork of the seed.
const ROUNDING: u64 = 5;

/// What flows where in training.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// Everything in 32 bits.
    #[default]
    F32,
    /// Weights, activations, gradients and moments in bf16, as after PyTorch's `.to(bfloat16)`.
    Bf16,
    /// The same, but weights are rounded by chance after each step, so that small steps count on average; moments in f32.
    Bf16Stochastic,
    /// The same, but what rounding takes from each step is kept in bf16 beside the weight, for the next one; moments in f32.
    Bf16Kahan,
    /// Activations and gradients in bf16; the weights that are trained and saved and their moments in f32 (Micikevicius et
    /// al. 2018).
    Mixed,
    /// The same in f16, for GPUs that have f16 and no bf16. The loss is scaled on the way back, so that small gradients stay
    /// normal numbers.
    MixedF16,
}

impl Dtype {
    /// What weights are trained and saved in.
    pub fn kept(self) -> DType {
        match self {
            Self::Bf16 | Self::Bf16Stochastic | Self::Bf16Kahan => DType::BF16,
            Self::F32 | Self::Mixed | Self::MixedF16 => DType::F32,
        }
    }

    /// A maker of a model's parameters.
    pub fn params(self, seed: u64, device: &Device) -> ParamBuilder {
        ParamBuilder::with_plan(seed, Placement::trained(self.into()).with_master(self.kept()), device)
    }

    /// How a step's result becomes a weight in bf16. Chances come from a fork of the run's seed.
    pub fn rounding(self, seed: u64) -> Rounding {
        match self {
            Self::Bf16Stochastic => Rounding::Stochastic(Philox::new(seed).fork(ROUNDING)),
            Self::Bf16Kahan => Rounding::Kahan,
            _ => Rounding::Nearest,
        }
    }

    /// What a loss is multiplied with, where gradients would be too small for the dtype.
    ///
    /// # Errors
    /// When the device fails.
    pub fn loss_scale(self, config: LossScaleConfig, device: &Device) -> flowtape_engine::Result<Option<LossScale>> {
        match self {
            Self::MixedF16 => LossScale::new(config, device).map(Some),
            _ => Ok(None),
        }
    }
}

/// What a model computes in.
impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 | Dtype::Bf16Stochastic | Dtype::Bf16Kahan | Dtype::Mixed => Self::BF16,
            Dtype::MixedF16 => Self::F16,
        }
    }
}
