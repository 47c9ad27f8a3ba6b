//! AdamW: Adam with decoupled weight decay (Loshchilov and Hutter), in the order of operations of PyTorch.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::backend::{AdamWScalars, AdamWUpdate, Ran, run_fused};
use crate::expr::{Expr, Function};
use crate::nn::Params;
use crate::ops::pointwise::{run_pointwise, run_pointwise_each};
use crate::safetensors::{SafeTensors, save};
use crate::{DType, Error, GradientSink, Gradients, Result, Tensor, VarId};

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
    fn new(kept: &Tensor) -> Result<Self> {
        let zeros = || Tensor::zeros(kept.dims(), kept.dtype(), kept.device());
        Ok(Self { steps: 0, exp_avg: zeros()?, exp_avg_sq: zeros()? })
    }
}

/// The optimiser. It updates the wider copies of the parameters where there are such ([`ParamBuilder::with_masters`]), and
/// rounds the parameters from them; the moments have the dtype of what is updated. Each parameter is one pass over memory.
///
/// [`ParamBuilder::with_masters`]: crate::nn::ParamBuilder::with_masters
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    /// Parameter and moments.
    plain: Rule,
    /// Also the rounded parameter.
    rounding: Rule,
    state: HashMap<VarId, State>,
}

/// The update as a function, for devices that have no kernel of their own.
#[derive(Debug)]
struct Rule {
    update: Function,
    /// The same with the coefficient of clipping as an input that gates it.
    gated: Function,
}

impl Rule {
    /// `outputs` chooses from the new parameter and moments.
    fn new<const N: usize>(outputs: impl for<'a> Fn([Expr<'a>; 3]) -> [Expr<'a>; N]) -> Self {
        // What varies from step to step is a scalar, or one value on the device.
        let update = Function::build_with_scalars(|inputs, [clip, a, b, c, d, e, f, g]| {
            outputs(rule(inputs, clip, [a, b, c, d, e, f, g]))
        });
        let gated = Function::build_with_scalars(|[p, g, m, v, clip], rest| {
            let [p2, m2, v2] = rule([p, g, m, v], clip, rest);
            outputs([(p, p2), (m, m2), (v, v2)].map(|(old, new)| clip.select_lt(f64::INFINITY, new, old)))
        });
        Self { update, gated }
    }
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

/// One parameter to update.
#[derive(Debug)]
struct Target<'a> {
    name: &'a str,
    tensor: &'a Tensor,
    master: Option<&'a Tensor>,
}

/// An update of one parameter.
#[derive(Debug)]
struct Update {
    scalars: AdamWScalars,
    gradient: Tensor,
    /// What is updated, its moments, and the rounded parameter where what is updated is a wider copy.
    outputs: Vec<Tensor>,
}

impl Update {
    /// Inputs (with the coefficient of clipping where there is one) and outputs.
    fn operands<'a>(&'a self, clip: Option<&'a Tensor>) -> (Vec<&'a Tensor>, Vec<&'a Tensor>) {
        let [p, m, v] = [0, 1, 2].map(|i| &self.outputs[i]);
        ([p, &self.gradient, m, v].into_iter().chain(clip).collect(), self.outputs.iter().collect())
    }

    fn scalars(&self) -> [f64; 8] {
        let AdamWScalars { clip, decay, beta2, step_size, root2, eps, rest1, rest2 } = self.scalars;
        [clip, decay, beta2, step_size, root2, eps, rest1, rest2]
    }

    fn is_like(&self, other: &Self) -> bool {
        self.scalars() == other.scalars() && self.outputs.len() == other.outputs.len()
    }
}

fn targets(params: &Params) -> impl Iterator<Item = Target<'_>> {
    params.iter().zip(params.masters()).map(|((name, tensor), master)| Target { name, tensor, master })
}

impl AdamW {
    /// Without any update so far.
    pub fn new(config: AdamWConfig) -> Self {
        let (plain, rounding) = (Rule::new(|all| all), Rule::new(|[p, m, v]| [p, m, v, p]));
        Self { config, plain, rounding, state: HashMap::new() }
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
        let updates: Vec<Update> = targets(params)
            .filter_map(|target| Some((gradients.of(target.tensor)?, target)))
            .filter_map(|(gradient, target)| self.prepare(&target, gradient, lr, weight_decay, scalar).transpose())
            .collect::<Result<_>>()?;
        if params.iter().next().is_some_and(|(_, p)| p.device().backend().is_host()) {
            return updates.iter().try_for_each(|update| self.run(update, clip));
        }
        // Launches cost more than small updates: those that compute with the same numbers go out together.
        let mut rest = &updates[..];
        while let Some(first) = rest.first() {
            let alike = rest.iter().take_while(|u| u.is_like(first)).count();
            self.run_together(&rest[..alike], clip)?;
            rest = &rest[alike..];
        }
        Ok(())
    }

    /// A sink that updates each parameter as soon as its gradient is final and lets the gradient go: never are all
    /// gradients in memory together. The bits are those of [`AdamW::step`] without clipping, whose norm would need all
    /// gradients first.
    pub fn stepping<'a>(&'a mut self, params: &'a Params, lr: f64, weight_decay: f64) -> Stepping<'a> {
        let targets: Vec<_> = targets(params).collect();
        let places = targets.iter().enumerate().filter_map(|(i, t)| Some((t.tensor.var()?, i))).collect();
        Stepping { optimizer: self, targets, places, lr, weight_decay }
    }

    /// What an update of a parameter takes; nothing where it is no variable.
    fn prepare(
        &mut self,
        target: &Target<'_>,
        g: &Tensor,
        lr: f64,
        weight_decay: f64,
        clip: f64,
    ) -> Result<Option<Update>> {
        let Target { name, tensor, master } = *target;
        let Some(var) = tensor.var() else { return Ok(None) };
        if (g.dims(), g.dtype()) != (tensor.dims(), tensor.dtype()) {
            return Err(Error::argument("AdamW", format!("a gradient like {name}, {tensor:?}"), g));
        }
        let kept = master.unwrap_or(tensor);
        let state = match self.state.entry(var) {
            Entry::Occupied(e) => e.into_mut(),
            Entry::Vacant(e) => e.insert(State::new(kept)?),
        };
        state.steps += 1;
        let t = state.steps as f64;
        let AdamWConfig { betas: (beta1, beta2), eps } = self.config;
        let scalars = AdamWScalars {
            clip,
            decay: 1.0 - lr * weight_decay,
            beta2,
            step_size: lr / (1.0 - beta1.powf(t)),
            root2: (1.0 - beta2.powf(t)).sqrt(),
            eps,
            rest1: 1.0 - beta1,
            rest2: 1.0 - beta2,
        };
        let outputs = [kept.detach(), state.exp_avg.clone(), state.exp_avg_sq.clone()];
        let outputs: Vec<Tensor> = outputs.into_iter().chain(master.map(|_| tensor.detach())).collect();
        outputs.iter().for_each(|t| t.storage().touch());
        Ok(Some(Update { scalars, gradient: g.clone(), outputs }))
    }

    fn rule(&self, update: &Update) -> &Rule {
        if update.outputs.len() > 3 { &self.rounding } else { &self.plain }
    }

    fn run(&self, update: &Update, clip: Option<&Tensor>) -> Result<()> {
        let (inputs, outputs) = update.operands(clip);
        let [parameter, exp_avg, exp_avg_sq] = [0, 1, 2].map(|i| outputs[i]);
        let (gradient, rounded, scalars) = (&update.gradient, outputs.get(3).copied(), update.scalars);
        let fused = AdamWUpdate { parameter, gradient, exp_avg, exp_avg_sq, rounded, scalars };
        if clip.is_none() && parameter.numel() > 0 && run_fused(fused)? == Ran::Done {
            return Ok(());
        }
        let (rule, scalars) = (self.rule(update), update.scalars());
        match clip {
            Some(_) => run_pointwise(&rule.gated, &inputs, &scalars[1..], &outputs),
            None => run_pointwise(&rule.update, &inputs, &scalars, &outputs),
        }
    }

    /// Updates that are alike: the same numbers, each parameter of its own shape.
    fn run_together(&self, updates: &[Update], clip: Option<&Tensor>) -> Result<()> {
        let Some(first) = updates.first() else { return Ok(()) };
        let groups: Vec<_> = updates.iter().map(|update| update.operands(clip)).collect();
        let (rule, scalars) = (self.rule(first), first.scalars());
        match clip {
            Some(_) => run_pointwise_each(&rule.gated, &groups, &scalars[1..]),
            None => run_pointwise_each(&rule.update, &groups, &scalars),
        }
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
        for ((name, p), (_, kept)) in params.iter().zip(params.kept()) {
            let names = [format!("exp_avg.{name}"), format!("exp_avg_sq.{name}"), format!("step.{name}")];
            let (Some(var), Some(_)) = (p.var(), file.dims(&names[0])) else { continue };
            let read = |name: &str, dtype| file.get(name, p.device(), Some(dtype));
            let (exp_avg, exp_avg_sq) = (read(&names[0], kept.dtype())?, read(&names[1], kept.dtype())?);
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

/// Updates parameters as their gradients become final: see [`AdamW::stepping`].
#[derive(Debug)]
pub struct Stepping<'a> {
    optimizer: &'a mut AdamW,
    targets: Vec<Target<'a>>,
    places: HashMap<VarId, usize>,
    lr: f64,
    weight_decay: f64,
}

impl Stepping<'_> {
    /// The number of a parameter in their order.
    pub fn place(&self, var: VarId) -> Option<usize> {
        self.places.get(&var).copied()
    }
}

impl GradientSink for Stepping<'_> {
    /// Gradients of what is no parameter are let go.
    fn gradient(&mut self, var: VarId, gradient: Tensor) -> Result<()> {
        let Some(target) = self.place(var).map(|i| &self.targets[i]) else { return Ok(()) };
        match self.optimizer.prepare(target, &gradient, self.lr, self.weight_decay, 1.0)? {
            Some(update) => self.optimizer.run(&update, None),
            None => Ok(()),
        }
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

    /// A parameter of `n` elements and a gradient, in the dtypes of weights, gradient and wider copy.
    fn one(n: usize, dtype: DType, masters: DType) -> Result<(Params, Gradients)> {
        let cpu = Device::cpu();
        let builder = ParamBuilder::new(n as u64, dtype, &cpu).with_masters(masters);
        let w = builder.get("w", &[n], Init::Normal { std: 1.0 })?;
        let mut gradients = Gradients::default();
        gradients.insert(w.var().unwrap(), Philox::new(n as u64).normal(&[n], &cpu)?.to_dtype(dtype)?);
        Ok((builder.params(), gradients))
    }

    /// What three steps make of the parameter that is kept, in f64.
    fn trained(params: &Params, gradients: &Gradients) -> Result<Vec<f64>> {
        let mut optimizer = AdamW::new(AdamWConfig::default());
        (0..3).try_for_each(|_| optimizer.step(params, gradients, 1e-2, 0.1, None))?;
        params.kept().next().unwrap().1.to_vec::<f64>()
    }

    #[test]
    fn the_kernel_is_the_rule_in_every_dtype_and_length() -> Result<()> {
        for n in [1, 7, 255, 256, 257, 20_000] {
            // The same gradient and start in f64, where the rule runs as a pointwise function.
            for (dtype, masters, close) in [
                (DType::F32, DType::F32, 1e-6),
                (DType::BF16, DType::F32, 1e-6),
                (DType::F16, DType::F32, 1e-6),
                (DType::BF16, DType::BF16, 2e-2),
            ] {
                let (params, gradients) = one(n, dtype, masters)?;
                let wide = ParamBuilder::new(n as u64, DType::F64, &Device::cpu());
                let w = wide.get("w", &[n], Init::Zeros)?;
                w.copy_from(params.kept().next().unwrap().1)?;
                let mut wide_gradients = Gradients::default();
                let gradient = gradients.iter().next().unwrap().1.to_dtype(DType::F64)?;
                wide_gradients.insert(w.var().unwrap(), gradient);
                let expected = trained(&wide.params(), &wide_gradients)?;
                for (a, b) in trained(&params, &gradients)?.iter().zip(&expected) {
                    assert!((a - b).abs() <= close * (1.0 + b.abs()), "{n} of {dtype}, {masters}: {a} instead of {b}");
                }
                let (weight, kept) = (params.get("w").unwrap(), params.kept().next().unwrap().1);
                assert_eq!(weight.to_vec::<f32>()?, kept.to_dtype(dtype)?.to_vec::<f32>()?);
            }
        }
        Ok(())
    }

    #[test]
    fn wider_copies_train_as_f32_on_widened_gradients() -> Result<()> {
        let (mixed, gradients) = one(1000, DType::BF16, DType::F32)?;
        let (plain, _) = one(1000, DType::F32, DType::F32)?;
        let (w, gradient) = (plain.get("w").unwrap(), gradients.iter().next().unwrap().1);
        let mut widened = Gradients::default();
        widened.insert(w.var().unwrap(), gradient.to_dtype(DType::F32)?);
        // The start is that of a run in f32, too.
        assert_eq!(mixed.kept().next().unwrap().1.to_vec::<f32>()?, w.to_vec::<f32>()?);
        assert_eq!(trained(&mixed, &gradients)?, trained(&plain, &widened)?);
        Ok(())
    }
}
