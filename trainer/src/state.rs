//! What a run knows beside its weights.

use std::path::{Path, PathBuf};

use flowtape_data::{Cursor, Fingerprint};
use flowtape_engine::files::exists;
use flowtape_engine::nn::{Param, Params};
use flowtape_engine::optim::{Ema, LossScale, LossScaleState, Optimizer};
use flowtape_engine::safetensors::Shards;
use flowtape_models::checkpoint::WEIGHTS;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::changes::{Change, listed};
use crate::error::io;
use crate::{Error, Recipe, Result};

/// The name of the optimiser's file, without its end.
pub(crate) const OPTIMIZER: &str = "optimizer";
const STATE: &str = "state.json";
pub(crate) const EMA: &str = "ema";

/// Everything that goes on from step to step beside the weights; a checkpoint holds it. Random numbers follow from the
/// step.
#[derive(Debug)]
pub struct TrainState {
    /// The optimiser with what it remembers.
    pub optimizer: Optimizer,
    /// The average of the weights, where one is kept.
    pub ema: Option<Ema>,
    /// What the loss is multiplied with before backward, where it is.
    pub loss_scale: Option<LossScale>,
    /// Where the run stands.
    pub progress: TrainProgress,
}

/// Where a run stands, and with what.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct TrainProgress {
    /// Optimiser steps done.
    pub step: u64,
    /// The next batch.
    pub cursor: Cursor,
    /// The loss of the last validation, where there was one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub validation_loss: Option<f64>,
    /// Seconds of training so far.
    pub train_seconds: f64,
    /// Steps that were left out so far because they were not finite, where the recipe asks for that.
    #[serde(skip_serializing_if = "is_zero", default)]
    pub skipped_steps: u64,
    /// Of the samples.
    pub data: Fingerprint,
    /// Ranks that train together: batches are counted by rank.
    #[serde(skip_serializing_if = "is_one", default = "one")]
    pub ranks: u64,
}

fn one() -> u64 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref)] // serde's form
fn is_one(ranks: &u64) -> bool {
    *ranks == 1
}

#[expect(clippy::trivially_copy_pass_by_ref)] // serde's form
fn is_zero(steps: &u64) -> bool {
    *steps == 0
}

/// The folder of a checkpoint with the average of the weights, a model of diffusers too, where there is one.
///
/// # Errors
/// When that can't be told.
pub fn ema_folder(checkpoint: &Path) -> Result<Option<PathBuf>> {
    let folder = checkpoint.join(EMA);
    Ok(exists(&folder)?.then_some(folder))
}

/// The parameters whose average is saved, and the name of its files: a whole model, or adapters alone.
pub(crate) fn averaged(recipe: &Recipe, params: &Params) -> (Params, &'static str) {
    if recipe.peft.is_some() { (params.adapters(), EMA) } else { (params.base(), WEIGHTS) }
}

/// What is stored as JSON.
#[derive(Serialize, Deserialize)]
pub(crate) struct Stored {
    #[serde(flatten)]
    pub progress: TrainProgress,
    /// The resolved recipe.
    recipe: Value,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    loss_scale: Option<LossScaleState>,
}

impl Stored {
    /// Reads it from the folder of a checkpoint.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(STATE);
        let text = std::fs::read(&path).map_err(io(&path))?;
        serde_json::from_slice(&text).map_err(|e| Error::Run { path, what: format!("not a state: {e}") })
    }

    /// What is other now, of all that decides about the training.
    pub fn changes(&self, recipe: &Recipe, data: Fingerprint) -> Vec<Change> {
        Change::of_run((&self.recipe, self.progress.data), (recipe, data))
    }
}

impl TrainState {
    /// Writes the progress and the recipe into the folder of a checkpoint.
    ///
    /// # Errors
    /// When a file can't be written.
    pub(crate) fn save(&self, recipe: &Recipe, folder: &Path) -> Result<()> {
        let stored = self.stored(recipe)?;
        let path = folder.join(STATE);
        std::fs::write(&path, format!("{:#}\n", serde_json::json!(stored))).map_err(io(&path))
    }

    /// Reads it from the folder of a checkpoint. What is other since then is a warning: the run goes on with it.
    ///
    /// # Errors
    /// When a file can't be read or does not fit the parameters.
    pub(crate) fn load(
        &mut self,
        params: &Params,
        recipe: &Recipe,
        folder: &Path,
        holds: &dyn Fn(&Param) -> bool,
    ) -> Result<()> {
        let optimizer = Shards::open(folder, OPTIMIZER)?;
        let averages = match (&self.ema, ema_folder(folder)?) {
            (Some(_), Some(averages)) => Some(Shards::open(&averages, averaged(recipe, params).1)?),
            _ => None,
        };
        self.restore(params, recipe, &optimizer, averages, Stored::read(folder)?, holds)
    }

    /// What is stored beside tensors.
    pub(crate) fn stored(&self, recipe: &Recipe) -> Result<Stored> {
        let scale = self.loss_scale.as_ref().map(|scale| LossScaleState::read(scale.read_later()?)).transpose()?;
        Ok(Stored { progress: self.progress, recipe: recipe.to_json(), loss_scale: scale })
    }

    /// Goes on from what was stored: the optimiser's tensors (of parameters that `holds` holds for), the averages of the weights where
    /// they were kept, and the rest.
    pub(crate) fn restore(
        &mut self,
        params: &Params,
        recipe: &Recipe,
        optimizer: &Shards,
        averages: Option<Shards>,
        stored: Stored,
        holds: &dyn Fn(&Param) -> bool,
    ) -> Result<()> {
        self.optimizer.load_some(params, optimizer, holds)?;
        if let (Some(scale), Some(state)) = (&mut self.loss_scale, stored.loss_scale) {
            scale.load(state)?;
        }
        if let (Some(ema), Some(config)) = (&mut self.ema, &recipe.ema) {
            match averages {
                Some(averages) => ema.load(&averaged(recipe, params).0, &averages)?,
                // It begins here.
                None => *ema = Ema::new(config, params)?,
            }
        }
        let data = self.progress.data;
        let changes = stored.changes(recipe, data);
        if !changes.is_empty() {
            tracing::warn!("since the checkpoint of step {}: {}", stored.progress.step, listed(&changes));
        }
        self.progress = TrainProgress { data, ..stored.progress };
        Ok(())
    }
}

impl TrainProgress {
    /// Reads it from the folder of a checkpoint.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn read(checkpoint: &Path) -> Result<Self> {
        Ok(Stored::read(checkpoint)?.progress)
    }
}
