//! How well a model does on samples that it is not trained on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use flowtape_data::{BatchPlan, Collator, Cursor, Loaded, Pick, Source};
use flowtape_engine::{DType, Device, Philox, Tensor};
use flowtape_flowmatch::{
    FlowMatchingConfig, FlowMatchingPipeline, PhiloxDraws, StepOptions, TaskType, TimestepSample,
};
use flowtape_models::{Transformer, create_pipeline};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::io;
use crate::{Error, Result};

/// Equal parts of σ's range from 0 to 1 that losses are also told for.
pub const BINS: usize = 10;
/// The stream of what is drawn for held-out samples, a fork of the run's seed.
const VALIDATION: u64 = 4;
/// Multiples of the golden ratio are far from their neighbours.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

/// Validation: on one of `num_samples`, `fraction` and `list`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ValidationConfig {
    /// Samples that are held out: the last ones of the source.
    #[schemars(range(min = 1))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_samples: Option<usize>,
    /// The share of the samples that is held out. Which ones their content decides, so a sample stays on its side when others are
    /// added or taken away.
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 1))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fraction: Option<f64>,
    /// A text file with the files of the samples that are held out, one a line: whole paths or names alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub list: Option<PathBuf>,
    /// Steps between validations; 0 for one at the end alone.
    #[serde(default)]
    pub every_steps: u64,
}

impl ValidationConfig {
    /// What does not fit together.
    pub(crate) fn problems(&self) -> Vec<String> {
        let given = [self.num_samples.is_some(), self.fraction.is_some(), self.list.is_some()];
        match given.into_iter().filter(|given| *given).count() {
            1 => Vec::new(),
            count => vec![format!("validation: expected one of num_samples, fraction and list, got {count} of them")],
        }
    }

    /// The numbers of the samples that are held out, in ascending order.
    pub(crate) fn held_out(&self, source: &dyn Source) -> Result<Vec<usize>> {
        let len = source.len();
        let refused = |what: String| Err(Error::Run { path: "data".into(), what });
        let (key, held): (&str, Vec<usize>) = match (&self.list, self.fraction, self.num_samples) {
            (Some(list), ..) => ("list", listed(list, source)?),
            (None, Some(fraction), _) => {
                let mut held = Vec::new();
                for index in 0..len {
                    // The hash's own bits are not spread evenly.
                    if Philox::new(source.key(index)?.bits()).next_f64() < fraction {
                        held.push(index);
                    }
                }
                ("fraction", held)
            }
            (None, None, held) => ("num_samples", (len.saturating_sub(held.unwrap_or(0))..len).collect()),
        };
        if held.len() >= len {
            return refused(format!("validation.{key}: expected fewer than the {len} samples, got {}", held.len()));
        }
        if held.is_empty() {
            return refused(format!("validation.{key}: holds out none of the {len} samples"));
        }
        Ok(held)
    }
}

/// The samples of the files that a list names.
fn listed(list: &Path, source: &dyn Source) -> Result<Vec<usize>> {
    let text = std::fs::read_to_string(list).map_err(io(list))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut wanted: BTreeMap<&str, bool> = lines.map(|line| (line, false)).collect();
    let mut held = Vec::new();
    for index in 0..source.len() {
        let file = source.file(index)?.unwrap_or_else(|| source.name(index));
        let name = Path::new(&file).file_name().and_then(|name| name.to_str()).unwrap_or(&file);
        let named: Vec<bool> = [&*file, name]
            .into_iter()
            .filter_map(|name| wanted.get_mut(name).map(|found| std::mem::replace(found, true)))
            .collect();
        if !named.is_empty() {
            held.push(index);
        }
    }
    let lacking: Vec<&str> = wanted.iter().filter(|(_, found)| !**found).map(|(name, _)| *name).collect();
    if lacking.is_empty() {
        return Ok(held);
    }
    let first = lacking.iter().take(3).copied().collect::<Vec<_>>().join(", ");
    let what = format!("validation.list: {} of its lines name no sample of the data: {first}", lacking.len());
    Err(Error::Run { path: list.into(), what })
}

/// A loss on held-out samples.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ValidationLoss {
    /// The mean over all of them.
    pub loss: f64,
    /// The mean over those whose σ lies in each of [`BINS`] equal parts of 0 to 1; nothing where there is none.
    pub bins: Vec<Option<f64>>,
}

/// What a validation came to: a line of `validation.jsonl`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Validated {
    /// Optimiser steps done.
    pub step: u64,
    /// Of the weights.
    pub raw: ValidationLoss,
    /// Of their average, where one is kept.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ema: Option<ValidationLoss>,
}

impl Validated {
    /// The loss that counts: that of the weights which samples are made with.
    pub fn loss(&self) -> f64 {
        self.ema.as_ref().unwrap_or(&self.raw).loss
    }
}

/// Samples that are held out. Each has a noise and a σ of its own, the same in every validation and spread evenly over all σ,
/// and no caption is dropped: so what changes from one validation to the next is the model.
pub(crate) struct HeldOut {
    source: Arc<dyn Source>,
    collator: Collator,
    pipeline: FlowMatchingPipeline,
    batch_size: usize,
    random: Philox,
}

impl HeldOut {
    pub fn new(
        source: Arc<dyn Source>,
        collator: Collator,
        config: &FlowMatchingConfig,
        batch_size: usize,
        seed: u64,
    ) -> Result<Self> {
        let pipeline = create_pipeline(FlowMatchingConfig { cfg_dropout_prob: 0.0, ..config.clone() })?;
        let collator = Collator { caption_dropout_prob: 0.0, ..collator };
        Ok(Self { source, collator, pipeline, batch_size, random: Philox::new(seed).fork(VALIDATION) })
    }

    /// The loss of a model; none where it was asked to stop meanwhile.
    pub fn loss(
        &self,
        model: &dyn Transformer,
        dtype: DType,
        device: &Device,
        stop: &AtomicBool,
    ) -> Result<Option<ValidationLoss>> {
        let all: Vec<usize> = (0..self.source.len()).collect();
        let (mut total, mut bins) = (Mean::default(), [Mean::default(); BINS]);
        for indices in all.chunks(self.batch_size) {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let sigma: Vec<f32> = indices.iter().map(|i| self.sigma(*i)).collect();
            for (loss, sigma) in self.losses(indices, &sigma, model, dtype, device)?.into_iter().zip(sigma) {
                total.add(loss);
                bins[bin_of(sigma)].add(loss);
            }
        }
        Ok(Some(ValidationLoss { loss: total.value().unwrap_or(f64::NAN), bins: bins.map(Mean::value).to_vec() }))
    }

    /// The middle of one of as many equal parts of 0 to 1 as there are samples; samples side by side have distant ones.
    fn sigma(&self, index: usize) -> f32 {
        let FlowMatchingConfig { sigma_min, sigma_max, .. } = *self.pipeline.config();
        let n = self.source.len() as u128;
        let start = ((n as f64 * GOLDEN) as u128).max(1);
        let stride = (start..=n).find(|stride| gcd(*stride, n) == 1).unwrap_or(1);
        let place = (index as u128 * stride % n) as f64;
        ((place + 0.5) / n as f64).max(sigma_min).min(sigma_max) as f32
    }

    /// Of one batch, sample by sample.
    fn losses(
        &self,
        indices: &[usize],
        sigma: &[f32],
        model: &dyn Transformer,
        dtype: DType,
        device: &Device,
    ) -> Result<Vec<f64>> {
        let of_sample = |index: usize| self.random.fork(index as u64);
        let picks: Vec<Pick> = indices.iter().map(|&index| Pick { index, place: index as u64 }).collect();
        let samples =
            indices.iter().map(|i| self.source.read(*i, &mut of_sample(*i).fork(0))).collect::<Result<_, _>>()?;
        let loaded = Loaded { plan: BatchPlan { picks, next: Cursor::default() }, samples };
        let batch = self.collator.batch(&loaded, device)?;
        let dims = &batch.latents.dims()[1..];
        let noise =
            indices.iter().map(|i| of_sample(*i).fork(1).normal(dims, device)).collect::<Result<Vec<_>, _>>()?;
        let noise = Tensor::stack(&noise.iter().collect::<Vec<_>>(), 0)?;
        let timesteps = sigma.iter().map(|s| s * self.pipeline.config().num_train_timesteps as f32).collect();
        let sample = TimestepSample { sigma: sigma.to_vec(), timesteps, method: "validation".into() };
        let noised = self.pipeline.with_noise(&batch, dtype, TaskType::T2V, sample, noise)?;
        // What further streams and the adapter draw.
        let mut draws = PhiloxDraws { philox: of_sample(indices[0]).fork(2) };
        let options = StepOptions { dtype, collect_metrics: false, check_loss: false, ..StepOptions::default() };
        let output = self.pipeline.step_from(model, &batch, noised, 1, &mut draws, &options)?;
        let losses = output.weighted_loss();
        Ok(losses.mean(&(1..losses.rank()).collect::<Vec<_>>(), false)?.to_vec::<f64>()?)
    }
}

/// The part of 0 to 1 that a σ lies in.
pub(crate) fn bin_of(sigma: f32) -> usize {
    ((f64::from(sigma) * BINS as f64) as usize).min(BINS - 1)
}

fn gcd(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A mean of numbers that come one by one.
#[derive(Clone, Copy, Default)]
struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }

    fn value(self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}
