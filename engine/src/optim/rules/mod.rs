//! Update rules, a file each.

mod adafactor;
mod adam;
mod adamw;
mod adamw_8bit;
mod came;
mod lion;
mod muon;
mod prodigy;
mod schedule_free;
mod sgd;
mod whole;

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

pub use self::adafactor::Adafactor;
pub use self::adam::Adam;
pub use self::adamw::AdamW;
pub use self::adamw_8bit::AdamW8bit;
pub use self::came::Came;
pub use self::lion::Lion;
pub use self::muon::{AdjustLr, Muon};
pub use self::prodigy::Prodigy;
pub use self::schedule_free::AdamWScheduleFree;
pub use self::sgd::Sgd;
use super::{Optimizer, Rates};
use crate::expr::Expr;
use crate::{DType, Error, Result, Tensor};

/// How an optimiser updates one parameter: what it remembers, and the new values as a pointwise program. All else (groups,
/// wider copies, files, launches over many tensors, gating, stepping in backward) is [`Optimizer`]'s, the same for all rules.
///
/// A rule that mixes elements, such as Muon's orthogonalised momentum, also has [`Rule::whole_slots`]: then [`Rule::direction`]
/// makes the direction of a step by operations on whole tensors, and the program's gradient is that direction.
///
/// [`Optimizer`]: super::Optimizer
pub trait Rule: Debug + Send + Sync {
    /// Its name in errors, such as `AdamW`.
    fn name(&self) -> &'static str;

    /// What it remembers of each parameter: tensors of the shape and dtype of what is updated, zero at first, by the names
    /// that PyTorch gives them in an optimiser's state. No name holds a dot.
    fn slots(&self) -> &'static [&'static str] {
        &[]
    }

    /// What varies from step to step and is the same for all elements. There are always equally many.
    fn scalars(&self, at: &At<'_>) -> Vec<f64> {
        whole::decay(at.rates)
    }

    /// The new value of the parameter, then those of the slots, in their order. By default the gradient is a direction that has its
    /// length already.
    fn update<'a>(&self, x: &Operands<'a, '_>) -> Vec<Expr<'a>> {
        whole::descend(x)
    }

    /// What it remembers of a parameter of these sizes beside the slots. None for rules that are pointwise programs alone.
    fn whole_slots(&self, dims: &[usize]) -> Vec<Slot> {
        let _ = dims;
        Vec::new()
    }

    /// The direction of a step, where there are whole slots.
    ///
    /// # Errors
    /// When the device fails.
    fn direction(&self, x: &Whole<'_>) -> Result<Direction> {
        Ok(Direction { direction: x.gradient.clone(), slots: x.slots.to_vec() })
    }

    /// Numbers that all parameters share and that go on from step to step: their names, which hold no dot, and first values.
    fn shared(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }

    /// What the shared numbers need to know of all parameters: each is summed over their elements. With any of these a step begins
    /// when all gradients are there, and the host waits for the sums.
    fn summed<'a>(&self, x: &Operands<'a, '_>) -> Vec<Expr<'a>> {
        let _ = x;
        Vec::new()
    }

    /// The shared numbers with a step of these rates, from those before and the sums.
    fn advance(&self, before: &[f64], rates: Rates, sums: &[f64]) -> Vec<f64> {
        let _ = (rates, sums);
        before.to_vec()
    }

    /// The value with which the model is judged, sampled and saved, where that is another than the one it is trained at.
    fn evaluated<'a>(&self, x: &Operands<'a, '_>) -> Option<Expr<'a>> {
        let _ = x;
        None
    }

    /// Checks the configuration.
    ///
    /// # Errors
    /// When a value is outside its range.
    fn check(&self) -> Result<()>;
}

/// When an update happens, and with what.
#[derive(Clone, Copy, Debug)]
pub struct At<'a> {
    /// The parameter's rates.
    pub rates: Rates,
    /// Updates of the parameter with this one, from 1.
    pub step: u64,
    /// The shared numbers before the step.
    pub before: &'a [f64],
    /// The same with it; those before where they are being summed for.
    pub shared: &'a [f64],
}

/// How many scalars a rule has.
pub(super) fn scalar_count(rule: &dyn Rule) -> usize {
    let shared: Vec<f64> = rule.shared().iter().map(|(_, first)| *first).collect();
    let rates = Rates { lr: 0.0, weight_decay: 0.0 };
    rule.scalars(&At { rates, step: 1, before: &shared, shared: &shared }).len()
}

/// What a rule that mixes elements remembers of a parameter: a tensor, zero at first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slot {
    /// Its name in files, without a dot.
    pub name: &'static str,
    /// Its sizes.
    pub dims: Vec<usize>,
    /// Its dtype; f32 (f64 for parameters in f64) where none is given.
    pub dtype: Option<DType>,
}

impl Slot {
    /// In f32, or f64 for parameters in f64.
    pub fn wide(name: &'static str, dims: Vec<usize>) -> Self {
        Self { name, dims, dtype: None }
    }
}

/// What a rule that mixes elements is given of a parameter. All tensors are in f32, or f64 for a parameter in f64.
#[derive(Clone, Copy, Debug)]
pub struct Whole<'a> {
    /// The parameter, or its wider copy.
    pub parameter: &'a Tensor,
    /// Its gradient, clipped already.
    pub gradient: &'a Tensor,
    /// In the order of [`Rule::whole_slots`].
    pub slots: &'a [Tensor],
    /// The rates of the step.
    pub rates: Rates,
    /// Updates of the parameter with this one, from 1.
    pub step: u64,
}

/// What such a rule makes of it.
#[derive(Clone, Debug)]
pub struct Direction {
    /// The gradient of [`Rule::update`], in the parameter's shape.
    pub direction: Tensor,
    /// The new values of the whole slots, in their order.
    pub slots: Vec<Tensor>,
}

/// What an update computes with, for one element.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a, 's> {
    /// The parameter, or its wider copy.
    pub parameter: Expr<'a>,
    /// Its gradient, clipped already.
    pub gradient: Expr<'a>,
    /// What is remembered, in the order of [`Rule::slots`].
    pub slots: &'s [Expr<'a>],
    /// In the order of [`Rule::scalars`].
    pub scalars: &'s [Expr<'a>],
}

impl<'a> Operands<'a, '_> {
    /// The first `N` slots.
    pub fn slots<const N: usize>(&self) -> [Expr<'a>; N] {
        std::array::from_fn(|i| self.slots[i])
    }

    /// The first `N` scalars.
    pub fn scalars<const N: usize>(&self) -> [Expr<'a>; N] {
        std::array::from_fn(|i| self.scalars[i])
    }
}

/// A rule by its name.
#[derive(Clone, Copy, Debug)]
pub struct RuleEntry {
    /// The name in recipes.
    pub name: &'static str,
    read: fn(Value) -> Result<Box<dyn Rule>, String>,
    /// A configuration with all defaults.
    resolve: fn(Value) -> Result<Value, String>,
}

/// All rules.
pub const RULES: &[RuleEntry] = &[
    RuleEntry::of::<AdamW>("adamw"),
    RuleEntry::of::<Adam>("adam"),
    RuleEntry::of::<Sgd>("sgd"),
    RuleEntry::of::<Lion>("lion"),
    RuleEntry::of::<Adafactor>("adafactor"),
    RuleEntry::of::<Came>("came"),
    RuleEntry::of::<Muon>("muon"),
    RuleEntry::of::<Prodigy>("prodigy"),
    RuleEntry::of::<AdamWScheduleFree>("adamwschedulefree"),
    RuleEntry::of::<AdamW8bit>("adamw8bit"),
];

impl RuleEntry {
    const fn of<R: Rule + Serialize + DeserializeOwned + 'static>(name: &'static str) -> Self {
        Self {
            name,
            read: |config| Ok(Box::new(read::<R>(config)?)),
            resolve: |config| serde_json::to_value(read::<R>(config)?).map_err(|e| e.to_string()),
        }
    }

    fn found(name: &str) -> Result<&'static Self> {
        let known = || RULES.iter().map(|r| r.name).collect::<Vec<_>>().join(" or ");
        let found = RULES.iter().find(|r| r.name == name);
        found.ok_or_else(|| Error::argument("optimizer", known(), name))
    }

    /// The rule of that name with a configuration, an object whose keys are the rule's fields: what it leaves out has its
    /// default.
    ///
    /// # Errors
    /// When there is no such rule, a key is unknown, or a value is outside its range.
    pub fn rule(name: &str, config: Value) -> Result<Box<dyn Rule>> {
        (Self::found(name)?.read)(config).map_err(|what| unfit(name, what))
    }

    /// Such a configuration with all defaults.
    ///
    /// # Errors
    /// As above.
    pub fn resolved(name: &str, config: Value) -> Result<Map<String, Value>> {
        match (Self::found(name)?.resolve)(config).map_err(|what| unfit(name, what))? {
            Value::Object(map) => Ok(map),
            other => Err(unfit(name, other.to_string())),
        }
    }

    /// Whether a rule finds one step size for all parameters, from sums over them.
    pub(super) fn shares_step_size(name: &str) -> bool {
        Self::rule(name, Value::Object(Map::new())).is_ok_and(|rule| Optimizer::boxed(rule).needs_all())
    }

    /// The keys of its configuration, with their defaults.
    pub fn keys(&self) -> Vec<(String, Value)> {
        match (self.resolve)(Value::Object(Map::new())) {
            Ok(Value::Object(map)) => map.into_iter().collect(),
            _ => Vec::new(),
        }
    }
}

fn read<R: Rule + DeserializeOwned>(config: Value) -> Result<R, String> {
    let rule: R = serde_json::from_value(config).map_err(|e| e.to_string())?;
    rule.check().map_err(|e| e.to_string())?;
    Ok(rule)
}

fn unfit(name: &str, what: String) -> Error {
    Error::Argument { op: "optimizer", expected: format!("a configuration of {name}"), got: what }
}
