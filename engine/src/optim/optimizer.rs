//! The optimiser: everything that does not depend on the rule by which parameters are updated.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::clip::PlacedSums;
use super::offload::{Offload, brought};
use super::rules::{At, Direction, Operands, Rule, Whole, scalar_count};
use super::updates::{Kind, Programs, Rounding, Update};
use crate::expr::{Function, Program};
use crate::nn::{Param, Params};
use crate::ops::pointwise::{pointwise, run_pointwise, run_pointwise_each};
use crate::{DType, Error, Gradients, Later, Result, Tensor, VarId, hash};

mod files;

/// What a step is taken with: the values of a schedule.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rates {
    /// The learning rate.
    pub lr: f64,
    /// The weight decay: what that is, the rule says.
    pub weight_decay: f64,
}

/// Parameters whose rates are others.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ParamGroup {
    /// Which: a path name, where `*` stands for any run of characters, as in `*.bias`.
    pub pattern: String,
    /// What the learning rate is multiplied with.
    #[serde(default = "one")]
    pub lr_mult: f64,
    /// What the weight decay is multiplied with.
    #[serde(default = "one")]
    pub wd_mult: f64,
}

fn one() -> f64 {
    1.0
}

impl ParamGroup {
    /// Whether the parameter of that path name belongs to it.
    pub fn holds(&self, name: &str) -> bool {
        let mut parts = self.pattern.split('*');
        let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else { return false };
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        for part in parts {
            let Some(at) = rest.find(part) else { return false };
            rest = &rest[at + part.len()..];
        }
        rest.ends_with(last)
    }

    /// Checks it.
    ///
    /// # Errors
    /// When a factor is negative or not finite.
    pub fn check(&self) -> Result<()> {
        let fits = |factor: f64| factor >= 0.0 && factor.is_finite();
        if fits(self.lr_mult) && fits(self.wd_mult) {
            return Ok(());
        }
        Err(Error::argument("parameter group", "lr_mult and wd_mult of at least 0", self))
    }
}

/// What is remembered of a parameter: on its device, or between updates on the host.
#[derive(Debug)]
pub(super) struct State {
    /// Updates of this parameter so far: one without a gradient is skipped.
    steps: u64,
    /// In the order of [`Rule::slots`], and what its roundings lost.
    pub slots: Vec<Tensor>,
    /// In the order of [`Rule::whole_slots`].
    pub whole: Vec<Tensor>,
}

/// An optimiser. It updates the wider copies of the parameters where there are such ([`Placement::with_master`]), and
/// rounds the parameters from them; what it remembers has the dtype of what is updated. Each parameter is one pass over
/// memory. Gradients may have any float dtype: the result is that of the gradient widened first.
///
/// [`Placement::with_master`]: crate::nn::Placement::with_master
#[derive(Debug)]
pub struct Optimizer {
    pub(super) rule: Box<dyn Rule>,
    groups: Vec<ParamGroup>,
    rounding: Rounding,
    /// By kind.
    programs: [Programs; Kind::ALL.len()],
    /// What is summed over all parameters before a step, where the rule asks for it.
    summed: Option<Function>,
    /// The numbers that all parameters share, and those of the step before.
    shared: Vec<f64>,
    before: Vec<f64>,
    pub(super) state: HashMap<VarId, State>,
    /// Where that lies on the host.
    pub(super) offload: Option<Offload>,
    gated: Option<Gated>,
}

/// An update of which the host may not know yet whether it was gated.
#[derive(Debug)]
struct Gated {
    /// The coefficient of its gradients, NaN if it was.
    clip: Tensor,
    later: Later,
    vars: HashSet<VarId>,
    /// The shared numbers before it.
    before: Vec<f64>,
}

impl Optimizer {
    /// Without any update so far.
    pub fn new(rule: impl Rule + 'static) -> Self {
        Self::boxed(Box::new(rule))
    }

    /// The same from a rule of the registry, [`RULES`].
    ///
    /// [`RULES`]: super::RULES
    pub fn boxed(rule: Box<dyn Rule>) -> Self {
        let scalars = scalar_count(&*rule);
        let programs = Kind::ALL.map(|kind| Programs::new(&*rule, kind, scalars));
        let summed = Function::of(2 + rule.slots().len(), 1 + scalars, |inputs, scalars| {
            let (parameter, gradient) = (inputs[0], inputs[1] * scalars[0]);
            rule.summed(&Operands { parameter, gradient, slots: &inputs[2..], scalars: &scalars[1..] })
        });
        let summed = Some(summed).filter(|sums| sums.outputs() > 0);
        let shared: Vec<f64> = rule.shared().iter().map(|(_, first)| *first).collect();
        let (groups, rounding) = (Vec::new(), Rounding::default());
        Self {
            rule,
            groups,
            rounding,
            programs,
            summed,
            before: shared.clone(),
            shared,
            state: HashMap::new(),
            offload: None,
            gated: None,
        }
    }

    /// With another way from a new value to a parameter that is kept in bf16.
    #[must_use]
    pub fn with_rounding(self, rounding: Rounding) -> Self {
        Self { rounding, ..self }
    }

    /// Whether a step needs all gradients together: sums over all parameters come before the first update.
    pub fn needs_all(&self) -> bool {
        self.summed.is_some()
    }

    /// Checks that ranks may share out the parameters.
    ///
    /// # Errors
    /// For a rule that sums over all parameters, or means other values to be looked at than those it trains.
    pub fn check_shareable(&self) -> Result<()> {
        if !self.needs_all() && self.evaluation().is_none() {
            return Ok(());
        }
        let expected =
            "a rule that looks at one parameter at a time where ranks share them out (leave `fsdp` out, or take `ddp`)";
        Err(Error::argument("optimizer", expected, self.rule.name()))
    }

    /// With groups of parameters whose rates are others. A parameter belongs to the first group that holds it.
    #[must_use]
    pub fn with_groups(self, groups: Vec<ParamGroup>) -> Self {
        Self { groups, ..self }
    }

    /// One update of all parameters that have a gradient. `clip` (one value, 1 if there is none) is what the gradients
    /// are multiplied with. Where it is NaN, nothing is updated; where that is known on the host, it is an error.
    ///
    /// # Errors
    /// When a gradient has another shape than its parameter or is not of a float dtype.
    pub fn step(&mut self, params: &Params, gradients: &Gradients, rates: Rates, clip: Option<&Tensor>) -> Result<()> {
        self.arrive()?;
        // Where the host has it, it is a scalar.
        let (clip, scalar) = match clip {
            Some(clip) if self.on_host(clip) => (None, self.finite(clip.item()?)?),
            clip => (clip, 1.0),
        };
        let sums = self.sums(params, gradients, rates, scalar)?;
        self.advance(rates, &sums);
        let all = params.iter().filter_map(|param| Some((param, gradients.get(param.var()?)?))).collect();
        for together in self.together(all) {
            let updates: Vec<Update> = together
                .iter()
                .filter_map(|(param, gradient)| self.prepare(param, gradient, rates, (scalar, clip)).transpose())
                .collect::<Result<_>>()?;
            self.run(&updates, clip)?;
            drop(updates);
            together.iter().try_for_each(|(param, _)| self.leave(param))?;
        }
        self.arrive()
    }

    /// The same, where a coefficient of NaN is no error: nothing is updated then, and no update is counted.
    pub(super) fn step_or_skip(
        &mut self,
        params: &Params,
        gradients: &Gradients,
        rates: Rates,
        clip: &Tensor,
    ) -> Result<()> {
        if self.on_host(clip) {
            return if clip.item()?.is_nan() { Ok(()) } else { self.step(params, gradients, rates, Some(clip)) };
        }
        // By now the device has the answer of the step before, since this one's gradients were computed behind it.
        self.settle()?;
        let before = self.shared.clone();
        self.step(params, gradients, rates, Some(clip))?;
        let vars = gradients.iter().map(|(var, _)| var).collect();
        self.gated = Some(Gated { clip: clip.detach(), later: clip.read_later()?, vars, before });
        Ok(())
    }

    /// Whether the host reads the coefficient before a step: it waits for nothing, or it waits for sums anyway.
    fn on_host(&self, clip: &Tensor) -> bool {
        clip.device().backend().is_host() || self.needs_all()
    }

    /// Brings the shared numbers to the next step.
    fn advance(&mut self, rates: Rates, sums: &[f64]) {
        let next = self.rule.advance(&self.shared, rates, sums);
        self.before = std::mem::replace(&mut self.shared, next);
    }

    /// Begins a step whose updates come one by one.
    ///
    /// # Errors
    /// When the rule needs all gradients together.
    pub(super) fn begin(&mut self, rates: Rates) -> Result<()> {
        if self.needs_all() {
            return Err(Error::argument(self.rule.name(), "all gradients together", "one after the other"));
        }
        self.arrive()?;
        self.advance(rates, &[]);
        Ok(())
    }

    /// What the rule sums over all parameters, where it does.
    fn sums(&mut self, params: &Params, gradients: &Gradients, rates: Rates, clip: f64) -> Result<Vec<f64>> {
        let Some(summed) = self.summed.clone() else { return Ok(Vec::new()) };
        let all: Vec<(&Param, &Tensor)> =
            params.iter().filter_map(|param| Some((param, gradients.get(param.var()?)?))).collect();
        let Some((first, _)) = all.first() else { return Ok(vec![0.0; summed.outputs()]) };
        let sums = PlacedSums::new(Program::of(&summed), all.len(), first.device())?;
        for (place, (param, gradient)) in all.into_iter().enumerate() {
            let rates = self.rates_of(param.path(), rates);
            let kept = param.kept()?;
            let (rule, shared) = (&*self.rule, &self.shared[..]);
            let state = state_of(rule, &self.rounding, &mut self.state, param, &kept)?;
            let mut scalars = rule.scalars(&At { rates, step: state.steps + 1, before: shared, shared });
            scalars.insert(0, clip);
            let slots = state.slots[..rule.slots().len()].iter().map(|slot| brought(slot, kept.device()));
            let slots = slots.collect::<Result<Vec<_>>>()?;
            let inputs: Vec<&Tensor> = [&kept, gradient].into_iter().chain(&slots).collect();
            sums.add(place, &inputs, &scalars)?;
        }
        sums.totals()
    }

    /// One update of one parameter, after [`Optimizer::begin`].
    pub(super) fn step_one(&mut self, param: &Param, gradient: &Tensor, rates: Rates) -> Result<()> {
        match self.prepare(param, gradient, rates, (1.0, None))? {
            Some(update) => self.run(&[update], None)?,
            None => return Ok(()),
        }
        self.leave(param)
    }

    /// Takes back the counts of the last update if it was gated.
    fn settle(&mut self) -> Result<()> {
        let Some(Gated { later, vars, before, .. }) = self.gated.take() else { return Ok(()) };
        if later.item()?.is_nan() {
            self.shared = before;
            for var in vars {
                self.state.entry(var).and_modify(|state| state.steps = state.steps.saturating_sub(1));
            }
        }
        Ok(())
    }

    fn finite(&self, clip: f64) -> Result<f64> {
        if clip.is_finite() {
            return Ok(clip);
        }
        Err(Error::NonFinite { op: self.rule.name(), what: "the gradients' norm".into() })
    }

    /// What an update of a parameter takes; nothing where it is frozen. `clip` is what the gradient is multiplied with: as far as
    /// the host knows, and on the device.
    fn prepare(
        &mut self,
        param: &Param,
        gradient: &Tensor,
        rates: Rates,
        clip: (f64, Option<&Tensor>),
    ) -> Result<Option<Update>> {
        if param.var().is_none() {
            return Ok(None);
        }
        if gradient.dims() != param.dims() || !gradient.dtype().is_float() {
            let expected = format!("a float gradient of the shape of {}, {:?}", param.path(), param.dims());
            return Err(Error::argument(self.rule.name(), expected, gradient));
        }
        let rates = self.rates_of(param.path(), rates);
        let (value, master) = (param.resident()?, param.master());
        let kept = master.clone().unwrap_or_else(|| value.clone());
        let (rule, kind) = (&*self.rule, Kind::of(&self.rounding, kept.dtype(), master.is_some()));
        let state = state_of(rule, &self.rounding, &mut self.state, param, &kept)?;
        state.bring(kept.device())?;
        state.steps += 1;
        let (mut gradient, mut factor, mut gate) = (gradient.detach(), clip.0, None);
        if !state.whole.is_empty() {
            (gradient, gate) = direction(rule, &kept, &gradient, rates, clip, state)?;
            factor = 1.0;
        }
        let at = At { rates, step: state.steps, before: &self.before, shared: &self.shared };
        let mut scalars = rule.scalars(&at);
        scalars.insert(0, factor);
        let outputs = [kept].into_iter().chain(state.slots.iter().cloned());
        let outputs: Vec<Tensor> = outputs.chain(master.map(|_| value)).collect();
        let random = match (&self.rounding, kind) {
            (Rounding::Stochastic(random), Kind::Stochastic) => {
                Some(random.fork(state.steps).fork(hash::of(param.path().as_bytes())))
            }
            _ => None,
        };
        Ok(Some(Update { kind, scalars, gradient, outputs, random, gate }))
    }

    /// The rates of a parameter.
    fn rates_of(&self, name: &str, Rates { lr, weight_decay }: Rates) -> Rates {
        match self.groups.iter().find(|group| group.holds(name)) {
            Some(group) => Rates { lr: lr * group.lr_mult, weight_decay: weight_decay * group.wd_mult },
            None => Rates { lr, weight_decay },
        }
    }

    /// Runs updates, those together that compute with the same numbers: launches cost more than small updates.
    fn run(&self, updates: &[Update], clip: Option<&Tensor>) -> Result<()> {
        let mut alike: Vec<Vec<&Update>> = Vec::new();
        for update in updates {
            match alike.iter_mut().find(|others| others[0].is_like(update)) {
                Some(others) => others.push(update),
                None => alike.push(vec![update]),
            }
        }
        for updates in alike {
            let programs = &self.programs[updates[0].kind as usize];
            let scalars = &updates[0].scalars;
            // Chances take as much memory as what they are for: those of one parameter at a time.
            let together = if updates[0].random.is_some() { 1 } else { updates.len() };
            for updates in updates.chunks(together) {
                let chances = updates.iter().map(|update| update.chances()).collect::<Result<Vec<_>>>()?;
                let both = updates.iter().zip(&chances);
                let operands: Vec<_> = both.map(|(update, chances)| update.operands(chances.as_ref(), clip)).collect();
                match clip {
                    Some(_) => run_pointwise_each(&programs.gated, &operands, &scalars[1..])?,
                    None => run_pointwise_each(&programs.update, &operands, scalars)?,
                }
            }
        }
        Ok(())
    }

    /// Runs `work` with the parameters at the values that the rule means to be looked at, where those are others than the ones that are
    /// trained; the parameters are the same bits afterwards.
    ///
    /// # Errors
    /// Those of `work`, and of the device.
    pub fn evaluated<R, E: From<Error>>(&self, params: &Params, work: impl FnOnce() -> Result<R, E>) -> Result<R, E> {
        let Some(function) = self.evaluation() else { return work() };
        self.check_arrived()?;
        let mut own = Vec::new();
        for param in params.iter() {
            let Some(state) = param.var().and_then(|var| self.state.get(&var)) else { continue };
            let kept = param.kept()?;
            let (saved, value) = (copied(&kept)?, Tensor::empty(kept.dims(), kept.dtype(), kept.device())?);
            let slots = state.slots[..self.rule.slots().len()].iter().map(|slot| brought(slot, kept.device()));
            let slots = slots.collect::<Result<Vec<_>>>()?;
            let inputs: Vec<&Tensor> = [&saved, &saved].into_iter().chain(&slots).collect();
            run_pointwise(&function, &inputs, &[], &[&value])?;
            own.push((param, saved));
            param.copy_from(&value)?;
        }
        let done = work();
        own.iter().try_for_each(|(param, saved)| param.copy_from(saved))?;
        done
    }

    /// The rule's value for looking at, from the inputs of an update.
    fn evaluation(&self) -> Option<Function> {
        let mut found = false;
        let function = Function::of(2 + self.rule.slots().len(), 0, |inputs, scalars| {
            let (parameter, gradient) = (inputs[0], inputs[1]);
            let value = self.rule.evaluated(&Operands { parameter, gradient, slots: &inputs[2..], scalars });
            found = value.is_some();
            vec![value.unwrap_or(parameter)]
        });
        found.then_some(function)
    }
}

/// The state of a parameter, all zero where there was none.
fn state_of<'s>(
    rule: &dyn Rule,
    rounding: &Rounding,
    all: &'s mut HashMap<VarId, State>,
    param: &Param,
    kept: &Tensor,
) -> Result<&'s mut State> {
    let var = param.var().ok_or_else(|| Error::argument(rule.name(), "a trained parameter", param.path()))?;
    Ok(match all.entry(var) {
        Entry::Occupied(e) => e.into_mut(),
        Entry::Vacant(e) => {
            let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, kept.device());
            let kind = Kind::of(rounding, kept.dtype(), param.master().is_some());
            let slots = rule.slots().iter().map(|_| zeros(kept.dims(), kind.remembers(kept.dtype())));
            let mut slots = slots.collect::<Result<Vec<_>>>()?;
            if kind == Kind::Kahan {
                slots.push(zeros(kept.dims(), kept.dtype())?);
            }
            let whole = rule.whole_slots(kept.dims());
            let whole = whole.iter().map(|slot| zeros(&slot.dims, slot.dtype.unwrap_or(wide(kept))));
            e.insert(State { steps: 0, slots, whole: whole.collect::<Result<_>>()? })
        }
    })
}

fn copied(value: &Tensor) -> Result<Tensor> {
    let copy = Tensor::empty(value.dims(), value.dtype(), value.device())?;
    copy.copy_from(value)?;
    Ok(copy)
}

/// The dtype of what rules for whole tensors compute in and remember.
fn wide(kept: &Tensor) -> DType {
    if kept.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The direction that a rule makes of a gradient, and where the coefficient is on the device what gates it. The rule's whole slots
/// are written, unless that coefficient is NaN.
fn direction(
    rule: &dyn Rule,
    kept: &Tensor,
    gradient: &Tensor,
    rates: Rates,
    (factor, clip): (f64, Option<&Tensor>),
    state: &mut State,
) -> Result<(Tensor, Option<Tensor>)> {
    let dtype = wide(kept);
    let (parameter, gradient) = (kept.detach().to_dtype(dtype)?, gradient.to_dtype(dtype)?);
    let clip = clip.map(|clip| clip.detach().reshape(&[])?.to_dtype(dtype)).transpose()?;
    let gradient = match &clip {
        Some(clip) => gradient.mul(clip)?,
        None if factor == 1.0 => gradient,
        None => gradient.mul_scalar(factor)?,
    };
    let whole = Whole { parameter: &parameter, gradient: &gradient, slots: &state.whole, rates, step: state.steps };
    let Direction { direction, slots } = rule.direction(&whole)?;
    for (old, new) in state.whole.iter_mut().zip(slots) {
        let new = match &clip {
            // Codes are no numbers, to choose between or to copy by value.
            clip if !old.dtype().is_float() => {
                if !clip.as_ref().map_or(Ok(false), |clip| clip.item().map(f64::is_nan))? {
                    *old = new;
                }
                continue;
            }
            Some(clip) => pointwise([clip, old, &new], |[clip, old, new]| clip.select_lt(f64::INFINITY, new, old))?,
            None => new,
        };
        old.copy_from(&new)?;
    }
    // NaN times 0 is NaN.
    let gate = clip.map(|clip| pointwise([&clip], |[clip]| clip * 0.0 + 1.0)).transpose()?;
    Ok((direction, gate))
}

#[cfg(test)]
pub(super) mod tests;
