//! CAME (Luo et al. 2023, "Confidence-guided Adaptive Memory Efficient Optimization", Algorithm 2): Adafactor's factored second
//! moments, and a factored measure of how far updates stray from their mean.

use serde::{Deserialize, Serialize};

use super::whole::{clipped, factored_dims, lerp, rows_and_columns};
use super::{Direction, Rule, Slot, Whole};
use crate::ops::pointwise::pointwise;
use crate::{Error, Result, Tensor};

/// CAME and what stays the same during a run.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Came {
    /// Decay rates of the updates' mean, of the second moments and of the confidence.
    pub betas: (f64, f64, f64),
    /// Added to the squares of gradients, and to those of deviations.
    pub eps: (f64, f64),
    /// The greatest root mean square of an update.
    pub clip_threshold: f64,
}

impl Default for Came {
    fn default() -> Self {
        Self { betas: (0.9, 0.999, 0.9999), eps: (1e-30, 1e-16), clip_threshold: 1.0 }
    }
}

/// The reciprocal root of what rows and columns stand for.
fn rsqrt(row: &Tensor, column: &Tensor) -> Result<Tensor> {
    let mean = row.mean(&[row.rank() - 2], true)?;
    pointwise([row, column, &mean], |[r, c, mean]| (r / mean).rsqrt() * c.rsqrt())
}

impl Rule for Came {
    fn name(&self) -> &'static str {
        "CAME"
    }

    fn whole_slots(&self, dims: &[usize]) -> Vec<Slot> {
        let mean = Slot::wide("exp_avg", dims.to_vec());
        match factored_dims(dims) {
            Some([row, column]) => vec![
                mean,
                Slot::wide("exp_avg_sq_row", row.clone()),
                Slot::wide("exp_avg_sq_col", column.clone()),
                Slot::wide("exp_avg_res_row", row),
                Slot::wide("exp_avg_res_col", column),
            ],
            None => vec![mean, Slot::wide("exp_avg_sq", dims.to_vec())],
        }
    }

    fn direction(&self, x: &Whole<'_>) -> Result<Direction> {
        let ((beta1, beta2, beta3), (eps1, eps2)) = (self.betas, self.eps);
        let squares = x.gradient.square()?.add_scalar(eps1)?;
        let (scale, moments) = match x.slots {
            [_, row, column, _, _] => {
                let [rows, columns] = rows_and_columns(&squares)?;
                let moments = vec![lerp(row, &rows, 1.0 - beta2)?, lerp(column, &columns, 1.0 - beta2)?];
                (rsqrt(&moments[0], &moments[1])?, moments)
            }
            _ => {
                let moment = lerp(&x.slots[1], &squares, 1.0 - beta2)?;
                (moment.rsqrt()?, vec![moment])
            }
        };
        let update = clipped(&x.gradient.mul(&scale)?, self.clip_threshold)?;
        let mean = lerp(&x.slots[0], &update, 1.0 - beta1)?;
        let mut slots = [vec![mean.clone()], moments].concat();
        let mut direction = mean;
        if let [_, _, _, row, column] = x.slots {
            let strayed = update.sub(&direction)?.square()?.add_scalar(eps2)?;
            let [rows, columns] = rows_and_columns(&strayed)?;
            let (row, column) = (lerp(row, &rows, 1.0 - beta3)?, lerp(column, &columns, 1.0 - beta3)?);
            direction = direction.mul(&rsqrt(&row, &column)?)?;
            slots.extend([row, column]);
        }
        Ok(Direction { direction: direction.mul_scalar(x.rates.lr)?, slots })
    }

    fn check(&self) -> Result<()> {
        let Self { betas: (b1, b2, b3), eps: (eps1, eps2), clip_threshold } = *self;
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let betas = [b1, b2, b3].iter().all(|beta| (0.0..1.0).contains(beta));
        if betas && [eps1, eps2, clip_threshold].into_iter().all(positive) {
            return Ok(());
        }
        Err(Error::argument("CAME", "betas, three numbers in [0, 1); eps and clip_threshold above 0", self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::Rates;
    use crate::optim::optimizer::tests::follows_whole;

    /// The authors' implementation, line by line, on rows of numbers.
    #[test]
    fn a_step_is_the_formula_and_goes_on_after_loading() -> Result<()> {
        let rule = Came { betas: (0.8, 0.9, 0.95), eps: (1e-12, 1e-8), clip_threshold: 0.9 };
        let ((b1, b2, b3), (eps1, eps2)) = (rule.betas, rule.eps);
        for (rows, columns) in [(4, 3), (1, 7)] {
            let matrix = rows > 1;
            let dims: &[usize] = if matrix { &[4, 3] } else { &[7] };
            let n = rows * columns;
            let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
            let [mut squares, mut strayed] = [(); 2].map(|()| (vec![0.0; rows], vec![0.0; columns]));
            // Takes the means of rows and columns in, and gives the reciprocal roots of what they stand for.
            let factor = |(r, c): &mut (Vec<f64>, Vec<f64>), beta: f64, of: &[f64]| -> Vec<f64> {
                for (i, r) in r.iter_mut().enumerate() {
                    let mean = (0..columns).map(|j| of[i * columns + j]).sum::<f64>() / columns as f64;
                    *r = beta * *r + (1.0 - beta) * mean;
                }
                for (j, c) in c.iter_mut().enumerate() {
                    *c = beta * *c + (1.0 - beta) * (0..rows).map(|i| of[i * columns + j]).sum::<f64>() / rows as f64;
                }
                let mean = r.iter().sum::<f64>() / rows as f64;
                (0..n).map(|k| (mean / r[k / columns]).sqrt() / c[k % columns].sqrt()).collect()
            };
            follows_whole(&rule, dims, |_, p, g, Rates { lr, weight_decay }| {
                let square: Vec<f64> = g.iter().map(|g| g * g + eps1).collect();
                let scale = if matrix {
                    factor(&mut squares, b2, &square)
                } else {
                    v.iter_mut().zip(&square).for_each(|(v, s)| *v = b2 * *v + (1.0 - b2) * s);
                    v.iter().map(|v| 1.0 / v.sqrt()).collect()
                };
                let mut u: Vec<f64> = g.iter().zip(scale).map(|(g, s)| g * s).collect();
                let rms = (u.iter().map(|u| u * u).sum::<f64>() / n as f64).sqrt();
                u.iter_mut().for_each(|u| *u /= (rms / rule.clip_threshold).max(1.0));
                m.iter_mut().zip(&u).for_each(|(m, u)| *m = b1 * *m + (1.0 - b1) * u);
                let confidence = if matrix {
                    let res: Vec<f64> = u.iter().zip(&m).map(|(u, m)| (u - m).powi(2) + eps2).collect();
                    factor(&mut strayed, b3, &res)
                } else {
                    vec![1.0; n]
                };
                let all = p.iter().zip(&m).zip(confidence);
                all.map(|((p, m), s)| p * (1.0 - lr * weight_decay) - lr * m * s).collect()
            })?;
        }
        assert!(Came { betas: (0.9, 1.0, 0.9), ..rule }.check().is_err());
        Ok(())
    }
}
