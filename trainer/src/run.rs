//! The run folder.
//!
//! | file | content |
//! |---|---|
//! | `recipe.yaml` | the resolved recipe |
//! | `metrics.jsonl` | a line a step |
//! | `samples/step_*.png` | sample grids; videos as animated PNGs, and their frames side by side in `step_*_frames.png` |
//! | `loss.svg` | the loss curve |
//! | `checkpoint/` | diffusers' `config.json` and weights, `optimizer.safetensors`, `state.json` |
//! | `report.json` | the figures of the end |

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use flowtape_engine::optim::{LossScaleState, Optimizer};
use flowtape_engine::safetensors::SafeTensors;
use flowtape_models::{Transformer, checkpoint};
use serde::{Deserialize, Serialize};

use crate::error::io;
use crate::{Error, Recipe, Result};

const OPTIMIZER: &str = "optimizer.safetensors";

/// A run folder that exists.
#[derive(Clone, Debug)]
pub struct RunFolder(PathBuf);

/// A line of `metrics.jsonl`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Line {
    /// Optimiser steps done, from 1.
    pub step: u64,
    /// The mean loss of the step's samples.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// The learning rate of the step.
    pub lr: f64,
    /// The norm of all gradients before clipping; not finite where the step was skipped, and null in the file then.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// Training speed of this step.
    pub samples_per_second: f64,
    /// What the next step's loss is multiplied with, where it is scaled.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub loss_scale: Option<f64>,
    /// Steps that were skipped so far because a gradient was not finite, where the loss is scaled.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub skipped_steps: Option<u64>,
}

/// JSON has no NaN.
fn null_is_nan<'de, D: serde::Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

/// Where a checkpoint stands. Random numbers and data follow from the step.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Optimiser steps done.
    pub step: u64,
    /// Seconds of training behind it.
    pub train_seconds: f64,
    /// Where the loss scale stands, where the loss is scaled.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub loss_scale: Option<LossScaleState>,
}

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
        if run.recipe_path().exists() {
            let what = format!(
                "holds a run already: resume it with `flowtape train --resume {}`, or choose another run_dir",
                run.0.display()
            );
            return Err(Error::Run { path: run.0, what });
        }
        std::fs::create_dir_all(run.0.join("samples")).map_err(io(&run.0))?;
        std::fs::write(run.recipe_path(), recipe.to_yaml()).map_err(io(run.recipe_path()))?;
        Ok(run)
    }

    /// An existing folder and its recipe.
    ///
    /// # Errors
    /// When it is not a run folder.
    pub fn open(path: &Path) -> Result<(Self, Recipe)> {
        let run = Self(path.into());
        if !run.recipe_path().exists() {
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

    /// The loss curve.
    pub fn curve_path(&self) -> PathBuf {
        self.0.join("loss.svg")
    }

    /// The report.
    pub fn report_path(&self) -> PathBuf {
        self.0.join("report.json")
    }

    fn metrics_path(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }

    /// Lines written so far, up to `step`: what an interrupted run wrote after its last checkpoint is cut off.
    ///
    /// # Errors
    /// When the file can't be read or written.
    pub fn metrics(&self, step: u64) -> Result<(Vec<Line>, BufWriter<File>)> {
        let path = self.metrics_path();
        let mut lines: Vec<Line> = Vec::new();
        if step > 0 {
            let file = BufReader::new(File::open(&path).map_err(io(&path))?);
            for line in file.lines() {
                // A last line may be cut short; it is past the checkpoint then.
                let Ok(line) = serde_json::from_str::<Line>(&line.map_err(io(&path))?) else { break };
                if line.step <= step {
                    lines.push(line);
                }
            }
        }
        let file = OpenOptions::new().create(true).write(true).truncate(true).open(&path).map_err(io(&path))?;
        let mut writer = BufWriter::new(file);
        for line in &lines {
            write_line(&mut writer, line).map_err(io(&path))?;
        }
        writer.flush().map_err(io(&path))?;
        Ok((lines, writer))
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
    pub fn save(&self, model: &dyn Transformer, optimizer: &Optimizer, state: &State) -> Result<()> {
        let [new, current, old] = ["checkpoint.new", "checkpoint", "checkpoint.old"].map(|n| self.0.join(n));
        let remove = |path: &Path| match std::fs::remove_dir_all(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io(path)(e)),
            _ => Ok(()),
        };
        remove(&new)?;
        checkpoint::save(model, &new, checkpoint::MAX_SHARD_SIZE)?;
        optimizer.save(model.params(), new.join(OPTIMIZER))?;
        let state = serde_json::json!(state);
        std::fs::write(new.join("state.json"), format!("{state}\n")).map_err(io(&new))?;
        if current.exists() {
            remove(&old)?;
            std::fs::rename(&current, &old).map_err(io(&current))?;
        }
        std::fs::rename(&new, &current).map_err(io(&new))?;
        remove(&old)
    }

    /// Loads the newest checkpoint into a model and an optimiser, and says where it stands.
    ///
    /// # Errors
    /// When there is none, or it does not fit the model.
    pub fn load(&self, model: &dyn Transformer, optimizer: &mut Optimizer) -> Result<State> {
        let folder = self.checkpoint()?;
        model.params().load(&checkpoint::open_weights(&folder)?)?;
        optimizer.load(model.params(), &SafeTensors::open(folder.join(OPTIMIZER))?)?;
        let path = folder.join("state.json");
        let text = std::fs::read(&path).map_err(io(&path))?;
        serde_json::from_slice(&text).map_err(|e| Error::Run { path, what: format!("not a state: {e}") })
    }
}

/// Writes one line of metrics.
///
/// # Errors
/// When the file can't be written.
pub fn write_line(file: &mut impl Write, line: &Line) -> std::io::Result<()> {
    serde_json::to_writer(&mut *file, line)?;
    file.write_all(b"\n")
}
