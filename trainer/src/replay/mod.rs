//! Steps that went wrong, kept whole: a bundle has the weights, the samples and the recipe of one, and is run again to find where
//! numbers stopped being finite.
//!
//! ```text
//! replay/step_000123/
//!   recipe.yaml              the run's
//!   weights/                 those that the step began with
//!   samples.json, samples.safetensors   its batches, as they were read
//!   finding.json             what was found
//! ```

mod samples;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use flowtape_data::{Loaded, MemorySource, Rank, Sample, Text};
use flowtape_engine::non_finite::{FirstNonFinite, is_bad};
use flowtape_engine::{Device, GradientSink, Tensor, VarId};
use serde::{Deserialize, Serialize};

use crate::builtin::WordTable;
use crate::checkpoints::{partial, remove, sync};
use crate::data::Data;
use crate::error::io;
use crate::run::quoted;
use crate::trainer::Trainer;
use crate::{Error, Recipe, Result, builtin};

const RECIPE: &str = "recipe.yaml";
const WEIGHTS: &str = "weights";
const FINDING: &str = "finding.json";

/// Where a step stopped being finite.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// The step, from 1.
    pub step: u64,
    /// The samples whose loss or numbers are not finite; all of the first such batch where only gradients are not.
    pub samples: Vec<BadSample>,
    /// The first weight that is not finite before the step.
    pub weight: Option<String>,
    /// Else the first weight whose gradient is not, in the order of backward.
    pub gradient: Option<String>,
    /// The first operation that wrote what is not finite, with its sizes and dtype.
    pub op: Option<String>,
}

/// A sample of such a step.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct BadSample {
    /// Its number in the source.
    pub index: usize,
    /// What the source calls it.
    pub name: String,
    /// The timestep that was drawn for it.
    pub timestep: f64,
    /// Its loss; null where it is not finite.
    pub loss: Option<f64>,
    /// Which of its own tensors is not finite, if one is.
    pub tensor: Option<String>,
}

impl Finding {
    /// Whether everything was finite.
    pub fn is_nothing(&self) -> bool {
        self.samples.is_empty() && self.weight.is_none() && self.gradient.is_none() && self.op.is_none()
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_nothing() {
            return write!(f, "step {}: everything is finite", self.step);
        }
        write!(f, "step {}", self.step)?;
        for (i, sample) in self.samples.iter().enumerate().take(3) {
            let BadSample { index, name, timestep, loss, tensor } = sample;
            let lead = if i == 0 { ": " } else { "; " };
            let own = if *name == format!("sample {index}") { String::new() } else { format!(" ({name})") };
            write!(f, "{lead}sample {index}{own} at timestep {timestep:.1}")?;
            match (tensor, loss) {
                (Some(tensor), _) => write!(f, ", whose {tensor} is not finite")?,
                (None, Some(loss)) => write!(f, ", whose loss is {loss:.4}")?,
                (None, None) => write!(f, ", whose loss is not finite")?,
            }
        }
        if self.samples.len() > 3 {
            write!(f, " and {} more", self.samples.len() - 3)?;
        }
        if let Some(weight) = &self.weight {
            write!(f, "; the weight {weight} is not finite")?;
        }
        if let Some(gradient) = &self.gradient {
            write!(f, "; the first gradient that is not finite is that of {gradient}")?;
        }
        if let Some(op) = &self.op {
            write!(f, "; the first operation is {op}")?;
        }
        Ok(())
    }
}

/// Which tensor of a sample is not finite.
fn bad_tensor(sample: &Sample) -> Result<Option<String>> {
    let mut all: Vec<(&str, &Tensor)> = vec![("media", sample.media.tensor())];
    if let Text::Embeddings(text) = &sample.text {
        all.extend(text.tensors.iter().map(|(name, tensor)| (&name[..], tensor)));
    }
    all.extend(sample.tensors.iter().map(|(name, tensor)| (&name[..], tensor)));
    for (name, tensor) in all {
        if is_bad(tensor)? {
            return Ok(Some(name.into()));
        }
    }
    Ok(None)
}

/// Notes the first gradient that is not finite.
struct FirstGradient<'a> {
    trainer: &'a Trainer,
    found: Option<String>,
}

impl GradientSink for FirstGradient<'_> {
    fn gradient(&mut self, var: VarId, gradient: Tensor) -> flowtape_engine::Result<()> {
        let params = self.trainer.model().params();
        let of = params.iter().find(|param| param.var() == Some(var));
        if let (None, Some(param)) = (&self.found, of)
            && is_bad(&gradient)?
        {
            self.found = Some(param.path().into());
        }
        Ok(())
    }
}

/// Runs a step's batches again and looks at all numbers; `first` is what listens to the trainer's device. Nothing is updated.
fn find(
    trainer: &Trainer,
    first: &FirstNonFinite,
    step: u64,
    parts: &[Loaded],
    names: &[Vec<String>],
    rank: Rank,
) -> Result<Finding> {
    let mut finding = Finding { step, samples: Vec::new(), weight: None, gradient: None, op: None };
    for param in trainer.model().params().iter() {
        if is_bad(&param.kept()?)? {
            finding.weight = Some(param.path().into());
            break;
        }
    }
    let mut forward = trainer.forward_of(step - 1, rank);
    for (part, names) in parts.iter().zip(names) {
        let (tape, output) = forward.step(&trainer.collate(part)?, None)?;
        let losses = output.weighted_loss();
        let losses = losses.mean(&(1..losses.rank()).collect::<Vec<_>>(), false)?.to_vec::<f64>()?;
        let all =
            part.plan.picks.iter().zip(names).zip(&part.samples).zip(&losses).zip(&output.noised.sample.timesteps);
        let all = all.map(|((((pick, name), sample), loss), timestep)| {
            let (index, timestep) = (pick.index, f64::from(*timestep));
            let loss = Some(*loss).filter(|loss| loss.is_finite());
            Ok(BadSample { index, name: name.clone(), timestep, loss, tensor: bad_tensor(sample)? })
        });
        let all = all.collect::<Result<Vec<_>>>()?;
        let mut sink = FirstGradient { trainer, found: None };
        let loss = &output.loss;
        let cotangent = Tensor::ones(loss.dims(), loss.dtype(), loss.device())?;
        tape.backward_with(&[(loss, &cotangent)], &mut sink)?;
        let bad: Vec<BadSample> =
            all.iter().filter(|sample| sample.loss.is_none() || sample.tensor.is_some()).cloned().collect();
        if !bad.is_empty() || sink.found.is_some() || first.found().is_some() {
            finding.samples = if bad.is_empty() { all } else { bad };
            finding.gradient = sink.found;
            break;
        }
    }
    finding.op = first.found();
    Ok(finding)
}

/// Writes a bundle of a step that is not finite, whole or not at all, and says what was found when it was run again.
pub(crate) fn write(trainer: &Trainer, step: u64, parts: &[Loaded], path: &Path) -> Result<Finding> {
    let partial = partial(path);
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(io(parent))?;
    remove(&partial)?;
    let weights = partial.join(WEIGHTS);
    std::fs::create_dir_all(&weights).map_err(io(&weights))?;
    let written = || -> Result<Finding> {
        trainer.save_weights(&weights)?;
        let recipe = partial.join(RECIPE);
        std::fs::write(&recipe, trainer.recipe().to_yaml()).map_err(io(&recipe))?;
        samples::write(&partial, parts)?;
        let names =
            parts.iter().map(|part| part.plan.picks.iter().map(|pick| trainer.sample_name(pick.index)).collect());
        let names: Vec<Vec<String>> = names.collect();
        let rank = trainer.rank();
        let finding = again(&partial, trainer.device(), Some(trainer.data()), step, &names, rank)?;
        let path = partial.join(FINDING);
        let text = serde_json::json!({ "finding": finding, "names": names, "rank": [rank.index, rank.count] });
        std::fs::write(&path, format!("{text:#}\n")).map_err(io(&path))?;
        Ok(finding)
    };
    let finding = written().inspect_err(|_| {
        // What was begun is of no use.
        let _ = remove(&partial);
    })?;
    remove(path)?;
    std::fs::rename(&partial, path).map_err(io(path))?;
    sync(parent)?;
    Ok(finding)
}

/// Runs the step of a bundle's folder on a device that is listened to.
fn again(
    bundle: &Path,
    device: &Device,
    data: Option<&Data>,
    step: u64,
    names: &[Vec<String>],
    rank: Rank,
) -> Result<Finding> {
    let mut recipe = Recipe::load(&bundle.join(RECIPE), &[])?;
    (recipe.validation, recipe.ema) = (None, None);
    recipe.performance.check_loss = false;
    // The batches of one rank are run again by one alone.
    recipe.step_scheduler.global_batch_size = None;
    let parts = samples::read(bundle)?;
    let first = FirstNonFinite::default();
    let device = first.device(device);
    let source = Arc::new(MemorySource::new(parts.iter().flat_map(|part| part.samples.iter().cloned()).collect())?);
    let encoded = parts
        .iter()
        .flat_map(|part| &part.samples)
        .all(|sample| matches!((&sample.media, &sample.text), (flowtape_data::Media::Latents(_), Text::Embeddings(_))));
    let data = match data {
        Some(data) => Data { source, ..data.clone() },
        // Nothing is left to encode.
        None if encoded => Data::of_pixels(source, WordTable::new(&[], 1)),
        None => Data { source, ..builtin::data(&recipe.data, &device)? },
    };
    let trainer = Trainer::with_data(&device, &recipe, data)?;
    trainer.load_weights(&bundle.join(WEIGHTS))?;
    // What was made so far is not the step's.
    first.reset();
    find(&trainer, &first, step, &parts, names, rank)
}

/// What a bundle came to when it is run again.
#[derive(Clone, PartialEq, Debug)]
pub struct Replayed {
    /// What is found now.
    pub finding: Finding,
    /// What was found when it was written.
    pub before: Finding,
}

#[derive(Deserialize)]
struct Written {
    finding: Finding,
    names: Vec<Vec<String>>,
    /// Index and count.
    #[serde(default = "alone")]
    rank: (u64, u64),
}

fn alone() -> (u64, u64) {
    (Rank::ALONE.index, Rank::ALONE.count)
}

/// Runs the step of a bundle again, on its recipe's device or another.
///
/// # Errors
/// When it is no bundle, its recipe's data can't be had where samples are still to be encoded, or the device fails.
pub fn replay(bundle: &Path, device: Option<&str>) -> Result<Replayed> {
    let path = bundle.join(FINDING);
    if !path.exists() {
        let what = "no bundle of a step (it has no finding.json): name a folder of a run's `replay`".into();
        return Err(Error::Run { path: bundle.into(), what });
    }
    let text = std::fs::read(&path).map_err(io(&path))?;
    let Written { finding: before, names, rank: (index, count) } =
        serde_json::from_slice(&text).map_err(|e| Error::Run { path, what: format!("not a finding: {e}") })?;
    let recipe = Recipe::load(&bundle.join(RECIPE), &[])?;
    let device = flowtape_gpu::device(device.unwrap_or(&recipe.device))?;
    let finding = again(bundle, &device, None, before.step, &names, Rank { index, count })?;
    Ok(Replayed { finding, before })
}

/// What an error says of a bundle.
pub(crate) fn told(finding: &Finding, path: &Path) -> String {
    format!("{finding}; `flowtape replay {}` runs it again", quoted(path))
}
