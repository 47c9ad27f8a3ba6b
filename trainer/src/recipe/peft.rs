//! The `peft` section: adapters instead of whole weights, with NeMo's keys.

use std::path::PathBuf;

use flowtape_engine::DType;
use flowtape_engine::nn::{DropoutPosition, LoraInit, ModuleSelection};
use flowtape_engine::quant::Format;
use flowtape_models::peft::SaveFormat;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is trained beside the model's linear layers, whose own weights stay as they are.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PeftConfig {
    /// NeMo's class; there is but one.
    #[serde(rename = "_target_", skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// What is computed.
    pub algorithm: Algorithm,
    /// The rank.
    #[schemars(range(min = 1, max = 65_536))]
    pub dim: usize,
    /// The product is scaled by `alpha / dim`.
    #[schemars(range(max = 1e9), extend("exclusiveMinimum" = 0))]
    pub alpha: f64,
    /// LoRA's weights by direction and length (Liu et al. 2024).
    pub use_dora: bool,
    /// LoKr's smaller factor; where it is left out the factors are near each other.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65_536))]
    pub factor: Option<usize>,
    /// The share of elements that are dropped.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub dropout: f64,
    /// Before the adapter or behind it.
    pub dropout_position: DropoutPosition,
    /// Patterns of the layers that get one: `*` stands for any text, and a pattern must match the whole path.
    pub target_modules: Vec<String>,
    /// All but these, instead.
    pub exclude_modules: Vec<String>,
    /// All linear layers, instead.
    pub match_all_linear: bool,
    /// How `A` starts.
    #[serde(rename = "lora_A_init")]
    pub lora_a_init: LoraInit,
    /// The dtype in which the adapter is kept, such as `float32`; the weights' own if it is left out.
    pub lora_dtype: Option<KeptDtype>,
    /// How the weights of the model's own linear layers are held, to take less memory: `int8`, `fp8` or `nf4`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantize_base: Option<Format>,
    /// A folder where they are kept as they were quantised, so that the next run finds them; if it is left out each run quantises them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantize_cache_dir: Option<PathBuf>,
    /// An adapter to go on from, in any known form; a new one if it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_from: Option<PathBuf>,
    /// The forms in which checkpoints hold it beside PEFT's.
    #[schemars(with = "Vec<Form>")]
    pub save_formats: Vec<SaveFormat>,
    /// NeMo's choice among its kernels, of no meaning here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub use_memory_efficient_lora: Option<bool>,
    /// NeMo's choice among its kernels, of no meaning here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub use_triton: Option<bool>,
    /// Of mixtures of experts, which no model here is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moe_rank_scaling: Option<bool>,
}

/// For the schema: the names of [`SaveFormat`].
#[derive(JsonSchema)]
#[schemars(rename_all = "lowercase")]
#[allow(dead_code)] // only its names count
enum Form {
    Peft,
    Diffusers,
    Comfyui,
}

/// What an adapter is kept in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
pub enum KeptDtype {
    /// 32 bits.
    #[serde(rename = "float32")]
    F32,
    /// bf16.
    #[serde(rename = "bfloat16")]
    Bf16,
    /// f16.
    #[serde(rename = "float16")]
    F16,
    /// PyTorch's name of the first.
    #[serde(rename = "torch.float32")]
    TorchF32,
    /// PyTorch's name of the second.
    #[serde(rename = "torch.bfloat16")]
    TorchBf16,
    /// PyTorch's name of the third.
    #[serde(rename = "torch.float16")]
    TorchF16,
}

impl From<KeptDtype> for DType {
    fn from(dtype: KeptDtype) -> Self {
        match dtype {
            KeptDtype::F32 | KeptDtype::TorchF32 => Self::F32,
            KeptDtype::Bf16 | KeptDtype::TorchBf16 => Self::BF16,
            KeptDtype::F16 | KeptDtype::TorchF16 => Self::F16,
        }
    }
}

/// What an adapter computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// A product of two thin matrices.
    #[default]
    Lora,
    /// The product, element by element, of two such products.
    Loha,
    /// A Kronecker product.
    Lokr,
}

/// NeMo's defaults.
impl Default for PeftConfig {
    fn default() -> Self {
        Self {
            target: None,
            algorithm: Algorithm::default(),
            dim: 8,
            alpha: 32.0,
            use_dora: false,
            factor: None,
            dropout: 0.0,
            dropout_position: DropoutPosition::default(),
            target_modules: Vec::new(),
            exclude_modules: Vec::new(),
            match_all_linear: false,
            lora_a_init: LoraInit::default(),
            lora_dtype: None,
            quantize_base: None,
            quantize_cache_dir: None,
            init_from: None,
            save_formats: vec![SaveFormat::Peft],
            use_memory_efficient_lora: None,
            use_triton: None,
            moe_rank_scaling: None,
        }
    }
}

impl PeftConfig {
    /// What does not fit together.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.use_dora && self.algorithm != Algorithm::Lora {
            problems.push("peft.use_dora: it is a form of the algorithm lora".into());
        }
        if self.factor.is_some() && self.algorithm != Algorithm::Lokr {
            problems.push("peft.factor: only the algorithm lokr has one".into());
        }
        if self.quantize_cache_dir.is_some() && self.quantize_base.is_none() {
            problems.push(
                "peft.quantize_cache_dir: nothing is quantised: say how (`quantize_base`), or leave it out".into(),
            );
        }
        problems.extend(self.modules().check().err().map(|error| format!("peft.{error}")));
        problems
    }

    pub(crate) fn modules(&self) -> ModuleSelection {
        ModuleSelection {
            target_modules: self.target_modules.clone(),
            exclude_modules: self.exclude_modules.clone(),
            match_all_linear: self.match_all_linear,
        }
    }
}
