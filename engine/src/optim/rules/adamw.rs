//! AdamW: Adam with decoupled weight decay (Loshchilov and Hutter), in the order of operations of PyTorch.

use serde::{Deserialize, Serialize};

use super::{At, Operands, Rule};
use crate::expr::Expr;
use crate::optim::Rates;
use crate::{Error, Result};

/// AdamW and what stays the same during a run.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW {
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8 }
    }
}

impl Rule for AdamW {
    fn name(&self) -> &'static str {
        "AdamW"
    }

    fn slots(&self) -> &'static [&'static str] {
        &["exp_avg", "exp_avg_sq"]
    }

    /// Decay, beta2, step size, root of the second correction, epsilon, and what the betas leave.
    fn scalars(&self, at: &At<'_>) -> Vec<f64> {
        let Rates { lr, weight_decay } = at.rates;
        let (Self { betas: (beta1, beta2), eps }, t) = (*self, at.step as f64);
        let (step_size, root2) = (lr / (1.0 - beta1.powf(t)), (1.0 - beta2.powf(t)).sqrt());
        vec![1.0 - lr * weight_decay, beta2, step_size, root2, eps, 1.0 - beta1, 1.0 - beta2]
    }

    fn update<'a>(&self, x: &Operands<'a, '_>) -> Vec<Expr<'a>> {
        let ([m, v], [decay, beta2, step_size, root2, eps, rest1, rest2]) = (x.slots(), x.scalars());
        let (p, g) = (x.parameter, x.gradient);
        let m = m + (g - m) * rest1;
        let v = v * beta2 + g * g * rest2;
        vec![p * decay - step_size * (m / (v.sqrt() / root2 + eps)), m, v]
    }

    fn check(&self) -> Result<()> {
        let (b1, b2) = self.betas;
        if !(0.0..1.0).contains(&b1) || !(0.0..1.0).contains(&b2) {
            return Err(Error::argument("AdamW", "betas, two numbers in [0, 1)", self.betas));
        }
        if !(self.eps > 0.0 && self.eps.is_finite()) {
            return Err(Error::argument("AdamW", "eps, a positive number", self.eps));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::optimizer::tests::{follows, one, trained};
    use crate::{DType, Device, Gradients};

    #[test]
    fn a_step_is_the_formula_and_goes_on_after_loading() -> Result<()> {
        let rule = AdamW::default();
        let ((b1, b2), eps) = (rule.betas, rule.eps);
        let (mut m, mut v) = ([0f64; 7], [0f64; 7]);
        follows(&rule, |t, i, p, g, Rates { lr, weight_decay }| {
            m[i] = b1 * m[i] + (1.0 - b1) * g;
            v[i] = b2 * v[i] + (1.0 - b2) * g * g;
            let (m_hat, v_hat) = (m[i] / (1.0 - b1.powi(t)), v[i] / (1.0 - b2.powi(t)));
            p - lr * weight_decay * p - lr * m_hat / (v_hat.sqrt() + eps)
        })
    }

    #[test]
    fn the_kernel_is_the_program_in_every_dtype_and_length() -> Result<()> {
        use crate::nn::{Init, ParamBuilder};
        for n in [1, 7, 255, 256, 257, 20_000] {
            // The same gradient and start in f64, where the program runs.
            for (dtype, masters, close) in [
                (DType::F32, DType::F32, 1e-6),
                (DType::BF16, DType::F32, 1e-6),
                (DType::F16, DType::F32, 1e-6),
                (DType::BF16, DType::BF16, 2e-2),
            ] {
                let (params, gradients) = one(n, dtype, masters)?;
                let wide = ParamBuilder::new(n as u64, DType::F64, &Device::cpu());
                let w = wide.get("w", &[n], Init::Zeros)?;
                w.copy_from(&params.get("w").unwrap().kept()?)?;
                let mut wide_gradients = Gradients::default();
                let gradient = gradients.iter().next().unwrap().1.to_dtype(DType::F64)?;
                wide_gradients.insert(w.var().unwrap(), gradient);
                let expected = trained(AdamW::default(), &wide.params(), &wide_gradients)?;
                for (a, b) in trained(AdamW::default(), &params, &gradients)?.iter().zip(&expected) {
                    assert!((a - b).abs() <= close * (1.0 + b.abs()), "{n} of {dtype}, {masters}: {a} instead of {b}");
                }
                let (weight, kept) = (params.get("w").unwrap(), params.get("w").unwrap().kept()?);
                assert_eq!(weight.value()?.to_vec::<f32>()?, kept.to_dtype(dtype)?.to_vec::<f32>()?);
            }
        }
        Ok(())
    }
}
