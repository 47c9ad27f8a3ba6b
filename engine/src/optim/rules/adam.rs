//! Adam (Kingma and Ba 2015), as PyTorch has it: weight decay is added to the gradient.

use serde::{Deserialize, Serialize};

use super::{AdamW, At, Operands, Rule};
use crate::Result;
use crate::expr::Expr;
use crate::optim::Rates;

/// Adam and what stays the same during a run.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Adam {
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
}

impl Default for Adam {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8 }
    }
}

impl Adam {
    /// The same moments with decay of the weights themselves.
    fn decoupled(&self) -> AdamW {
        AdamW { betas: self.betas, eps: self.eps }
    }
}

impl Rule for Adam {
    fn name(&self) -> &'static str {
        "Adam"
    }

    fn slots(&self) -> &'static [&'static str] {
        &["exp_avg", "exp_avg_sq"]
    }

    /// Weight decay, and those of AdamW without any.
    fn scalars(&self, at: &At<'_>) -> Vec<f64> {
        let Rates { lr, weight_decay } = at.rates;
        let mut scalars = vec![weight_decay];
        scalars.extend(self.decoupled().scalars(&At { rates: Rates { lr, weight_decay: 0.0 }, ..*at }));
        scalars
    }

    fn update<'a>(&self, x: &Operands<'a, '_>) -> Vec<Expr<'a>> {
        let gradient = x.gradient + x.scalars[0] * x.parameter;
        self.decoupled().update(&Operands { gradient, scalars: &x.scalars[1..], ..*x })
    }

    fn check(&self) -> Result<()> {
        self.decoupled().check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::optimizer::tests::follows;

    /// The paper's Algorithm 1 on the gradient with its decay, line by line.
    #[test]
    fn a_step_is_the_formula_and_goes_on_after_loading() -> Result<()> {
        let rule = Adam { betas: (0.8, 0.95), eps: 1e-6 };
        let ((b1, b2), eps) = (rule.betas, rule.eps);
        let (mut m, mut v) = ([0f64; 7], [0f64; 7]);
        follows(&rule, |t, i, p, g, Rates { lr, weight_decay }| {
            let g = g + weight_decay * p;
            m[i] = b1 * m[i] + (1.0 - b1) * g;
            v[i] = b2 * v[i] + (1.0 - b2) * g * g;
            let (m_hat, v_hat) = (m[i] / (1.0 - b1.powi(t)), v[i] / (1.0 - b2.powi(t)));
            p - lr * m_hat / (v_hat.sqrt() + eps)
        })?;
        assert!(Adam { betas: (0.9, 1.0), ..Adam::default() }.check().is_err());
        Ok(())
    }
}
