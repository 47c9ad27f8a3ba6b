//! What flows where in training.

use flowtape_engine::nn::{ParamBuilder, Placement};
use flowtape_engine::optim::{LossScale, LossScaleConfig};
use flowtape_engine::{DType, Device};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What flows where in training.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Everything in 32 bits.
    #[default]
    F32,
    /// Weights, activations, gradients and moments in bf16, as after PyTorch's `.to(bfloat16)`.
    Bf16,
    /// Activations and gradients in bf16; the weights that are trained and saved and their moments in f32 (Micikevicius et
    /// al. 2018).
    Mixed,
    /// The same in f16, for GPUs that have f16 and no bf16. The loss is scaled on the way back, so that small gradients stay
    /// normal numbers.
    #[serde(rename = "mixed_f16")]
    MixedF16,
}

impl Dtype {
    /// What weights are trained and saved in.
    pub fn kept(self) -> DType {
        match self {
            Self::Bf16 => DType::BF16,
            Self::F32 | Self::Mixed | Self::MixedF16 => DType::F32,
        }
    }

    /// A maker of a model's parameters.
    pub fn params(self, seed: u64, device: &Device) -> ParamBuilder {
        ParamBuilder::with_plan(seed, Placement::trained(self.into()).with_master(self.kept()), device)
    }

    /// What a loss is multiplied with, where gradients would be too small for the dtype.
    ///
    /// # Errors
    /// When the device fails.
    pub fn loss_scale(self, config: LossScaleConfig, device: &Device) -> flowtape_engine::Result<Option<LossScale>> {
        match self {
            Self::MixedF16 => LossScale::new(config, device).map(Some),
            Self::F32 | Self::Bf16 | Self::Mixed => Ok(None),
        }
    }
}

/// What a model computes in.
impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 | Dtype::Mixed => Self::BF16,
            Dtype::MixedF16 => Self::F16,
        }
    }
}
