//! Prodigy (Mishchenko and Defazio 2024, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner"), as the authors'
//! `prodigyopt.Prodigy` has it: Adam whose step size `d` grows with what the parameters have come from their start.

use serde::{Deserialize, Serialize};

use super::{AdamW, At, Operands, Rule};
use crate::expr::Expr;
use crate::optim::Rates;
use crate::{Error, Result};

/// Prodigy and what stays the same during a run. The learning rate is a factor of what it finds: 1 unless a schedule lowers it. All
/// parameters share one `d`, so a group's `lr_mult` is 1, or 0 for parameters that stay.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Prodigy {
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// That of `d`'s sums; the root of the second one of `betas` if none is given.
    pub beta3: Option<f64>,
    /// Added to the root of the second moment, times `d`.
    pub eps: f64,
    /// Whether weight decay is AdamW's; else it is added to the gradient.
    pub decouple: bool,
    /// Whether Adam's correction of the moments' start is applied.
    pub use_bias_correction: bool,
    /// Whether the learning rate is left out of the denominator of `d`, so that a warm-up does not make it too large.
    pub safeguard_warmup: bool,
    /// The first `d`.
    pub d0: f64,
    /// A factor of what is found: 0.5 or 2 where steps are too long or too short.
    pub d_coef: f64,
    /// The most that `d` grows by in a step; no limit if none is given.
    pub growth_rate: Option<f64>,
}

impl Default for Prodigy {
    fn default() -> Self {
        Self {
            betas: (0.9, 0.999),
            beta3: None,
            eps: 1e-8,
            decouple: true,
            use_bias_correction: false,
            safeguard_warmup: false,
            d0: 1e-6,
            d_coef: 1.0,
            growth_rate: None,
        }
    }
}

impl Prodigy {
    fn beta3(&self) -> f64 {
        self.beta3.unwrap_or(self.betas.1.sqrt())
    }

    /// `d`, the learning rate and the correction together, in the step after `k` others.
    fn step_size(&self, d: f64, lr: f64, k: f64) -> f64 {
        let (beta1, beta2) = self.betas;
        let correction = (1.0 - beta2.powf(k + 1.0)).sqrt() / (1.0 - beta1.powf(k + 1.0));
        d * lr * if self.use_bias_correction { correction } else { 1.0 }
    }
}

/// An element's gradient with coupled decay, where it began, and its part of the denominator.
fn parts<'a>(x: &Operands<'a, '_>) -> [Expr<'a>; 3] {
    let ([p0, s, ..], [first, coupled, beta3, gain, ..]) = (x.slots::<4>(), x.scalars::<12>());
    let gradient = x.gradient + coupled * x.parameter;
    // All slots are zero at first, and the first step begins where the parameter is.
    let start = p0 + first * (x.parameter - p0);
    [gradient, start, s * beta3 + gradient * gain]
}

impl Rule for Prodigy {
    fn name(&self) -> &'static str {
        "Prodigy"
    }

    fn slots(&self) -> &'static [&'static str] {
        &["p0", "s", "exp_avg", "exp_avg_sq"]
    }

    fn shared(&self) -> Vec<(&'static str, f64)> {
        vec![("d", self.d0), ("d_max", self.d0), ("d_numerator", 0.0), ("k", 0.0)]
    }

    fn summed<'a>(&self, x: &Operands<'a, '_>) -> Vec<Expr<'a>> {
        let [gradient, start, s] = parts(x);
        let [.., weight] = x.scalars::<5>();
        vec![gradient * (start - x.parameter) * weight, s.abs()]
    }

    fn advance(&self, before: &[f64], _: Rates, sums: &[f64]) -> Vec<f64> {
        let (&[d, d_max, numerator, k], &[grown, denominator]) = (before, sums) else { return before.to_vec() };
        let numerator = numerator * self.beta3() + grown;
        if denominator == 0.0 {
            // No gradient so far: the authors' step ends here.
            return before.to_vec();
        }
        let found = self.d_coef * numerator / denominator;
        let raised = if d == self.d0 { d.max(found) } else { d };
        let d_max = d_max.max(found);
        vec![d_max.min(raised * self.growth_rate.unwrap_or(f64::INFINITY)), d_max, numerator, k + 1.0]
    }

    fn scalars(&self, at: &At<'_>) -> Vec<f64> {
        let ((beta1, beta2), Rates { lr, weight_decay }) = (self.betas, at.rates);
        let [d, k] = [0, 3].map(|i| at.before.get(i).copied().unwrap_or(self.d0));
        let new_d = at.shared.first().copied().unwrap_or(d);
        let step_size = self.step_size(d, lr, k);
        let first = f64::from(at.step == 1);
        let (coupled, decoupled) = if self.decouple { (0.0, weight_decay) } else { (weight_decay, 0.0) };
        let weight = d / self.d0 * step_size;
        let gain = if self.safeguard_warmup && lr > 0.0 { d / self.d0 * d } else { weight };
        let [rest1, rest2] = [d * (1.0 - beta1), d * d * (1.0 - beta2)];
        let kept = 1.0 - decoupled * step_size;
        vec![first, coupled, self.beta3(), gain, weight, beta1, rest1, beta2, rest2, step_size, new_d * self.eps, kept]
    }

    fn update<'a>(&self, x: &Operands<'a, '_>) -> Vec<Expr<'a>> {
        let [_, _, m, v] = x.slots();
        let [_, _, _, _, _, beta1, rest1, beta2, rest2, step_size, eps, kept] = x.scalars();
        let [g, start, s] = parts(x);
        let m = m * beta1 + g * rest1;
        let v = v * beta2 + g * g * rest2;
        vec![x.parameter * kept - step_size * (m / (v.sqrt() + eps)), start, s, m, v]
    }

    fn check(&self) -> Result<()> {
        AdamW { betas: self.betas, eps: self.eps }.check()?;
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let limits = self.beta3.is_none_or(|b| (0.0..1.0).contains(&b)) && self.growth_rate.is_none_or(|g| g >= 1.0);
        if limits && positive(self.d0) && positive(self.d_coef) {
            return Ok(());
        }
        let expected = "d0 and d_coef above 0, beta3 in [0, 1), growth_rate of at least 1";
        Err(Error::argument("Prodigy", expected, self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Init, ParamBuilder};
    use crate::optim::{Optimizer, ParamGroup};
    use crate::safetensors::SafeTensors;
    use crate::{DType, Device, Gradients, Philox, Tensor};

    /// The authors' implementation, line by line, of two parameters together.
    struct Reference {
        d: f64,
        d_max: f64,
        numerator: f64,
        k: i32,
        p: [Vec<f64>; 2],
        p0: [Vec<f64>; 2],
        s: [Vec<f64>; 2],
        m: [Vec<f64>; 2],
        v: [Vec<f64>; 2],
    }

    impl Reference {
        fn step(&mut self, rule: &Prodigy, g: &[Vec<f64>; 2], lr: f64, decay: f64) {
            let ((b1, b2), beta3) = (rule.betas, rule.beta3.unwrap_or(rule.betas.1.sqrt()));
            let correction = if rule.use_bias_correction {
                (1.0 - b2.powi(self.k + 1)).sqrt() / (1.0 - b1.powi(self.k + 1))
            } else {
                1.0
            };
            let (d, dlr) = (self.d, self.d * lr * correction);
            self.numerator *= beta3;
            let mut denominator = 0.0;
            let mut gradients = g.clone();
            for (t, gradients) in gradients.iter_mut().enumerate() {
                for (i, g) in gradients.iter_mut().enumerate() {
                    if !rule.decouple {
                        *g += decay * self.p[t][i];
                    }
                    self.numerator += d / rule.d0 * dlr * *g * (self.p0[t][i] - self.p[t][i]);
                    self.m[t][i] = b1 * self.m[t][i] + d * (1.0 - b1) * *g;
                    self.v[t][i] = b2 * self.v[t][i] + d * d * (1.0 - b2) * *g * *g;
                    let gain = if rule.safeguard_warmup { d / rule.d0 * d } else { d / rule.d0 * dlr };
                    self.s[t][i] = beta3 * self.s[t][i] + gain * *g;
                    denominator += self.s[t][i].abs();
                }
            }
            let d_hat = rule.d_coef * self.numerator / denominator;
            let raised = if d == rule.d0 { d.max(d_hat) } else { d };
            self.d_max = self.d_max.max(d_hat);
            self.d = rule.growth_rate.map_or(self.d_max, |rate| self.d_max.min(raised * rate));
            for t in 0..2 {
                for i in 0..self.p[t].len() {
                    if rule.decouple {
                        self.p[t][i] -= decay * dlr * self.p[t][i];
                    }
                    self.p[t][i] -= dlr * self.m[t][i] / (self.v[t][i].sqrt() + self.d * rule.eps);
                }
            }
            self.k += 1;
        }
    }

    #[test]
    fn steps_are_the_authors_over_all_parameters_and_go_on_after_loading() -> Result<()> {
        let plain = Prodigy::default();
        for rule in [
            plain,
            Prodigy { d0: 1e-3, d_coef: 0.5, growth_rate: Some(1.5), ..plain },
            Prodigy { decouple: false, use_bias_correction: true, beta3: Some(0.9), ..plain },
            Prodigy { safeguard_warmup: true, betas: (0.8, 0.95), d0: 1e-2, ..plain },
        ] {
            let (cpu, folder) = (Device::cpu(), tempfile::tempdir().unwrap());
            let path = folder.path().join("state.safetensors");
            let builder = ParamBuilder::new(4, DType::F64, &cpu);
            let params =
                [("a", [5, 3]), ("b", [2, 4])].map(|(name, dims)| builder.get(name, &dims, Init::Normal { std: 1.0 }));
            let (params, all) = (params.into_iter().collect::<Result<Vec<_>>>()?, builder.params());
            let values = || [0, 1].map(|i: usize| params[i].value().unwrap().to_vec::<f64>().unwrap());
            let zeros = || values().map(|v| vec![0.0; v.len()]);
            let mut reference = Reference {
                d: rule.d0,
                d_max: rule.d0,
                numerator: 0.0,
                k: 0,
                p: values(),
                p0: values(),
                s: zeros(),
                m: zeros(),
                v: zeros(),
            };
            let mut optimizer = Optimizer::new(rule);
            let mut random = Philox::new(2);
            for t in 1..=8 {
                let rates = Rates { lr: 1.0 / f64::from(t).sqrt(), weight_decay: 0.1 };
                let mut gradients = Gradients::default();
                // A bowl with some noise, so that there is a way to go.
                let both = [0, 1].map(|i: usize| {
                    let noise = random.normal(params[i].dims(), &cpu).unwrap().to_dtype(DType::F64).unwrap();
                    let value = params[i].value().unwrap().detach();
                    value.mul_scalar(0.8).unwrap().add(&noise.mul_scalar(0.1).unwrap()).unwrap()
                });
                for (param, gradient) in params.iter().zip(&both) {
                    gradients.insert(param.var().unwrap(), gradient.clone());
                }
                let clip = 0.5;
                let clipped = both.each_ref().map(|g| g.to_vec::<f64>().unwrap().iter().map(|g| g * clip).collect());
                reference.step(&rule, &clipped, rates.lr, rates.weight_decay);
                let coefficient = Tensor::from_slice(&[clip], &[], &cpu)?;
                optimizer.step(&all, &gradients, rates, Some(&coefficient))?;
                for (got, expected) in values().iter().flatten().zip(reference.p.iter().flatten()) {
                    assert!((got - expected).abs() < 1e-12, "{rule:?}, step {t}: {got} instead of {expected}");
                }
                optimizer.save(&all, &path)?;
                optimizer = Optimizer::new(rule);
                optimizer.load(&all, &SafeTensors::open(&path)?.into())?;
            }
            assert!(reference.d > rule.d0, "{rule:?} found no way");
        }
        assert!(
            Prodigy { d0: 0.0, ..plain }.check().is_err()
                && Prodigy { growth_rate: Some(0.5), ..plain }.check().is_err()
        );
        Ok(())
    }

    #[test]
    fn a_group_of_rate_0_stays_and_counts_for_nothing() -> Result<()> {
        let cpu = Device::cpu();
        let run = |names: &[&str]| -> Result<Vec<f64>> {
            let builder = ParamBuilder::new(4, DType::F64, &cpu);
            let group = ParamGroup { pattern: "still".into(), lr_mult: 0.0, wd_mult: 1.0 };
            let mut optimizer =
                Optimizer::new(Prodigy { safeguard_warmup: true, ..Prodigy::default() }).with_groups(vec![group]);
            let params = names.iter().map(|n| builder.get(n, &[3], Init::Ones)).collect::<Result<Vec<_>>>()?;
            for _ in 0..3 {
                let mut gradients = Gradients::default();
                for p in &params {
                    gradients.insert(p.var().unwrap(), p.value()?.detach());
                }
                optimizer.step(&builder.params(), &gradients, Rates { lr: 1.0, weight_decay: 0.1 }, None)?;
            }
            params.iter().map(|p| Ok(p.value()?.to_vec::<f64>()?[0])).collect()
        };
        let (alone, both) = (run(&["moves"])?, run(&["moves", "still"])?);
        assert!(alone[0] < 1.0 && both[0] == alone[0] && both[1] == 1.0, "{alone:?} {both:?}");
        Ok(())
    }
}
