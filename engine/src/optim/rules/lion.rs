//! Lion, the evolved sign momentum of Chen et al. (2023, "Symbolic Discovery of Optimization Algorithms", Algorithm 2), with
//! decoupled weight decay.

use serde::{Deserialize, Serialize};

use super::{At, Operands, Rule};
use crate::expr::Expr;
use crate::optim::Rates;
use crate::{Error, Result};

/// Lion and what stays the same during a run. Every element moves by the learning rate, which is therefore three to ten times
/// smaller than AdamW's, and the weight decay as much larger.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lion {
    /// The share of the momentum in a step's direction, and the one that a step keeps.
    pub betas: (f64, f64),
}

impl Default for Lion {
    fn default() -> Self {
        Self { betas: (0.9, 0.99) }
    }
}

impl Rule for Lion {
    fn name(&self) -> &'static str {
        "Lion"
    }

    fn slots(&self) -> &'static [&'static str] {
        &["exp_avg"]
    }

    /// Decay, learning rate, and both betas with what they leave.
    fn scalars(&self, at: &At<'_>) -> Vec<f64> {
        let Rates { lr, weight_decay } = at.rates;
        let (beta1, beta2) = self.betas;
        vec![1.0 - lr * weight_decay, lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2]
    }

    fn update<'a>(&self, x: &Operands<'a, '_>) -> Vec<Expr<'a>> {
        let ([m], [decay, lr, beta1, rest1, beta2, rest2]) = (x.slots(), x.scalars());
        let (p, g) = (x.parameter, x.gradient);
        let direction = m * beta1 + g * rest1;
        // The sign, which is 0 of 0 and NaN of NaN.
        let rise = (-direction).select_lt(0.0, 1.0, direction);
        vec![p * decay - lr * direction.select_lt(0.0, -1.0, rise), m * beta2 + g * rest2]
    }

    fn check(&self) -> Result<()> {
        let (b1, b2) = self.betas;
        if !(0.0..1.0).contains(&b1) || !(0.0..1.0).contains(&b2) {
            return Err(Error::argument("Lion", "betas, two numbers in [0, 1)", self.betas));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::optimizer::tests::{follows, one, trained};
    use crate::{DType, Device, Gradients, Tensor};

    /// The paper's Algorithm 2, line by line.
    #[test]
    fn a_step_is_the_formula_and_goes_on_after_loading() -> Result<()> {
        for betas in [(0.9, 0.99), (0.95, 0.98), (0.0, 0.5)] {
            let (mut m, (b1, b2)) = ([0f64; 7], betas);
            follows(&Lion { betas }, |_, i, p, g, Rates { lr, weight_decay }| {
                let c = b1 * m[i] + (1.0 - b1) * g;
                m[i] = b2 * m[i] + (1.0 - b2) * g;
                p - lr * (c.signum() + weight_decay * p)
            })?;
        }
        assert!(Lion { betas: (0.9, 1.0) }.check().is_err());
        Ok(())
    }

    #[test]
    fn an_element_without_momentum_and_gradient_only_decays() -> Result<()> {
        for dtype in [DType::F64, DType::F32] {
            let (params, _) = one(5, dtype, dtype)?;
            let w = params.get("w").unwrap();
            let before = w.kept()?.to_vec::<f64>()?;
            let mut none = Gradients::default();
            none.insert(w.var().unwrap(), Tensor::zeros(&[5], dtype, &Device::cpu())?);
            // Three steps at a learning rate of 1e-2 and a weight decay of 0.1.
            for (a, b) in trained(Lion::default(), &params, &none)?.iter().zip(&before) {
                let expected = b * 0.999f64.powi(3);
                assert!((a - expected).abs() < 1e-6, "{dtype}: {a} instead of {expected}");
            }
        }
        Ok(())
    }
}
