//! Adapters instead of whole weights: the section `peft` of a recipe, with NeMo's keys.

use std::collections::BTreeMap;
use std::mem::discriminant;
use std::path::{Path, PathBuf};

use flowtape_engine::DType;
use flowtape_engine::nn::{
    AdapterKind, AdapterPlan, AdapterSpec, Dropout, DropoutMasks, DropoutPosition, LoraInit, ModuleSelection, Placement,
};
use flowtape_models::Transformer;
use flowtape_models::peft::{self, AdapterWeights, SaveFormat, load_any, save_as};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::io;
use crate::recipe::Dtype;
use crate::weights::check_used;
use crate::{Error, Result};

/// What is trained beside the model's linear layers, whose own weights stay as they are.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PeftConfig {
    /// NeMo's class; there is but one.
    #[serde(rename = "_target_", skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// What is computed.
    pub algorithm: Algorithm,
    /// The rank.
    pub dim: usize,
    /// The product is scaled by `alpha / dim`.
    pub alpha: f64,
    /// LoRA's weights by direction and length (Liu et al. 2024).
    pub use_dora: bool,
    /// LoKr's smaller factor; where it is left out the factors are near each other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factor: Option<usize>,
    /// The share of elements that are dropped.
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
    pub lora_dtype: Option<String>,
    /// An adapter to go on from, in any known form; a new one if it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_from: Option<PathBuf>,
    /// The forms in which checkpoints hold it beside PEFT's.
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

/// What an adapter computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
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
            init_from: None,
            save_formats: vec![SaveFormat::Peft],
            use_memory_efficient_lora: None,
            use_triton: None,
            moe_rank_scaling: None,
        }
    }
}

/// NeMo's file beside an adapter.
pub const NEMO_CONFIG: &str = "automodel_peft_config.json";
/// The greatest rank.
const MAX_DIM: usize = 1 << 16;

impl PeftConfig {
    /// Checks it without a model; a problem begins with the key.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.dim == 0 || self.dim > MAX_DIM {
            return Err(format!("dim: expected at least 1 and at most {MAX_DIM}, got {}", self.dim));
        }
        if !(self.alpha > 0.0 && self.alpha.is_finite()) {
            return Err(format!("alpha: expected a positive number, got {}", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(format!("dropout: expected a number in [0, 1), got {}", self.dropout));
        }
        if self.use_dora && self.algorithm != Algorithm::Lora {
            return Err(format!("use_dora: it is a form of lora, got algorithm {:?}", self.algorithm));
        }
        if self.factor == Some(0) || self.factor.is_some() && self.algorithm != Algorithm::Lokr {
            return Err(format!("factor: expected at least 1, and algorithm: lokr, got {:?}", self.factor));
        }
        self.kept_dtype()?;
        self.modules().check().map_err(|e| e.to_string())
    }

    fn modules(&self) -> ModuleSelection {
        ModuleSelection {
            target_modules: self.target_modules.clone(),
            exclude_modules: self.exclude_modules.clone(),
            match_all_linear: self.match_all_linear,
        }
    }

    fn kept_dtype(&self) -> Result<Option<DType>, String> {
        let Some(name) = &self.lora_dtype else { return Ok(None) };
        let dtype = match name.strip_prefix("torch.").unwrap_or(name) {
            "float32" | "float" | "fp32" | "f32" => DType::F32,
            "bfloat16" | "bf16" => DType::BF16,
            "float16" | "half" | "fp16" | "f16" => DType::F16,
            _ => return Err(format!("lora_dtype: expected float32, bfloat16 or float16, got {name}")),
        };
        Ok(Some(dtype))
    }

    /// The adapters beside a model's linear layers, of a run that computes in a dtype.
    ///
    /// # Errors
    /// When a pattern matches nothing, or less than it seems to mean.
    pub fn adapters(
        &self,
        dtype: Dtype,
        linears: &[String],
        masks: &DropoutMasks,
    ) -> Result<BTreeMap<String, AdapterSpec>> {
        let wrong = |what| flowtape_engine::Error::Argument { op: "peft", expected: what, got: "another value".into() };
        let kind = match self.algorithm {
            Algorithm::Lora if self.use_dora => AdapterKind::Dora,
            Algorithm::Lora => AdapterKind::Lora,
            Algorithm::Loha => AdapterKind::Loha,
            Algorithm::Lokr => AdapterKind::Lokr { factor: self.factor },
        };
        let kept = self.kept_dtype().map_err(wrong)?.unwrap_or(dtype.kept());
        let dropout = Dropout { probability: self.dropout, position: self.dropout_position, masks: masks.clone() };
        let spec = AdapterSpec {
            kind,
            dim: self.dim,
            alpha: self.alpha,
            init: self.lora_a_init,
            placement: Placement::trained(dtype.into()).with_master(kept),
            dropout: Some(dropout).filter(|d| d.probability > 0.0),
        };
        Ok(self.modules().select(linears)?.into_iter().map(|module| (module, spec.clone())).collect())
    }

    /// Gives a model's new adapters the values of `init_from`, if there is one.
    pub(crate) fn start(&self, model: &dyn Transformer, adapters: &BTreeMap<String, AdapterSpec>) -> Result<()> {
        let Some(path) = &self.init_from else { return Ok(()) };
        let (weights, unused) = load_any(path, model.params())?;
        check_used(path, &unused, weights.0.is_empty(), false)?;
        for (module, own) in &weights.0 {
            let asked = adapters.get(module).filter(|spec| {
                spec.scale() == own.spec.scale() && discriminant(&spec.kind) == discriminant(&own.spec.kind)
            });
            if asked.is_none() {
                let what = format!(
                    "peft.init_from: the adapter of {module} is {:?} with a scale of {}, which is not what `peft` asks for",
                    own.spec.kind,
                    own.spec.scale()
                );
                return Err(Error::Run { path: path.clone(), what });
            }
        }
        Ok(weights.load_into(model.params(), path)?)
    }

    /// Writes the adapters of a model into a folder in all forms.
    pub(crate) fn save(
        &self,
        model: &dyn Transformer,
        adapters: &BTreeMap<String, AdapterSpec>,
        folder: &Path,
    ) -> Result<()> {
        let weights = AdapterWeights::of(model.params(), adapters)?;
        peft::save(&weights, folder)?;
        let config = model.config();
        let class = config["_class_name"].as_str().unwrap_or_default();
        for form in self.save_formats.iter().filter(|form| **form != SaveFormat::Peft) {
            save_as(*form, &weights, model.params(), class, folder)?;
        }
        self.save_beside(folder)
    }

    /// Writes what NeMo keeps beside an adapter and PEFT's configuration has no place for.
    fn save_beside(&self, folder: &Path) -> Result<()> {
        let mut all = json!({
            "dropout": self.dropout,
            "dropout_position": self.dropout_position,
            "exclude_modules": self.exclude_modules,
            "lora_A_init": self.lora_a_init,
            "lora_dtype": self.lora_dtype,
            "match_all_linear": self.match_all_linear,
            "moe_rank_scaling": self.moe_rank_scaling.unwrap_or(false),
            "target_modules": self.target_modules,
            "use_dora": self.use_dora,
            "use_memory_efficient_lora": self.use_memory_efficient_lora.unwrap_or(true),
            "use_triton": self.use_triton.unwrap_or(false),
        });
        if let Some(factor) = self.factor {
            all["factor"] = factor.into();
        }
        let path = folder.join(NEMO_CONFIG);
        std::fs::write(&path, format!("{all:#}\n")).map_err(io(&path))
    }

    /// The plan of a frozen model with these adapters.
    pub(crate) fn plan(dtype: Dtype, adapters: BTreeMap<String, AdapterSpec>) -> AdapterPlan {
        AdapterPlan { base: Placement::frozen(dtype.into()), adapters }
    }
}
