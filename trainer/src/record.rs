//! What a step came to.

use std::collections::BTreeMap;

use flowtape_engine::Tensor;
use flowtape_engine::pool::PoolUsage;
use flowtape_flowmatch::StepOutput;
use serde::{Deserialize, Serialize};

use crate::timing::StepTimes;
use crate::validation::{BINS, bin_of};

/// What a step came to: a line of `metrics.jsonl`, by NeMo's names but for `step`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimiser steps done, from 1: NeMo's `global_step` and 1.
    pub step: u64,
    /// Passes over the data that were over before this step's last batch.
    #[serde(default)]
    pub epoch: u64,
    /// The mean loss of the step's samples.
    #[serde(rename = "train_loss", alias = "loss", deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// The learning rate of the step.
    pub lr: f64,
    /// The norm of all gradients before clipping; not finite where the step was skipped, and null in the file then.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// The norm by the first part of the parameters' paths, after each tenth step: where a step has several batches, the norm of all
    /// is shared among the groups as in the last batch.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub grad_norm_by_group: BTreeMap<String, f64>,
    /// Seconds that it took.
    #[serde(default)]
    pub step_time: f64,
    /// Training speed of this step.
    #[serde(rename = "samples_per_sec", alias = "samples_per_second")]
    pub samples_per_second: f64,
    /// The device's memory.
    #[serde(flatten)]
    pub memory: Memory,
    /// Losses by the noise levels of their samples.
    #[serde(flatten)]
    pub by_sigma: BySigma,
    /// What the next step's loss is multiplied with, where it is scaled.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub loss_scale: Option<f64>,
    /// Steps that were skipped so far because a gradient was not finite, where the loss is scaled.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub skipped_steps: Option<u64>,
    /// Sums of squares of the gradients of the last micro-batch by the parameters' paths, after each tenth step; not part of the
    /// line.
    #[serde(skip)]
    pub gradient_squares: Vec<(String, f64)>,
    /// Whether a rank was asked to stop; not part of the line.
    #[serde(skip)]
    pub stop: bool,
    /// Where its time went; not part of the line.
    #[serde(skip)]
    pub times: StepTimes,
}

/// Memory of the device, in GB of 2^30 bytes as PyTorch counts them; 0 where the device doesn't count.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Memory {
    /// In use by tensors behind the step.
    #[serde(rename = "memory_allocated_gb", default)]
    pub allocated: f64,
    /// The most that was in use at once since the program began.
    #[serde(rename = "max_memory_allocated_gb", default)]
    pub max_allocated: f64,
}

impl From<PoolUsage> for Memory {
    fn from(usage: PoolUsage) -> Self {
        let gb = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        Self { allocated: gb(usage.used), max_allocated: gb(usage.peak) }
    }
}

/// A step's samples by their σ, in [`BINS`] equal parts of 0 to 1.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct BySigma {
    /// How many samples lie in each part.
    #[serde(rename = "sigma_counts", default)]
    pub counts: Vec<u64>,
    /// The mean of their losses, as weighted as the step's; null where there is none, or where it is not finite. Losses of an adapter
    /// beside that of the prediction are not in it.
    #[serde(rename = "sigma_losses", default)]
    pub losses: Vec<Option<f64>>,
}

impl BySigma {
    /// Of samples with their losses.
    pub(crate) fn of(samples: impl Iterator<Item = (f32, f64)>) -> Self {
        let (mut counts, mut sums) = (vec![0; BINS], vec![0.0; BINS]);
        for (sigma, loss) in samples {
            let bin = bin_of(sigma);
            counts[bin] += 1;
            sums[bin] += loss;
        }
        let mean =
            |(sum, count): (&f64, &u64)| (*count > 0).then(|| sum / *count as f64).filter(|mean| mean.is_finite());
        let losses = sums.iter().zip(&counts).map(mean).collect();
        Self { counts, losses }
    }
}

/// The mean of each sample's weighted losses: `[B]`, f32.
pub(crate) fn losses_of_samples(output: &StepOutput) -> flowtape_engine::Result<Tensor> {
    let losses = output.weighted_loss().detach();
    losses.mean(&(1..losses.rank()).collect::<Vec<_>>(), false)
}

/// The first part of a parameter's path: the group that it is told of with.
pub(crate) fn group_of(path: &str) -> &str {
    path.split('.').next().unwrap_or_default()
}

/// The norm of all gradients shared among groups, as their squares are.
pub(crate) fn norms_by_group(norm: f64, squares: &[(String, f64)]) -> BTreeMap<String, f64> {
    let mut groups: BTreeMap<String, f64> = BTreeMap::new();
    for (path, square) in squares {
        *groups.entry(group_of(path).to_owned()).or_default() += square;
    }
    let total: f64 = groups.values().sum();
    groups.values_mut().for_each(|sum| *sum = norm * (*sum / total).sqrt());
    // JSON has no NaN, and what is not finite is the whole step's.
    if groups.values().all(|norm| norm.is_finite()) { groups } else { BTreeMap::new() }
}

/// Samples that a run does not train on, beside those that are held out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LeftOut {
    /// Readings that failed since the run began or went on; they are told in the log one by one (`data.skip_bad`).
    pub unreadable: u64,
    /// Samples that fill no batch at an epoch's end (`data.drop_last`).
    pub dropped_each_epoch: usize,
}

/// JSON has no NaN.
fn null_is_nan<'de, D: serde::Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_told_by_the_part_of_sigma_that_they_lie_in() {
        let of = BySigma::of([(0.0, 1.0), (0.05, 3.0), (0.55, 5.0), (1.0, 7.0), (0.31, f64::NAN)].into_iter());
        assert_eq!(of.counts, [2, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
        let mut expected = [None; BINS];
        (expected[0], expected[5], expected[9]) = (Some(2.0), Some(5.0), Some(7.0));
        assert_eq!(of.losses, expected);
    }

    #[test]
    fn groups_share_the_norm_of_all() {
        let squares = [("a.0.w".into(), 9.0), ("a.1.w".into(), 7.0), ("b.w".into(), 9.0)];
        let norms = norms_by_group(10.0, &squares);
        assert_eq!(norms, BTreeMap::from([("a".into(), 8.0), ("b".into(), 6.0)]));
        assert!(norms_by_group(f64::NAN, &squares).is_empty() && norms_by_group(1.0, &[]).is_empty());
    }

    #[test]
    fn lines_have_nemos_names_and_those_of_before_are_read() {
        let record = StepRecord { step: 3, loss: f64::NAN, lr: 0.5, grad_norm: 2.0, ..StepRecord::default() };
        let line = serde_json::json!(record);
        let names =
            ["epoch", "train_loss", "lr", "grad_norm", "step_time", "samples_per_sec", "max_memory_allocated_gb"];
        names.into_iter().for_each(|name| assert!(line.get(name).is_some(), "{name} in {line}"));
        let read: StepRecord = serde_json::from_value(line).unwrap();
        assert!(read.loss.is_nan() && read.step == 3);
        let before = r#"{"step":1,"loss":0.5,"lr":0.1,"grad_norm":null,"samples_per_second":7.0}"#;
        let read: StepRecord = serde_json::from_str(before).unwrap();
        assert!((read.loss, read.samples_per_second) == (0.5, 7.0) && read.grad_norm.is_nan());
    }
}
