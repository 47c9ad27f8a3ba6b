//! Updates of parameters as pointwise functions: a rule's own, and what becomes of the new value in the parameter's dtype.

use super::rules::{Operands, Rule};
use crate::expr::{Expr, Function};
use crate::random::Philox;
use crate::{DType, Result, Tensor};

/// How a new value becomes one of a parameter that is kept in bf16 alone, without a wider copy. What the rule remembers of it is in
/// f32 then, but for [`Rounding::Nearest`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Rounding {
    /// To the nearest number: steps below half of the distance to the next one are lost.
    #[default]
    Nearest,
    /// Up or down by chance, so that the expected value is the value itself. The chances are a function of this generator, of the
    /// parameter's path and of the number of its update.
    Stochastic(Philox),
    /// To the nearest number, and what is lost is kept beside it, in bf16, for the next update (Kahan 1965).
    Kahan,
}

/// What Kahan's sum keeps beside a parameter, in files.
pub(super) const COMPENSATION: &str = "compensation";

/// What becomes of the new value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// It is the parameter.
    Plain,
    /// It is the wider copy, and the parameter is rounded from it.
    Master,
    /// It is rounded by chance.
    Stochastic,
    /// It is rounded, and what is lost is kept.
    Kahan,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Plain, Self::Master, Self::Stochastic, Self::Kahan];

    /// Of a parameter kept in this dtype.
    pub fn of(rounding: &Rounding, kept: DType, master: bool) -> Self {
        match rounding {
            _ if master => Self::Master,
            Rounding::Stochastic(_) if kept == DType::BF16 => Self::Stochastic,
            Rounding::Kahan if kept == DType::BF16 => Self::Kahan,
            _ => Self::Plain,
        }
    }

    /// The dtype of what is remembered of a parameter kept in `kept`.
    pub fn remembers(self, kept: DType) -> DType {
        match self {
            Self::Plain | Self::Master => kept,
            Self::Stochastic | Self::Kahan => DType::F32,
        }
    }
}

/// An update as a function. Its inputs are the parameter, its gradient, the slots, and what else its kind takes (chances, or what was
/// lost so far); its outputs are the parameter, the slots, and what else its kind gives (the rounded parameter, or what is lost). Its
/// first scalar is what the gradient is multiplied with.
#[derive(Debug)]
pub(super) struct Programs {
    pub update: Function,
    /// The same with the gradient's coefficient as the last input instead, which gates the update.
    pub gated: Function,
}

impl Programs {
    /// `scalars` is their number.
    pub fn new(rule: &dyn Rule, kind: Kind, scalars: usize) -> Self {
        let inputs = 2 + rule.slots().len() + usize::from(matches!(kind, Kind::Stochastic | Kind::Kahan));
        let update =
            Function::of(inputs, 1 + scalars, |inputs, scalars| updated(rule, kind, inputs, scalars[0], &scalars[1..]));
        let gated = Function::of(1 + inputs, scalars, |all, scalars| {
            let (inputs, clip) = (&all[..inputs], all[inputs]);
            let new = updated(rule, kind, inputs, clip, scalars);
            // What stood at an output's place: the parameter, then the others in their order, and a wider copy's parameter.
            let old = inputs[..1].iter().chain(&inputs[2..]).chain(&inputs[..1]);
            old.zip(new).map(|(old, new)| clip.select_lt(f64::INFINITY, new, *old)).collect()
        });
        Self { update, gated }
    }
}

fn updated<'a>(
    rule: &dyn Rule,
    kind: Kind,
    inputs: &[Expr<'a>],
    clip: Expr<'a>,
    scalars: &[Expr<'a>],
) -> Vec<Expr<'a>> {
    let slots = &inputs[2..2 + rule.slots().len()];
    let besides = inputs[inputs.len() - 1];
    let parameter = if kind == Kind::Kahan { inputs[0] + besides } else { inputs[0] };
    let mut new = rule.update(&Operands { parameter, gradient: inputs[1] * clip, slots, scalars });
    let value = new[0];
    match kind {
        Kind::Plain => {}
        Kind::Master => new.push(value),
        Kind::Stochastic => new[0] = value.round_bf16(besides),
        Kind::Kahan => {
            new[0] = value.round_bf16(0.5);
            new.push(value - new[0]);
        }
    }
    new
}

/// A rule's updates as functions, without and with a rounded parameter, for backends that have a kernel for them.
pub(crate) fn functions(rule: &dyn Rule) -> [Function; 2] {
    let scalars = super::rules::scalar_count(rule);
    [Kind::Plain, Kind::Master].map(|kind| Programs::new(rule, kind, scalars).update)
}

/// An update of one parameter.
#[derive(Debug)]
pub(super) struct Update {
    pub kind: Kind,
    pub scalars: Vec<f64>,
    pub gradient: Tensor,
    /// What is updated, its slots, and the parameter of a wider copy or what its roundings lost.
    pub outputs: Vec<Tensor>,
    /// The generator of its chances, where it is rounded by those.
    pub random: Option<Philox>,
    /// In place of the step's coefficient where the gradient is a direction, which holds that already: 1, or NaN to gate.
    pub gate: Option<Tensor>,
}

impl Update {
    /// Chances for each element, where it is rounded by those.
    pub fn chances(&self) -> Result<Option<Tensor>> {
        let kept = &self.outputs[0];
        self.random.clone().map(|mut random| random.uniform(kept.dims(), kept.device())).transpose()
    }

    /// Inputs (with the coefficient of clipping where there is one) and outputs.
    pub fn operands<'a>(
        &'a self,
        chances: Option<&'a Tensor>,
        clip: Option<&'a Tensor>,
    ) -> (Vec<&'a Tensor>, Vec<&'a Tensor>) {
        let kept = &self.outputs[..self.outputs.len() - usize::from(self.kind == Kind::Master)];
        let clip = clip.map(|clip| self.gate.as_ref().unwrap_or(clip));
        let inputs = kept[..1].iter().chain([&self.gradient]).chain(&kept[1..]).chain(chances).chain(clip);
        (inputs.collect(), self.outputs.iter().collect())
    }

    /// Whether both compute with the same numbers.
    pub fn is_like(&self, other: &Self) -> bool {
        self.scalars == other.scalars && self.kind == other.kind
    }
}
