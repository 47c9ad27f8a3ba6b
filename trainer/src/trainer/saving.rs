//! What a trainer writes into the folder of a checkpoint, and goes on from.

use std::collections::BTreeMap;
use std::path::Path;

use flowtape_engine::nn::{DropoutMasks, Param, ParamBuilder, Params, Placement};
use flowtape_engine::optim::Ema;
use flowtape_engine::safetensors::{Shards, Snapshot, index_shards, save_shard};
use flowtape_engine::{DType, Device, Tensor};
use flowtape_models::{Transformer, checkpoint, peft};

use super::{Trainer, adapters};
use crate::error::io;
use crate::ranks::is_first;
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
        if self.saves_shards() {
            self.save_shards(folder)?;
            return Ok(snapshot);
        }
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
        if let (Some(ema), Some(averages)) = (&self.state.ema, self.collect_averages()?) {
            let folder = folder.join(EMA);
            std::fs::create_dir(&folder).map_err(io(&folder))?;
            let stem = averaged(&self.recipe, self.model.params()).1;
            add(&folder, stem, averages)?;
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

    /// Whether each rank writes its own files of a checkpoint of where the run stands.
    fn saves_shards(&self) -> bool {
        let last = self.state.progress.step >= self.recipe.step_scheduler.max_steps;
        self.ranks.is_sharded() && !self.recipe.checkpoint.save_consolidated.holds(last)
    }

    /// Writes what this rank has. All ranks call it together, with one folder, which the first has made; it makes their files one.
    fn save_shards(&self, folder: &Path) -> Result<()> {
        let (comm, params, averages) = (self.comm(), self.model.params().base(), folder.join(EMA));
        let first = is_first(&**comm);
        let mut sets = vec![(folder, checkpoint::WEIGHTS), (folder, OPTIMIZER)];
        if self.state.ema.is_some() {
            sets.push((&averages, checkpoint::WEIGHTS));
        }
        if first && self.state.ema.is_some() {
            std::fs::create_dir(&averages).map_err(io(&averages))?;
        }
        comm.barrier()?;
        if let Some(share) = self.ranks.share() {
            let counts = |name: &str| params.get(name).is_some_and(|param| self.ranks.counts(param));
            let weights = params.iter().filter(|param| self.ranks.counts(param));
            let weights =
                weights.map(|param| Ok((param.path().to_owned(), param.kept()?))).collect::<Result<Vec<_>>>()?;
            // What all parameters share is the first one's.
            let mut optimizer = self.state.optimizer.tensors(&params)?;
            optimizer.retain(|(name, _)| name.split_once('.').map_or(first, |(_, name)| counts(name)));
            let mut all = vec![weights, optimizer];
            if let Some(ema) = &self.state.ema {
                let mut averages = ema.tensors(&params)?;
                averages.retain(|(name, _)| counts(name));
                all.push(averages);
            }
            for ((folder, stem), tensors) in sets.iter().zip(all) {
                save_shard(folder, stem, share, &tensors, &Params::text())?;
            }
        }
        comm.barrier()?;
        if let Some((_, count)) = self.ranks.share().filter(|_| first) {
            sets.iter().try_for_each(|(folder, stem)| index_shards(folder, stem, count))?;
            checkpoint::save_config(self.model(), folder)?;
            if self.state.ema.is_some() {
                checkpoint::save_config(self.model(), &averages)?;
            }
            self.state.save(&self.recipe, folder)?;
        }
        Ok(())
    }

    /// Goes along where the first rank takes a snapshot into a folder: gives it what this rank alone has, or writes that beside it.
    pub(crate) fn give_to_snapshot(&self, folder: &Path) -> Result<()> {
        if self.saves_shards() {
            return self.save_shards(folder);
        }
        self.collect_optimizer()?;
        if self.recipe.peft.is_none() {
            self.collect_weights()?;
        }
        self.collect_averages()?;
        Ok(())
    }

    /// What the optimiser remembers: all of it on the first rank.
    fn collect_optimizer(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(self.ranks.collect(self.state.optimizer.tensors(self.model.params())?)?)
    }

    /// The weights as they are kept: all of them on the first rank.
    fn collect_weights(&self) -> Result<Vec<(String, Tensor)>> {
        if !self.is_shared_out() {
            return Ok(checkpoint::tensors(self.model())?);
        }
        let base = self.model.params().base();
        let own = base.iter().filter(|param| self.ranks.counts(param));
        let own = own.map(|param| Ok((param.path().to_owned(), param.kept()?))).collect::<Result<_>>()?;
        Ok(self.ranks.collect(own)?)
    }

    /// The averages of the weights, where they are kept: all of them on the first rank, with what is not trained.
    fn collect_averages(&self) -> Result<Option<Vec<(String, Tensor)>>> {
        let Some(ema) = &self.state.ema else { return Ok(None) };
        let params = averaged(&self.recipe, self.model.params()).0;
        let mut own = ema.tensors(&params)?;
        own.retain(|(name, _)| params.get(name).is_some_and(|param| self.ranks.counts(param)));
        Ok(Some(self.ranks.collect(own)?))
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
