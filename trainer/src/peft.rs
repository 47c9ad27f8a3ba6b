//! Adapters beside a model's frozen layers, as the section `peft` of a recipe asks for them.

use std::collections::BTreeMap;
use std::mem::discriminant;
use std::path::Path;

use flowtape_engine::DType;
use flowtape_engine::nn::{AdapterKind, AdapterPlan, AdapterSpec, Dropout, DropoutMasks, Placement};
use flowtape_models::Transformer;
use flowtape_models::peft::{self, AdapterWeights, SaveFormat, load_any, save_as};
use serde_json::json;

use crate::error::io;
use crate::recipe::{Algorithm, Dtype, PeftConfig};
use crate::weights::check_used;
use crate::{Error, Result};

/// NeMo's file beside an adapter.
pub const NEMO_CONFIG: &str = "automodel_peft_config.json";
impl PeftConfig {
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
        let kind = match self.algorithm {
            Algorithm::Lora if self.use_dora => AdapterKind::Dora,
            Algorithm::Lora => AdapterKind::Lora,
            Algorithm::Loha => AdapterKind::Loha,
            Algorithm::Lokr => AdapterKind::Lokr { factor: self.factor },
        };
        let kept = self.lora_dtype.map_or(dtype.kept(), DType::from);
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
        let (weights, unused) = load_any(path, model.params(), &model.class())?;
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
    pub(crate) fn plan(&self, dtype: Dtype, adapters: BTreeMap<String, AdapterSpec>) -> AdapterPlan {
        AdapterPlan { base: Placement::frozen(dtype.into()).quantised(self.quantize_base), adapters }
    }
}
