//! What an optimiser remembers, as tensors with names: written, and read again.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::{Optimizer, State, wide};
use crate::nn::{Param, Params};
use crate::optim::rules::Slot;
use crate::optim::updates::{COMPENSATION, Kind};
use crate::safetensors::{Shards, save};
use crate::{DType, Device, Error, Result, Tensor};

/// The name of the counts of updates in files.
pub(super) const STEP: &str = "step";
/// The name of parameters at which gradients are taken, where files have others.
const TRAINED: &str = "trained";

impl Optimizer {
    /// Names and dtypes of what is remembered of a parameter: the rule's slots, what roundings lost, whole slots, and the value it is
    /// trained at where files have another.
    fn remembered(&self, param: &Param, kept: &Tensor) -> Vec<(&'static str, Vec<usize>, DType)> {
        let kind = Kind::of(&self.rounding, kept.dtype(), param.master().is_some());
        let dims = || kept.dims().to_vec();
        let slots = self.rule.slots().iter().map(|slot| (*slot, dims(), kind.remembers(kept.dtype())));
        let lost = (kind == Kind::Kahan).then(|| (COMPENSATION, dims(), kept.dtype()));
        let whole = self.rule.whole_slots(param.dims()).into_iter();
        let whole = whole.map(|Slot { name, dims, dtype }| (name, dims, dtype.unwrap_or(wide(kept))));
        let trained = self.evaluation().map(|_| (TRAINED, dims(), kept.dtype()));
        slots.chain(lost).chain(whole).chain(trained).collect()
    }

    /// Writes [`Optimizer::tensors`] to a file.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn save(&self, params: &Params, path: impl AsRef<Path>) -> Result<()> {
        save(path, &self.tensors(params)?, &BTreeMap::new())
    }

    /// What is remembered, named `<slot>.<name>` for each slot of the rule, counts of updates, `step.<name>`, and the numbers that
    /// all parameters share.
    ///
    /// # Errors
    /// When the device fails.
    pub fn tensors(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        let gated = match &self.gated {
            Some(gated) if gated.clip.item()?.is_nan() => Some(gated),
            _ => None,
        };
        self.check_arrived()?;
        let mut all = Vec::new();
        for p in params.iter() {
            let name = p.path();
            let Some((var, state)) = p.var().and_then(|v| Some((v, self.state.get(&v)?))) else { continue };
            let steps = state.steps - u64::from(gated.is_some_and(|gated| gated.vars.contains(&var)));
            let kept = p.kept()?;
            let values = state.slots.iter().chain(&state.whole).chain([&kept]);
            for ((slot, ..), value) in self.remembered(p, &kept).into_iter().zip(values) {
                all.push((format!("{slot}.{name}"), value.clone()));
            }
            all.push((format!("{STEP}.{name}"), Tensor::from_slice(&[steps as f64], &[], p.device())?));
        }
        let shared = gated.map_or(&self.shared, |gated| &gated.before);
        for ((name, _), value) in self.rule.shared().into_iter().zip(shared) {
            all.push((name.into(), Tensor::from_slice(&[*value], &[], &Device::cpu())?));
        }
        Ok(all)
    }

    /// Reads what [`Optimizer::save`] wrote for the same parameters and the same rule.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape, or there is one of no parameter or no slot.
    pub fn load(&mut self, params: &Params, file: &Shards) -> Result<()> {
        self.load_some(params, file, |_| true)
    }

    /// The same, of which only what belongs to parameters that `holds` holds for is read.
    ///
    /// # Errors
    /// As above.
    pub fn load_some(&mut self, params: &Params, file: &Shards, holds: impl Fn(&Param) -> bool) -> Result<()> {
        let mut state = HashMap::new();
        let mut mismatched = Vec::new();
        let mut trained = Vec::new();
        for p in params.iter().filter(|param| holds(param)) {
            let (name, kept) = (p.path(), p.kept()?);
            let step = format!("{STEP}.{name}");
            let (Some(var), Some(_)) = (p.var(), file.dims(&step)) else { continue };
            let mut values = Vec::new();
            for (slot, dims, dtype) in self.remembered(p, &kept) {
                let value = file.get(&format!("{slot}.{name}"), &self.home(p), Some(dtype))?;
                if value.dims() != dims {
                    mismatched.push(format!("{name} expected {dims:?}, got {:?}", value.dims()));
                }
                values.push(value);
            }
            if self.evaluation().is_some() {
                trained.extend(values.pop().map(|value| (p, value)));
            }
            let whole = values.split_off(values.len() - self.rule.whole_slots(p.dims()).len());
            let steps = file.get(&step, p.device(), Some(DType::F64))?.item()? as u64;
            state.insert(var, State { steps, slots: values, whole });
        }
        let shared = self.rule.shared();
        let known = |key: &str| {
            let Some((kind, param)) = key.split_once('.').and_then(|(kind, n)| Some((kind, params.get(n)?))) else {
                return shared.iter().any(|(name, _)| *name == key);
            };
            let Ok(kept) = param.kept() else {
                // Another rank keeps it, and knows what is remembered of it.
                let whole = self.rule.whole_slots(param.dims());
                let all = self.rule.slots().iter().copied().chain(whole.iter().map(|slot| slot.name));
                return all.chain([STEP, COMPENSATION]).any(|slot| slot == kind);
            };
            kind == STEP || self.remembered(param, &kept).iter().any(|(slot, ..)| *slot == kind)
        };
        let unexpected: Vec<String> = file.names().filter(|n| !known(n)).map(String::from).collect();
        let missing = shared.iter().map(|(name, _)| (*name).to_owned()).filter(|name| file.dims(name).is_none());
        let missing: Vec<String> = missing.collect();
        if mismatched.len() + unexpected.len() + missing.len() > 0 {
            return Err(Error::Keys { path: file.path().into(), missing, unexpected, mismatched });
        }
        let read = |name: &str| file.get(name, &Device::cpu(), Some(DType::F64))?.item();
        self.shared = shared.iter().map(|(name, _)| read(name)).collect::<Result<_>>()?;
        self.before.clone_from(&self.shared);
        trained.iter().try_for_each(|(param, value)| param.copy_from(value))?;
        (self.state, self.gated) = (state, None);
        Ok(())
    }

    /// What is remembered of a parameter under a slot's name, if it was updated.
    pub fn slot(&self, parameter: &Param, name: &str) -> Option<&Tensor> {
        let state = self.state.get(&parameter.var()?)?;
        let kept = parameter.kept().ok()?;
        let place = self.remembered(parameter, &kept).iter().position(|(slot, ..)| *slot == name)?;
        state.slots.iter().chain(&state.whole).nth(place)
    }
}
