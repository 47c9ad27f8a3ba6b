//! Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal by Newton and Schulz's iteration, as `torch.optim.Muon`
//! has it. What is no matrix gets AdamW's update; tensors of more than two axes are matrices of their first axis by the rest.

use serde::{Deserialize, Serialize};

use super::whole::{adamw, lerp};
use super::{AdamW, Direction, Rule, Slot, Whole};
use crate::ops::pointwise::pointwise;
use crate::{Error, Result, Tensor};

/// How a matrix's learning rate follows from its sizes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdjustLr {
    /// `sqrt(max(1, rows / columns))`, as its authors have it.
    #[default]
    Original,
    /// `0.2 sqrt(max(rows, columns))`, so that steps are as long as AdamW's and its learning rate serves (Liu et al. 2025).
    MatchRmsAdamw,
}

/// Muon and what stays the same during a run.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Muon {
    /// The share of the momentum that a step keeps.
    pub momentum: f64,
    /// Whether the gradient is looked up where the momentum leads.
    pub nesterov: bool,
    /// Of the iteration's polynomial `a x + b x^3 + c x^5`.
    pub ns_coefficients: (f64, f64, f64),
    /// Iterations.
    pub ns_steps: u32,
    /// How a matrix's learning rate follows from its sizes.
    pub adjust_lr_fn: AdjustLr,
    /// The least norm that a matrix is divided by.
    pub eps: f64,
    /// AdamW's decay rates, for what is no matrix.
    pub adamw_betas: (f64, f64),
    /// AdamW's epsilon, for what is no matrix.
    pub adamw_eps: f64,
}

impl Default for Muon {
    fn default() -> Self {
        Self {
            momentum: 0.95,
            nesterov: true,
            ns_coefficients: (3.4445, -4.7750, 2.0315),
            ns_steps: 5,
            adjust_lr_fn: AdjustLr::Original,
            eps: 1e-7,
            adamw_betas: (0.9, 0.999),
            adamw_eps: 1e-8,
        }
    }
}

impl Muon {
    /// A matrix near `U Vᵀ` for one of `U S Vᵀ`: all singular values go to about 1.
    fn orthogonal(&self, matrix: &Tensor) -> Result<Tensor> {
        let (a, b, c) = self.ns_coefficients;
        let tall = matrix.dims()[0] > matrix.dims()[1];
        let mut x = if tall { matrix.t()?.contiguous()? } else { matrix.clone() };
        let (norm, eps) = (x.square()?.sum_all()?.sqrt()?, self.eps);
        x = pointwise([&x, &norm], |[x, norm]| x / norm.maximum(eps))?;
        for _ in 0..self.ns_steps {
            let gram = x.matmul(&x.t()?)?;
            let quintic = gram.mul_scalar(b)?.add(&gram.matmul(&gram)?.mul_scalar(c)?)?;
            x = x.mul_scalar(a)?.add(&quintic.matmul(&x)?)?;
        }
        if tall { x.t()?.contiguous() } else { Ok(x) }
    }

    fn ratio(&self, rows: usize, columns: usize) -> f64 {
        match self.adjust_lr_fn {
            AdjustLr::Original => (rows as f64 / columns as f64).max(1.0).sqrt(),
            AdjustLr::MatchRmsAdamw => 0.2 * (rows.max(columns) as f64).sqrt(),
        }
    }
}

/// Rows and columns of what is taken for a matrix.
fn matrix(dims: &[usize]) -> Option<(usize, usize)> {
    let [rows, rest @ ..] = dims else { return None };
    (!rest.is_empty()).then(|| (*rows, rest.iter().product()))
}

impl Rule for Muon {
    fn name(&self) -> &'static str {
        "Muon"
    }

    fn whole_slots(&self, dims: &[usize]) -> Vec<Slot> {
        match matrix(dims) {
            Some(_) => vec![Slot::wide("momentum_buffer", dims.to_vec())],
            None => vec![Slot::wide("exp_avg", dims.to_vec()), Slot::wide("exp_avg_sq", dims.to_vec())],
        }
    }

    fn direction(&self, x: &Whole<'_>) -> Result<Direction> {
        let dims = x.gradient.dims();
        let Some((rows, columns)) = matrix(dims) else { return adamw(x, self.adamw_betas, self.adamw_eps) };
        let momentum = lerp(&x.slots[0], x.gradient, 1.0 - self.momentum)?;
        let update = if self.nesterov { lerp(x.gradient, &momentum, self.momentum)? } else { momentum.clone() };
        let direction = self.orthogonal(&update.reshape(&[rows, columns])?)?.reshape(dims)?;
        let direction = direction.mul_scalar(x.rates.lr * self.ratio(rows, columns))?;
        Ok(Direction { direction, slots: vec![momentum] })
    }

    fn check(&self) -> Result<()> {
        AdamW { betas: self.adamw_betas, eps: self.adamw_eps }.check()?;
        let (a, b, c) = self.ns_coefficients;
        let finite = [a, b, c].iter().all(|x| x.is_finite());
        if (0.0..1.0).contains(&self.momentum) && finite && (1..=100).contains(&self.ns_steps) && self.eps > 0.0 {
            return Ok(());
        }
        Err(Error::argument(
            "Muon",
            "momentum in [0, 1), finite ns_coefficients, ns_steps from 1 to 100, eps above 0",
            self,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::Rates;
    use crate::optim::optimizer::tests::follows_whole;
    use crate::{DType, Device, Philox};

    /// PyTorch's documentation of `torch.optim.Muon`, line by line, on rows of numbers.
    #[test]
    fn a_step_is_the_formula_and_goes_on_after_loading() -> Result<()> {
        for (dims, nesterov, adjust_lr_fn) in [
            (&[3, 5][..], true, AdjustLr::Original),
            (&[5, 3], false, AdjustLr::Original),
            (&[4, 2, 3], true, AdjustLr::MatchRmsAdamw),
        ] {
            let rule = Muon { nesterov, adjust_lr_fn, ..Muon::default() };
            let (rows, columns) = matrix(dims).unwrap();
            let mut buffer = vec![0.0; rows * columns];
            follows_whole(&rule, dims, |_, p, g, Rates { lr, weight_decay }| {
                let mu = rule.momentum;
                buffer.iter_mut().zip(g).for_each(|(b, g)| *b = mu * *b + (1.0 - mu) * g);
                let update = |(g, b): (&f64, &f64)| if nesterov { (1.0 - mu) * g + mu * b } else { *b };
                let mut x: Vec<f64> = g.iter().zip(&buffer).map(update).collect();
                let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt().max(rule.eps);
                x.iter_mut().for_each(|x| *x /= norm);
                // a x + (b (x xᵀ) + c (x xᵀ)²) x, whatever the shape: the polynomial acts on singular values alone.
                let product = |a: &[f64], b: &[f64], (n, k, m): (usize, usize, usize)| -> Vec<f64> {
                    (0..n * m).map(|i| (0..k).map(|j| a[i / m * k + j] * b[j * m + i % m]).sum()).collect()
                };
                let (a, b, c) = rule.ns_coefficients;
                for _ in 0..rule.ns_steps {
                    let transposed: Vec<f64> = (0..columns * rows).map(|i| x[i % rows * columns + i / rows]).collect();
                    let gram = product(&x, &transposed, (rows, columns, rows));
                    let square = product(&gram, &gram, (rows, rows, rows));
                    let inner: Vec<f64> = gram.iter().zip(square).map(|(g, s)| b * g + c * s).collect();
                    let added = product(&inner, &x, (rows, rows, columns));
                    x.iter_mut().zip(added).for_each(|(x, added)| *x = a * *x + added);
                }
                let ratio = match adjust_lr_fn {
                    AdjustLr::Original => (rows as f64 / columns as f64).max(1.0).sqrt(),
                    AdjustLr::MatchRmsAdamw => 0.2 * (rows.max(columns) as f64).sqrt(),
                };
                p.iter().zip(&x).map(|(p, x)| p * (1.0 - lr * weight_decay) - lr * ratio * x).collect()
            })?;
        }
        assert!(Muon { ns_steps: 0, ..Muon::default() }.check().is_err());
        Ok(())
    }

    #[test]
    fn what_is_no_matrix_is_updated_as_by_adamw() -> Result<()> {
        let rule = Muon::default();
        let ((b1, b2), eps) = (rule.adamw_betas, rule.adamw_eps);
        let (mut m, mut v) = ([0f64; 7], [0f64; 7]);
        follows_whole(&rule, &[7], |t, p, g, Rates { lr, weight_decay }| {
            let step = |i: usize| {
                m[i] = b1 * m[i] + (1.0 - b1) * g[i];
                v[i] = b2 * v[i] + (1.0 - b2) * g[i] * g[i];
                let (m_hat, v_hat) = (m[i] / (1.0 - b1.powi(t)), v[i] / (1.0 - b2.powi(t)));
                p[i] - lr * weight_decay * p[i] - lr * m_hat / (v_hat.sqrt() + eps)
            };
            (0..7).map(step).collect()
        })
    }

    #[test]
    fn singular_values_come_close_to_one() -> Result<()> {
        let cpu = Device::cpu();
        for dims in [[4, 20], [20, 4]] {
            let x = Muon::default().orthogonal(&Philox::new(3).normal(&dims, &cpu)?.to_dtype(DType::F64)?)?;
            let gram = if dims[0] < dims[1] { x.matmul(&x.t()?)? } else { x.t()?.matmul(&x)? };
            // The coefficients trade precision for speed: singular values end between about 0.7 and 1.2.
            let gram = gram.to_vec::<f64>()?;
            let trace: f64 = (0..4).map(|i| gram[5 * i]).sum();
            assert!((2.0..6.0).contains(&trace), "{trace}");
            let off = (0..16).filter(|i| i % 5 != 0).map(|i| gram[i].abs()).fold(0.0, f64::max);
            assert!(off < 0.5, "{gram:?}");
        }
        Ok(())
    }
}
