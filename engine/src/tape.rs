//! The tape: what ran, in order, with what its gradient needs.
//!
//! A tensor may carry a tape and a variable. An op records when some input carries a tape and some input
//! has a variable (a leaf, a parameter, or the output of a recorded op). Its outputs carry the tape on.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::expr::Function;
use crate::ops::pointwise::run_pointwise;
use crate::{Error, Result, Tensor};

/// The identity of a differentiable value, unique in the process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct VarId(u64);

impl VarId {
    pub(crate) fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// An op: how it runs and how its gradient runs, side by side in one file.
pub trait Op: Debug + Send + Sync + 'static {
    /// The name in errors.
    fn name(&self) -> &'static str;
    /// Runs on plain tensors and saves what `backward` needs.
    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>>;
    /// Adds the gradients of the inputs to `out`; `grads` holds those of the outputs that have any.
    fn backward(&self, saved: &[Tensor], grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let _ = (saved, grads, out);
        Err(Error::NoBackward { op: self.name() })
    }
    /// Whether `backward` exists: recording an op without one is an error at once.
    fn differentiable(&self) -> bool {
        true
    }
    /// For an op that runs again instead of having a `backward`: what it runs on its inputs, all of which it saved.
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
    saved: Vec<(Tensor, u64)>,
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

    /// Keeps a tensor for backward; nothing is kept where nothing is recorded.
    pub fn save(&mut self, tensor: &Tensor) {
        if self.recording() {
            self.saved.push((tensor.detach(), tensor.storage().version()));
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
    saved: Vec<(Tensor, u64)>,
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
    records: Vec<Record>,
    produced: HashSet<VarId>,
    /// The variables that operations meet, on a tape that records nothing else.
    heard: Option<BTreeSet<VarId>>,
}

/// A recording. Cheap to clone: all clones are the same tape.
#[derive(Clone, Debug, Default)]
pub struct Tape(Arc<Mutex<Inner>>);

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

    /// The gradient of a leaf or parameter tensor.
    pub fn of(&self, tensor: &Tensor) -> Option<&Tensor> {
        tensor.var().and_then(|v| self.get(v))
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

    /// Adds another set, as gradient accumulation does.
    pub fn add(&mut self, other: Self) -> Result<()> {
        for (var, gradient) in other.0 {
            let sum = sum(self.0.remove(&var), gradient)?;
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
        Self(Arc::new(Mutex::new(Inner { heard: Some(BTreeSet::new()), ..Inner::default() })))
    }

    /// What a listener heard.
    pub(crate) fn heard(&self) -> BTreeSet<VarId> {
        self.lock().heard.clone().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tensor, carried by the tape and differentiated: a fresh variable.
    pub fn leaf(&self, tensor: &Tensor) -> Tensor {
        tensor.detach().tracked(Some(VarId::fresh()), Some(self.clone()))
    }

    /// The tensor, carried by the tape: ops on it record. Its own variable, if any, is kept.
    pub fn attach(&self, tensor: &Tensor) -> Tensor {
        tensor.clone().tracked(tensor.var(), Some(self.clone()))
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
        let mut pending = HashMap::new();
        for (output, cotangent) in outputs {
            let var = output.var().ok_or_else(|| {
                Error::argument("backward", "an output that depends on a leaf or parameter", "a constant")
            })?;
            if cotangent.dims() != output.dims() {
                return Err(Error::shape("backward", format!("a cotangent of {:?}", output.dims()), cotangent.dims()));
            }
            add_gradient(&mut pending, var, cotangent.detach())?;
        }
        let Inner { mut records, produced, .. } = std::mem::take(&mut *self.lock());
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
                    && !produced.contains(&var)
                    && let Some(gradient) = pending.remove(&var)
                {
                    sink.gradient(var, gradient)?;
                }
            }
        }
        // An output that is a leaf itself.
        let mut rest: Vec<_> = pending.into_iter().filter(|(v, _)| !produced.contains(v)).collect();
        rest.sort_by_key(|(v, _)| *v);
        rest.into_iter().try_for_each(|(v, g)| sink.gradient(v, g))
    }
}

/// Takes the gradients of a record's outputs out of `pending`, and adds those of its inputs.
fn run_backward(record: &Record, pending: &mut HashMap<VarId, Tensor>) -> Result<()> {
    let grads: Vec<_> = record.outputs.iter().map(|v| pending.remove(v)).collect();
    if grads.iter().all(Option::is_none) {
        return Ok(());
    }
    if record.saved.iter().any(|(t, version)| t.storage().version() != *version) {
        return Err(Error::Overwritten { op: record.op.name() });
    }
    if let Some(block) = record.op.replay() {
        return replay(block, record, grads, pending);
    }
    let saved: Vec<Tensor> = record.saved.iter().map(|(t, _)| t.clone()).collect();
    let needs: Vec<bool> = record.inputs.iter().map(Option::is_some).collect();
    let mut out = InputGradients { gradients: vec![None; needs.len()], needs };
    record.op.backward(&saved, &grads, &mut out)?;
    let inputs = record.inputs.iter().zip(out.gradients).filter_map(|(v, g)| Some(((*v)?, g?)));
    inputs.into_iter().try_for_each(|(var, gradient)| add_gradient(pending, var, gradient))
}

/// Records a block anew and runs its backward. Its records add to the slots of the variables outside, so the bits are
/// those of a run that kept everything.
fn replay(
    block: &Block,
    record: &Record,
    grads: Vec<Option<Tensor>>,
    pending: &mut HashMap<VarId, Tensor>,
) -> Result<()> {
    let tape = Tape::new();
    let inputs = record.saved.iter().zip(&record.inputs);
    let inputs: Vec<_> = inputs.map(|((t, _), var)| t.clone().tracked(*var, Some(tape.clone()))).collect();
    for (output, grad) in block(&inputs)?.iter().zip(grads) {
        // An output that depends on nothing has no variable, and its gradient goes nowhere.
        if let (Some(var), Some(grad)) = (output.var(), grad) {
            add_gradient(pending, var, grad)?;
        }
    }
    let mut records = std::mem::take(&mut *tape.lock()).records;
    while let Some(record) = records.pop() {
        run_backward(&record, pending)?;
    }
    Ok(())
}

fn add_gradient(pending: &mut HashMap<VarId, Tensor>, var: VarId, gradient: Tensor) -> Result<()> {
    let sum = sum(pending.remove(&var), gradient)?;
    pending.insert(var, sum);
    Ok(())
}

/// The sum of gradients, in the memory of one of them where nobody else has it.
fn sum(before: Option<Tensor>, gradient: Tensor) -> Result<Tensor> {
    let Some(before) = before else { return Ok(gradient) };
    let alike = (before.dims(), before.dtype()) == (gradient.dims(), gradient.dtype());
    match [&before, &gradient].into_iter().find(|t| alike && t.is_sole_owner()) {
        Some(own) => {
            own.storage().touch();
            run_pointwise(&Function::build(|[a, b]| [a + b]), &[&before, &gradient], &[], &[own])?;
            Ok(own.clone())
        }
        None => before.add(&gradient),
    }
}

/// Runs an op, and records it where its inputs ask for that.
pub fn apply(op: impl Op, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let mut tape: Option<&Tape> = None;
    for input in inputs {
        match (tape, input.tape()) {
            (Some(a), Some(b)) if !Arc::ptr_eq(&a.0, &b.0) => {
                return Err(Error::argument(op.name(), "inputs on one tape", "inputs on two"));
            }
            (None, found) => tape = found,
            _ => {}
        }
    }
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
    let mut cx = Forward { needs, saved: Vec::new(), captured: Vec::new() };
    let plain: Vec<Tensor> = inputs.iter().map(|t| t.detach()).collect();
    let outputs = op.forward(&mut cx, &plain)?;
    let Some(tape) = tape else { return Ok(outputs) };
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
    inner.records.push(Record { op: Box::new(op), saved: cx.saved, inputs: vars, captured: cx.captured, outputs: ids });
    Ok(outputs)
}

/// The same for an op with one output.
pub fn apply_one(op: impl Op, inputs: &[&Tensor]) -> Result<Tensor> {
    let name = op.name();
    apply(op, inputs)?.pop().ok_or_else(|| Error::argument(name, "one output", "none"))
}
