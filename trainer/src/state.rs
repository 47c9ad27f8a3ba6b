//! What a run knows beside its weights.

use std::path::Path;

use flowtape_data::{Cursor, Fingerprint};
use flowtape_engine::nn::Params;
use flowtape_engine::optim::{LossScale, LossScaleState, Optimizer};
use flowtape_engine::safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use crate::error::io;
use crate::{Error, Result};

const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// Everything that goes on from step to step beside the weights; a checkpoint holds it. Random numbers follow from the
/// step.
#[derive(Debug)]
pub struct TrainState {
    /// The optimiser with what it remembers.
    pub optimizer: Optimizer,
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
    /// Seconds of training so far.
    pub train_seconds: f64,
    /// Of the recipe, but for where it runs and where it is kept.
    pub recipe: Fingerprint,
    /// Of the samples.
    pub data: Fingerprint,
}

/// What is stored as JSON.
#[derive(Serialize, Deserialize)]
struct Stored {
    #[serde(flatten)]
    progress: TrainProgress,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    loss_scale: Option<LossScaleState>,
}

impl Stored {
    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(STATE);
        let text = std::fs::read(&path).map_err(io(&path))?;
        serde_json::from_slice(&text).map_err(|e| Error::Run { path, what: format!("not a state: {e}") })
    }
}

impl TrainState {
    /// Writes it into the folder of a checkpoint.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn save(&self, params: &Params, folder: &Path) -> Result<()> {
        self.optimizer.save(params, folder.join(OPTIMIZER))?;
        let scale = self.loss_scale.as_ref().map(|scale| LossScaleState::read(scale.read_later()?)).transpose()?;
        let stored = serde_json::json!(Stored { progress: self.progress, loss_scale: scale });
        let path = folder.join(STATE);
        std::fs::write(&path, format!("{stored}\n")).map_err(io(&path))
    }

    /// Reads it from the folder of a checkpoint. Another recipe or other data are a warning: the run goes on with them.
    ///
    /// # Errors
    /// When a file can't be read or does not fit the parameters.
    pub fn load(&mut self, params: &Params, folder: &Path) -> Result<()> {
        self.optimizer.load(params, &SafeTensors::open(folder.join(OPTIMIZER))?)?;
        let Stored { progress: found, loss_scale } = Stored::read(folder)?;
        if let (Some(scale), Some(state)) = (&mut self.loss_scale, loss_scale) {
            scale.load(state)?;
        }
        let TrainProgress { recipe, data, .. } = self.progress;
        if found.recipe != recipe {
            tracing::warn!("the recipe was changed since the checkpoint of step {}", found.step);
        }
        if found.data != data {
            tracing::warn!(
                "the data was changed since the checkpoint of step {}: samples come in another order",
                found.step
            );
        }
        self.progress = TrainProgress { recipe, data, ..found };
        Ok(())
    }
}

impl TrainProgress {
    /// Reads it from the folder of a checkpoint.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn read(folder: &Path) -> Result<Self> {
        Ok(Stored::read(folder)?.progress)
    }
}
