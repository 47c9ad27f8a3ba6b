//! Goldens of whole recipe runs: every folder `recipe_*`. Its `config.yaml` is read as a recipe of ours, and the trainer runs it
//! with the recorded batches and draws, from the cache to the checkpoints.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use flowtape_data::{BatchPlan, Cursor, Pick, Rank, Sampler};
use flowtape_engine::nn::Params;
use flowtape_engine::safetensors::SafeTensors;
use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::{Recorded, RecordedDraws, TimestepSample};
use flowtape_models::checkpoint;
use flowtape_models::peft;
use flowtape_trainer::hooks::{Checkpoint, on_step};
use flowtape_trainer::peft::NEMO_CONFIG;
use flowtape_trainer::run::RunFolder;
use flowtape_trainer::train::Session;
use flowtape_trainer::{Recipe, StepRecord, Trainer};
use serde_json::Value;

use crate::Outcome;
use crate::golden::{Any, Golden, Tolerance, exact, max, number, text};

/// The folder of a run.
pub(crate) fn check(dir: &Path, _: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let case = json(&dir.join("case.json"))?;
    let folder = tempfile::tempdir()?;
    let run_dir = folder.path().join("run");
    let checkpoints = strings(&case["checkpoints"]);
    let recipe = Recipe::load(
        &dir.join("config.yaml"),
        // The paths alone are ours, and that no checkpoint is removed.
        &[
            format!("model.pretrained_model_name_or_path={}", dir.join(text(&case, "model")?).display()),
            format!("data.dataloader.cache_dir={}", dir.join("cache").display()),
            format!("checkpoint.checkpoint_dir={}", run_dir.display()),
            format!("checkpoint.max_recent_checkpoints={}", checkpoints.len().max(1)),
        ],
    )?;
    let steps = list(&case, "optimizer_steps")?;
    let batches = Arc::new(Batches::read(dir, &case)?);
    let trainer = Trainer::new(&recipe)?.replaying(batches.clone(), draws(dir, &case, &recipe)?);
    out.push(exact("optimiser steps", trainer.recipe().step_scheduler.max_steps == steps.len() as u64, ""));
    let params = trainer.model().params();
    let trained: usize = params.iter().filter(|param| param.var().is_some()).map(|param| param.numel()).sum();
    out.push(exact("trainable parameters", trained as f64 == number(&case, "trainable_parameters")?, ""));
    if recipe.peft.is_some() {
        give(&params.adapters(), &Golden::tensors(dir, "initial_adapter")?.under("")?)?;
    }
    let every = recipe.step_scheduler.ckpt_every_steps;
    let mut records: Vec<StepRecord> = Vec::new();
    {
        let run = RunFolder::create(trainer.recipe())?;
        let session = Session::new(trainer, run, &NEVER).with(on_step(|record| records.push(record.clone())));
        session
            .with(Box::new(Checkpoint::new(every).at_epoch_ends(recipe.step_scheduler.save_checkpoint_every_epoch)))
            .run()?;
    }
    figures(&case, &records, &batches.steps(recipe.step_scheduler.micro_batches()), out)?;
    let saved = Saved { case: &case, folder: run_dir.join("checkpoints"), adapters: recipe.peft.is_some() };
    saved.listed(&checkpoints, out)?;
    saved.compare(dir, out)
}

static NEVER: AtomicBool = AtomicBool::new(false);

fn json(path: &Path) -> Any<Value> {
    let text = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

fn list<'a>(value: &'a Value, key: &str) -> Any<&'a [Value]> {
    value[key].as_array().map(Vec::as_slice).ok_or_else(|| format!("no list `{key}`").into())
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// The batches that the reference's loader gave, by epoch.
struct Batches(Vec<Vec<Vec<usize>>>);

impl Batches {
    fn read(dir: &Path, case: &Value) -> Any<Self> {
        // A sample's number is its place in the cache's metadata.
        let cache = dir.join("cache");
        let mut places = BTreeMap::new();
        for shard in strings(&json(&cache.join("metadata.json"))?["shards"]) {
            for item in json(&cache.join(shard))?.as_array().into_iter().flatten() {
                places.insert(text(item, "image_path")?.to_owned(), places.len());
            }
        }
        let mut epochs: Vec<Vec<Vec<usize>>> = vec![Vec::new()];
        for micro in list(case, "micro_batches")? {
            let place = |name: &str| places.get(name).copied().ok_or_else(|| format!("no picture {name}"));
            let batch = strings(&micro["image_paths"]).into_iter().map(place).collect::<Result<Vec<_>, _>>()?;
            // An epoch has each sample once.
            if epochs.iter().rev().take(1).flatten().flatten().any(|index| batch.contains(index)) {
                epochs.push(Vec::new());
            }
            epochs.iter_mut().rev().take(1).for_each(|epoch| epoch.push(batch.clone()));
        }
        Ok(Self(epochs))
    }

    /// The micro-batches of each optimiser step: so many, or what is left of an epoch.
    fn steps(&self, micro_batches: usize) -> Vec<usize> {
        let of_epoch = |epoch: &Vec<Vec<usize>>| epoch.chunks(micro_batches).map(<[_]>::len).collect::<Vec<_>>();
        self.0.iter().flat_map(of_epoch).collect()
    }
}

impl Sampler for Batches {
    fn plan(&self, at: Cursor, _: Rank) -> Option<BatchPlan> {
        let over = self.0.get(at.epoch as usize).is_none_or(|batches| at.batch as usize >= batches.len());
        // The loader reads ahead of the last batch: it begins again.
        let at = match over {
            true => Cursor { epoch: (at.epoch + 1) % self.0.len() as u64, batch: 0 },
            false => at,
        };
        let batch = self.0.get(at.epoch as usize)?.get(at.batch as usize)?;
        let picks = batch.iter().map(|index| Pick { index: *index, place: *index as u64 }).collect();
        Some(BatchPlan { picks, next: Cursor { batch: at.batch + 1, ..at } })
    }
}

/// The recorded draws of all micro-batches.
fn draws(dir: &Path, case: &Value, recipe: &Recipe) -> Any<RecordedDraws> {
    let golden = Golden::tensors(dir, "draws")?;
    let mut calls = Vec::new();
    for micro in list(case, "micro_batches")? {
        let name = |what: &str| format!("micro{}.{what}", micro["index"]);
        calls.push(Recorded::Timesteps(TimestepSample {
            sigma: golden.values(&name("sigma"))?,
            timesteps: golden.values(&name("timesteps"))?,
            method: text(micro, "sampling_method")?.into(),
        }));
        calls.push(Recorded::Noise(golden.tensor(&name("noise"))?));
        if recipe.flow_matching.cfg_dropout_prob > 0.0 {
            // What is below the probability is dropped.
            let dropped = golden.values(&name("dropped"))?;
            calls.push(Recorded::Uniform(dropped.iter().map(|d| if *d == 0.0 { 1.0 } else { 0.0 }).collect()));
        }
    }
    Ok(RecordedDraws::new(calls))
}

/// Gives parameters values by their paths; each gets one.
fn give(params: &Params, values: &BTreeMap<String, Tensor>) -> Any<()> {
    for param in params.iter() {
        let value = values.get(param.path()).ok_or_else(|| format!("no initial {}", param.path()))?;
        param.copy_from(value)?;
    }
    Ok(())
}

/// Losses, norms and learning rates, step by step.
fn figures(case: &Value, records: &[StepRecord], parts: &[usize], out: &mut Vec<Outcome>) -> Any<()> {
    let steps = list(case, "optimizer_steps")?;
    let micros = list(case, "micro_batches")?;
    let detail = format!("{} steps", steps.len());
    out.push(exact("every step", records.len() == steps.len(), &*detail));
    let mut micros = micros.iter();
    let mut losses = Vec::new();
    for count in parts {
        let sum = micros.by_ref().take(*count).map(|micro| number(micro, "loss")).sum::<Any<f64>>()?;
        losses.push(sum / *count as f64);
    }
    let of = |key: &str| steps.iter().map(|step| number(step, key)).collect::<Any<Vec<f64>>>();
    let bound = |what: &str| number(&case["tolerance"][what], "rtol");
    let ours = |of: fn(&StepRecord) -> f64| records.iter().map(of).collect::<Vec<f64>>();
    let one = Tolerance { rtol: 1.0, atol: 0.0 };
    for (what, got, want, bound) in [
        ("losses", ours(|r| r.loss), losses, bound("loss")?),
        ("gradient norms", ours(|r| r.grad_norm), of("grad_norm")?, bound("grad_norm")?),
        ("learning rates", ours(|r| r.lr), of("lr_used")?, 1e-9),
    ] {
        out.push(Outcome::measured(what, one.worst(&got, &want), bound, &*detail));
    }
    Ok(())
}

/// What was saved, against what the reference saved.
struct Saved<'a> {
    case: &'a Value,
    folder: PathBuf,
    adapters: bool,
}

impl Saved<'_> {
    /// The folder of one of the reference's checkpoints, `epoch_<e>_step_<s>` with steps counted from 0.
    fn ours(&self, name: &str) -> Any<PathBuf> {
        let step: u64 = name.rsplit('_').next().unwrap_or_default().parse()?;
        Ok(self.folder.join(format!("step_{:06}", step + 1)))
    }

    /// What a link of the folder leads to; where the standard library makes none, the file in its place has the name.
    fn linked(&self, link: &str) -> Any<PathBuf> {
        let link = self.folder.join(link);
        let named = if cfg!(unix) { link } else { self.folder.join(std::fs::read_to_string(link)?) };
        Ok(named)
    }

    /// Which checkpoints there are, which is the latest, and what in each is for other programs.
    fn listed(&self, checkpoints: &[&str], out: &mut Vec<Outcome>) -> Any<()> {
        let mut wanted = checkpoints.iter().map(|name| self.ours(name)).collect::<Any<Vec<_>>>()?;
        wanted.sort();
        let entries = std::fs::read_dir(&self.folder)?.map(|entry| Ok(entry?.path())).collect::<Any<Vec<_>>>()?;
        let mut found: Vec<PathBuf> = entries.into_iter().filter(|path| path.is_dir() && !path.is_symlink()).collect();
        found.sort();
        out.push(exact("checkpoints", found == wanted, format!("{checkpoints:?}")));
        for file in list(self.case, "checkpoint_files")? {
            let path = text(file, "path")?;
            if let Some(target) = file["symlink_to"].as_str() {
                let same = std::fs::canonicalize(self.linked(path)?)? == std::fs::canonicalize(self.ours(target)?)?;
                out.push(exact(format!("checkpoint {path}"), same, target));
                continue;
            }
            let Some((checkpoint, inside)) = path.split_once('/') else { continue };
            let folder = self.ours(checkpoint)?;
            let same = match inside {
                // The folder that diffusers opens.
                "model/consolidated/config.json" => {
                    same_model(&json(&folder.join(checkpoint::CONFIG))?, &file["content"])
                }
                "model/adapter_config.json" => json(&folder.join(peft::ADAPTER_CONFIG))? == file["content"],
                "model/automodel_peft_config.json" => json(&folder.join(NEMO_CONFIG))? == file["content"],
                "model/adapter_model.safetensors" => same_tensors(&folder.join(peft::ADAPTER_WEIGHTS), file)?,
                _ if inside.starts_with("model/consolidated/") && file["tensors"].is_number() => {
                    same_tensors(&folder.join(checkpoint::WEIGHTS).with_extension("safetensors"), file)?
                }
                // PyTorch's own state, which only PyTorch reads.
                _ => continue,
            };
            out.push(exact(format!("checkpoint {path}"), same, ""));
        }
        Ok(())
    }

    /// The last checkpoint's weights.
    fn compare(&self, dir: &Path, out: &mut Vec<Outcome>) -> Any<()> {
        let bound = number(&self.case["tolerance"]["final"], "atol")?;
        let last = self.linked("LATEST")?;
        let weights = if self.adapters { peft::ADAPTER_WEIGHTS } else { "diffusion_pytorch_model.safetensors" };
        let weights = SafeTensors::open(last.join(weights))?;
        let file = if self.adapters { "checkpoint_adapter_model" } else { "final_parameters_sample" };
        let wanted = Golden::tensors(dir, file)?.under("")?;
        let mut worst = if wanted.is_empty() { f64::INFINITY } else { 0.0 };
        for (key, want) in &wanted {
            let got = weights.get(key, &Device::cpu(), Some(DType::F32))?;
            worst = got.sub(want)?.to_vec::<f64>()?.into_iter().fold(worst, |worst, d| max(worst, d.abs()));
        }
        out.push(Outcome::measured("final parameters", worst, bound, format!("{} tensors", wanted.len())));
        if self.adapters {
            // The same under the names that training has for them, and the files themselves.
            let model = peft::load(&last)?;
            let (own, wanted) =
                (model.tensors().collect::<BTreeMap<_, _>>(), Golden::tensors(dir, "final_adapter")?.under("")?);
            let mut worst = if own.keys().eq(wanted.keys()) { 0.0 } else { f64::INFINITY };
            for (key, want) in &wanted {
                let got = own.get(key).ok_or_else(|| format!("no {key}"))?;
                worst = got.sub(want)?.to_vec::<f64>()?.into_iter().fold(worst, |worst, d| max(worst, d.abs()));
            }
            out.push(Outcome::measured("final adapter", worst, bound, format!("{} tensors", wanted.len())));
            for (ours, theirs) in [
                (peft::ADAPTER_CONFIG, "checkpoint_adapter_config.json"),
                (NEMO_CONFIG, "checkpoint_automodel_peft_config.json"),
            ] {
                out.push(exact(ours, json(&last.join(ours))? == json(&dir.join(theirs))?, theirs));
            }
        }
        Ok(())
    }
}

/// Whether two configurations are of one model: what starts with `_` but for the class tells where a model came from.
fn same_model(ours: &Value, theirs: &Value) -> bool {
    let of = |value: &Value| -> BTreeMap<String, Value> {
        let all = value.as_object().cloned().unwrap_or_default();
        all.into_iter().filter(|(key, _)| !key.starts_with('_') || key == "_class_name").collect()
    };
    of(ours) == of(theirs)
}

/// Whether a file of ours has as many tensors as one of the reference's, the same first names, and the same dtype.
fn same_tensors(ours: &Path, theirs: &Value) -> Any<bool> {
    let file = SafeTensors::open(ours)?;
    let mut names = file.names();
    names.sort();
    let first = strings(&theirs["first_keys"]);
    let dtypes = strings(&theirs["dtype"]);
    let typed = names.iter().all(|name| file.dtype_name(name).is_some_and(|dtype| dtypes == [dtype]));
    Ok(names.len() as f64 == number(theirs, "tensors")?
        && typed
        && first.iter().all(|key| names.iter().any(|n| n == key)))
}
