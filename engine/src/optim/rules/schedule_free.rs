//! Schedule-free AdamW (Defazio et al. 2024, "The Road Less Scheduled"), as the authors' `schedulefree.AdamWScheduleFree` has it. Of
//! three sequences the gradients are taken at `y`, the steps at `z`, and `x` is the average that serves: the model is judged, sampled
//! and saved at `x`.

use serde::{Deserialize, Serialize};

use super::{AdamW, At, Operands, Rule};
use crate::expr::Expr;
use crate::optim::Rates;
use crate::{Error, Result};

/// Schedule-free AdamW and what stays the same during a run. It wants a learning rate that is constant after a warm-up.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWScheduleFree {
    /// How far `y` lies from `z` towards `x`, above 0, and the decay rate of the second moment.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// The power of a step's number in its weight.
    pub r: f64,
    /// The power of the greatest learning rate so far in a step's weight.
    pub weight_lr_power: f64,
}

impl Default for AdamWScheduleFree {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8, r: 0.0, weight_lr_power: 2.0 }
    }
}

impl AdamWScheduleFree {
    fn weight(&self, k: f64, lr_max: f64) -> f64 {
        k.powf(self.r) * lr_max.powf(self.weight_lr_power)
    }
}

impl Rule for AdamWScheduleFree {
    fn name(&self) -> &'static str {
        "AdamWScheduleFree"
    }

    fn slots(&self) -> &'static [&'static str] {
        &["z", "exp_avg_sq"]
    }

    /// The greatest learning rate, the sum of the steps' weights, and the number of steps. A group's factor would cancel.
    fn shared(&self) -> Vec<(&'static str, f64)> {
        vec![("lr_max", 0.0), ("weight_sum", 0.0), ("k", 0.0)]
    }

    fn advance(&self, before: &[f64], rates: Rates, _: &[f64]) -> Vec<f64> {
        let &[lr_max, sum, k] = before else { return before.to_vec() };
        let (lr_max, k) = (lr_max.max(rates.lr), k + 1.0);
        vec![lr_max, sum + self.weight(k, lr_max), k]
    }

    /// Whether it is the first step, beta2 and what it leaves, the root of its correction, epsilon, weight decay, the share of `z` in
    /// the average, the learning rate, and what of it moves `y`.
    fn scalars(&self, at: &At<'_>) -> Vec<f64> {
        let ((beta1, beta2), Rates { lr, weight_decay }) = (self.betas, at.rates);
        let share = match *at.shared {
            [lr_max, sum, k] if sum > 0.0 => self.weight(k, lr_max) / sum,
            _ => 0.0,
        };
        let root2 = (1.0 - beta2.powf(at.step as f64)).sqrt();
        let first = f64::from(at.step == 1);
        vec![first, beta2, 1.0 - beta2, root2, self.eps, weight_decay, share, lr, lr * (beta1 * (1.0 - share) - 1.0)]
    }

    fn update<'a>(&self, x: &Operands<'a, '_>) -> Vec<Expr<'a>> {
        let ([z, v], y, g) = (x.slots(), x.parameter, x.gradient);
        let [first, beta2, rest2, root2, eps, weight_decay, share, lr, of_y] = x.scalars();
        // All slots are zero at first, and z begins at y.
        let z = z + first * (y - z);
        let v = v * beta2 + g * g * rest2;
        let step = g / (v.sqrt() / root2 + eps) + weight_decay * y;
        vec![y + share * (z - y) + of_y * step, z - lr * step, v]
    }

    fn evaluated<'a>(&self, x: &Operands<'a, '_>) -> Option<Expr<'a>> {
        let y = x.parameter;
        Some(y + (x.slots[0] - y) * (1.0 - 1.0 / self.betas.0))
    }

    fn check(&self) -> Result<()> {
        AdamW { betas: self.betas, eps: self.eps }.check()?;
        if self.betas.0 > 0.0 && self.r.is_finite() && self.weight_lr_power.is_finite() {
            return Ok(());
        }
        Err(Error::argument("AdamWScheduleFree", "the first of betas above 0, r and weight_lr_power finite", self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Init, ParamBuilder};
    use crate::optim::Optimizer;
    use crate::optim::optimizer::tests::follows;
    use crate::{DType, Device, Gradients, Philox};

    /// The authors' implementation, line by line.
    #[test]
    fn a_step_is_the_formula_and_goes_on_after_loading() -> Result<()> {
        let plain = AdamWScheduleFree::default();
        for rule in [plain, AdamWScheduleFree { betas: (0.8, 0.95), r: 1.5, weight_lr_power: 1.0, ..plain }] {
            let (mut z, mut v, (b1, b2)) = ([0f64; 7], [0f64; 7], rule.betas);
            let (mut lr_max, mut sums) = (0f64, [0f64; 8]);
            follows(&rule, |t, i, y, g, Rates { lr, weight_decay }| {
                lr_max = lr_max.max(lr);
                let weight = f64::from(t).powf(rule.r) * lr_max.powf(rule.weight_lr_power);
                sums[t as usize] = sums[t as usize - 1] + weight;
                let ckp1 = weight / sums[t as usize];
                if t == 1 {
                    z[i] = y;
                }
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                let normalized = g / ((v[i] / (1.0 - b2.powi(t))).sqrt() + rule.eps) + weight_decay * y;
                let lerped = y + ckp1 * (z[i] - y);
                z[i] -= lr * normalized;
                lerped + lr * (b1 * (1.0 - ckp1) - 1.0) * normalized
            })?;
        }
        assert!(AdamWScheduleFree { betas: (0.0, 0.9), ..plain }.check().is_err());
        Ok(())
    }

    /// The paper's definition: `x` is the average of all `z` by their weights, and `y` lies between the two.
    #[test]
    fn the_model_is_looked_at_where_the_average_is() -> Result<()> {
        let cpu = Device::cpu();
        let builder = ParamBuilder::new(4, DType::F64, &cpu);
        let (w, params) = (builder.get("w", &[3], Init::Normal { std: 1.0 })?, builder.params());
        let mut optimizer = Optimizer::new(AdamWScheduleFree::default());
        let (mut x, mut random) = (w.value()?.to_vec::<f64>()?, Philox::new(7));
        let read =
            |optimizer: &Optimizer| -> Result<Vec<f64>> { optimizer.evaluated(&params, || w.value()?.to_vec::<f64>()) };
        assert_eq!(read(&optimizer)?, x);
        for t in 1..=5 {
            let mut gradients = Gradients::default();
            gradients.insert(w.var().unwrap(), random.normal(&[3], &cpu)?.to_dtype(DType::F64)?);
            let y = optimizer.slot(&w, "z").map(|z| z.to_vec::<f64>()).transpose()?;
            optimizer.step(&params, &gradients, Rates { lr: 0.1, weight_decay: 0.0 }, None)?;
            let (before, z) = (w.value()?.to_bytes()?, optimizer.slot(&w, "z").unwrap().to_vec::<f64>()?);
            // The average takes in the new z, since steps weigh the same.
            x = x.iter().zip(&z).map(|(x, z)| x + (z - x) / f64::from(t)).collect();
            for (got, expected) in read(&optimizer)?.iter().zip(&x) {
                assert!((got - expected).abs() < 1e-12, "step {t}: {got} instead of {expected} after {y:?}");
            }
            assert_eq!(w.value()?.to_bytes()?, before);
        }
        Ok(())
    }
}
