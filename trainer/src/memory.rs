//! Weights and whole checkpoints in memory, for programs that keep them where they like.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use flowtape_engine::nn::Params;
use flowtape_engine::safetensors::{SafeTensors, Shards, to_bytes};
use flowtape_engine::{Device, Tensor};

use crate::state::{Stored, averaged};
use crate::{Error, Result, Trainer};

/// What stands before the names of a checkpoint's tensors.
const MODEL: &str = "model.";
const OPTIMIZER: &str = "optimizer.";
const AVERAGES: &str = "ema.";
/// The key of the header's text that holds what is no tensor.
const STATE: &str = "flowtape_state";
/// What errors call it.
const NAME: &str = "memory";

impl Trainer {
    /// What is trained: the model's parameters, or its adapters where the recipe has `peft`.
    fn trained(&self) -> Params {
        averaged(self.recipe(), self.model().params()).0
    }

    /// What is trained as the content of a safetensors file, by the parameters' paths: of a model it is the file that diffusers opens.
    /// It is what is sampled with: the average of the weights, where one is kept.
    ///
    /// # Errors
    /// When the device fails.
    pub fn weights_to_bytes(&self) -> Result<Vec<u8>> {
        self.as_sampled(|| Ok(to_bytes(&self.trained().tensors()?, &Params::text())?))
    }

    /// Puts weights in the place of those that are trained, and begins a new average where one is kept; what the optimiser remembers
    /// stays.
    ///
    /// # Errors
    /// When the bytes are no safetensors file, or names or shapes differ from the model's; nothing is changed then.
    pub fn load_weights_from_bytes(&mut self, bytes: Vec<u8>) -> Result<()> {
        self.trained().load(&SafeTensors::from_bytes(NAME, bytes)?.into())?;
        self.begin_average()
    }

    /// Everything that a checkpoint holds, as the content of one safetensors file: a run that is loaded from it goes on as if it had
    /// never stopped.
    ///
    /// # Errors
    /// When the device fails.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let state = self.state();
        // The optimiser may mean other values to be looked at than those it trains, which are among its own: these are copies.
        let copy = |(name, tensor): (String, Tensor)| {
            Ok((name, Tensor::from_bytes(&tensor.to_bytes()?, tensor.dims(), tensor.dtype(), &Device::cpu())?))
        };
        let weights =
            self.as_evaluated(|| self.trained().tensors()?.into_iter().map(copy).collect::<Result<Vec<_>>>())?;
        let averages = state.ema.as_ref().map_or(Ok(Vec::new()), |ema| ema.tensors(&self.trained()))?;
        let optimizer = state.optimizer.tensors(self.model().params())?;
        let all = under(MODEL, weights).chain(under(OPTIMIZER, optimizer)).chain(under(AVERAGES, averages));
        let stored = serde_json::json!(state.stored(self.recipe())?).to_string();
        Ok(to_bytes(&all.collect::<Vec<_>>(), &BTreeMap::from([(STATE.into(), stored)]))?)
    }

    /// Goes on from what [`Trainer::to_bytes`] gave for the same recipe.
    ///
    /// # Errors
    /// When the bytes are no such checkpoint, or do not fit the model.
    pub fn load_from_bytes(&mut self, bytes: Vec<u8>) -> Result<()> {
        let file = Arc::new(SafeTensors::from_bytes(NAME, bytes)?);
        let refused = |what: String| Error::Run { path: Path::new(NAME).into(), what };
        let text = file.metadata().remove(STATE).ok_or_else(|| {
            refused("expected a checkpoint from memory, got a file without its state; are these weights alone?".into())
        })?;
        let stored: Stored = serde_json::from_str(&text).map_err(|e| refused(format!("not a state: {e}")))?;
        self.trained().load(&Shards::part(&file, MODEL))?;
        let averages = Some(Shards::part(&file, AVERAGES)).filter(|averages| averages.names().next().is_some());
        self.restore(&Shards::part(&file, OPTIMIZER), averages, stored)
    }
}

fn under(prefix: &'static str, tensors: Vec<(String, Tensor)>) -> impl Iterator<Item = (String, Tensor)> {
    tensors.into_iter().map(move |(name, tensor)| (format!("{prefix}{name}"), tensor))
}
