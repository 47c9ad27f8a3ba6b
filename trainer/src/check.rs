//! What a recipe would take, and whether it can be had, before anything is made.

use std::fmt;
use std::path::Path;

use flowtape_data::{BucketSampler, Media, Rank, Sample, Source, Text};
use flowtape_engine::quant::Format;
use flowtape_engine::{Device, Philox};
use flowtape_models::ModelKind;
use flowtape_models::requirements::SampleSizes;
use rayon::prelude::*;
use serde::Serialize;

use crate::data::{Data, bucket_options};
use crate::plan::{StepPlan, gigabytes};
use crate::platform::free_space;
use crate::recipe::{Dtype, Fsdp};
use crate::start::Start;
use crate::{Error, Recipe, Result, builtin, swap};

/// What was found out about a recipe that fits together.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Check {
    /// The run's name.
    pub name: String,
    /// Where it would run.
    pub device: String,
    /// Ranks that train together, each on such a device.
    pub ranks: usize,
    /// Samples of an epoch.
    pub samples: usize,
    /// Samples that are held out for validation.
    pub held_out: usize,
    /// What reading some of them told, or all.
    pub read: Read,
    /// Their sizes, `[C, H, W]` or `[C, F, H, W]`, each with its number of samples, of whole batches, and of samples that
    /// fill none and are left out.
    pub buckets: Vec<Bucket>,
    /// Optimiser steps.
    pub steps: u64,
    /// What one takes.
    pub step: StepPlan,
    /// Bytes that the device has for it, where that is known.
    pub capacity: Option<u64>,
    /// Settings that would take less, each with what a step takes then: where it does not fit.
    pub alternatives: Vec<Alternative>,
    /// Bytes that checkpoints take at once: those that are kept, and the next while it is written.
    pub checkpoints: u64,
    /// Bytes that are free where the run is kept, where that is known.
    pub disk: Option<u64>,
    /// What training takes away from the checkpoint that the run starts from: where it is distilled.
    pub caution: Option<&'static str>,
}

/// What reading samples told.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Read {
    /// How many were read.
    pub samples: usize,
    /// Those that can't be, with the reason, where `data.skip_bad` leaves them out; else they are an error.
    pub unreadable: Vec<String>,
    /// Those that have no caption, of all whose captions are known.
    pub without_caption: Vec<String>,
}

/// Samples of one size.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Bucket {
    /// `[C, H, W]` or `[C, F, H, W]`.
    pub dims: Vec<usize>,
    /// How many.
    pub samples: usize,
    /// Batches of them in an epoch.
    pub batches: usize,
    /// Samples that an epoch leaves out.
    pub dropped: usize,
}

/// A setting that takes less.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Alternative {
    /// As on the command line.
    pub settings: Vec<String>,
    /// What a step takes with it.
    pub peak: u64,
}

/// Which samples are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Depth {
    /// A handful, the same for a seed.
    #[default]
    Handful,
    /// All, and each is compared with its hash where there is one.
    All,
}

/// Samples that are read.
const HANDFUL: usize = 8;
/// The most samples that are told of.
const TOLD: usize = 20;

impl Check {
    /// Checks a recipe for a device: data, model, weights' keys and a step's shapes. Nothing is written, and no weight is read.
    ///
    /// # Errors
    /// What a run would come to at its first step.
    pub fn of(recipe: &Recipe, device: &Device, depth: Depth) -> Result<Self> {
        Self::with_data(recipe, device, builtin::data(&recipe.data, device)?, depth)
    }

    /// The same with data of one's own.
    ///
    /// # Errors
    /// As above.
    pub fn with_data(recipe: &Recipe, device: &Device, data: Data, depth: Depth) -> Result<Self> {
        Self::on_ranks(recipe, device, data, depth, 1)
    }

    /// The same for each of so many ranks, on devices like this one.
    ///
    /// # Errors
    /// As above.
    pub fn on_ranks(recipe: &Recipe, device: &Device, data: Data, depth: Depth, ranks: usize) -> Result<Self> {
        swap::check_device(recipe, device)?;
        let batch_ranks = recipe.batch_ranks(ranks)?;
        let recipe = &Recipe { step_scheduler: recipe.step_scheduler.on_ranks(batch_ranks)?, ..recipe.clone() };
        let read = read_samples(recipe, &data, depth)?;
        let (trained, held) = data.clone().split(recipe.validation.as_ref())?;
        let samples = trained.source.len();
        let steps = recipe.step_scheduler.resolved(samples, recipe.data.drop_last, batch_ranks).max_steps;
        let step = StepPlan::on_ranks(recipe, data.clone(), ranks)?;
        // Those that are kept, the best one, and the next while it is written.
        let kept = recipe.checkpoint.max_recent_checkpoints + usize::from(recipe.validation.is_some()) + 1;
        let capacity = device.backend().capacity();
        let fits = capacity.is_none_or(|capacity| step.peak <= capacity);
        let alternatives = if fits { Vec::new() } else { alternatives(recipe, device, &data, &step, ranks)? };
        Ok(Self {
            name: recipe.name.clone(),
            device: recipe.device.clone(),
            samples,
            held_out: held.len(),
            read,
            buckets: buckets(recipe, &trained, batch_ranks)?,
            ranks,
            steps,
            step,
            capacity,
            alternatives,
            checkpoints: (kept as u64).saturating_mul(step.checkpoint),
            disk: free_space(recipe.run_dir.as_deref().unwrap_or(Path::new("runs"))),
            caution: Start::of(&recipe.model)?.caution,
        })
    }

    /// Whether memory and disk suffice, as far as they are known.
    pub fn fits(&self) -> bool {
        self.capacity.is_none_or(|capacity| self.step.peak <= capacity)
            && self.disk.is_none_or(|disk| self.checkpoints <= disk)
    }

    /// An error where it does not fit.
    ///
    /// # Errors
    /// With what would make it fit.
    pub fn require(&self) -> Result<()> {
        if self.fits() {
            return Ok(());
        }
        Err(Error::Run { path: self.name.clone().into(), what: self.verdict() })
    }

    /// What fits, what does not, and what would.
    fn verdict(&self) -> String {
        let mut out = Vec::new();
        if let Some(capacity) = self.capacity {
            let relation = if self.step.peak <= capacity { "of" } else { "does not fit: a step takes more than the" };
            let (peak, capacity) = (gigabytes(self.step.peak), gigabytes(capacity));
            out.push(format!("{peak} {relation} {capacity} that {} has", self.device));
        }
        for alternative in &self.alternatives {
            let settings: Vec<String> = alternative.settings.iter().map(|s| format!("--set {s}")).collect();
            let fits =
                if self.capacity.is_some_and(|capacity| alternative.peak <= capacity) { "fits" } else { "too much" };
            out.push(format!("  {:>10}  {fits:<8}  with {}", gigabytes(alternative.peak), settings.join(" ")));
        }
        if let Some(disk) = self.disk.filter(|disk| self.checkpoints > *disk) {
            let disk = gigabytes(disk);
            out.push(format!(
                "the disk has {disk} left, and checkpoints take {}: choose another run_dir",
                gigabytes(self.checkpoints)
            ));
        }
        out.join("\n")
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StepPlan { weights, optimizer, gradients, activations, workspace, peak, flops, sent, .. } = self.step;
        let ranks = if self.ranks > 1 { format!("{} ranks, each on ", self.ranks) } else { String::new() };
        writeln!(f, "{:<14}{} samples, {} steps on {ranks}{}", self.name, self.samples, self.steps, self.device)?;
        writeln!(f, "{:<14}{} samples held out, {} read and checked", "", self.held_out, self.read.samples)?;
        for (what, names) in
            [("left out: can't be read", &self.read.unreadable), ("without a caption", &self.read.without_caption)]
        {
            if !names.is_empty() {
                writeln!(f, "\n{} of them {what}:\n{}", names.len(), told(names))?;
            }
        }
        writeln!(f, "\n{:<20}{:>10}{:>10}{:>10}", "size", "samples", "batches", "dropped")?;
        for Bucket { dims, samples, batches, dropped } in &self.buckets {
            let dims = dims.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
            writeln!(f, "{dims:<20}{samples:>10}{batches:>10}{dropped:>10}")?;
        }
        writeln!(f)?;
        for (name, bytes) in [
            ("weights", weights),
            ("optimiser", optimizer),
            ("gradients", gradients),
            ("activations", activations),
            ("workspace", workspace),
            ("peak", peak),
            ("checkpoints", self.checkpoints),
        ] {
            writeln!(f, "{name:<14}{:>12}", gigabytes(bytes))?;
        }
        writeln!(f, "{:<14}{:>9.4} TFLOP a step", "arithmetic", flops / 1e12)?;
        if self.ranks > 1 {
            writeln!(f, "{:<14}{:>12} a step, sent by each rank", "exchange", gigabytes(sent))?;
        }
        if let Some(caution) = self.caution {
            writeln!(f, "\ncaution: {caution}")?;
        }
        let verdict = self.verdict();
        if verdict.is_empty() { Ok(()) } else { writeln!(f, "\n{verdict}") }
    }
}

/// The first of many, and how many more there are.
fn told(all: &[String]) -> String {
    let more = all.len().saturating_sub(TOLD);
    let more = if more > 0 { format!("\nand {more} more") } else { String::new() };
    format!("{}{more}", all[..all.len().min(TOLD)].join("\n"))
}

/// Reads samples: all that can't be, or do not fit the model, are told together.
fn read_samples(recipe: &Recipe, data: &Data, depth: Depth) -> Result<Read> {
    let samples = data.source.len();
    let mut random = Philox::new(recipe.seed);
    let chosen: Vec<usize> = match depth {
        Depth::Handful if samples > HANDFUL => {
            let mut places = vec![0.0; HANDFUL];
            random.fill_uniform(&mut places);
            places
                .into_iter()
                .map(|place: f32| ((f64::from(place) * samples as f64) as usize).min(samples - 1))
                .collect()
        }
        _ => (0..samples).collect(),
    };
    let mut read = Read { samples: chosen.len(), ..Read::default() };
    let mut sizes = Sizes::of(recipe, data)?;
    let mut wrong = Vec::new();
    for i in chosen {
        let sample = data.source.read(i, &mut random.fork(i as u64)).and_then(|sample| match depth {
            Depth::Handful => Ok(sample),
            Depth::All => data.source.verify(i).map(|()| sample),
        });
        match sample {
            Ok(sample) => {
                let caption = match &sample.text {
                    Text::Caption(caption) => Some(caption.clone()),
                    Text::Embeddings(_) => data.source.caption(i)?,
                };
                if caption.is_some_and(|caption| caption.trim().is_empty()) {
                    read.without_caption.push(data.source.name(i));
                }
                wrong.extend(sizes.problems(&sample, &*data.source, i));
            }
            Err(error) => read.unreadable.push(error.to_string()),
        }
    }
    if !recipe.data.skip_bad || read.unreadable.len() == read.samples {
        wrong.append(&mut read.unreadable);
    }
    if wrong.is_empty() {
        return Ok(read);
    }
    let what = format!("{} samples can't be read, or do not fit the model:\n{}", wrong.len(), told(&wrong));
    Err(Error::Run { path: "data".into(), what })
}

/// Compares sizes of samples with what the model asks for: those of one kind once.
struct Sizes<'a> {
    recipe: &'a Recipe,
    data: &'a Data,
    kind: &'static ModelKind,
    config: serde_json::Value,
    seen: std::collections::HashSet<String>,
}

impl<'a> Sizes<'a> {
    fn of(recipe: &'a Recipe, data: &'a Data) -> Result<Self> {
        let kind = ModelKind::of_adapter(&recipe.flow_matching.adapter_type)?;
        let config = Start::of(&recipe.model)?.config;
        Ok(Self { recipe, data, kind, config, seen: Default::default() })
    }

    /// What is wrong with a sample's channels, sides and widths.
    fn problems(&mut self, sample: &Sample, source: &dyn Source, index: usize) -> Vec<String> {
        let dims = sample.media.tensor().dims();
        let latents = match &sample.media {
            Media::Latents(_) => dims.to_vec(),
            Media::Pixels(_) => self.data.codec.latent_dims(dims),
        };
        let embeddings = match &sample.text {
            Text::Embeddings(embeddings) => embeddings.tensors.iter().collect(),
            Text::Caption(_) => Vec::new(),
        };
        let width = |tensor: &flowtape_engine::Tensor| tensor.dims().last().copied().unwrap_or(0);
        let names: Vec<(&str, String, usize)> = embeddings
            .into_iter()
            .chain(&sample.tensors)
            .map(|(name, tensor)| (&**name, format!("the width of its {name}"), width(tensor)))
            .collect();
        if !self.seen.insert(format!("{latents:?} {names:?}")) {
            return Vec::new();
        }
        let widths: Vec<(&str, &str, usize)> = names.iter().map(|(name, key, width)| (*name, &**key, *width)).collect();
        let name = source.name(index);
        let sizes = SampleSizes { source: "the sample", latents: &latents, widths: &widths };
        let found = self.kind.contradictions(&self.config, &self.recipe.flow_matching.adapter_kwargs, &sizes);
        found.into_iter().map(|what| format!("{name}: {what}")).collect()
    }
}

/// Sizes of the samples that are trained on, the smallest first.
fn buckets(recipe: &Recipe, data: &Data, ranks: usize) -> Result<Vec<Bucket>> {
    let rank = Rank { index: 0, count: ranks as u64 };
    let options = bucket_options(&recipe.data, recipe.step_scheduler.local_batch_size, recipe.seed);
    let sampler = BucketSampler::new(BucketSampler::buckets_of(&*data.source)?, options);
    let bucket = |bucket: &flowtape_data::Bucket| {
        Ok(Bucket {
            dims: bucket
                .indices
                .first()
                .map_or(Ok(Vec::new()), |i| data.source.header(*i).map(|header| header.dims))?,
            samples: bucket.indices.len(),
            batches: sampler.batches(bucket, rank),
            dropped: sampler.dropped_of(bucket, rank),
        })
    };
    sampler.buckets().iter().map(bucket).collect()
}

/// What settings would take, those that change the result least first: each that takes less than `step`, and all of these so far
/// together.
fn alternatives(
    recipe: &Recipe,
    device: &Device,
    data: &Data,
    step: &StepPlan,
    ranks: usize,
) -> Result<Vec<Alternative>> {
    type Change<'a> = (String, Box<dyn Fn(&mut Recipe) -> bool + 'a>);
    // Blocks lie elsewhere where the device's memory is not the host's, and ranks do not share them out.
    let shared = ranks > 1 && recipe.fsdp.as_ref().is_some_and(Fsdp::shares_weights);
    let blocks = if device.backend().is_host() || shared { 0 } else { step.swappable_blocks };
    let swap = move |r: &mut Recipe| std::mem::replace(&mut r.performance.blocks_to_swap, blocks) < blocks;
    let offload = !device.backend().is_host() && (ranks == 1 || recipe.fsdp.is_none());
    let changes: [Change<'_>; 8] = [
        (
            "performance.activation_checkpointing=true".into(),
            Box::new(|r| !std::mem::replace(&mut r.performance.activation_checkpointing, true)),
        ),
        (format!("performance.blocks_to_swap={blocks}"), Box::new(swap)),
        (
            "performance.optimizer_cpu_offload=true".into(),
            Box::new(move |r| offload && !std::mem::replace(&mut r.performance.optimizer_cpu_offload, true)),
        ),
        (
            "step_scheduler.local_batch_size=1".into(),
            Box::new(|r| {
                r.step_scheduler.global_batch_size = Some(r.step_scheduler.global_batch_size());
                std::mem::replace(&mut r.step_scheduler.local_batch_size, 1) > 1
            }),
        ),
        ("clip_grad_norm=null".into(), Box::new(|r| r.clip_grad_norm.take().is_some())),
        ("peft.quantize_base=int8".into(), Box::new(|r| quantise_base(r, Format::Int8))),
        ("peft.quantize_base=nf4".into(), Box::new(|r| quantise_base(r, Format::Nf4))),
        ("dtype=bf16".into(), Box::new(|r| std::mem::replace(&mut r.dtype, Dtype::Bf16) != Dtype::Bf16)),
    ];
    let peak = step.peak;
    // Each is a step of its own on a device without data, so they are planned beside each other.
    let plan = |(settings, changed): (Vec<String>, Recipe)| -> Result<Alternative> {
        Ok(Alternative { settings, peak: StepPlan::on_ranks(&changed, data.clone(), ranks)?.peak })
    };
    let plan_all = |recipes: Vec<(Vec<String>, Recipe)>| -> Result<Vec<Alternative>> {
        recipes.into_par_iter().map(plan).collect()
    };
    let single = changes.iter().filter_map(|(setting, change)| {
        let mut changed = recipe.clone();
        change(&mut changed).then(|| (vec![setting.clone()], changed))
    });
    let mut single = plan_all(single.collect())?;
    single.retain(|alternative| alternative.peak < peak);
    let (mut together, mut settings, mut combined) = (recipe.clone(), Vec::new(), Vec::new());
    for (setting, change) in &changes {
        if single.iter().all(|alternative| alternative.settings != [setting.as_str()]) {
            continue;
        }
        change(&mut together);
        // Of two values of one key the later one counts.
        let key = setting.split('=').next();
        settings.retain(|other: &String| other.split('=').next() != key);
        settings.push(setting.clone());
        combined.push((settings.clone(), together.clone()));
    }
    let combined = plan_all(combined.into_iter().filter(|(settings, _)| settings.len() > 1).collect())?;
    // Behind each setting alone what it makes with those before.
    let mut all = Vec::new();
    for alone in single {
        let ends = |both: &&Alternative| both.settings.last() == alone.settings.last();
        let with_those_before: Vec<Alternative> = combined.iter().filter(ends).cloned().collect();
        all.push(alone);
        all.extend(with_those_before);
    }
    Ok(all)
}

/// Quantises the frozen base of adapters; whether there is one that is not held so.
fn quantise_base(recipe: &mut Recipe, format: Format) -> bool {
    recipe.peft.as_mut().is_some_and(|peft| peft.quantize_base.replace(format) != Some(format))
}
