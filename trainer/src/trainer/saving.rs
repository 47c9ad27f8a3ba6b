//! What a trainer writes into the folder of a checkpoint, and goes on from.

use std::collections::BTreeMap;
use std::path::Path;

use flowtape_engine::nn::{DropoutMasks, Param, ParamBuilder, Params, Placement};
use flowtape_engine::optim::Ema;
use flowtape_engine::safetensors::{Shards, Snapshot};
use flowtape_engine::{DType, Device, Tensor};
use flowtape_models::{Transformer, checkpoint, peft};

use super::{Trainer, adapters};
use crate::error::io;
use crate::recipe::Init;
use crate::start::Start;
use crate::state::{EMA, OPTIMIZER, Stored, averaged};
use crate::{Recipe, Result};

impl Trainer {
    /// Goes on from a checkpoint: weights and state.
    ///
    /// # Errors
    /// When it can't be read or does not fit the model.
    pub fn load(&mut self, checkpoint: &Path) -> Result<()> {
        self.load_weights(checkpoint)?;
        self.loader = None;
        let ranks = &self.ranks;
        self.state.load(self.model.params(), &self.recipe, checkpoint, &|param| ranks.updates(param))?;
        self.recount();
        Ok(())
    }

    /// Finds the place in the data where a run with other ranks stood: batches are counted by rank.
    fn recount(&mut self) {
        let (now, progress) = (self.rank(), &mut self.state.progress);
        progress.cursor = self.sampler.recount(progress.cursor, progress.ranks, now.count);
        progress.ranks = now.count;
    }

    /// Goes on from what was stored beside the weights.
    pub(crate) fn restore(&mut self, optimizer: &Shards, averages: Option<Shards>, stored: Stored) -> Result<()> {
        self.loader = None;
        let ranks = &self.ranks;
        let holds = |param: &Param| ranks.updates(param);
        self.state.restore(self.model.params(), &self.recipe, optimizer, averages, stored, &holds)?;
        self.recount();
        Ok(())
    }

    /// Lets the average of the weights begin with those that are there, where one is kept.
    pub(crate) fn begin_average(&mut self) -> Result<()> {
        if let (Some(ema), Some(config)) = (&mut self.state.ema, &self.recipe.ema) {
            *ema = Ema::new(config, self.model.params())?;
        }
        Ok(())
    }

    /// Reads what is trained from the folder of a checkpoint.
    pub(crate) fn load_weights(&self, checkpoint: &Path) -> Result<()> {
        if self.recipe.peft.is_some() {
            peft::load(checkpoint)?.load_into(self.model.params(), &checkpoint.join(peft::ADAPTER_WEIGHTS))?;
        } else {
            self.model.params().load(&checkpoint::open_weights(checkpoint)?)?;
        }
        Ok(())
    }

    /// Writes a checkpoint's files into a folder: what is trained, its average where one is kept, and what goes on from step to step.
    ///
    /// # Errors
    /// When the folder can't be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        Ok(self.snapshot(folder)?.write()?)
    }

    /// Writes the small files of a checkpoint, and takes copies for the large ones where the device is not the host: to be written
    /// while training goes on.
    ///
    /// # Errors
    /// When the folder can't be written.
    pub(crate) fn snapshot(&self, folder: &Path) -> Result<Snapshot> {
        let mut snapshot = Snapshot::default();
        let optimizer = self.collect_optimizer()?;
        let mut add = |folder: &Path, stem: &str, tensors: Vec<(String, Tensor)>| {
            snapshot.add(folder, stem, tensors, Params::text(), checkpoint::MAX_SHARD_SIZE)
        };
        self.as_evaluated(|| match &self.recipe.peft {
            // Adapters are small, and read back before they count as saved.
            Some(_) => self.save_weights(folder),
            None => {
                checkpoint::save_config(self.model(), folder)?;
                Ok(add(folder, checkpoint::WEIGHTS, self.collect_weights()?)?)
            }
        })?;
        if let Some(ema) = &self.state.ema {
            let folder = folder.join(EMA);
            std::fs::create_dir(&folder).map_err(io(&folder))?;
            let (params, stem) = averaged(&self.recipe, self.model.params());
            add(&folder, stem, ema.tensors(&params)?)?;
            match &self.recipe.peft {
                // Adapters have files of their own, in the dtype that they are kept in.
                Some(_) => ema.instead(self.model.params(), || self.save_weights(&folder))?,
                None => checkpoint::save_config(self.model(), &folder)?,
            }
        }
        self.state.save(&self.recipe, folder)?;
        snapshot.add(folder, OPTIMIZER, optimizer, BTreeMap::new(), u64::MAX)?;
        Ok(snapshot)
    }

    /// Goes along where the first rank takes a snapshot: gives it what this rank alone has.
    pub(crate) fn give_to_snapshot(&self) -> Result<()> {
        self.collect_optimizer()?;
        if self.recipe.peft.is_none() {
            self.collect_weights()?;
        }
        Ok(())
    }

    /// What the optimiser remembers: all of it on the first rank.
    fn collect_optimizer(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(self.ranks.collect(self.state.optimizer.tensors(self.model.params())?)?)
    }

    /// The weights as they are kept: all of them on the first rank.
    fn collect_weights(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = checkpoint::tensors(self.model())?;
        if !self.ranks.is_sharded() {
            return Ok(all);
        }
        // Where there is no wider copy each rank has the weights already.
        let params = self.model.params();
        let is_elsewhere =
            |name: &str| params.get(name).is_some_and(|p| p.kept_dtype() != p.dtype() && p.var().is_some());
        let own = |name: &str| params.get(name).is_some_and(|param| self.ranks.updates(param));
        let given = all.iter().filter(|(name, _)| is_elsewhere(name) && own(name)).cloned().collect();
        all.retain(|(name, _)| !is_elsewhere(name));
        all.extend(self.ranks.collect(given)?);
        Ok(all)
    }

    /// Writes what is trained into the folder of a checkpoint.
    pub(crate) fn save_weights(&self, folder: &Path) -> Result<()> {
        match &self.recipe.peft {
            Some(config) => config.save(&*self.model, &self.adapters, folder),
            None => Ok(checkpoint::save(&*self.model, folder, checkpoint::MAX_SHARD_SIZE)?),
        }
    }
}

/// The model behind a run's checkpoint, as it is sampled.
pub(crate) fn trained_model(recipe: &Recipe, folder: &Path, device: &Device) -> Result<Box<dyn Transformer>> {
    let dtype: DType = recipe.dtype.into();
    let Some(config) = &recipe.peft else { return Ok(checkpoint::load(folder, dtype, device)?) };
    let start = Start::of(&recipe.model)?;
    let mut adapters = adapters(recipe, &start, &DropoutMasks::default())?;
    adapters.values_mut().for_each(|spec| spec.placement = Placement::frozen(dtype));
    let plan = config.plan(recipe.dtype, adapters);
    let params = ParamBuilder::with_plan(recipe.seed, plan, device).with_adaln_zero(recipe.init == Init::AdalnZero);
    let model = start.model(params)?;
    peft::load(folder)?.load_into(model.params(), &folder.join(peft::ADAPTER_WEIGHTS))?;
    Ok(model)
}
