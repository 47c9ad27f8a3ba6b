//! Stochastic gradient descent with momentum, as PyTorch has it: weight decay is added to the gradient, and the learning rate
//! stands outside the momentum (Sutskever et al. 2013 put it inside).

use serde::{Deserialize, Serialize};

use super::{At, Operands, Rule};
use crate::expr::Expr;
use crate::optim::Rates;
use crate::{Error, Result};

/// SGD and what stays the same during a run.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sgd {
    /// The share of the momentum that a step keeps; 0 for none, and then nothing is remembered.
    pub momentum: f64,
    /// The share of the gradient that does not enter the momentum, from the second step on.
    pub dampening: f64,
    /// Whether the gradient is looked up where the momentum leads (Nesterov). It needs momentum, and no dampening.
    pub nesterov: bool,
}

impl Rule for Sgd {
    fn name(&self) -> &'static str {
        "SGD"
    }

    fn slots(&self) -> &'static [&'static str] {
        if self.momentum == 0.0 { &[] } else { &["momentum_buffer"] }
    }

    /// Learning rate, weight decay, momentum, and what the buffer and the gradient count in the new buffer: the first
    /// gradient is the first buffer.
    fn scalars(&self, at: &At<'_>) -> Vec<f64> {
        let Rates { lr, weight_decay } = at.rates;
        let (kept, taken) = if at.step == 1 { (0.0, 1.0) } else { (self.momentum, 1.0 - self.dampening) };
        vec![lr, weight_decay, self.momentum, kept, taken]
    }

    fn update<'a>(&self, x: &Operands<'a, '_>) -> Vec<Expr<'a>> {
        let [lr, weight_decay, momentum, kept, taken] = x.scalars();
        let p = x.parameter;
        let g = x.gradient + weight_decay * p;
        let Some(&buffer) = x.slots.first() else { return vec![p - lr * g] };
        let buffer = kept * buffer + taken * g;
        let direction = if self.nesterov { g + momentum * buffer } else { buffer };
        vec![p - lr * direction, buffer]
    }

    fn check(&self) -> Result<()> {
        if !(self.momentum >= 0.0 && self.momentum.is_finite() && self.dampening.is_finite()) {
            let got = (self.momentum, self.dampening);
            return Err(Error::argument("SGD", "a momentum of at least 0 and a finite dampening", got));
        }
        if self.nesterov && (self.momentum == 0.0 || self.dampening != 0.0) {
            return Err(Error::argument("SGD", "a momentum above 0 and no dampening for nesterov", self));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::optimizer::tests::follows;

    /// PyTorch's documentation of `torch.optim.SGD`, line by line.
    #[test]
    fn a_step_is_the_formula_and_goes_on_after_loading() -> Result<()> {
        for (momentum, dampening, nesterov) in
            [(0.0, 0.0, false), (0.9, 0.0, false), (0.9, 0.3, false), (0.9, 0.0, true), (0.0, 0.5, false)]
        {
            let mut buffer = [0f64; 7];
            follows(&Sgd { momentum, dampening, nesterov }, |t, i, p, g, Rates { lr, weight_decay }| {
                let mut g = g + weight_decay * p;
                if momentum != 0.0 {
                    buffer[i] = if t > 1 { momentum * buffer[i] + (1.0 - dampening) * g } else { g };
                    g = if nesterov { g + momentum * buffer[i] } else { buffer[i] };
                }
                p - lr * g
            })?;
        }
        assert!(Sgd { nesterov: true, ..Sgd::default() }.check().is_err());
        Ok(())
    }
}
