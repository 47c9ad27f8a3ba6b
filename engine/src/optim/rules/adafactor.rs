//! Adafactor (Shazeer and Stern 2018), as PyTorch has it: of a matrix's second moments it keeps means of rows and columns.

use serde::{Deserialize, Serialize};

use super::whole::{clipped, factored_dims, lerp, rms, rows_and_columns};
use super::{Direction, Rule, Slot, Whole};
use crate::ops::pointwise::pointwise;
use crate::{Error, Result};

/// Adafactor and what stays the same during a run. The learning rate is relative to a parameter's root mean square, and at most
/// `1 / sqrt(step)`.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Adafactor {
    /// The second moments' decay is `1 - step^beta2_decay`.
    pub beta2_decay: f64,
    /// The least root of a second moment, and the least root mean square of a parameter.
    pub eps: (f64, f64),
    /// The greatest root mean square of a direction.
    pub d: f64,
}

impl Default for Adafactor {
    fn default() -> Self {
        // The first eps is f32's smallest step at 1, PyTorch's default for f32.
        Self { beta2_decay: -0.8, eps: (1.192_092_895_507_812_5e-7, 1e-3), d: 1.0 }
    }
}

impl Rule for Adafactor {
    fn name(&self) -> &'static str {
        "Adafactor"
    }

    fn whole_slots(&self, dims: &[usize]) -> Vec<Slot> {
        match factored_dims(dims) {
            Some([row, column]) => vec![Slot::wide("row_var", row), Slot::wide("col_var", column)],
            None => vec![Slot::wide("variance", dims.to_vec())],
        }
    }

    fn direction(&self, x: &Whole<'_>) -> Result<Direction> {
        let (eps1, eps2) = self.eps;
        let t = x.step as f64;
        let share = t.powf(self.beta2_decay);
        let squares = x.gradient.square()?;
        let (variance, slots) = match x.slots {
            [row, column] => {
                let [rows, columns] = rows_and_columns(&squares)?;
                let (row, column) = (lerp(row, &rows, share)?, lerp(column, &columns, share)?);
                let mean = row.mean(&[row.rank() - 2], true)?;
                let variance = pointwise([&row, &column, &mean], |[r, c, mean]| r * c / mean.maximum(eps1))?;
                (variance, vec![row, column])
            }
            _ => {
                let variance = lerp(&x.slots[0], &squares, share)?;
                (variance.clone(), vec![variance])
            }
        };
        let direction = pointwise([x.gradient, &variance], |[g, v]| g / v.maximum(eps1 * eps1).sqrt())?;
        let size = pointwise([&rms(x.parameter)?], |[size]| size.maximum(eps2))?;
        let rate = x.rates.lr.min(1.0 / t.sqrt());
        Ok(Direction { direction: clipped(&direction, self.d)?.mul(&size)?.mul_scalar(rate)?, slots })
    }

    fn check(&self) -> Result<()> {
        let Self { beta2_decay, eps: (eps1, eps2), d } = *self;
        let positive = |x: f64| x > 0.0 && x.is_finite();
        if beta2_decay <= 0.0
            && beta2_decay.is_finite()
            && positive(eps1)
            && eps2 >= 0.0
            && eps2.is_finite()
            && positive(d)
        {
            return Ok(());
        }
        Err(Error::argument("Adafactor", "beta2_decay of at most 0, eps of positive numbers, d above 0", self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::Rates;
    use crate::optim::optimizer::tests::follows_whole;

    /// PyTorch's documentation of `torch.optim.Adafactor`, line by line, on rows of numbers.
    #[test]
    fn a_step_is_the_formula_and_goes_on_after_loading() -> Result<()> {
        let rule = Adafactor { d: 0.7, ..Adafactor::default() };
        for (rows, columns) in [(3, 5), (1, 7)] {
            let matrix = rows > 1;
            let dims: &[usize] = if matrix { &[3, 5] } else { &[7] };
            let (mut r, mut c, mut v) = (vec![0.0; rows], vec![0.0; columns], vec![0.0; columns]);
            follows_whole(&rule, dims, |t, p, g, Rates { lr, weight_decay }| {
                let share = f64::from(t).powf(rule.beta2_decay);
                let (eps1, eps2) = rule.eps;
                let rms = |x: &[f64]| (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64).sqrt();
                let at = |i: usize, j: usize| g[i * columns + j];
                let variance: Vec<f64> = if matrix {
                    for (i, r) in r.iter_mut().enumerate() {
                        let mean = (0..columns).map(|j| at(i, j) * at(i, j)).sum::<f64>() / columns as f64;
                        *r = (1.0 - share) * *r + share * mean;
                    }
                    for (j, c) in c.iter_mut().enumerate() {
                        let mean = (0..rows).map(|i| at(i, j) * at(i, j)).sum::<f64>() / rows as f64;
                        *c = (1.0 - share) * *c + share * mean;
                    }
                    let mean = (r.iter().sum::<f64>() / rows as f64).max(eps1);
                    (0..rows * columns).map(|k| r[k / columns] * c[k % columns] / mean).collect()
                } else {
                    for (v, g) in v.iter_mut().zip(g) {
                        *v = (1.0 - share) * *v + share * g * g;
                    }
                    v.clone()
                };
                let u: Vec<f64> = g.iter().zip(&variance).map(|(g, v)| g / v.max(eps1 * eps1).sqrt()).collect();
                let alpha = eps2.max(rms(p)) * lr.min(1.0 / f64::from(t).sqrt());
                let denominator = (rms(&u) / rule.d).max(1.0);
                p.iter().zip(u).map(|(p, u)| p * (1.0 - lr * weight_decay) - alpha * u / denominator).collect()
            })?;
        }
        assert!(
            Adafactor { d: 0.0, ..rule }.check().is_err() && Adafactor { beta2_decay: 0.1, ..rule }.check().is_err()
        );
        Ok(())
    }
}
