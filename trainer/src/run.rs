//! The run folder.
//!
//! | file | content |
//! |---|---|
//! | `recipe.yaml` | the resolved recipe |
//! | `metrics.jsonl` | a line a step |
//! | `samples/step_*.png` | sample grids; videos as animated PNGs, and their frames side by side in `step_*_frames.png` |
//! | `loss.svg` | the loss curve |
//! | `checkpoint/` | diffusers' `config.json` and weights, or PEFT's files of an adapter; `optimizer.safetensors`, `state.json` |
//! | `report.json` | the figures of the end |

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use flowtape_engine::files::exists;

use crate::error::io;
use crate::train::Summary;
use crate::trainer::{StepRecord, Trainer};
use crate::{Error, Recipe, Result};

/// A run folder that exists.
#[derive(Clone, Debug)]
pub struct RunFolder(PathBuf);

impl RunFolder {
    /// A new folder with the resolved recipe in it: `run_dir`, or the first free `runs/<name>-<number>`.
    ///
    /// # Errors
    /// When `run_dir` holds a run already, or can't be written.
    pub fn create(recipe: &Recipe) -> Result<Self> {
        let path = match &recipe.run_dir {
            Some(path) => path.clone(),
            None => {
                let numbered = |i: u32| Path::new("runs").join(format!("{}-{i}", recipe.name));
                (1..).map(numbered).find(|p| !p.exists()).unwrap_or_default()
            }
        };
        let run = Self(path);
        if exists(&run.recipe_path())? {
            let what = format!(
                "holds a run already: resume it with `flowtape train --resume {}`, or choose another run_dir",
                run.0.display()
            );
            return Err(Error::Run { path: run.0, what });
        }
        run.make_samples_folder()?;
        std::fs::write(run.recipe_path(), recipe.to_yaml()).map_err(io(run.recipe_path()))?;
        Ok(run)
    }

    /// An existing folder and its recipe.
    ///
    /// # Errors
    /// When it is not a run folder.
    pub fn open(path: &Path) -> Result<(Self, Recipe)> {
        let run = Self(path.into());
        if !exists(&run.recipe_path())? {
            let what = "not a run folder (it has no recipe.yaml): name one that `flowtape train` made".into();
            return Err(Error::Run { path: path.into(), what });
        }
        let recipe = Recipe::load(&run.recipe_path(), &[])?;
        Ok((run, recipe))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn recipe_path(&self) -> PathBuf {
        self.0.join("recipe.yaml")
    }

    /// A picture of a step's samples; `kind` tells several of one step apart.
    pub fn samples_path(&self, step: u64, kind: &str) -> PathBuf {
        self.0.join("samples").join(format!("step_{step:06}{kind}.png"))
    }

    /// The folder of pictures of samples; made anew where it is gone.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn make_samples_folder(&self) -> Result<()> {
        let path = self.0.join("samples");
        std::fs::create_dir_all(&path).map_err(io(path))
    }

    /// The loss curve.
    pub fn curve_path(&self) -> PathBuf {
        self.0.join("loss.svg")
    }

    /// The report.
    pub fn report_path(&self) -> PathBuf {
        self.0.join("report.json")
    }

    /// What the run came to, where it is done.
    ///
    /// # Errors
    /// When the report is not one.
    pub fn report(&self) -> Result<Option<Summary>> {
        let path = self.report_path();
        let Ok(text) = std::fs::read(&path) else { return Ok(None) };
        let found = serde_json::from_slice(&text);
        found.map(Some).map_err(|e| Error::Run { path, what: format!("not a report: {e}; remove it to make another") })
    }

    /// A line for each step.
    pub fn metrics_path(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }

    /// What the steps up to `step` came to, as far as it is there to be read: it is a by-product.
    pub fn history(&self, step: u64) -> Vec<StepRecord> {
        if step == 0 {
            return Vec::new();
        }
        self.metrics_up_to(step).into_iter().map(|(record, _)| record).collect()
    }

    /// Readable lines of steps up to `step`, with their texts.
    fn metrics_up_to(&self, step: u64) -> Vec<(StepRecord, String)> {
        let path = self.metrics_path();
        let text = std::fs::read(&path).unwrap_or_else(|error| {
            tracing::warn!("{}: {error}; it begins anew", path.display());
            Vec::new()
        });
        let text = String::from_utf8_lossy(&text);
        // The last line may be cut short; it is past the checkpoint then.
        let lines = text.lines().filter_map(|line| Some((serde_json::from_str::<StepRecord>(line).ok()?, line.into())));
        lines.filter(|(record, _)| record.step <= step).collect()
    }

    /// The file of metrics with the lines up to `step`: what an interrupted run wrote after its last checkpoint is cut off.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn begin_metrics(&self, step: u64) -> Result<File> {
        let path = self.metrics_path();
        let kept = if step == 0 { Vec::new() } else { self.metrics_up_to(step) };
        let text: String = kept.iter().map(|(_, line)| format!("{line}\n")).collect();
        let begun = File::create(&path).and_then(|mut file| file.write_all(text.as_bytes()).map(|()| file));
        begun.map_err(io(&path))
    }

    /// The folder of the newest whole checkpoint.
    ///
    /// # Errors
    /// When there is none.
    pub fn checkpoint(&self) -> Result<PathBuf> {
        // Between the two renames of `save` the older one is still there under its other name.
        let found = ["checkpoint", "checkpoint.old"].map(|n| self.0.join(n)).into_iter().find(|p| p.exists());
        found.ok_or_else(|| Error::Run { path: self.0.clone(), what: "has no checkpoint yet: train it again".into() })
    }

    /// Writes a checkpoint beside the last one and puts it in its place when it is whole.
    ///
    /// # Errors
    /// When the folder can't be written; the last checkpoint stays then.
    pub fn save(&self, trainer: &Trainer) -> Result<()> {
        let [new, current, old] = ["checkpoint.new", "checkpoint", "checkpoint.old"].map(|n| self.0.join(n));
        let remove = |path: &Path| match std::fs::remove_dir_all(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io(path)(e)),
            _ => Ok(()),
        };
        remove(&new)?;
        trainer.save(&new)?;
        if current.exists() {
            remove(&old)?;
            std::fs::rename(&current, &old).map_err(io(&current))?;
        }
        std::fs::rename(&new, &current).map_err(io(&new))?;
        remove(&old)
    }
}
