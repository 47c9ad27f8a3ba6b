//! The optimiser: everything that does not depend on the rule by which parameters are updated.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::rules::{Direction, Operands, Rule, Whole};
use crate::expr::{Expr, Function};
use crate::nn::{Param, Params};
use crate::ops::pointwise::{pointwise, run_pointwise_each};
use crate::safetensors::{SafeTensors, save};
use crate::{DType, Error, Gradients, Later, Result, Tensor, VarId};

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

#[derive(Debug)]
struct State {
    /// Updates of this parameter so far: one without a gradient is skipped.
    steps: u64,
    /// In the order of [`Rule::slots`].
    slots: Vec<Tensor>,
    /// In the order of [`Rule::whole_slots`].
    whole: Vec<Tensor>,
}

/// An optimiser. It updates the wider copies of the parameters where there are such ([`Placement::with_master`]), and
/// rounds the parameters from them; what it remembers has the dtype of what is updated. Each parameter is one pass over
/// memory. Gradients may have any float dtype: the result is that of the gradient widened first.
///
/// [`Placement::with_master`]: crate::nn::Placement::with_master
#[derive(Debug)]
pub struct Optimizer {
    rule: Box<dyn Rule>,
    groups: Vec<ParamGroup>,
    /// Writes the parameter and the slots.
    plain: Programs,
    /// Also the rounded parameter.
    rounding: Programs,
    state: HashMap<VarId, State>,
    gated: Option<Gated>,
}

/// An update of which the host may not know yet whether it was gated.
#[derive(Debug)]
struct Gated {
    /// The coefficient of its gradients, NaN if it was.
    clip: Tensor,
    later: Later,
    vars: HashSet<VarId>,
}

/// An update as a function. Its inputs are the parameter, its gradient and the slots, its first scalar is what the gradient
/// is multiplied with.
#[derive(Debug)]
struct Programs {
    update: Function,
    /// The same with the gradient's coefficient as the last input instead, which gates the update.
    gated: Function,
}

impl Programs {
    fn new(rule: &dyn Rule, rounding: bool) -> Self {
        let slots = rule.slots().len();
        let scalars = rule.scalars(Rates { lr: 0.0, weight_decay: 0.0 }, 1).len();
        let update = Function::of(2 + slots, 1 + scalars, |inputs, scalars| {
            updated(rule, rounding, inputs, scalars[0], &scalars[1..])
        });
        let gated = Function::of(3 + slots, scalars, |inputs, scalars| {
            let (clip, inputs) = (inputs[2 + slots], &inputs[..2 + slots]);
            let old = [&inputs[..1], &inputs[2..], &inputs[..1]].concat();
            let new = updated(rule, rounding, inputs, clip, scalars);
            old.into_iter().zip(new).map(|(old, new)| clip.select_lt(f64::INFINITY, new, old)).collect()
        });
        Self { update, gated }
    }
}

/// The new parameter and slots, and the parameter again where it is to be rounded.
fn updated<'a>(
    rule: &dyn Rule,
    rounding: bool,
    inputs: &[Expr<'a>],
    clip: Expr<'a>,
    scalars: &[Expr<'a>],
) -> Vec<Expr<'a>> {
    let (parameter, gradient) = (inputs[0], inputs[1] * clip);
    let mut new = rule.update(&Operands { parameter, gradient, slots: &inputs[2..], scalars });
    if rounding {
        new.push(new[0]);
    }
    new
}

/// A rule's updates as functions, without and with a rounded parameter, for backends that have a kernel for them.
pub(crate) fn functions(rule: &dyn Rule) -> [Function; 2] {
    [false, true].map(|rounding| Programs::new(rule, rounding).update)
}

/// An update of one parameter.
#[derive(Debug)]
struct Update {
    scalars: Vec<f64>,
    gradient: Tensor,
    /// What is updated, its slots, and the rounded parameter where what is updated is a wider copy.
    outputs: Vec<Tensor>,
    rounding: bool,
    /// In place of the step's coefficient where the gradient is a direction, which holds that already: 1, or NaN to gate.
    gate: Option<Tensor>,
}

impl Update {
    /// Inputs (with the coefficient of clipping where there is one) and outputs.
    fn operands<'a>(&'a self, clip: Option<&'a Tensor>) -> (Vec<&'a Tensor>, Vec<&'a Tensor>) {
        let kept = &self.outputs[..self.outputs.len() - usize::from(self.rounding)];
        let clip = clip.map(|clip| self.gate.as_ref().unwrap_or(clip));
        let inputs = kept[..1].iter().chain([&self.gradient]).chain(&kept[1..]).chain(clip);
        (inputs.collect(), self.outputs.iter().collect())
    }

    fn is_like(&self, other: &Self) -> bool {
        self.scalars == other.scalars && self.rounding == other.rounding
    }
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
        let [plain, rounding] = [false, true].map(|rounding| Programs::new(&*rule, rounding));
        Self { rule, groups: Vec::new(), plain, rounding, state: HashMap::new(), gated: None }
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
        // Where the host has it, it is a scalar.
        let (clip, scalar) = match clip {
            Some(clip) if clip.device().backend().is_host() => (None, self.finite(clip.item()?)?),
            clip => (clip, 1.0),
        };
        let updates: Vec<Update> = params
            .iter()
            .filter_map(|param| Some((gradients.get(param.var()?)?, param)))
            .filter_map(|(gradient, param)| self.prepare(param, gradient, rates, (scalar, clip)).transpose())
            .collect::<Result<_>>()?;
        self.run(&updates, clip)
    }

    /// The same, where a coefficient of NaN is no error: nothing is updated then, and no update is counted.
    pub(super) fn step_or_skip(
        &mut self,
        params: &Params,
        gradients: &Gradients,
        rates: Rates,
        clip: &Tensor,
    ) -> Result<()> {
        if clip.device().backend().is_host() {
            return if clip.item()?.is_nan() { Ok(()) } else { self.step(params, gradients, rates, Some(clip)) };
        }
        // By now the device has the answer of the step before, since this one's gradients were computed behind it.
        self.settle()?;
        self.step(params, gradients, rates, Some(clip))?;
        let vars = gradients.iter().map(|(var, _)| var).collect();
        self.gated = Some(Gated { clip: clip.detach(), later: clip.read_later()?, vars });
        Ok(())
    }

    /// One update of one parameter.
    pub(super) fn step_one(&mut self, param: &Param, gradient: &Tensor, rates: Rates) -> Result<()> {
        match self.prepare(param, gradient, rates, (1.0, None))? {
            Some(update) => self.run(&[update], None),
            None => Ok(()),
        }
    }

    /// Takes back the counts of the last update if it was gated.
    fn settle(&mut self) -> Result<()> {
        let Some(Gated { later, vars, .. }) = self.gated.take() else { return Ok(()) };
        if later.item()?.is_nan() {
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
        let Some(var) = param.var() else { return Ok(None) };
        if gradient.dims() != param.dims() || !gradient.dtype().is_float() {
            let expected = format!("a float gradient of the shape of {}, {:?}", param.path(), param.dims());
            return Err(Error::argument(self.rule.name(), expected, gradient));
        }
        let rates = self.rates_of(param.path(), rates);
        let (value, master) = (param.value()?.detach(), param.master());
        let kept = master.clone().unwrap_or_else(|| value.clone());
        let state = match self.state.entry(var) {
            Entry::Occupied(e) => e.into_mut(),
            Entry::Vacant(e) => {
                let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, kept.device());
                let slots =
                    self.rule.slots().iter().map(|_| zeros(kept.dims(), kept.dtype())).collect::<Result<_>>()?;
                let whole = self.rule.whole_slots(kept.dims());
                let whole = whole.iter().map(|(_, dims)| zeros(dims, wide(&kept))).collect::<Result<_>>()?;
                e.insert(State { steps: 0, slots, whole })
            }
        };
        state.steps += 1;
        let (mut gradient, mut factor, mut gate) = (gradient.detach(), clip.0, None);
        if !state.whole.is_empty() {
            (gradient, gate) = direction(&*self.rule, &kept, &gradient, rates, clip, state)?;
            factor = 1.0;
        }
        let mut scalars = self.rule.scalars(rates, state.steps);
        scalars.insert(0, factor);
        let outputs = [kept].into_iter().chain(state.slots.iter().cloned());
        let rounding = master.is_some();
        let outputs: Vec<Tensor> = outputs.chain(master.map(|_| value)).collect();
        Ok(Some(Update { scalars, gradient, outputs, rounding, gate }))
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
            let operands: Vec<_> = updates.iter().map(|update| update.operands(clip)).collect();
            let programs = if updates[0].rounding { &self.rounding } else { &self.plain };
            let scalars = &updates[0].scalars;
            match clip {
                Some(_) => run_pointwise_each(&programs.gated, &operands, &scalars[1..])?,
                None => run_pointwise_each(&programs.update, &operands, scalars)?,
            }
        }
        Ok(())
    }

    /// Writes what is remembered, named `<slot>.<name>` for each slot of the rule, and counts of updates, `step.<name>`.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn save(&self, params: &Params, path: impl AsRef<Path>) -> Result<()> {
        let gated = match &self.gated {
            Some(gated) if gated.clip.item()?.is_nan() => Some(&gated.vars),
            _ => None,
        };
        let mut all = Vec::new();
        for p in params.iter() {
            let name = p.path();
            let Some((var, state)) = p.var().and_then(|v| Some((v, self.state.get(&v)?))) else { continue };
            let steps = state.steps - u64::from(gated.is_some_and(|vars| vars.contains(&var)));
            let whole = self.rule.whole_slots(p.dims()).into_iter().map(|(slot, _)| slot).zip(&state.whole);
            for (slot, value) in self.rule.slots().iter().copied().zip(&state.slots).chain(whole) {
                all.push((format!("{slot}.{name}"), value.clone()));
            }
            all.push((format!("{STEP}.{name}"), Tensor::from_slice(&[steps as f64], &[], p.device())?));
        }
        save(path, &all, &BTreeMap::new())
    }

    /// Reads what [`Optimizer::save`] wrote for the same parameters and the same rule.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape, or there is one of no parameter or no slot.
    pub fn load(&mut self, params: &Params, file: &SafeTensors) -> Result<()> {
        let mut state = HashMap::new();
        let mut mismatched = Vec::new();
        for p in params.iter() {
            let (name, kept) = (p.path(), p.kept()?);
            let step = format!("{STEP}.{name}");
            let (Some(var), Some(_)) = (p.var(), file.dims(&step)) else { continue };
            let read = |slot: &str, dtype| file.get(&format!("{slot}.{name}"), p.device(), Some(dtype));
            let slots = self.rule.slots().iter().map(|slot| read(slot, kept.dtype())).collect::<Result<Vec<_>>>()?;
            let wholes = self.rule.whole_slots(p.dims());
            let whole = wholes.iter().map(|(slot, _)| read(slot, wide(&kept))).collect::<Result<Vec<_>>>()?;
            let expected = slots.iter().map(|_| p.dims()).chain(wholes.iter().map(|(_, dims)| &dims[..]));
            let both = expected.zip(slots.iter().chain(&whole));
            if let Some((expected, wrong)) = both.into_iter().find(|(dims, value)| value.dims() != *dims) {
                mismatched.push(format!("{name} expected {expected:?}, got {:?}", wrong.dims()));
            }
            let steps = file.get(&step, p.device(), Some(DType::F64))?.item()? as u64;
            state.insert(var, State { steps, slots, whole });
        }
        let known = |key: &String| {
            let Some((kind, param)) = key.split_once('.').and_then(|(kind, n)| Some((kind, params.get(n)?))) else {
                return false;
            };
            let whole = || self.rule.whole_slots(param.dims()).iter().any(|(slot, _)| *slot == kind);
            kind == STEP || self.rule.slots().contains(&kind) || whole()
        };
        let unexpected: Vec<String> = file.names().into_iter().filter(|n| !known(n)).collect();
        if mismatched.len() + unexpected.len() > 0 {
            return Err(Error::Keys { path: file.path().into(), missing: Vec::new(), unexpected, mismatched });
        }
        (self.state, self.gated) = (state, None);
        Ok(())
    }

    /// What is remembered of a parameter under a slot's name, if it was updated.
    pub fn slot(&self, parameter: &Param, name: &str) -> Option<&Tensor> {
        let state = self.state.get(&parameter.var()?)?;
        if let Some(place) = self.rule.slots().iter().position(|slot| *slot == name) {
            return state.slots.get(place);
        }
        let place = self.rule.whole_slots(parameter.dims()).iter().position(|(slot, _)| *slot == name)?;
        state.whole.get(place)
    }
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
    for (old, new) in state.whole.iter().zip(slots) {
        let new = match &clip {
            Some(clip) => pointwise([clip, old, &new], |[clip, old, new]| clip.select_lt(f64::INFINITY, new, old))?,
            None => new,
        };
        old.copy_from(&new)?;
    }
    // NaN times 0 is NaN.
    let gate = clip.map(|clip| pointwise([&clip], |[clip]| clip * 0.0 + 1.0)).transpose()?;
    Ok((direction, gate))
}

/// The name of the counts of updates in files.
const STEP: &str = "step";

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::nn::{Init, ParamBuilder, Placement};
    use crate::optim::{AdamW, RULES, RuleEntry, Sgd};
    use crate::{Device, Philox};

    /// Steps of a rule in f64 beside a formula, which gets the step's number (from 1), an element's number, value and gradient,
    /// and the rates. After each step another optimiser goes on from a file.
    pub(in crate::optim) fn follows<R: Rule + Copy + 'static>(
        rule: &R,
        mut formula: impl FnMut(i32, usize, f64, f64, Rates) -> f64,
    ) -> Result<()> {
        follows_whole(rule, &[7], |t, p, g, rates| (0..7).map(|i| formula(t, i, p[i], g[i], rates)).collect())
    }

    /// The same for a parameter of these sizes, where the formula gets all elements at once.
    pub(in crate::optim) fn follows_whole<R: Rule + Copy + 'static>(
        rule: &R,
        dims: &[usize],
        mut formula: impl FnMut(i32, &[f64], &[f64], Rates) -> Vec<f64>,
    ) -> Result<()> {
        let (cpu, folder) = (Device::cpu(), tempfile::tempdir().unwrap());
        let path = folder.path().join("state.safetensors");
        let builder = ParamBuilder::new(4, DType::F64, &cpu);
        let (w, params) = (builder.get("w", dims, Init::Normal { std: 1.0 })?, builder.params());
        let clip = 0.5;
        let mut optimizer = Optimizer::new(*rule);
        let mut expected = w.value()?.to_vec::<f64>()?;
        let mut random = Philox::new(2);
        for t in 1..=4 {
            let rates = Rates { lr: 0.01 / f64::from(t), weight_decay: 0.1 };
            let g = random.normal(dims, &cpu)?.to_dtype(DType::F64)?;
            let clipped: Vec<f64> = g.to_vec::<f64>()?.iter().map(|g| g * clip).collect();
            expected = formula(t, &expected, &clipped, rates);
            let mut gradients = Gradients::default();
            gradients.insert(w.var().unwrap(), g);
            let coefficient = Tensor::from_slice(&[clip], &[], &cpu)?;
            optimizer.step(&params, &gradients, rates, Some(&coefficient))?;
            for (a, b) in w.value()?.to_vec::<f64>()?.iter().zip(&expected) {
                assert!((a - b).abs() < 1e-12, "{rule:?}, step {t}: {a} instead of {b}");
            }
            optimizer.save(&params, &path)?;
            optimizer = Optimizer::new(*rule);
            optimizer.load(&params, &SafeTensors::open(&path)?)?;
        }
        let other = ParamBuilder::new(4, DType::F64, &cpu);
        other.get("x", dims, Init::Zeros)?;
        assert!(optimizer.load(&other.params(), &SafeTensors::open(&path)?).is_err());
        Ok(())
    }

    /// A parameter of `n` elements and a gradient, in the dtypes of weight and gradient, and of the wider copy.
    pub(in crate::optim) fn one(n: usize, dtype: DType, masters: DType) -> Result<(Params, Gradients)> {
        let cpu = Device::cpu();
        let builder = ParamBuilder::with_plan(n as u64, Placement::trained(dtype).with_master(masters), &cpu);
        let w = builder.get("w", &[n], Init::Normal { std: 1.0 })?;
        let mut gradients = Gradients::default();
        gradients.insert(w.var().unwrap(), Philox::new(n as u64).normal(&[n], &cpu)?.to_dtype(dtype)?);
        Ok((builder.params(), gradients))
    }

    const RATES: Rates = Rates { lr: 1e-2, weight_decay: 0.1 };

    /// What three steps make of the parameter that is kept, in f64.
    pub(in crate::optim) fn trained(
        rule: impl Rule + 'static,
        params: &Params,
        gradients: &Gradients,
    ) -> Result<Vec<f64>> {
        trained_by(Optimizer::new(rule), params, gradients)
    }

    fn trained_by(mut optimizer: Optimizer, params: &Params, gradients: &Gradients) -> Result<Vec<f64>> {
        (0..3).try_for_each(|_| optimizer.step(params, gradients, RATES, None))?;
        params.get("w").unwrap().kept()?.to_vec::<f64>()
    }

    /// Every rule of the registry as it is without configuration, and with one that has all its parts.
    fn rules() -> Vec<Box<dyn Rule>> {
        let configured = serde_json::json!({ "momentum": 0.9, "nesterov": true });
        let default = RULES.iter().map(|entry| RuleEntry::rule(entry.name, serde_json::json!({})).unwrap());
        default.chain([RuleEntry::rule("sgd", configured).unwrap()]).collect()
    }

    #[test]
    fn every_rule_gives_what_it_declares_and_is_found_by_its_name() {
        for rule in rules() {
            let [plain, rounding] = functions(&*rule);
            let slots = rule.slots().len();
            assert_eq!((plain.inputs(), plain.outputs()), (2 + slots, 1 + slots), "{rule:?}");
            assert_eq!(rounding.outputs(), 2 + slots, "{rule:?}");
            let rates = Rates { lr: 0.1, weight_decay: 0.0 };
            assert_eq!(plain.scalars(), 1 + rule.scalars(rates, 1000).len(), "{rule:?}");
            assert!(rule.slots().iter().all(|slot| !slot.contains('.') && *slot != STEP), "{rule:?}");
        }
        let names: HashSet<&str> = RULES.iter().map(|entry| entry.name).collect();
        assert_eq!(names.len(), RULES.len());
        let error = |name: &str, config| RuleEntry::rule(name, config).unwrap_err().to_string();
        assert!(error("adan", serde_json::json!({})).contains("adamw or adam or sgd"));
        assert!(error("sgd", serde_json::json!({ "betas": [0.9, 0.9] })).contains("momentum"));
        assert!(error("adamw", serde_json::json!({ "eps": 0.0 })).contains("eps"));
    }

    #[test]
    fn a_gradient_of_any_float_dtype_is_as_if_widened_first() -> Result<()> {
        // Wider copies as well: the start is that of a run in f32.
        let kinds = [
            (DType::F32, DType::F32),
            (DType::BF16, DType::BF16),
            (DType::F16, DType::F16),
            (DType::BF16, DType::F32),
            (DType::F16, DType::F32),
        ];
        for make in 0..rules().len() {
            for (dtype, masters) in kinds {
                for of_gradient in [DType::F32, DType::BF16, DType::F16] {
                    let run = |widened: bool| -> Result<(Vec<f64>, Vec<f64>)> {
                        let (params, gradients) = one(1000, dtype, masters)?;
                        let w = params.get("w").unwrap();
                        let mut given = gradients.of(w).unwrap().to_dtype(of_gradient)?;
                        if widened {
                            given = given.to_dtype(DType::F32)?;
                        }
                        let mut gradients = Gradients::default();
                        gradients.insert(w.var().unwrap(), given);
                        let rule = rules().swap_remove(make);
                        let kept = trained_by(Optimizer::boxed(rule), &params, &gradients)?;
                        Ok((kept, w.value()?.to_vec()?))
                    };
                    let what = format!("rule {make}, {dtype} with {masters}, gradient in {of_gradient}");
                    assert_eq!(run(false)?, run(true)?, "{what}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn wider_copies_train_as_f32_on_widened_gradients() -> Result<()> {
        for make in 0..rules().len() {
            let optimizer = || Optimizer::boxed(rules().swap_remove(make));
            let (mixed, gradients) = one(1000, DType::BF16, DType::F32)?;
            let (plain, _) = one(1000, DType::F32, DType::F32)?;
            let (w, gradient) = (plain.get("w").unwrap(), gradients.iter().next().unwrap().1);
            let mut widened = Gradients::default();
            widened.insert(w.var().unwrap(), gradient.to_dtype(DType::F32)?);
            // The start is that of a run in f32, too.
            assert_eq!(mixed.get("w").unwrap().kept()?.to_vec::<f32>()?, w.value()?.to_vec::<f32>()?);
            let expected = trained_by(optimizer(), &plain, &widened)?;
            assert_eq!(trained_by(optimizer(), &mixed, &gradients)?, expected);
        }
        Ok(())
    }

    #[test]
    fn a_group_has_rates_of_its_own() -> Result<()> {
        for (pattern, name, holds) in [
            ("*.bias", "blocks.0.bias", true),
            ("*.bias", "bias", false),
            ("blocks.*.norm*", "blocks.10.norm.weight", true),
            ("blocks.*.norm*", "blocks.norm", false),
            ("w", "w", true),
            ("w", "ww", false),
            ("*", "anything", true),
            ("a*a", "a", false),
        ] {
            let group = ParamGroup { pattern: pattern.into(), lr_mult: 1.0, wd_mult: 1.0 };
            assert_eq!(group.holds(name), holds, "{pattern} and {name}");
        }
        let cpu = Device::cpu();
        let run = |groups: Vec<ParamGroup>, rates: Rates, only: Option<usize>| -> Result<Vec<Vec<f64>>> {
            let builder = ParamBuilder::new(3, DType::F64, &cpu);
            let weight = builder.sub("a").get("weight", &[5], Init::Normal { std: 1.0 })?;
            let tensors = [weight, builder.sub("a").get("bias", &[5], Init::Ones)?];
            let mut optimizer = Optimizer::new(AdamW::default()).with_groups(groups);
            for _ in 0..2 {
                let mut gradients = Gradients::default();
                for (_, tensor) in tensors.iter().enumerate().filter(|(i, _)| only.is_none_or(|only| only == *i)) {
                    gradients.insert(tensor.var().unwrap(), Tensor::full(&[5], 0.3, DType::F64, &cpu)?);
                }
                optimizer.step(&builder.params(), &gradients, rates, None)?;
            }
            tensors.iter().map(|w| w.value()?.to_vec()).collect()
        };
        let group = ParamGroup { pattern: "*.bias".into(), lr_mult: 0.5, wd_mult: 0.0 };
        let grouped = run(vec![group], RATES, None)?;
        assert_eq!(grouped[0], run(Vec::new(), RATES, Some(0))?[0]);
        let half = Rates { lr: 0.5 * RATES.lr, weight_decay: 0.0 };
        assert_eq!(grouped[1], run(Vec::new(), half, Some(1))?[1]);
        Ok(())
    }

    #[test]
    fn a_file_of_another_rule_is_named_as_such() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        let (params, gradients) = one(5, DType::F32, DType::F32)?;
        let mut adamw = Optimizer::new(AdamW::default());
        adamw.step(&params, &gradients, RATES, None)?;
        adamw.save(&params, &path)?;
        let file = SafeTensors::open(&path)?;
        assert_eq!(file.names(), ["exp_avg.w", "exp_avg_sq.w", "step.w"]);
        let error = Optimizer::new(Sgd::default()).load(&params, &file).unwrap_err().to_string();
        assert!(error.contains("exp_avg.w"), "{error}");
        Ok(())
    }
}
