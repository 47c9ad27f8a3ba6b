//! Averages of the weights over the steps, with which models sample better than with the weights of the last step (EMA).

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Ranks;
use crate::expr::Function;
use crate::nn::{Param, Params};
use crate::ops::pointwise::run_pointwise_each;
use crate::safetensors::{Shards, save_sharded};
use crate::{DType, Error, Result, Tensor, VarId};

/// How fast an average forgets: one of the two.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct EmaConfig {
    /// The share that every step keeps, in `[0, 1)`, such as 0.9999. The average starts at the first weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay: Option<f64>,
    /// The width of a power-function profile relative to the time trained, in (0, 0.28], such as 0.1: the longer a run, the
    /// longer the average (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", 3.1).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigma_rel: Option<f64>,
}

/// An average's share that a step keeps, as a function of the step.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Decay {
    Constant(f64),
    /// `(1 - 1 / t)^(gamma + 1)`.
    Power {
        gamma: f64,
    },
}

impl EmaConfig {
    fn decay(&self) -> Result<Decay> {
        match (self.decay, self.sigma_rel) {
            (Some(decay), None) if (0.0..1.0).contains(&decay) => Ok(Decay::Constant(decay)),
            (None, Some(width)) if width > 0.0 && width <= 0.28 => Ok(Decay::Power { gamma: gamma(width) }),
            _ => {
                let expected = "either decay, a number in [0, 1), or sigma_rel, one above 0 and at most 0.28";
                let named = |name: &str, value: Option<f64>| value.map(|value| format!("{name} {value}"));
                let got: Vec<String> =
                    [named("decay", self.decay), named("sigma_rel", self.sigma_rel)].into_iter().flatten().collect();
                let got = if got.is_empty() { "neither".into() } else { got.join(" and ") };
                Err(Error::Argument { op: "ema", expected: expected.into(), got })
            }
        }
    }

    /// Checks it.
    ///
    /// # Errors
    /// When there is not exactly one of the two, or it is outside its range.
    pub fn check(&self) -> Result<()> {
        self.decay().map(|_| ())
    }
}

/// The exponent of a power-function profile of this relative width: `sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))`, which
/// falls with gamma.
fn gamma(sigma: f64) -> f64 {
    let width = |gamma: f64| (gamma + 1.0) / ((gamma + 2.0).powi(2) * (gamma + 3.0));
    let (mut low, mut high) = (0.0, 1.0);
    while width(high) > sigma * sigma {
        high *= 2.0;
    }
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        if width(middle) > sigma * sigma { low = middle } else { high = middle }
    }
    low
}

impl Decay {
    /// At a step, from 1.
    fn at(self, step: u64) -> f64 {
        match self {
            Self::Constant(decay) => decay,
            Self::Power { gamma } => (1.0 - 1.0 / step.max(1) as f64).powf(gamma + 1.0),
        }
    }
}

/// An average of a model's trained parameters, in f32 (f64 for those in f64): of the wider copies where there are such. Where ranks share
/// out the blocks of a model ([`Units`](crate::nn::Units)), each has the averages of what it keeps.
#[derive(Debug)]
pub struct Ema {
    decay: Decay,
    /// The new average from the old one, the parameter and the share that it takes.
    update: Function,
    averages: HashMap<VarId, Tensor>,
}

impl Ema {
    /// At the parameters as they are.
    ///
    /// # Errors
    /// When the configuration does not fit or memory runs out.
    pub fn new(config: &EmaConfig, params: &Params) -> Result<Self> {
        let decay = config.decay()?;
        let update = Function::of(2, 1, |inputs, scalars| {
            let [average, value] = [inputs[0], inputs[1]];
            vec![average + (value - average) * scalars[0]]
        });
        let here = trained(params).filter(|(_, param)| param.is_here());
        let averages = here.map(|(var, param)| Ok((var, copy(&param.kept()?)?))).collect::<Result<_>>()?;
        Ok(Self { decay, update, averages })
    }

    /// Takes in the parameters after a step, from 1.
    ///
    /// # Errors
    /// When a parameter is not resident or the device fails.
    pub fn update(&mut self, params: &Params, step: u64) -> Result<()> {
        let values = trained(params).map(|(var, param)| Ok((var, param.kept()?))).collect::<Result<Vec<_>>>()?;
        let both = values.iter().filter_map(|(var, value)| Some((self.averages.get(var)?, value)));
        let operands: Vec<_> = both.map(|(average, value)| (vec![average, value], vec![average])).collect();
        run_pointwise_each(&self.update, &operands, &[1.0 - self.decay.at(step)])
    }

    /// The same where ranks share out the parameters: each has all averages, but for blocks that ranks share out.
    ///
    /// # Errors
    /// When a rank or the device fails.
    pub fn update_on_ranks(&mut self, ranks: &Ranks, params: &Params, step: u64) -> Result<()> {
        if !ranks.is_sharded() {
            return self.update(params, step);
        }
        let share = 1.0 - self.decay.at(step);
        ranks.each_kept(params, |param, value| match param.var().and_then(|var| self.averages.get(&var)) {
            Some(average) => run_pointwise_each(&self.update, &[(vec![average, &value], vec![average])], &[share]),
            None => Ok(()),
        })
    }

    /// Runs `work` with the averages in the parameters' places; the parameters are the same bits afterwards. Where ranks share out the
    /// blocks of a model, all of them call it together.
    ///
    /// # Errors
    /// Those of `work`, and of the device.
    pub fn instead<R, E: From<Error>>(&self, params: &Params, work: impl FnOnce() -> Result<R, E>) -> Result<R, E> {
        let mut own = Vec::new();
        let forget = || params.units().map_or(Ok(()), |units| units.forget());
        forget()?;
        for (var, param) in trained(params) {
            let Some(average) = self.averages.get(&var) else { continue };
            let kept = param.kept()?;
            let saved = Tensor::empty(kept.dims(), kept.dtype(), kept.device())?;
            saved.copy_from(&kept)?;
            own.push((param, saved));
            param.copy_from(average)?;
        }
        let done = work();
        own.iter().try_for_each(|(param, saved)| param.copy_from(saved))?;
        forget()?;
        done
    }

    /// Writes the averages as [`Params::save`] writes the parameters: [`Ema::tensors`].
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn save(&self, params: &Params, folder: &Path, stem: &str, max_bytes: u64) -> Result<()> {
        save_sharded(folder, stem, &self.tensors(params)?, &Params::text(), max_bytes)
    }

    /// The averages by the parameters' names, with those that are not trained: a whole model, or what this rank keeps of it.
    ///
    /// # Errors
    /// When a parameter is not there.
    pub fn tensors(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        let value = |param: &Param| match param.var().and_then(|var| self.averages.get(&var)) {
            Some(average) => Ok(average.clone()),
            None => param.kept(),
        };
        params.iter().filter(|p| p.is_here()).map(|p| Ok((p.path().to_owned(), value(p)?))).collect()
    }

    /// Reads what [`Ema::save`] wrote for the same parameters.
    ///
    /// # Errors
    /// When names or shapes differ (one error lists them all; nothing is changed then), or the file can't be read.
    pub fn load(&mut self, params: &Params, file: &Shards) -> Result<()> {
        params.check_keys(file, |_| false)?;
        for (var, param) in trained(params) {
            if let Some(average) = self.averages.get(&var) {
                average.copy_from(&file.get(param.path(), param.device(), Some(average.dtype()))?)?;
            }
        }
        Ok(())
    }
}

fn trained(params: &Params) -> impl Iterator<Item = (VarId, &Param)> {
    params.iter().filter_map(|param| Some((param.var()?, param)))
}

fn copy(value: &Tensor) -> Result<Tensor> {
    let dtype = if value.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let copy = Tensor::empty(value.dims(), dtype, value.device())?;
    copy.copy_from(value)?;
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Init, ParamBuilder, Placement};
    use crate::{Device, Philox};

    #[test]
    fn a_relative_width_is_that_of_its_profile() -> Result<()> {
        // The exponents that the paper gives.
        assert!((gamma(0.05) - 16.97).abs() < 5e-3 && (gamma(0.10) - 6.94).abs() < 5e-3);
        // And by its definition: the standard deviation of the profile t^gamma on [0, 1].
        for sigma in [0.02, 0.1, 0.28] {
            let (gamma, n) = (gamma(sigma), 200_000);
            let moment = |k: i32| {
                let at = |i: i32| (f64::from(i) + 0.5) / f64::from(n);
                (0..n).map(|i| at(i).powf(gamma) * at(i).powi(k)).sum::<f64>()
            };
            let mean = moment(1) / moment(0);
            assert!(((moment(2) / moment(0) - mean * mean).sqrt() - sigma).abs() < 1e-6, "{sigma}");
        }
        for (decay, sigma_rel) in
            [(None, None), (Some(0.9), Some(0.1)), (Some(1.0), None), (None, Some(0.0)), (None, Some(0.3))]
        {
            assert!(EmaConfig { decay, sigma_rel }.check().is_err(), "{decay:?} {sigma_rel:?}");
        }
        Ok(())
    }

    #[test]
    fn averages_are_the_sums_that_their_profiles_say_and_go_on_from_a_file() -> Result<()> {
        let (cpu, folder) = (Device::cpu(), tempfile::tempdir().unwrap());
        let configs =
            [EmaConfig { decay: Some(0.75), sigma_rel: None }, EmaConfig { decay: None, sigma_rel: Some(0.2) }];
        for config in configs {
            let builder = ParamBuilder::new(3, DType::F64, &cpu);
            let (w, params) = (builder.get("w", &[5], Init::Normal { std: 1.0 })?, builder.params());
            let mut ema = Ema::new(&config, &params)?;
            let mut all = vec![w.kept()?.to_vec::<f64>()?];
            let mut random = Philox::new(1);
            for step in 1..=6u64 {
                w.copy_from(&random.normal(&[5], &cpu)?)?;
                all.push(w.kept()?.to_vec::<f64>()?);
                ema.update(&params, step)?;
                // Weights of all values so far, in closed form.
                let shares: Vec<f64> = match ema.decay {
                    Decay::Constant(d) => {
                        let later = |i: u64| (1.0 - d) * d.powi((step - i) as i32);
                        (0..=step).map(|i| if i == 0 { d.powi(step as i32) } else { later(i) }).collect()
                    }
                    Decay::Power { gamma } => {
                        let part = |i: u64| (i as f64 / step as f64).powf(gamma + 1.0);
                        (0..=step).map(|i| if i == 0 { 0.0 } else { part(i) - part(i - 1) }).collect()
                    }
                };
                let average = ema.instead(&params, || w.kept()?.to_vec::<f64>())?;
                for (i, got) in average.iter().enumerate() {
                    let expected: f64 = all.iter().zip(&shares).map(|(values, share)| values[i] * share).sum();
                    assert!((got - expected).abs() < 1e-12, "{config:?}, step {step}: {got} instead of {expected}");
                }
                assert_eq!(w.kept()?.to_vec::<f64>()?, all[step as usize]);
                ema.save(&params, folder.path(), "m", u64::MAX)?;
                ema = Ema::new(&config, &params)?;
                ema.load(&params, &Shards::open(folder.path(), "m")?)?;
            }
        }
        Ok(())
    }

    #[test]
    fn narrow_weights_have_a_wide_average_and_come_back_bit_by_bit() -> Result<()> {
        let cpu = Device::cpu();
        for placement in [Placement::trained(DType::BF16), Placement::trained(DType::BF16).with_master(DType::F32)] {
            let builder = ParamBuilder::with_plan(3, placement, &cpu);
            let (w, params) = (builder.get("w", &[64], Init::Normal { std: 1.0 })?, builder.params());
            let mut ema = Ema::new(&EmaConfig { decay: Some(0.999), sigma_rel: None }, &params)?;
            let first = w.kept()?.to_vec::<f64>()?;
            w.copy_from(&w.kept()?.mul_scalar(2.0)?)?;
            ema.update(&params, 1)?;
            let before = (w.value()?.to_bytes()?, w.kept()?.to_bytes()?);
            // bf16 has no number so close to 1.
            let average = ema.averages[&w.var().unwrap()].to_vec::<f64>()?;
            assert!(average.iter().zip(&first).all(|(a, f)| (a / f - 1.001).abs() < 1e-6 || *f == 0.0));
            let failed: Result<()> = ema.instead(&params, || {
                assert!(w.value()?.to_bytes()? != before.0);
                Err(Error::argument("a test", "nothing", 0))
            });
            assert!(failed.is_err());
            assert_eq!((w.value()?.to_bytes()?, w.kept()?.to_bytes()?), before);
        }
        Ok(())
    }
}
