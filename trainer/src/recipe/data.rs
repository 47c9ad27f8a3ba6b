//! The `data` section.

use std::path::PathBuf;

use flowtape_data::LoaderOptions;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::builtin::moving_digits::VideoSize;
use crate::builtin::pictures::FolderConfig;

/// A source of training data.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// A set that comes with the trainer; or else `folder` or `cache_dir`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub builtin: Option<SourceName>,
    /// The classes of digits that it shows; all if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 10), inner(range(max = 9)))]
    pub classes: Option<Vec<u8>>,
    /// Width of the embeddings of caption tokens and of the pooled caption, for the built-in digits.
    #[serde(default, skip_serializing_if = "is_zero")]
    #[schemars(range(min = 1, max = 1_048_576))]
    pub text_dim: usize,
    /// Sizes of the videos, for a source of videos.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub video: Option<VideoSize>,
    /// Pictures with captions in a folder, encoded by a diffusers pipeline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<FolderConfig>,
    /// A folder of samples that were encoded before: one of `flowtape preprocess`, or of NeMo's preprocessing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<PathBuf>,
    /// Several such folders, all encoded alike, each as often in an epoch as it says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub caches: Vec<CacheConfig>,
    /// How often an epoch has each sample.
    #[serde(default = "once", skip_serializing_if = "is_once")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub repeats: usize,
    /// The diffusers pipeline that a cache was made with, for sample grids; without it there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pipeline: Option<PathBuf>,
    /// Whether batches of larger pictures have fewer samples: `local_batch_size` is for `base_resolution`.
    #[serde(default)]
    pub dynamic_batch_size: bool,
    /// Width and height that `local_batch_size` is for, where batches are dynamic.
    #[serde(default = "base_resolution")]
    #[schemars(inner(range(min = 1, max = 1_048_576)))]
    pub base_resolution: [usize; 2],
    /// Share of the samples whose caption is dropped, for guidance: the adapters of video models drop none themselves.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1))]
    pub caption_dropout_prob: f64,
    /// Whether each epoch has an order of its own; else all have the source's.
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// Whether samples that fill no batch at an epoch's end are left out; else the batch goes on into the next epoch.
    #[serde(default)]
    pub drop_last: bool,
    /// Whether samples that can't be read are left out with a warning; else they end the run.
    #[serde(default)]
    pub skip_bad: bool,
    /// Threads that read ahead; 0 reads between steps. The results do not depend on it.
    #[serde(default = "num_workers")]
    #[schemars(range(max = 1024))]
    pub num_workers: usize,
}

/// One of several folders of encoded samples.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CacheConfig {
    /// The folder.
    pub path: PathBuf,
    /// How often an epoch has each of its samples.
    #[serde(default = "once")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub repeats: usize,
}

fn once() -> usize {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's form
fn is_once(times: &usize) -> bool {
    *times == 1
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

fn base_resolution() -> [usize; 2] {
    [256; 2]
}

fn yes() -> bool {
    true
}

fn num_workers() -> usize {
    LoaderOptions::default().num_workers
}

/// The known sources.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
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
            builtin: Some(SourceName::Digits),
            classes: None,
            text_dim,
            video: None,
            folder: None,
            cache_dir: None,
            caches: Vec::new(),
            repeats: 1,
            pipeline: None,
            dynamic_batch_size: false,
            base_resolution: base_resolution(),
            caption_dropout_prob: 0.0,
            shuffle: true,
            drop_last: false,
            skip_bad: false,
            num_workers: num_workers(),
        }
    }

    /// What does not fit together.
    pub(super) fn problems(&self) -> Vec<String> {
        let given = [self.builtin.is_some(), self.folder.is_some(), self.cache_dir.is_some(), !self.caches.is_empty()];
        let count = given.into_iter().filter(|given| *given).count();
        if count != 1 {
            return vec![format!("data: expected one of builtin, folder, cache_dir and caches, got {count} of them")];
        }
        let Some(builtin) = self.builtin else { return Vec::new() };
        if self.text_dim == 0 {
            return vec!["data.text_dim: expected the width of the captions' embeddings".into()];
        }
        match (builtin, &self.video) {
            (SourceName::MovingDigits, None) => {
                vec!["data.video: moving_digits needs frames, height and width".into()]
            }
            (SourceName::MovingDigits, Some(_)) if self.classes.is_some() => {
                vec!["data.classes: only still digits are chosen by class".into()]
            }
            (SourceName::MovingDigits, Some(video)) => {
                video.problems().into_iter().map(|p| format!("data.video.{p}")).collect()
            }
            (SourceName::Digits, Some(_)) => vec!["data.video: digits are images; did you mean moving_digits?".into()],
            (SourceName::Digits, None) => Vec::new(),
        }
    }
}
