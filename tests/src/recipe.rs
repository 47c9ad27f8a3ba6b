//! Goldens of whole recipe runs: every folder `recipe_*`, by its `case.json` and `config.yaml`, with recorded draws.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use flowtape_data::{BatchPlan, Collator, Cursor, Loaded, NemoCache, Pick, PixelCodec, Source, TextEmbeddings, TextEncoder};
use flowtape_engine::nn::{AdapterPlan, AdapterSpec, DropoutMasks, ParamBuilder, Placement};
use flowtape_engine::optim::{
    AdamW, LrScheduler, LrSchedulerConfig, Optimizer, OptimizerStep, Rates, StepConfig,
};
use flowtape_engine::{DType, Device, Philox, Tape};
use flowtape_flowmatch::{
    Batch, FlowMatchingConfig, Recorded, RecordedDraws, StepOptions, StepOutput, TaskType, TimestepSample,
};
use flowtape_flowmatch::FlowMatchingPipeline;
use flowtape_models::peft::{self, AdapterWeights};
use flowtape_models::{Transformer, checkpoint, create_pipeline};
use flowtape_trainer::recipe::{Dtype, PeftConfig};
use serde_json::Value;

use crate::Outcome;
use crate::golden::{Any, Golden, Tolerance, exact, max, number, text};

/// What NeMo clips to where a recipe says nothing.
const MAX_NORM: f64 = 1.0;

/// No caption is encoded: the caches hold embeddings.
struct Encoded;

impl TextEncoder for Encoded {
    fn encode(&self, _: &[Option<&str>], _: &Device) -> flowtape_data::Result<TextEmbeddings> {
        Ok(TextEmbeddings::default())
    }
}

/// The folder of a run.
pub(crate) fn check(dir: &Path, _: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let case: Value = serde_json::from_slice(&std::fs::read(dir.join("case.json"))?)?;
    let config: Value = serde_saphyr::from_str(&std::fs::read_to_string(dir.join("config.yaml"))?)?;
    let run = Run::open(dir, &case, &config)?;
    let trained: usize = run.model.params().iter().filter(|p| p.var().is_some()).map(|p| p.numel()).sum();
    out.push(exact("trainable parameters", trained as f64 == number(&case, "trainable_parameters")?, ""));
    run.train(&case, &config, out)?;
    run.compare(dir, &case, out)
}

/// A model as a recipe trains it, and its data.
struct Run {
    model: Box<dyn Transformer>,
    adapters: BTreeMap<String, AdapterSpec>,
    pipeline: FlowMatchingPipeline,
    draws: Golden,
    cache: NemoCache,
    /// The place of each picture in the cache.
    pictures: BTreeMap<String, usize>,
    collator: Collator,
}

impl Run {
    fn open(dir: &Path, case: &Value, config: &Value) -> Any<Self> {
        let base = dir.join(text(case, "model")?);
        let mut model = checkpoint::load(&base, DType::F32, &Device::cpu())?;
        let mut adapters = BTreeMap::new();
        if !config["peft"].is_null() {
            let peft: PeftConfig = serde_json::from_value(config["peft"].clone())?;
            adapters = peft.adapters(Dtype::F32, model.params().linears(), &DropoutMasks::default())?;
            let plan = AdapterPlan { base: Placement::frozen(DType::F32), adapters: adapters.clone() };
            model = checkpoint::load_with(&base, ParamBuilder::with_plan(1, plan, &Device::cpu()))?;
            let initial = Golden::tensors(dir, "initial_adapter")?.under("")?;
            for param in model.params().adapters().iter() {
                let value = initial.get(param.path()).ok_or_else(|| format!("no initial {}", param.path()))?;
                param.copy_from(value)?;
            }
        }
        let flow: FlowMatchingConfig = serde_json::from_value(config["flow_matching"].clone())?;
        let mut pictures = BTreeMap::new();
        let read = |path: &Path| -> Any<Value> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
        let cache = dir.join("cache");
        for shard in read(&cache.join("metadata.json"))?["shards"].as_array().into_iter().flatten() {
            for item in read(&cache.join(shard.as_str().ok_or("a shard")?))?.as_array().into_iter().flatten() {
                pictures.insert(text(item, "image_path")?.to_owned(), pictures.len());
            }
        }
        let (codec, encoder) = (Arc::new(PixelCodec), Arc::new(Encoded));
        Ok(Self {
            model,
            adapters,
            pipeline: create_pipeline(flow)?,
            draws: Golden::tensors(dir, "draws")?,
            cache: NemoCache::open(&cache)?,
            pictures,
            collator: Collator { codec, text: encoder, caption_dropout_prob: 0.0, seed: 0 },
        })
    }

    /// The batch of a micro-batch.
    fn batch(&self, micro: &Value) -> Any<Batch> {
        let names = micro["image_paths"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let index = |name| self.pictures.get(name).copied().ok_or_else(|| format!("no picture {name}"));
        let indices = names.map(index).collect::<Result<Vec<usize>, _>>()?;
        let samples = indices.iter().map(|i| self.cache.read(*i, &mut Philox::new(0)));
        let picks = indices.iter().map(|i| Pick { index: *i, place: 0 }).collect();
        let loaded =
            Loaded { plan: BatchPlan { picks, next: Cursor::default() }, samples: samples.collect::<Result<_, _>>()? };
        Ok(self.collator.batch(&loaded, &Device::cpu())?)
    }

    /// Forward of a micro-batch with its recorded draws.
    fn forward(&self, micro: &Value, tape: &Tape) -> Any<StepOutput> {
        let get = |name: &str| self.draws.values(&format!("micro{}.{name}", micro["index"]));
        let sample = TimestepSample {
            sigma: get("sigma")?,
            timesteps: get("timesteps")?,
            method: text(micro, "sampling_method")?.into(),
        };
        // What is below the probability is dropped.
        let dropped = get("dropped")?.iter().map(|dropped| if *dropped == 0.0 { 1.0 } else { 0.0 }).collect();
        let mut draws = RecordedDraws::new([Recorded::Uniform(dropped)]);
        let batch = self.batch(micro)?;
        let noise = self.draws.tensor(&format!("micro{}.noise", micro["index"]))?;
        let noised = self.pipeline.with_noise(&batch, DType::F32, TaskType::T2V, sample, noise)?;
        let options = StepOptions { dtype: DType::F32, ..StepOptions::recorded(tape) };
        Ok(self.pipeline.step_from(&*self.model, &batch, noised, 0, &mut draws, &options)?)
    }

    fn train(&self, case: &Value, config: &Value, out: &mut Vec<Outcome>) -> Any<()> {
        let settings = &config["optimizer"];
        let betas: (f64, f64) = serde_json::from_value(settings["betas"].clone())?;
        let mut optimizer = Optimizer::new(AdamW { betas, ..AdamW::default() });
        let schedule: LrSchedulerConfig = serde_json::from_value(config["lr_scheduler"].clone())?;
        let steps = case["optimizer_steps"].as_array().ok_or("optimizer_steps")?;
        let schedule =
            LrScheduler::new(&schedule, number(settings, "lr")?, number(settings, "weight_decay")?, steps.len() as u64)?;
        let micros = case["micro_batches"].as_array().ok_or("micro_batches")?;
        let mut groups = micros.chunk_by(|a, b| a["global_step_argument"] == b["global_step_argument"]);
        let one = Tolerance { rtol: 1.0, atol: 0.0 };
        let [mut losses, mut norms, mut rates] = [0.0; 3];
        for (step, wanted) in steps.iter().enumerate() {
            let group = groups.next().ok_or("fewer groups of micro-batches than steps")?;
            let (lr, weight_decay) = (schedule.lr(step as u64), schedule.weight_decay(step as u64));
            rates = max(rates, one.worst(&[lr], &[number(wanted, "lr_used")?]));
            let config = StepConfig { micro_batches: group.len(), max_norm: Some(MAX_NORM) };
            let params = self.model.params();
            let mut sinks = OptimizerStep::new(config, Rates { lr, weight_decay }, &mut optimizer, params, None)?;
            for micro in group {
                let tape = Tape::new();
                let output = self.forward(micro, &tape)?;
                losses = max(losses, one.worst(&[output.loss.item()?], &[number(micro, "loss")?]));
                let share = output.loss.mul_scalar(1.0 / group.len() as f64)?;
                let without = self.model.parameters_without_gradient(&output.inputs);
                if let Some(norm) = sinks.backward(&tape, &share, &without)? {
                    norms = max(norms, one.worst(&[norm.item()?], &[number(wanted, "grad_norm")?]));
                }
            }
        }
        out.push(exact("every micro-batch", groups.next().is_none(), format!("{} of {} steps", micros.len(), steps.len())));
        let bound = |what: &str| number(&case["tolerance"][what], "rtol");
        out.push(Outcome::measured("losses", losses, bound("loss")?, format!("{} micro-batches", micros.len())));
        out.push(Outcome::measured("gradient norms", norms, bound("grad_norm")?, format!("{} steps", steps.len())));
        out.push(Outcome::measured("learning rates", rates, 1e-9, format!("{} steps", steps.len())));
        Ok(())
    }

    /// What was learned, and the checkpoint's files.
    fn compare(&self, dir: &Path, case: &Value, out: &mut Vec<Outcome>) -> Any<()> {
        let bound = number(&case["tolerance"]["final"], "atol")?;
        let name = if self.adapters.is_empty() { "final_parameters_sample" } else { "final_adapter" };
        let (mut worst, wanted) = (0.0, Golden::tensors(dir, name)?.under("")?);
        for (path, want) in &wanted {
            let got = self.model.params().get(path).ok_or_else(|| format!("no parameter {path}"))?.kept()?;
            worst = got.sub(want)?.to_vec::<f64>()?.into_iter().fold(worst, |m, d| max(m, d.abs()));
        }
        out.push(Outcome::measured("final parameters", worst, bound, format!("{} tensors", wanted.len())));
        if self.adapters.is_empty() {
            return Ok(());
        }
        let folder = tempfile::tempdir()?;
        peft::save(&AdapterWeights::of(self.model.params(), &self.adapters)?, folder.path())?;
        let json = |path: &Path| -> Any<Value> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
        let same = json(&folder.path().join(peft::ADAPTER_CONFIG))? == json(&dir.join("checkpoint_adapter_config.json"))?;
        out.push(exact("checkpoint's adapter_config.json", same, ""));
        let (written, stored) =
            (Golden::tensors(folder.path(), "adapter_model")?.under("")?, Golden::tensors(dir, "checkpoint_adapter_model")?.under("")?);
        let mut worst = if written.keys().eq(stored.keys()) { 0.0 } else { f64::INFINITY };
        for (key, want) in &stored {
            let got = written.get(key).ok_or_else(|| format!("no tensor {key}"))?;
            worst = got.sub(want)?.to_vec::<f64>()?.into_iter().fold(worst, |m, d| max(m, d.abs()));
        }
        out.push(Outcome::measured("checkpoint's adapter_model", worst, bound, format!("{} tensors", stored.len())));
        Ok(())
    }
}
