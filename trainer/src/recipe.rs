//! Recipes: YAML with NeMo's names where it has them.

use std::path::{Path, PathBuf};

use flowtape_data::LoaderOptions;
use flowtape_engine::nn::{ParamBuilder, Placement};
use flowtape_engine::optim::{DecayStyle, LossScale, LossScaleConfig, LrScheduler, LrSchedulerConfig, OptimizerConfig};
use flowtape_engine::{DType, Device};
use flowtape_flowmatch::FlowMatchingConfig;
use flowtape_models::requirements::SampleSizes;
use flowtape_models::{Condition, ModelKind};
use serde::{Deserialize, Serialize};
use serde_yaml_ng::{Mapping, Value};

use crate::builtin::digits::SIDE;
use crate::builtin::moving_digits::VideoSize;
use crate::error::io;
use crate::{Error, Result};

/// Everything that a run is made of. The run folder keeps it resolved: all defaults written out.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The first part of the run folder's name.
    pub name: String,
    /// The run folder; `runs/<name>-<number>` if none is given.
    #[serde(default)]
    pub run_dir: Option<PathBuf>,
    /// All random numbers follow from it.
    #[serde(default)]
    pub seed: u64,
    /// What flows where: `f32`, `bf16` (weights and moments too), or `mixed` or `mixed_f16` (bf16 or f16 with weights and
    /// moments kept in f32).
    #[serde(default)]
    pub dtype: Dtype,
    /// Where it runs: `cpu`, `cuda`, `cuda:<number>`, `wgpu` or `wgpu:<number>`, as `flowtape devices` lists them.
    #[serde(default = "cpu")]
    pub device: String,
    /// What is trained on.
    pub data: DataConfig,
    /// The object of diffusers' `config.json`; its `_class_name` says which model.
    pub model: serde_json::Value,
    /// How the model starts.
    #[serde(default)]
    pub init: Init,
    /// The pipeline.
    #[serde(default)]
    pub flow_matching: FlowMatchingConfig,
    /// The optimiser.
    pub optimizer: OptimizerConfig,
    /// Learning rate by step; constant if the section is absent.
    #[serde(default)]
    pub lr_scheduler: Option<LrSchedulerConfig>,
    /// Gradient clipping; none if the section is absent.
    #[serde(default)]
    pub clip_grad_norm: Option<ClipGradNorm>,
    /// How the factor of the loss moves, for `mixed_f16` alone.
    #[serde(default)]
    pub loss_scale: LossScaleConfig,
    /// How long, in which batches.
    pub step_scheduler: StepScheduler,
    /// What is traded for time.
    #[serde(default)]
    pub performance: Performance,
    /// Sample grids.
    #[serde(default)]
    pub sampling: SamplingConfig,
    /// The report at the end; none if the section is absent.
    #[serde(default)]
    pub report: Option<ReportConfig>,
}

fn cpu() -> String {
    "cpu".into()
}

/// What flows where in training.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
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
    /// A maker of a model's parameters.
    pub fn params(self, seed: u64, device: &Device) -> ParamBuilder {
        let placement = Placement::trained(self.into());
        let wide = matches!(self, Self::Mixed | Self::MixedF16);
        let placement = if wide { placement.with_master(DType::F32) } else { placement };
        ParamBuilder::with_plan(seed, placement, device)
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

/// A source of training data.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Which.
    pub source: SourceName,
    /// Width of the embeddings of caption tokens and of the pooled caption.
    pub text_dim: usize,
    /// Sizes of the videos, for a source of videos.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub video: Option<VideoSize>,
    /// Share of the samples whose caption is dropped, for guidance: the adapters of video models drop none themselves.
    #[serde(default)]
    pub caption_dropout_prob: f64,
    /// Whether each epoch has an order of its own; else all have the source's.
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// Whether samples that fill no batch at an epoch's end are left out; else the batch goes on into the next epoch.
    #[serde(default)]
    pub drop_last: bool,
    /// Threads that read ahead; 0 reads between steps. The results do not depend on it.
    #[serde(default = "num_workers")]
    pub num_workers: usize,
}

fn yes() -> bool {
    true
}

fn num_workers() -> usize {
    LoaderOptions::default().num_workers
}

/// The known sources.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceName {
    /// The embedded 8 x 8 digits.
    Digits,
    /// The same, moving over a larger canvas and bouncing off its edges.
    MovingDigits,
}

impl DataConfig {
    /// Still digits, with embeddings of `text_dim`.
    pub fn digits(text_dim: usize) -> Self {
        Self {
            source: SourceName::Digits,
            text_dim,
            video: None,
            caption_dropout_prob: 0.0,
            shuffle: true,
            drop_last: false,
            num_workers: num_workers(),
        }
    }

    fn check(&self) -> Result<(), String> {
        let fits = |v: &VideoSize| v.frames > 0 && v.height >= SIDE && v.width >= SIDE;
        match (self.source, &self.video) {
            (SourceName::MovingDigits, Some(video)) if fits(video) => {}
            (SourceName::MovingDigits, _) => {
                return Err(format!(
                    "data.video: moving_digits needs frames (at least 1), height and width (at least {SIDE})"
                ));
            }
            (SourceName::Digits, Some(_)) => {
                return Err("data.video: digits are images; did you mean moving_digits?".into());
            }
            (SourceName::Digits, None) => {}
        }
        if !(0.0..=1.0).contains(&self.caption_dropout_prob) {
            let got = self.caption_dropout_prob;
            return Err(format!("data.caption_dropout_prob: expected a number in [0, 1], got {got}"));
        }
        Ok(())
    }
}

/// Starting values of a new model.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// As diffusers: PyTorch's linear initialisation everywhere.
    #[default]
    Diffusers,
    /// The same, but modulations, gates and the output projection start at zero, as in DiT.
    AdalnZero,
}

/// Gradient clipping.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClipGradNorm {
    /// The greatest norm of all gradients together.
    pub max_norm: f64,
}

/// Steps and batches.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepScheduler {
    /// Samples of an optimiser step; a multiple of `local_batch_size`, which it is if left out.
    #[serde(default)]
    pub global_batch_size: Option<usize>,
    /// Samples that go through the model at once.
    pub local_batch_size: usize,
    /// Optimiser steps.
    pub max_steps: u64,
    /// Steps between checkpoints; 0 for one at the end alone.
    #[serde(default)]
    pub ckpt_every_steps: u64,
}

/// What is traded for time.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Performance {
    /// Whether a loss that is NaN or above 100 stops the run.
    pub check_loss: bool,
    /// Whether blocks run again in backward instead of keeping their activations: less memory, the same results.
    pub activation_checkpointing: bool,
}

/// How grids are sampled.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingConfig {
    /// Steps between sample grids; 0 for one at the end alone.
    pub every_steps: u64,
    /// Euler steps.
    pub num_inference_steps: usize,
    /// Scale of classifier-free guidance; 1 for none.
    pub guidance_scale: f64,
    /// Whether grids and the report also show videos that go on from a given first frame.
    pub image_to_video: bool,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self { every_steps: 0, num_inference_steps: 20, guidance_scale: 2.0, image_to_video: false }
    }
}

/// What the last report measures.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReportConfig {
    /// Generated samples of each class.
    pub samples_per_class: usize,
}

impl Recipe {
    /// Reads a file and applies overrides `a.b=value`.
    ///
    /// # Errors
    /// When the file can't be read, a key is unknown (the nearest one is suggested, with line and column), a value does
    /// not fit, or an override is malformed.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(io(path))?;
        Self::from_yaml(path, &text, overrides)
    }

    /// The same from the text of a file; errors name it `path`.
    ///
    /// # Errors
    /// As above.
    pub fn from_yaml(path: &Path, text: &str, overrides: &[String]) -> Result<Self> {
        Self::parse(text, overrides).map_err(|what| Error::Recipe { path: path.into(), what })
    }

    /// From the object that a file would hold, for programs with data of their own.
    ///
    /// # Errors
    /// When a key is unknown or a value does not fit.
    pub fn from_json(object: serde_json::Value) -> Result<Self> {
        let recipe = serde_json::from_value::<Self>(object).map_err(|e| with_suggestion(&e.to_string()));
        let checked = recipe.and_then(|recipe| recipe.check().map(|()| recipe));
        checked.map_err(|what| Error::Recipe { path: "recipe".into(), what })
    }

    fn parse(text: &str, overrides: &[String]) -> Result<Self, String> {
        // From the text first: only then errors know their line.
        let mut recipe: Self = serde_yaml_ng::from_str(text).map_err(|e| with_suggestion(&e.to_string()))?;
        if !overrides.is_empty() {
            let mut value: Value = serde_yaml_ng::from_str(text).map_err(|e| e.to_string())?;
            for setting in overrides {
                set(&mut value, setting).map_err(|e| format!("--set {setting}: {e}"))?;
            }
            recipe =
                serde_yaml_ng::from_value(value).map_err(|e| format!("--set: {}", with_suggestion(&e.to_string())))?;
        }
        recipe.check()?;
        recipe.check_data()?;
        Ok(recipe)
    }

    fn check(&self) -> Result<(), String> {
        let StepScheduler { local_batch_size: local, max_steps, .. } = self.step_scheduler;
        let global = self.global_batch_size();
        if local == 0 || global == 0 || !global.is_multiple_of(local) {
            return Err(format!(
                "step_scheduler: global_batch_size must be a positive multiple of local_batch_size, got {global} and {local}"
            ));
        }
        if max_steps == 0 {
            return Err("step_scheduler.max_steps: expected at least 1, got 0".into());
        }
        let positive = [
            ("optimizer.lr", self.optimizer.lr),
            ("clip_grad_norm.max_norm", self.clip_grad_norm.as_ref().map_or(1.0, |c| c.max_norm)),
            ("data.text_dim", self.data.text_dim as f64),
        ];
        if let Some((key, value)) = positive.into_iter().find(|(_, v)| !(*v > 0.0 && v.is_finite())) {
            return Err(format!("{key}: expected a positive number, got {value}"));
        }
        self.sampling.check().map_err(|e| format!("sampling.{e}"))?;
        self.loss_scale.check().map_err(|e| e.to_string())?;
        self.data.check()?;
        let adapter = &self.flow_matching.adapter_type;
        let kind = ModelKind::of_adapter(adapter).map_err(|e| format!("flow_matching.{e}"))?;
        if self.sampling.image_to_video && (self.data.video.is_none() || !kind.takes(Condition::FirstFrame)) {
            let able = Condition::FirstFrame.adapters().join(", ");
            return Err(format!(
                "sampling.image_to_video: expected a source of videos and an adapter that takes a first frame ({able}), got {adapter}"
            ));
        }
        self.flow_matching.validate().map_err(|e| format!("flow_matching.{e}"))
    }

    /// Whether model and adapter fit the recipe's own data.
    fn check_data(&self) -> Result<(), String> {
        let kind = ModelKind::of_adapter(&self.flow_matching.adapter_type).map_err(|e| e.to_string())?;
        let DataConfig { video, text_dim, .. } = &self.data;
        let latents = video.map_or(vec![1, SIDE, SIDE], |v| vec![1, v.frames, v.height, v.width]);
        let widths = ["text_embeddings", "text_embeddings_2", "pooled_prompt_embeds"]
            .map(|tensor| (tensor, "data.text_dim", *text_dim));
        let sample = SampleSizes { source: "data.source", latents: &latents, widths: &widths };
        let contradictions = kind.contradictions(&self.model, &self.flow_matching.adapter_kwargs, &sample);
        if contradictions.is_empty() { Ok(()) } else { Err(contradictions.join("; ")) }
    }

    /// Samples of an optimiser step.
    pub fn global_batch_size(&self) -> usize {
        self.step_scheduler.global_batch_size.unwrap_or(self.step_scheduler.local_batch_size)
    }

    /// Batches of a step, one after the other.
    pub fn micro_batches(&self) -> usize {
        self.global_batch_size() / self.step_scheduler.local_batch_size.max(1)
    }

    /// Learning rate and weight decay by step.
    ///
    /// # Errors
    /// When the section does not fit.
    pub fn schedule(&self) -> flowtape_engine::Result<LrScheduler> {
        let constant = LrSchedulerConfig {
            lr_decay_style: DecayStyle::Constant,
            lr_warmup_steps: Some(0),
            ..LrSchedulerConfig::default()
        };
        let OptimizerConfig { lr, weight_decay, .. } = self.optimizer;
        let config = self.lr_scheduler.as_ref().unwrap_or(&constant);
        LrScheduler::new(config, lr, weight_decay, self.step_scheduler.max_steps)
    }

    /// With what a recipe may leave open as it is used: a run that is made longer later keeps its schedule.
    fn resolved(&self) -> Self {
        let mut out = self.clone();
        out.step_scheduler.global_batch_size = Some(self.global_batch_size());
        if let (Some(config), Ok(schedule)) = (&mut out.lr_scheduler, self.schedule()) {
            *config = schedule.config();
        }
        out
    }

    /// The resolved recipe as YAML.
    pub fn to_yaml(&self) -> String {
        serde_yaml_ng::to_string(&self.resolved()).unwrap_or_default()
    }

    /// The resolved recipe as an object.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self.resolved()).unwrap_or_default()
    }
}

/// Sets one key of a tree; sections on the way are made where they are missing.
fn set(root: &mut Value, setting: &str) -> Result<(), String> {
    let (path, value) = setting.split_once('=').ok_or("expected key=value, such as optimizer.lr=1e-4")?;
    if value.trim().is_empty() {
        return Err("expected a value after =; null takes an optional section away".into());
    }
    let value: Value = serde_yaml_ng::from_str(value).map_err(|e| e.to_string())?;
    let mut at = root;
    for key in path.split('.') {
        if at.is_null() {
            *at = Value::Mapping(Mapping::new());
        }
        let map = at.as_mapping_mut().ok_or_else(|| format!("{key} is inside a value, not a section"))?;
        at = map.entry(Value::from(key)).or_insert(Value::Null);
    }
    *at = value;
    Ok(())
}

/// Adds the nearest known name to a message about an unknown one.
fn with_suggestion(message: &str) -> String {
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let unknown = message.contains("unknown field") || message.contains("unknown variant");
    let Some((wrong, known)) = quoted.split_first().filter(|_| unknown) else { return message.into() };
    let nearest = known.iter().max_by(|a, b| strsim::jaro(wrong, a).total_cmp(&strsim::jaro(wrong, b)));
    match nearest.filter(|name| strsim::jaro(wrong, name) > 0.7) {
        Some(name) => format!("{message}; did you mean `{name}`?"),
        None => message.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGITS: &str = include_str!("../../recipes/digits.yaml");

    #[test]
    fn overrides_reach_every_level() {
        let set = ["optimizer.lr=5e-6", "run_dir=/tmp/x", "model.num_layers=1", "step_scheduler.max_steps=3"];
        let recipe = Recipe::parse(DIGITS, &set.map(String::from)).unwrap();
        assert_eq!(recipe.optimizer.lr, 5e-6);
        assert_eq!(recipe.run_dir.as_deref(), Some(Path::new("/tmp/x")));
        assert_eq!((recipe.model["num_layers"].as_u64(), recipe.step_scheduler.max_steps), (Some(1), 3));
    }

    #[test]
    fn a_recipe_chooses_any_rule() {
        let set = ["optimizer={name: sgd, lr: 0.1, momentum: 0.9, groups: [{pattern: '*.bias', wd_mult: 0}]}"];
        let recipe = Recipe::parse(DIGITS, &set.map(String::from)).unwrap();
        let text = recipe.to_yaml();
        assert!(
            text.contains("name: sgd") && text.contains("momentum: 0.9") && text.contains("nesterov: false"),
            "{text}"
        );
        assert_eq!(Recipe::parse(&text, &[]).unwrap().optimizer, recipe.optimizer);
        assert_eq!(recipe.optimizer.groups.len(), 1);
    }

    #[test]
    fn the_resolved_recipe_is_the_same_recipe_with_the_values_that_are_used() {
        let recipe = Recipe::parse(DIGITS, &["data.shuffle=false".into()]).unwrap();
        let text = recipe.to_yaml();
        for value in ["lr_warmup_steps: 100", "lr_decay_steps: 1000", "min_lr: 0.00001", "global_batch_size: 64"] {
            assert!(text.contains(value), "{value} in {text}");
        }
        // Made longer, it keeps its schedule.
        let longer = Recipe::parse(&text, &["step_scheduler.max_steps=5000".into()]).unwrap();
        assert_eq!(longer.schedule().unwrap(), recipe.schedule().unwrap());
        assert_eq!(Recipe::parse(&text, &[]).unwrap().to_yaml(), text);
    }

    #[test]
    fn errors_name_key_line_and_nearest() {
        let error = Recipe::parse(&DIGITS.replace("  lr:", "  lrr:"), &[]).unwrap_err();
        assert!(error.contains("lrr") && error.contains("line") && error.contains("did you mean `lr`"), "{error}");
        for (set, part) in [
            ("optimizer.lr", "key=value"),
            ("optimizer.lr=fast", "fast"),
            ("optimizer.lr.x=1", "not a section"),
            ("optimizer.lr=-1", "optimizer.lr"),
            ("optimizer.momentum=0.9", "unknown field `momentum`"),
            ("optimizer.name=adam", "adamw or sgd"),
            ("optimizer=", "expected a value"),
            ("sampling.guidance_scale=.nan", "sampling.guidance_scale: expected a number above 0"),
            ("sampling.num_inference_steps=1000000000000", "sampling.num_inference_steps: expected a whole number"),
            ("step_scheduler.local_batch_size=0", "local_batch_size"),
            ("step_scheduler.global_batch_size=100", "multiple"),
            ("flow_matching.flow_shift=0", "flow_matching.flow_shift"),
            ("sampelr.x=1", "did you mean `sampling`"),
            ("data.source=moving_digits", "data.video"),
            ("data.video={frames: 2, height: 9, width: 9}", "moving_digits"),
            ("data.caption_dropout_prob=2", "[0, 1]"),
            ("sampling.image_to_video=true", "hunyuan"),
            ("init=zero", "adaln_zero"),
            ("data.text_dim=31", "data.text_dim (31) must equal model.joint_attention_dim (32)"),
            ("model.in_channels=8", "the channels of data.source (1) must equal model.in_channels / 4 (2)"),
            ("model.num_layer=2", "did you mean `num_layers`"),
            ("model.num_layers=100000000", "num_layers: expected at least 0 and at most 1024"),
            (
                "flow_matching.adapter_type=simple",
                "model._class_name (FluxTransformer2DModel) must be WanTransformer3DModel",
            ),
            ("flow_matching.timestep_sampling=sigmoid", "logit_normal"),
        ] {
            let error = Recipe::parse(DIGITS, &[set.into()]).unwrap_err();
            assert!(error.contains(part), "{set}: {error}");
        }
    }
}
