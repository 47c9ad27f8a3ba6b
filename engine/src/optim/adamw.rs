//! AdamW: Adam with decoupled weight decay (Loshchilov and Hutter), in the order of operations of PyTorch.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::expr::{Expr, Function};
use crate::nn::Params;
use crate::ops::pointwise::run_pointwise;
use crate::safetensors::{SafeTensors, save};
use crate::{DType, Error, Gradients, Result, Tensor, VarId};

/// What stays the same during a run.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8 }
    }
}

#[derive(Debug)]
struct State {
    /// Updates of this parameter so far: one without a gradient is skipped.
    steps: u64,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

impl State {
    fn new(parameter: &Tensor) -> Result<Self> {
        let zeros = || Tensor::zeros(parameter.dims(), parameter.dtype(), parameter.device());
        Ok(Self { steps: 0, exp_avg: zeros()?, exp_avg_sq: zeros()? })
    }
}

/// The optimiser. The moments have the parameters' dtype.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    update: Function,
    /// The same with the coefficient of clipping as an input that gates it.
    gated: Function,
    state: HashMap<VarId, State>,
}

/// The new parameter and moments. The scalars: decay, beta2, step size, root of the second correction, epsilon, and
/// what the betas leave.
fn rule<'a>([p, g, m, v]: [Expr<'a>; 4], clip: Expr<'a>, scalars: [Expr<'a>; 7]) -> [Expr<'a>; 3] {
    let [decay, beta2, step_size, root2, eps, rest1, rest2] = scalars;
    let g = g * clip;
    let m = m + (g - m) * rest1;
    let v = v * beta2 + g * g * rest2;
    [p * decay - step_size * (m / (v.sqrt() / root2 + eps)), m, v]
}

fn finite(clip: f64) -> Result<f64> {
    if clip.is_finite() {
        return Ok(clip);
    }
    Err(Error::NonFinite { op: "AdamW", what: "the gradients' norm".into() })
}

impl AdamW {
    /// Without any update so far.
    pub fn new(config: AdamWConfig) -> Self {
        // One pass over each parameter; what varies from step to step is a scalar, or one value on the device.
        let update = Function::build_with_scalars(|inputs, [clip, a, b, c, d, e, f, g]| {
            rule(inputs, clip, [a, b, c, d, e, f, g])
        });
        let gated = Function::build_with_scalars(|[p, g, m, v, clip], rest| {
            let [p2, m2, v2] = rule([p, g, m, v], clip, rest);
            [(p, p2), (m, m2), (v, v2)].map(|(old, new)| clip.select_lt(f64::INFINITY, new, old))
        });
        Self { config, update, gated, state: HashMap::new() }
    }

    /// One update of all parameters that have a gradient. `clip` (one value, 1 if there is none) is what the gradients
    /// are multiplied with. Where it is NaN, nothing is updated; where that is known on the host, it is an error.
    ///
    /// # Errors
    /// When a gradient has another shape or dtype than its parameter.
    pub fn step(
        &mut self,
        params: &Params,
        gradients: &Gradients,
        lr: f64,
        weight_decay: f64,
        clip: Option<&Tensor>,
    ) -> Result<()> {
        // Where the host has it, it is a scalar.
        let (clip, scalar) = match clip {
            Some(clip) if clip.device().backend().is_host() => (None, finite(clip.item()?)?),
            clip => (clip, 1.0),
        };
        let AdamWConfig { betas: (beta1, beta2), eps } = self.config;
        for (name, p) in params.iter() {
            let (Some(var), Some(g)) = (p.var(), gradients.of(p)) else { continue };
            if (g.dims(), g.dtype()) != (p.dims(), p.dtype()) {
                return Err(Error::argument("AdamW", format!("a gradient like {name}, {p:?}"), g));
            }
            let state = match self.state.entry(var) {
                std::collections::hash_map::Entry::Occupied(e) => e.into_mut(),
                std::collections::hash_map::Entry::Vacant(e) => e.insert(State::new(p)?),
            };
            state.steps += 1;
            let t = state.steps as f64;
            let scalars = [
                scalar,
                1.0 - lr * weight_decay,
                beta2,
                lr / (1.0 - beta1.powf(t)),
                (1.0 - beta2.powf(t)).sqrt(),
                eps,
                1.0 - beta1,
                1.0 - beta2,
            ];
            let targets = [&p.detach(), &state.exp_avg, &state.exp_avg_sq];
            targets.iter().for_each(|t| t.storage().touch());
            let [p, m, v] = targets;
            match clip {
                Some(clip) => run_pointwise(&self.gated, &[p, g, m, v, clip], &scalars[1..], &targets)?,
                None => run_pointwise(&self.update, &[p, g, m, v], &scalars, &targets)?,
            }
        }
        Ok(())
    }

    /// Writes moments and step counts, named `exp_avg.<name>`, `exp_avg_sq.<name>`, `step.<name>`.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn save(&self, params: &Params, path: impl AsRef<Path>) -> Result<()> {
        let mut all = Vec::new();
        for (name, p) in params.iter() {
            let Some(state) = p.var().and_then(|v| self.state.get(&v)) else { continue };
            all.push((format!("exp_avg.{name}"), state.exp_avg.clone()));
            all.push((format!("exp_avg_sq.{name}"), state.exp_avg_sq.clone()));
            all.push((format!("step.{name}"), Tensor::from_slice(&[state.steps as f64], &[], p.device())?));
        }
        save(path, &all, &BTreeMap::new())
    }

    /// Reads what [`AdamW::save`] wrote for the same parameters.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape, or there is one of no parameter.
    pub fn load(&mut self, params: &Params, file: &SafeTensors) -> Result<()> {
        let mut state = HashMap::new();
        let mut mismatched = Vec::new();
        for (name, p) in params.iter() {
            let names = [format!("exp_avg.{name}"), format!("exp_avg_sq.{name}"), format!("step.{name}")];
            let (Some(var), Some(_)) = (p.var(), file.dims(&names[0])) else { continue };
            let read = |name: &str, dtype| file.get(name, p.device(), Some(dtype));
            let (exp_avg, exp_avg_sq) = (read(&names[0], p.dtype())?, read(&names[1], p.dtype())?);
            if exp_avg.dims() != p.dims() || exp_avg_sq.dims() != p.dims() {
                mismatched.push(format!("{name} expected {:?}, got {:?}", p.dims(), exp_avg.dims()));
            }
            state.insert(var, State { steps: read(&names[2], DType::F64)?.item()? as u64, exp_avg, exp_avg_sq });
        }
        let known = |key: &String| key.split_once('.').is_some_and(|(_, name)| params.get(name).is_some());
        let unexpected: Vec<String> = file.names().into_iter().filter(|n| !known(n)).collect();
        if mismatched.len() + unexpected.len() > 0 {
            return Err(Error::Keys { path: file.path().into(), missing: Vec::new(), unexpected, mismatched });
        }
        self.state = state;
        Ok(())
    }

    /// The moments of a parameter, if it was updated: of the gradient and of its square.
    pub fn moments(&self, parameter: &Tensor) -> Option<(&Tensor, &Tensor)> {
        let state = self.state.get(&parameter.var()?)?;
        Some((&state.exp_avg, &state.exp_avg_sq))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Init, ParamBuilder};
    use crate::{Device, Philox};

    #[test]
    fn a_step_is_the_formula_and_goes_on_after_loading() -> Result<()> {
        let (cpu, folder) = (Device::cpu(), tempfile::tempdir().unwrap());
        let path = folder.path().join("state.safetensors");
        let make = || {
            let builder = ParamBuilder::new(4, DType::F64, &cpu);
            builder.get("w", &[7], Init::Normal { std: 1.0 }).map(|w| (w, builder.params()))
        };
        let (w, params) = make()?;
        let (lr, wd, clip, (b1, b2), eps) = (0.01, 0.1, 0.5, (0.9, 0.999), 1e-8);
        let mut optimiser = AdamW::new(AdamWConfig::default());
        let mut expected = w.to_vec::<f64>()?;
        let (mut m, mut v) = ([0f64; 7], [0f64; 7]);
        let mut random = Philox::new(2);
        for t in 1..=4 {
            let g = random.normal(&[7], &cpu)?.to_dtype(DType::F64)?;
            for (i, g) in g.to_vec::<f64>()?.into_iter().map(|g| g * clip).enumerate() {
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                let (m_hat, v_hat) = (m[i] / (1.0 - b1.powi(t)), v[i] / (1.0 - b2.powi(t)));
                expected[i] -= lr * wd * expected[i] + lr * m_hat / (v_hat.sqrt() + eps);
            }
            let mut gradients = Gradients::default();
            gradients.insert(w.var().unwrap(), g);
            let coefficient = Tensor::from_slice(&[clip], &[], &cpu)?;
            optimiser.step(&params, &gradients, lr, wd, Some(&coefficient))?;
            for (a, b) in w.to_vec::<f64>()?.iter().zip(&expected) {
                assert!((a - b).abs() < 1e-12, "step {t}: {a} instead of {b}");
            }
            // Another optimiser goes on from the file.
            optimiser.save(&params, &path)?;
            optimiser = AdamW::new(AdamWConfig::default());
            optimiser.load(&params, &SafeTensors::open(&path)?)?;
        }
        let other = ParamBuilder::new(4, DType::F64, &cpu);
        other.get("x", &[7], Init::Zeros)?;
        assert!(optimiser.load(&other.params(), &SafeTensors::open(&path)?).is_err());
        Ok(())
    }
}
