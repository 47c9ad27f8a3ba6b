//! The tape: what ran, in order, with what its gradient needs.
//!
//! A tensor may carry a tape and a variable. An op records when some input carries a tape and some input
//! has a variable (a leaf, a parameter, or the output of a recorded op). Its outputs carry the tape on.
//!
//! A parameter has a variable and no tape, so that one model runs recorded or not. An op on parameters alone is recorded
//! on a floating tape, which every tape takes over that meets its results. An op on parameters and plain tensors is taken
//! for inference: its result is no more to be recorded, and an error where it meets a tape.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::expr::Function;
use crate::nn::Param;
use crate::ops::pointwise::{pointwise_to, run_pointwise};
pub use crate::saved::{Saved, Slot};
use crate::{DType, Error, Result, Tensor};

/// The identity of a differentiable value, unique in the process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct VarId(u64);

impl VarId {
    pub(crate) fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// What a gradient may be of.
pub trait Variable {
    /// Its variable, if it is differentiated.
    fn var(&self) -> Option<VarId>;
}

impl Variable for Tensor {
    fn var(&self) -> Option<VarId> {
        Tensor::var(self)
    }
}

impl Variable for Param {
    fn var(&self) -> Option<VarId> {
        Param::var(self)
    }
}

/// An op: how it runs and how its gradient runs, side by side in one file.
pub trait Op: Debug + Send + Sync + 'static {
    /// The name in errors.
    fn name(&self) -> &'static str;
    /// Runs on plain tensors and saves what `backward` needs.
    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>>;
    /// Adds the gradients of the inputs to `out`; `grads` holds those of the outputs that have any.
    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let _ = (saved, grads, out);
        Err(Error::NoBackward { op: self.name() })
    }
    /// Whether `backward` exists: recording an op without one is an error at once.
    fn differentiable(&self) -> bool {
        true
    }
    /// For an op that runs again instead of having a `backward`: what it runs on its inputs, which it saved in the slots
    /// `("input", i)`.
    fn replay(&self) -> Option<&Block> {
        None
    }
}

/// A function of tensors that may run more than once, always with the same result.
pub type Block = dyn Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync;

/// What a running op may ask and keep.
#[derive(Debug)]
pub struct Forward {
    needs: Vec<bool>,
    saved: Saved,
    captured: Vec<VarId>,
}

impl Forward {
    /// Whether backward will be asked for the gradient of input `i`.
    pub fn needs_grad(&self, i: usize) -> bool {
        self.needs.get(i).copied().unwrap_or(false)
    }

    /// Whether backward will be asked for anything.
    pub fn recording(&self) -> bool {
        self.needs.contains(&true)
    }

    /// Keeps a tensor for backward under a name: of a parameter's value the parameter alone, so that the value may go and
    /// come back meanwhile. Nothing is kept where nothing is recorded.
    pub fn save(&mut self, slot: impl Into<Slot>, tensor: &Tensor) {
        if self.recording() {
            self.saved.keep(slot.into(), tensor);
        }
    }

    /// Keeps dims and dtype of a tensor for backward, and none of its memory.
    pub fn save_shape(&mut self, slot: impl Into<Slot>, tensor: &Tensor) {
        if self.recording() {
            self.saved.keep_shape(slot.into(), tensor);
        }
    }

    /// Says that backward also adds to the gradients of these variables, which are no inputs.
    pub(crate) fn capture(&mut self, vars: impl IntoIterator<Item = VarId>) {
        self.captured.extend(vars);
    }
}

/// Where an op's backward puts the gradients of its inputs.
#[derive(Debug)]
pub struct InputGradients {
    needs: Vec<bool>,
    gradients: Vec<Option<Tensor>>,
}

impl InputGradients {
    /// Whether the gradient of input `i` is wanted.
    pub fn needs(&self, i: usize) -> bool {
        self.needs.get(i).copied().unwrap_or(false)
    }

    /// The gradient of input `i`.
    pub fn set(&mut self, i: usize, gradient: Tensor) {
        if self.needs(i) {
            self.gradients[i] = Some(gradient);
        }
    }
}

#[derive(Debug)]
struct Record {
    op: Box<dyn Op>,
    saved: Saved,
    inputs: Vec<Option<VarId>>,
    /// Variables inside a block that runs again.
    captured: Vec<VarId>,
    outputs: Vec<VarId>,
}

impl Record {
    /// The variables to whose gradients its backward adds.
    fn adds_to(&self) -> impl Iterator<Item = VarId> {
        self.inputs.iter().flatten().chain(&self.captured).copied()
    }
}

#[derive(Debug, Default)]
struct Inner {
    /// Shared with the tapes that took a floating one over.
    records: Vec<Arc<Record>>,
    produced: HashSet<VarId>,
    /// The variables that operations meet, on a tape that records nothing else.
    heard: Option<BTreeSet<VarId>>,
}

#[derive(Debug)]
struct Shared {
    /// Rises from tape to tape: that of a block which runs again is newer than the one around it.
    serial: u64,
    /// Whether it began with parameters alone.
    floating: bool,
    recording: Mutex<Inner>,
}

impl Default for Shared {
    fn default() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { serial: NEXT.fetch_add(1, Ordering::Relaxed), floating: false, recording: Mutex::default() }
    }
}

/// A recording. Cheap to clone: all clones are the same tape.
#[derive(Clone, Debug, Default)]
pub struct Tape(Arc<Shared>);

/// Told when the gradient of a leaf or parameter is final.
pub trait GradientSink {
    /// Takes the gradient of `var`.
    fn gradient(&mut self, var: VarId, gradient: Tensor) -> Result<()>;
}

/// Gradients by variable.
#[derive(Clone, Debug, Default)]
pub struct Gradients(BTreeMap<VarId, Tensor>);

impl Gradients {
    /// The gradient of `var`.
    pub fn get(&self, var: VarId) -> Option<&Tensor> {
        self.0.get(&var)
    }

    /// The gradient of a leaf or a parameter.
    pub fn of(&self, of: &impl Variable) -> Option<&Tensor> {
        of.var().and_then(|v| self.get(v))
    }

    /// Sets the gradient of `var`.
    pub fn insert(&mut self, var: VarId, gradient: Tensor) {
        self.0.insert(var, gradient);
    }

    /// Takes the gradient of `var`.
    pub fn remove(&mut self, var: VarId) -> Option<Tensor> {
        self.0.remove(&var)
    }

    /// All gradients, in the order in which their variables were made.
    pub fn iter(&self) -> impl Iterator<Item = (VarId, &Tensor)> {
        self.0.iter().map(|(v, t)| (*v, t))
    }

    /// Adds another set, as gradient accumulation does: sums are f32 (f64 for f64), whatever the gradients' dtype.
    pub fn add(&mut self, other: Self) -> Result<()> {
        for (var, gradient) in other.0 {
            let sum = match self.0.remove(&var) {
                Some(before) => wide_sum(before, gradient)?,
                None => gradient,
            };
            self.0.insert(var, sum);
        }
        Ok(())
    }
}

impl GradientSink for Gradients {
    fn gradient(&mut self, var: VarId, gradient: Tensor) -> Result<()> {
        self.insert(var, gradient);
        Ok(())
    }
}

impl Tape {
    /// An empty tape.
    pub fn new() -> Self {
        Self::default()
    }

    /// A tape that records nothing but which variables operations meet.
    pub(crate) fn listener() -> Self {
        let heard = Inner { heard: Some(BTreeSet::new()), ..Inner::default() };
        Self(Arc::new(Shared { recording: Mutex::new(heard), ..Shared::default() }))
    }

    /// What a listener heard.
    pub(crate) fn heard(&self) -> BTreeSet<VarId> {
        self.lock().heard.clone().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tensor, carried by the tape and differentiated: a fresh variable.
    pub fn leaf(&self, tensor: &Tensor) -> Tensor {
        tensor.detach().tracked(Some(VarId::fresh()), Some(self.clone()))
    }

    /// The tensor, carried by the tape: ops on it record. Its own variable, if any, is kept.
    pub fn attach(&self, tensor: &Tensor) -> Tensor {
        tensor.clone().tracked(tensor.var(), Some(self.clone()))
    }

    /// Takes over what a floating tape recorded, as far as it was not yet.
    fn take_over(&self, floating: &Tape) {
        if Arc::ptr_eq(&self.0, &floating.0) {
            return;
        }
        let (records, produced) = {
            let other = floating.lock();
            (other.records.clone(), other.produced.clone())
        };
        let mut inner = self.lock();
        if let Some(heard) = &mut inner.heard {
            let met = records.iter().flat_map(|r| r.adds_to()).filter(|var| !produced.contains(var));
            heard.extend(met);
            return;
        }
        for record in records {
            if record.outputs.iter().all(|var| inner.produced.insert(*var)) {
                inner.records.push(record);
            }
        }
    }

    fn is_floating(&self) -> bool {
        self.0.floating
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.lock().records.len()
    }

    /// Whether nothing is recorded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The gradients of all leaves and parameters with respect to `loss` (one element). Empties the tape.
    pub fn backward(&self, loss: &Tensor) -> Result<Gradients> {
        if loss.numel() != 1 {
            return Err(Error::shape("backward", "one element", loss.dims()));
        }
        let mut gradients = Gradients::default();
        let one = Tensor::ones(loss.dims(), loss.dtype(), loss.device())?;
        self.backward_with(&[(loss, &one)], &mut gradients)?;
        Ok(gradients)
    }

    /// The same from any outputs and their cotangents; each gradient goes to `sink` as soon as it is final.
    pub fn backward_with(&self, outputs: &[(&Tensor, &Tensor)], sink: &mut dyn GradientSink) -> Result<()> {
        for tape in outputs.iter().filter_map(|(output, _)| output.tape()).filter(|tape| tape.is_floating()) {
            self.take_over(tape);
        }
        let Inner { mut records, produced, .. } = std::mem::take(&mut *self.lock());
        let mut pending = Pending { gradients: HashMap::new(), produced };
        for (output, cotangent) in outputs {
            let var = output.var().ok_or_else(|| {
                Error::argument("backward", "an output that depends on a leaf or parameter", "a constant")
            })?;
            if cotangent.dims() != output.dims() {
                return Err(Error::shape("backward", format!("a cotangent of {:?}", output.dims()), cotangent.dims()));
            }
            pending.add(var, cotangent.detach())?;
        }
        // The earliest record that reads a variable is the last to add to its gradient.
        let mut first_use = HashMap::new();
        for (index, record) in records.iter().enumerate() {
            for var in record.adds_to() {
                first_use.entry(var).or_insert(index);
            }
        }
        while let Some(record) = records.pop() {
            run_backward(&record, &mut pending)?;
            for var in record.adds_to() {
                if first_use.get(&var) == Some(&records.len())
                    && !pending.produced.contains(&var)
                    && let Some(gradient) = pending.gradients.remove(&var)
                {
                    sink.gradient(var, gradient)?;
                }
            }
        }
        // An output that is a leaf itself.
        let Pending { gradients, produced } = pending;
        let mut rest: Vec<_> = gradients.into_iter().filter(|(v, _)| !produced.contains(v)).collect();
        rest.sort_by_key(|(v, _)| *v);
        rest.into_iter().try_for_each(|(v, g)| sink.gradient(v, g))
    }
}

/// Gradients that more may be added to.
struct Pending {
    gradients: HashMap<VarId, Tensor>,
    /// The variables that are results of recorded ops; the others are leaves and parameters.
    produced: HashSet<VarId>,
}

impl Pending {
    /// Adds to the gradient of a variable. What reaches a leaf or parameter from several places is summed in f32.
    fn add(&mut self, var: VarId, gradient: Tensor) -> Result<()> {
        let sum = match self.gradients.remove(&var) {
            Some(before) if self.produced.contains(&var) => sum(before, gradient)?,
            Some(before) => wide_sum(before, gradient)?,
            None => gradient,
        };
        self.gradients.insert(var, sum);
        Ok(())
    }
}

/// Takes the gradients of a record's outputs out of `pending`, and adds those of its inputs.
fn run_backward(record: &Record, pending: &mut Pending) -> Result<()> {
    let grads: Vec<_> = record.outputs.iter().map(|v| pending.gradients.remove(v)).collect();
    if grads.iter().all(Option::is_none) {
        return Ok(());
    }
    record.saved.fetch(record.op.name())?;
    if let Some(block) = record.op.replay() {
        return replay(block, record, grads, pending);
    }
    let needs: Vec<bool> = record.inputs.iter().map(Option::is_some).collect();
    let mut out = InputGradients { gradients: vec![None; needs.len()], needs };
    record.op.backward(&record.saved, &grads, &mut out)?;
    let inputs = record.inputs.iter().zip(out.gradients).filter_map(|(v, g)| Some(((*v)?, g?)));
    inputs.into_iter().try_for_each(|(var, gradient)| pending.add(var, gradient))
}

/// Records a block anew and runs its backward. Its records add to the slots of the variables outside, so the bits are
/// those of a run that kept everything.
fn replay(block: &Block, record: &Record, grads: Vec<Option<Tensor>>, pending: &mut Pending) -> Result<()> {
    let tape = Tape::new();
    let input = |(i, var): (usize, &Option<VarId>)| {
        Ok(record.saved.get(("input", i))?.clone().tracked(*var, Some(tape.clone())))
    };
    let inputs: Vec<_> = record.inputs.iter().enumerate().map(input).collect::<Result<_>>()?;
    let outputs = block(&inputs)?;
    let Inner { mut records, produced, .. } = std::mem::take(&mut *tape.lock());
    pending.produced.extend(produced);
    for (output, grad) in outputs.iter().zip(grads) {
        // An output that depends on nothing has no variable, and its gradient goes nowhere.
        if let (Some(var), Some(grad)) = (output.var(), grad) {
            pending.add(var, grad)?;
        }
    }
    while let Some(record) = records.pop() {
        run_backward(&record, pending)?;
    }
    Ok(())
}

/// The sum of two gradients in their promoted dtype, in the memory of one of them where nobody else has it.
fn sum(before: Tensor, gradient: Tensor) -> Result<Tensor> {
    sum_in(before.dtype().promote(gradient.dtype()), before, gradient)
}

/// The same in f32 or wider: small gradients that are added to a large sum in bf16 are lost.
pub(crate) fn wide_sum(before: Tensor, gradient: Tensor) -> Result<Tensor> {
    sum_in(before.dtype().promote(gradient.dtype()).promote(DType::F32), before, gradient)
}

fn sum_in(dtype: DType, before: Tensor, gradient: Tensor) -> Result<Tensor> {
    let alike = before.dims() == gradient.dims();
    let add = |own: &Tensor| run_pointwise(&Function::build(|[a, b]| [a + b]), &[&before, &gradient], &[], &[own]);
    match [&before, &gradient].into_iter().find(|t| alike && t.dtype() == dtype && t.is_sole_owner()) {
        Some(own) => {
            add(own)?;
            Ok(own.clone())
        }
        None => pointwise_to(dtype, [&before, &gradient], |[a, b]| a + b),
    }
}

/// Runs an op, and records it where its inputs ask for that.
pub fn apply(op: impl Op, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let tape = common_tape(op.name(), inputs)?;
    let tape = tape.as_ref();
    let unrecorded = tape.is_none() && inputs.iter().any(|t| t.requires_grad() || t.is_unrecorded());
    let mut vars: Vec<Option<VarId>> = inputs.iter().map(|t| tape.and(t.var())).collect();
    let mut listening = false;
    if let Some(heard) = tape.map(Tape::lock).as_mut().and_then(|inner| inner.heard.as_mut()) {
        heard.extend(vars.iter_mut().filter_map(Option::take));
        listening = true;
    }
    let recording = vars.iter().any(Option::is_some);
    if recording && !op.differentiable() {
        return Err(Error::NoBackward { op: op.name() });
    }
    let needs = vars.iter().map(Option::is_some).collect();
    let mut cx = Forward { needs, saved: Saved::default(), captured: Vec::new() };
    let plain: Vec<Tensor> = inputs.iter().map(|t| t.plain()).collect();
    let outputs = op.forward(&mut cx, &plain)?;
    let Some(tape) = tape else {
        return Ok(if unrecorded { outputs.into_iter().map(Tensor::unrecorded).collect() } else { outputs });
    };
    if listening && let Some(heard) = &mut tape.lock().heard {
        heard.extend(cx.captured.drain(..));
    }
    if !recording {
        return Ok(outputs.into_iter().map(|t| t.tracked(None, Some(tape.clone()))).collect());
    }
    let ids: Vec<VarId> = outputs.iter().map(|_| VarId::fresh()).collect();
    let tracked = outputs.into_iter().zip(&ids).map(|(t, id)| t.tracked(Some(*id), Some(tape.clone())));
    let outputs = tracked.collect();
    let mut inner = tape.lock();
    inner.produced.extend(&ids);
    let record = Record { op: Box::new(op), saved: cx.saved, inputs: vars, captured: cx.captured, outputs: ids };
    inner.records.push(Arc::new(record));
    Ok(outputs)
}

/// The tape on which an op on these inputs is recorded: theirs, or a floating one where all of them are parameters or made
/// of parameters alone.
fn common_tape(op: &'static str, inputs: &[&Tensor]) -> Result<Option<Tape>> {
    let carried = |t: &&Tensor| t.tape().is_some_and(|tape| !tape.is_floating());
    // A constant that a block brings from outside may carry the tape around it: nothing is recorded for it there.
    let found = inputs.iter().filter(|t| carried(t)).filter_map(|t| t.tape()).max_by_key(|tape| tape.0.serial);
    if let Some(tape) = found {
        let elsewhere = |t: &&Tensor| t.tape().is_some_and(|other| !Arc::ptr_eq(&other.0, &tape.0));
        if inputs.iter().any(|t| t.requires_grad() && carried(t) && elsewhere(t)) {
            return Err(Error::argument(op, "inputs on one tape", "inputs on two"));
        }
    }
    let mut floating = inputs.iter().filter_map(|t| t.tape()).filter(|tape| tape.is_floating());
    match found {
        Some(_) if inputs.iter().any(|t| t.is_unrecorded()) => Err(Error::Unrecorded { op }),
        Some(tape) => {
            floating.for_each(|other| tape.take_over(other));
            Ok(Some(tape.clone()))
        }
        None if inputs.is_empty() || !inputs.iter().all(|t| t.requires_grad()) => Ok(None),
        None => {
            let new = || Tape(Arc::new(Shared { floating: true, ..Shared::default() }));
            let tape = floating.next().cloned().unwrap_or_else(new);
            floating.for_each(|other| tape.take_over(other));
            Ok(Some(tape.clone()))
        }
    }
}

/// The same for an op with one output.
pub fn apply_one(op: impl Op, inputs: &[&Tensor]) -> Result<Tensor> {
    let name = op.name();
    apply(op, inputs)?.pop().ok_or_else(|| Error::argument(name, "one output", "none"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Device};

    #[test]
    fn gradients_are_summed_in_place_but_never_over_what_others_hold() -> Result<()> {
        let (tape, cpu) = (Tape::new(), Device::cpu());
        let x = tape.leaf(&Tensor::from_vec(vec![1.0f32, 2.0], &[2], &cpu)?);
        let cotangent = Tensor::from_vec(vec![3.0f32, -1.0], &[2], &cpu)?;
        let (double, triple) = (x.mul_scalar(2.0)?, x.mul_scalar(3.0)?);
        let mut gradients = Gradients::default();
        // The leaf is an output itself, twice: its first gradient is the caller's own tensor.
        let outputs = [(&x, &cotangent), (&double, &cotangent), (&x, &cotangent), (&triple, &cotangent)];
        tape.backward_with(&outputs, &mut gradients)?;
        assert_eq!(gradients.of(&x).map(Tensor::to_vec::<f32>).transpose()?, Some(vec![21.0, -7.0]));
        assert_eq!(cotangent.to_vec::<f32>()?, [3.0, -1.0]);

        let own = |value: f32| Tensor::full(&[2], f64::from(value), DType::F32, &cpu);
        let (first, second) = (own(1.0)?, own(2.0)?);
        let place = |t: &Tensor| std::ptr::from_ref(t.storage());
        let (before, held) = (place(&first), first.clone());
        let total = sum(first, second)?;
        assert!(place(&total) != before && held.to_vec::<f32>()? == [1.0; 2] && total.to_vec::<f32>()? == [3.0; 2]);
        let before = place(&total);
        let total = sum(total, held)?;
        assert!(place(&total) == before && total.to_vec::<f32>()? == [4.0; 2]);
        Ok(())
    }
}
