//! Solvers of the sampling equation `dx/dσ = v(x, σ)`, on the noise levels of a schedule.

use std::str::FromStr;

use flowtape_engine::{DType, Tensor};

use crate::{Error, EulerSchedule, EulerStep, Result};

/// The greatest noise level of which multistep methods take a logarithm, as in diffusers: at 1 there is no signal.
pub const MAX_LOG_SIGMA: f32 = 1.0 - 1e-6;

/// How a step is taken. Several streams (a video and its sound) go along the same noise levels.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Solver {
    /// diffusers' `FlowMatchEulerDiscreteScheduler`: one evaluation a step, first order.
    #[default]
    Euler,
    /// diffusers' `FlowMatchHeunDiscreteScheduler`: two evaluations a step but the last, second order.
    Heun,
    /// diffusers' `DPMSolverMultistepScheduler` with flow sigmas, `dpmsolver++` of order 2, midpoint (Lu et al. 2022).
    DpmPlusPlus2M,
    /// diffusers' `UniPCMultistepScheduler` with flow sigmas, `bh2` of order 2, predicting data (Zhao et al. 2023).
    UniPc,
}

/// The solvers by name.
pub const SOLVERS: &[(&str, Solver)] =
    &[("euler", Solver::Euler), ("heun", Solver::Heun), ("dpm++2m", Solver::DpmPlusPlus2M), ("unipc", Solver::UniPc)];

impl FromStr for Solver {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let names: Vec<&str> = SOLVERS.iter().map(|(name, _)| *name).collect();
        let found = SOLVERS.iter().find(|(known, _)| *known == name);
        found
            .map(|(_, solver)| *solver)
            .ok_or_else(|| Error::config("sampler", format!("one of {}", names.join(", ")), name))
    }
}

/// The velocities of all streams at a step, in their shapes.
pub type Velocity<'a> = dyn FnMut(&[Tensor], EulerStep) -> Result<Vec<Tensor>> + 'a;
/// Sees all streams after a step.
pub type OnStep<'a> = dyn FnMut(EulerStep, &[Tensor]) -> Result<()> + 'a;

impl Solver {
    /// Its name in [`SOLVERS`].
    pub fn name(self) -> &'static str {
        SOLVERS.iter().find(|(_, solver)| *solver == self).map_or("", |(name, _)| *name)
    }

    /// Goes from noise to data. Nothing is recorded; sums are made in f32 and returned in the streams' dtypes.
    ///
    /// # Errors
    /// Those of `velocity` and `on_step`, and when shapes differ.
    pub fn integrate(
        self,
        noise: &[Tensor],
        schedule: &EulerSchedule,
        velocity: &mut Velocity<'_>,
        on_step: &mut OnStep<'_>,
    ) -> Result<Vec<Tensor>> {
        let mut x: Vec<Tensor> = noise.iter().map(Tensor::detach).collect();
        let mut multistep = Multistep::new(self == Self::UniPc);
        for step in schedule.steps() {
            let v = velocity(&x, step)?;
            x = match self {
                Self::Euler => euler(&x, &v, step)?,
                // At the end no noise is left to look at.
                Self::Heun if step.index + 1 < schedule.len() => {
                    let ahead = euler(&x, &v, step)?;
                    let (index, timestep) = (step.index + 1, schedule.timesteps[step.index + 1]);
                    let there = EulerStep { index, timestep, sigma: step.next_sigma, ..step };
                    let half = f64::from(step.next_sigma - step.sigma) / 2.0;
                    let next = velocity(&ahead, there)?;
                    let terms = x.iter().zip(v.iter().zip(&next));
                    terms.map(|(x, (v, w))| combine(&[(1.0, x), (half, v), (half, w)])).collect::<Result<_>>()?
                }
                Self::Heun => euler(&x, &v, step)?,
                Self::DpmPlusPlus2M | Self::UniPc => multistep.advance(&x, &v, step, schedule.len())?,
            };
            on_step(step, &x)?;
        }
        Ok(x)
    }
}

fn euler(x: &[Tensor], v: &[Tensor], step: EulerStep) -> Result<Vec<Tensor>> {
    x.iter().zip(v).map(|(x, v)| Ok(step.advance(x, v)?.detach())).collect()
}

/// A sum of tensors, each with its factor: in f32, returned in the dtype of the first.
fn combine(terms: &[(f64, &Tensor)]) -> Result<Tensor> {
    let Some((_, first)) = terms.first() else { return Err(Error::batch("a term", "none")) };
    let mut sum: Option<Tensor> = None;
    for (factor, tensor) in terms.iter().filter(|(factor, _)| *factor != 0.0) {
        let term = tensor.detach().to_dtype(DType::F32)?.mul_scalar(*factor)?;
        sum = Some(sum.map_or(Ok(term.clone()), |sum| sum.add(&term))?);
    }
    let sum = sum.map_or_else(|| Tensor::zeros(first.dims(), DType::F32, first.device()), Ok)?;
    Ok(sum.to_dtype(first.dtype())?)
}

/// Methods on predictions of the data `m = x - σ v`, over the half log signal-to-noise ratio `λ = log((1 - σ) / σ)`. The
/// predictor of UniPC's second order is that of DPM-Solver++(2M); UniPC corrects what it predicted once the next `m` is known.
struct Multistep {
    corrects: bool,
    /// The step before: its noise level, its predictions of the data and where it began.
    last: Option<Seen>,
    /// The step before that, without what its step began with.
    before: Option<(f64, Vec<Tensor>)>,
}

struct Seen {
    sigma: f64,
    data: Vec<Tensor>,
    start: Vec<Tensor>,
    /// The order of the step that it took.
    order: usize,
}

fn lambda(sigma: f64) -> f64 {
    (1.0 - sigma).ln() - sigma.ln()
}

impl Multistep {
    fn new(corrects: bool) -> Self {
        Self { corrects, last: None, before: None }
    }

    fn advance(&mut self, x: &[Tensor], v: &[Tensor], step: EulerStep, steps: usize) -> Result<Vec<Tensor>> {
        // The first level's distance to 1 is that of f32, as in the reference.
        let (sigma, next) = (f64::from(step.sigma.min(MAX_LOG_SIGMA)), f64::from(step.next_sigma));
        let pairs = x.iter().zip(v);
        let data = pairs.map(|(x, v)| combine(&[(1.0, x), (-sigma, v)])).collect::<Result<Vec<_>>>()?;
        let x = match &self.last {
            Some(last) if self.corrects => self.correct(last, &data, sigma)?,
            _ => x.to_vec(),
        };
        // From noise levels at the end to none there is no second order.
        let order = if self.last.is_none() || step.index + 1 == steps { 1 } else { 2 };
        let h = lambda(next) - lambda(sigma);
        let (signal, phi) = (1.0 - next, (-h).exp_m1());
        let mut out = Vec::with_capacity(x.len());
        for (i, (x, m)) in x.iter().zip(&data).enumerate() {
            let mut terms = vec![(next / sigma, x), (-signal * phi, m)];
            if let (Some(last), 2) = (&self.last, order) {
                let ratio = (lambda(sigma) - lambda(last.sigma)) / h;
                let slope = -0.5 * signal * phi / ratio;
                terms.extend([(slope, m), (-slope, &last.data[i])]);
            }
            out.push(combine(&terms)?);
        }
        let seen = Seen { sigma, data, start: x, order };
        self.before = self.last.replace(seen).map(|last| (last.sigma, last.data));
        Ok(out)
    }

    /// UniC: the step before again, with what is now known of its end.
    fn correct(&self, last: &Seen, data: &[Tensor], sigma: f64) -> Result<Vec<Tensor>> {
        let h = lambda(sigma) - lambda(last.sigma);
        let (signal, phi_1) = (1.0 - sigma, (-h).exp_m1());
        let phi_2 = phi_1 / -h - 1.0;
        let phi_3 = phi_2 / -h - 0.5;
        let of_end = |weight: f64| -signal * phi_1 * weight;
        let mut out = Vec::with_capacity(data.len());
        for (i, (m, now)) in last.data.iter().zip(data).enumerate() {
            let mut terms = vec![(sigma / last.sigma, &last.start[i]), (-signal * phi_1, m)];
            match &self.before {
                Some((before_sigma, before)) if last.order == 2 => {
                    let ratio = (lambda(*before_sigma) - lambda(last.sigma)) / h;
                    let (first, second) = (phi_2 / phi_1, 2.0 * phi_3 / phi_1);
                    let weight = (first - second) / (1.0 - ratio);
                    let (slope, end) = (of_end(weight) / ratio, of_end(first - weight));
                    terms.extend([(slope, &before[i]), (-slope, m), (end, now), (-end, m)]);
                }
                _ => terms.extend([(of_end(0.5), now), (-of_end(0.5), m)]),
            }
            out.push(combine(&terms)?);
        }
        Ok(out)
    }
}
