//! From noise to data: Euler's method along the learned velocity, with diffusers' `FlowMatchEulerDiscreteScheduler`
//! tables.

use flowtape_engine::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::{
    Batch, Error, FlowMatchingContext, FlowModel, Input, ModelAdapter, NoisedStream, RecordedDraws, Result, TaskType,
};

/// The function that a dynamic shift uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeShiftType {
    /// `e^μ / (e^μ + 1/σ - 1)`.
    #[default]
    Exponential,
    /// `μ / (μ + 1/σ - 1)`.
    Linear,
}

/// `scheduler_config.json`, with diffusers' names and defaults. Keys that begin with `_` are ignored.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct EulerConfig {
    /// `T`: timesteps are `σ · T`.
    pub num_train_timesteps: usize,
    /// The static shift `s`: `σ' = s σ / (1 + (s - 1) σ)`.
    pub shift: f64,
    /// Shift by `mu` (given per sequence length) instead.
    pub use_dynamic_shifting: bool,
    /// μ at `base_image_seq_len`, for [`calculate_shift`].
    pub base_shift: f64,
    /// μ at `max_image_seq_len`.
    pub max_shift: f64,
    /// Tokens at which μ is `base_shift`.
    pub base_image_seq_len: usize,
    /// Tokens at which μ is `max_shift`.
    pub max_image_seq_len: usize,
    /// Run from data to noise: `σ' = 1 - σ`, ending at 1.
    pub invert_sigmas: bool,
    /// Stretch the table so that its last σ is this.
    pub shift_terminal: Option<f64>,
    /// How μ shifts.
    pub time_shift_type: TimeShiftType,
    /// Not supported; an error when set.
    pub use_karras_sigmas: bool,
    /// Not supported; an error when set.
    pub use_exponential_sigmas: bool,
    /// Not supported; an error when set.
    pub use_beta_sigmas: bool,
    /// Not supported; an error when set.
    pub stochastic_sampling: bool,
}

impl Default for EulerConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            shift: 1.0,
            use_dynamic_shifting: false,
            base_shift: 0.5,
            max_shift: 1.15,
            base_image_seq_len: 256,
            max_image_seq_len: 4096,
            invert_sigmas: false,
            shift_terminal: None,
            time_shift_type: TimeShiftType::Exponential,
            use_karras_sigmas: false,
            use_exponential_sigmas: false,
            use_beta_sigmas: false,
            stochastic_sampling: false,
        }
    }
}

/// The σ of one run.
#[derive(Clone, PartialEq, Debug)]
pub struct EulerSchedule {
    /// One more than steps; the last is 0 (1 when inverted).
    pub sigmas: Vec<f32>,
    /// `σ · T`, one per step.
    pub timesteps: Vec<f32>,
}

impl EulerSchedule {
    /// Number of steps.
    pub fn len(&self) -> usize {
        self.timesteps.len()
    }

    /// Whether there are no steps.
    pub fn is_empty(&self) -> bool {
        self.timesteps.is_empty()
    }

    /// The steps in order.
    pub fn steps(&self) -> impl Iterator<Item = EulerStep> {
        self.timesteps.iter().zip(self.sigmas.windows(2)).enumerate().filter_map(|(index, (timestep, pair))| match pair
        {
            [sigma, next] => Some(EulerStep { index, timestep: *timestep, sigma: *sigma, next_sigma: *next }),
            _ => None,
        })
    }
}

/// One step of a run.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct EulerStep {
    /// From 0.
    pub index: usize,
    /// `σ · T`.
    pub timestep: f32,
    /// Where the step starts.
    pub sigma: f32,
    /// Where it ends.
    pub next_sigma: f32,
}

impl EulerStep {
    /// `x + (σ' - σ) v`: added up in f32, returned in the dtype of the velocity.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn advance(self, x: &Tensor, velocity: &Tensor) -> Result<Tensor> {
        let step = velocity.to_dtype(DType::F32)?.mul_scalar(f64::from(self.next_sigma - self.sigma))?;
        Ok(x.to_dtype(DType::F32)?.add(&step)?.to_dtype(velocity.dtype())?)
    }
}

/// Makes schedules and runs them.
#[derive(Clone, PartialEq, Debug)]
pub struct FlowMatchEulerDiscrete {
    config: EulerConfig,
    train_sigmas: Vec<f32>,
}

impl FlowMatchEulerDiscrete {
    /// From a configuration.
    ///
    /// # Errors
    /// When a value does not fit, or asks for what is not supported.
    pub fn new(config: EulerConfig) -> Result<Self> {
        if config.num_train_timesteps == 0 {
            return Err(Error::config("num_train_timesteps", "a positive number", 0));
        }
        if !(config.shift > 0.0 && config.shift.is_finite()) {
            return Err(Error::config("shift", "a positive number", config.shift));
        }
        if let Some(terminal) = config.shift_terminal
            && !(0.0..1.0).contains(&terminal)
        {
            return Err(Error::config("shift_terminal", "a number in [0, 1)", terminal));
        }
        for (key, set) in [
            ("use_karras_sigmas", config.use_karras_sigmas),
            ("use_exponential_sigmas", config.use_exponential_sigmas),
            ("use_beta_sigmas", config.use_beta_sigmas),
            ("stochastic_sampling", config.stochastic_sampling),
        ] {
            if set {
                return Err(Error::config(key, "false (true is not supported)", set));
            }
        }
        let (total, shift) = (config.num_train_timesteps as f32, config.shift as f32);
        let sigma = |t: usize| {
            let sigma = t as f32 / total;
            if config.use_dynamic_shifting { sigma } else { shift * sigma / (1.0 + (shift - 1.0) * sigma) }
        };
        let train_sigmas = (1..=config.num_train_timesteps).rev().map(sigma).collect();
        Ok(Self { config, train_sigmas })
    }

    /// The configuration.
    pub fn config(&self) -> &EulerConfig {
        &self.config
    }

    /// σ of all training timesteps, from noise to data.
    pub fn train_sigmas(&self) -> &[f32] {
        &self.train_sigmas
    }

    /// The greatest σ of training.
    pub fn sigma_max(&self) -> f32 {
        self.train_sigmas.first().copied().unwrap_or(1.0)
    }

    /// The least σ of training.
    pub fn sigma_min(&self) -> f32 {
        self.train_sigmas.last().copied().unwrap_or(0.0)
    }

    /// A schedule of `num_inference_steps`, evenly spaced before the shift. `mu` is needed for dynamic shifting.
    ///
    /// The static shift applies to σ that training's table has shifted already, as in diffusers.
    ///
    /// # Errors
    /// Without steps, or without a `mu` that dynamic shifting needs.
    pub fn set_timesteps(&self, num_inference_steps: usize, mu: Option<f64>) -> Result<EulerSchedule> {
        // timesteps are spaced, not σ: the detour over T keeps the rounding of the reference.
        let total = self.config.num_train_timesteps as f64;
        let (high, low) = (f64::from(self.sigma_max()) * total, f64::from(self.sigma_min()) * total);
        let gap = (high - low) / num_inference_steps.saturating_sub(1).max(1) as f64;
        let sigmas: Vec<f64> = (0..num_inference_steps).map(|i| (high - gap * i as f64) / total).collect();
        self.shifted(sigmas, mu)
    }

    /// A schedule from σ of one's own, from noise to data and without the final 0.
    ///
    /// # Errors
    /// Those of [`Self::set_timesteps`].
    pub fn set_sigmas(&self, sigmas: &[f64], mu: Option<f64>) -> Result<EulerSchedule> {
        self.shifted(sigmas.iter().map(|s| f64::from(*s as f32)).collect(), mu)
    }

    fn shifted(&self, mut sigmas: Vec<f64>, mu: Option<f64>) -> Result<EulerSchedule> {
        let EulerConfig { shift, shift_terminal, time_shift_type, invert_sigmas, .. } = self.config;
        if sigmas.is_empty() {
            return Err(Error::config("num_inference_steps", "at least one step", 0));
        }
        if let Some(bad) = sigmas.iter().find(|s| !(0.0..=1.0).contains(*s)) {
            return Err(Error::config("sigmas", "numbers in [0, 1]", bad));
        }
        if self.config.use_dynamic_shifting {
            let mu = mu.filter(|m| m.is_finite());
            let mu = mu.ok_or_else(|| Error::config("mu", "a number: use_dynamic_shifting is set", mu))?;
            let scale = match time_shift_type {
                TimeShiftType::Exponential => mu.exp(),
                TimeShiftType::Linear => mu,
            };
            sigmas.iter_mut().for_each(|s| *s = scale / (scale + (1.0 / *s - 1.0)));
        } else {
            sigmas.iter_mut().for_each(|s| *s = shift * *s / (1.0 + (shift - 1.0) * *s));
        }
        // As in diffusers, a terminal of 0 asks for nothing.
        if let (Some(terminal), Some(last)) = (shift_terminal.filter(|t| *t != 0.0), sigmas.last().copied())
            && last < 1.0
        {
            let scale = (1.0 - last) / (1.0 - terminal);
            sigmas.iter_mut().for_each(|s| *s = 1.0 - (1.0 - *s) / scale);
        }
        let mut sigmas: Vec<f32> = sigmas.into_iter().map(|s| s as f32).collect();
        if invert_sigmas {
            sigmas.iter_mut().for_each(|s| *s = 1.0 - *s);
        }
        let timesteps = sigmas.iter().map(|s| s * self.config.num_train_timesteps as f32).collect();
        sigmas.push(if invert_sigmas { 1.0 } else { 0.0 });
        Ok(EulerSchedule { sigmas, timesteps })
    }

    /// Integrates from `noise` along `velocity(x, step)`, which has the shape of `x`. Nothing is recorded.
    ///
    /// # Errors
    /// Those of `velocity`, and when the shapes differ.
    pub fn integrate(
        &self,
        noise: &Tensor,
        schedule: &EulerSchedule,
        mut velocity: impl FnMut(&Tensor, EulerStep) -> Result<Tensor>,
    ) -> Result<Tensor> {
        schedule.steps().try_fold(noise.detach(), |x, step| {
            let v = velocity(&x, step)?;
            Ok(step.advance(&x, &v)?.detach())
        })
    }

    /// Samples a model through its adapter, from `noise` in the shape of the latents; its dtype is the compute dtype.
    ///
    /// # Errors
    /// Those of the adapter and the model.
    pub fn sample(&self, sampling: &Sampling<'_>, noise: &Tensor, schedule: &EulerSchedule) -> Result<Tensor> {
        self.integrate(noise, schedule, |x, step| sampling.guided_velocity(x, step))
    }
}

/// What is sampled: a model behind its adapter, and its conditioning. Nothing is recorded, and conditioning is never
/// dropped, so an adapter that draws anything finds no draws.
#[derive(Clone, Copy)]
pub struct Sampling<'a> {
    /// The adapter.
    pub adapter: &'a dyn ModelAdapter,
    /// The model.
    pub model: &'a dyn FlowModel,
    /// The conditioning. Its latents are the clean latents of the context (a first frame, for i2v).
    pub batch: &'a Batch,
    /// The task.
    pub task_type: TaskType,
    /// Guidance, which runs the model twice per step.
    pub guidance: Option<Guidance<'a>>,
}

impl Sampling<'_> {
    /// The velocity of one step, with guidance where there is one, in the shape of `x`.
    ///
    /// # Errors
    /// Those of the adapter and the model.
    pub fn guided_velocity(&self, x: &Tensor, step: EulerStep) -> Result<Tensor> {
        let positive = self.velocity(self.batch, x, step)?;
        match self.guidance {
            Some(g) => guided(&positive, &self.velocity(g.negative, x, step)?, g.scale),
            None => Ok(positive),
        }
    }

    /// The velocity of one step for one conditioning, in the shape of `x`, untracked.
    ///
    /// # Errors
    /// Those of the adapter and the model.
    pub fn velocity(&self, batch: &Batch, x: &Tensor, step: EulerStep) -> Result<Tensor> {
        self.predict(batch, std::slice::from_ref(x), step, &[]).map(|mut all| all.swap_remove(0))
    }

    /// The velocities of all streams: the latents first, then those of [`ModelAdapter::stream_latents`], whose sizes are the batch's.
    /// The model's inputs are those of the adapter and `more`, such as what is to be left out for guidance.
    ///
    /// # Errors
    /// Those of the adapter and the model, and when streams are missing.
    pub fn predict(&self, batch: &Batch, x: &[Tensor], step: EulerStep, more: &[(&str, Input)]) -> Result<Vec<Tensor>> {
        let (first, others) = x.split_first().ok_or_else(|| Error::batch("latents", "none"))?;
        let (size, dtype) = (first.dim(0)?, first.dtype());
        let names: Vec<&str> = match others {
            [] => Vec::new(),
            _ => self.adapter.stream_latents(batch)?.into_iter().map(|(name, _)| name).collect(),
        };
        if names.len() != others.len() {
            return Err(Error::batch(format!("the streams {names:?}"), format!("{} of them", others.len())));
        }
        let stream = |(name, x): (&&str, &Tensor)| {
            let noisy_latents = x.detach().to_dtype(DType::F32)?;
            // Nothing is trained on.
            let target = Tensor::zeros(x.dims(), DType::F32, x.device())?;
            Ok(((*name).to_owned(), NoisedStream { noisy_latents, target }))
        };
        let per_sample = |value: f32| Tensor::from_slice(&vec![value; size], &[size], first.device());
        let cx = FlowMatchingContext {
            noisy_latents: first.detach(),
            latents: batch.latents.detach().to_dtype(dtype)?,
            timesteps: per_sample(step.timestep)?,
            sigma: per_sample(step.sigma)?,
            task_type: self.task_type,
            data_type: batch.data_type.clone(),
            device: first.device().clone(),
            dtype,
            cfg_dropout_prob: 0.0,
            streams: names.iter().zip(others).map(stream).collect::<Result<_>>()?,
            batch,
        };
        let mut inputs = self.adapter.prepare_inputs(&cx, &mut RecordedDraws::default())?;
        for (name, input) in more {
            inputs.insert(name, input.clone());
        }
        let mut prediction = self.adapter.forward(&cx, self.model, &inputs)?;
        let mut all = vec![prediction.velocity];
        for name in names {
            let velocity = prediction.auxiliary.remove(name);
            all.push(velocity.ok_or_else(|| Error::batch(format!("a prediction of `{name}`"), "none"))?);
        }
        Ok(all)
    }
}

/// Classifier-free guidance (Ho and Salimans 2022).
#[derive(Clone, Copy, Debug)]
pub struct Guidance<'a> {
    /// The conditioning to steer away from: empty text, or a negative prompt.
    pub negative: &'a Batch,
    /// 1 is no guidance.
    pub scale: f64,
}

/// `v_neg + scale · (v_pos - v_neg)`.
///
/// # Errors
/// When the shapes differ.
pub fn guided(positive: &Tensor, negative: &Tensor, scale: f64) -> Result<Tensor> {
    Ok(negative.add(&positive.sub(negative)?.mul_scalar(scale)?)?)
}

/// μ for a dynamic shift, on the line through (base length, base shift) and (max length, max shift): FLUX.1's rule.
pub fn calculate_shift(image_seq_len: usize, config: &EulerConfig) -> f64 {
    let (base, max) = (config.base_image_seq_len as f64, config.max_image_seq_len as f64);
    let slope = (config.max_shift - config.base_shift) / (max - base);
    image_seq_len as f64 * slope + (config.base_shift - slope * base)
}

/// μ for a dynamic shift as FLUX.2 fits it: from the token count and the number of steps.
pub fn compute_empirical_mu(image_seq_len: usize, num_steps: usize) -> f64 {
    let len = image_seq_len as f64;
    let (at_10, at_200) = (8.738_095_24e-5 * len + 1.898_333_33, 0.000_169_27 * len + 0.456_666_66);
    if image_seq_len > 4300 {
        return at_200;
    }
    let slope = (at_200 - at_10) / 190.0;
    slope * num_steps as f64 + (at_200 - 200.0 * slope)
}

#[cfg(test)]
mod tests {
    use flowtape_engine::Device;

    use super::*;
    use crate::{DataType, Draws, ModelInputs, ModelOutput};

    fn euler(config: EulerConfig) -> FlowMatchEulerDiscrete {
        FlowMatchEulerDiscrete::new(config).unwrap()
    }

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::from_slice(values, &[values.len(), 1, 1, 1], &Device::cpu()).unwrap()
    }

    #[test]
    fn schedules_end_at_zero_and_fall() {
        let plain = euler(EulerConfig::default()).set_timesteps(4, None).unwrap();
        assert_eq!((plain.len(), plain.sigmas[0], plain.sigmas[4]), (4, 1.0, 0.0));
        assert!((plain.sigmas[3] - 0.001).abs() < 1e-7 && (plain.timesteps[3] - 1.0).abs() < 1e-4);
        assert!(plain.sigmas.windows(2).all(|p| p[0] > p[1]));
        let one = euler(EulerConfig::default()).set_timesteps(1, None).unwrap();
        assert_eq!(one.sigmas, [1.0, 0.0]);
        let dynamic = euler(EulerConfig { use_dynamic_shifting: true, ..EulerConfig::default() });
        let got = dynamic.set_sigmas(&[1.0, 0.5], Some(1.0)).unwrap();
        let e = std::f32::consts::E;
        assert!((got.sigmas[1] - e / (e + 1.0)).abs() < 1e-6);
        let config = EulerConfig { shift_terminal: Some(0.1), ..EulerConfig::default() };
        assert!((euler(config).set_timesteps(5, None).unwrap().sigmas[4] - 0.1).abs() < 1e-6);
        let config = EulerConfig { invert_sigmas: true, ..EulerConfig::default() };
        let inverted = euler(config).set_timesteps(3, None).unwrap();
        assert_eq!((inverted.sigmas[0], inverted.sigmas[3]), (0.0, 1.0));
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        for (config, key) in [
            (EulerConfig { shift: 0.0, ..EulerConfig::default() }, "shift"),
            (EulerConfig { num_train_timesteps: 0, ..EulerConfig::default() }, "num_train_timesteps"),
            (EulerConfig { use_karras_sigmas: true, ..EulerConfig::default() }, "use_karras_sigmas"),
            (EulerConfig { shift_terminal: Some(1.0), ..EulerConfig::default() }, "shift_terminal"),
        ] {
            let error = FlowMatchEulerDiscrete::new(config).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{key}: ")), "{error}");
        }
        let dynamic = euler(EulerConfig { use_dynamic_shifting: true, ..EulerConfig::default() });
        assert!(dynamic.set_timesteps(4, None).unwrap_err().to_string().contains("mu"));
        assert!(dynamic.set_timesteps(0, Some(1.0)).is_err());
        assert!(dynamic.set_sigmas(&[1.5], Some(1.0)).is_err());
    }

    #[test]
    fn the_straight_path_is_exact_in_any_number_of_steps() {
        let (noise, data) = ([0.7f32, -1.2], [3.0f32, 5.0]);
        for steps in [1, 3, 20] {
            let euler = euler(EulerConfig { shift: 3.0, ..EulerConfig::default() });
            let schedule = euler.set_timesteps(steps, None).unwrap();
            let velocity = tensor(&[noise[0] - data[0], noise[1] - data[1]]);
            let got = euler.integrate(&tensor(&noise), &schedule, |_, _| Ok(velocity.clone())).unwrap();
            for (a, b) in got.to_vec::<f32>().unwrap().iter().zip(data) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }

    /// Its velocity is its conditioning.
    struct Constant;
    impl FlowModel for Constant {
        fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput> {
            Ok(inputs.tensor("text")?.clone().into())
        }
    }
    impl ModelAdapter for Constant {
        fn name(&self) -> &str {
            "constant"
        }
        fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, _: &mut dyn Draws) -> Result<ModelInputs> {
            assert_eq!(cx.cfg_dropout_prob, 0.0);
            let text = cx.batch.require("text")?.clone();
            Ok(ModelInputs::new().with("text", text).with_optional("none", None::<Input>))
        }
    }

    #[test]
    fn guidance_extrapolates_from_the_negative() {
        let batch = |v: f32| Batch::new(tensor(&[0.0]), DataType::Image).with("text", tensor(&[v]));
        let (positive, negative) = (batch(1.0), batch(-0.5));
        let euler = euler(EulerConfig::default());
        let schedule = euler.set_timesteps(7, None).unwrap();
        let plain = Sampling {
            adapter: &Constant,
            model: &Constant,
            batch: &positive,
            task_type: TaskType::T2V,
            guidance: None,
        };
        let run = |sampling: &Sampling<'_>| euler.sample(sampling, &tensor(&[2.0]), &schedule).unwrap().item().unwrap();
        assert!((run(&plain) - 1.0).abs() < 1e-6);
        for (scale, velocity) in [(1.0, 1.0), (2.0, 2.5), (0.0, -0.5)] {
            let guided = Sampling { guidance: Some(Guidance { negative: &negative, scale }), ..plain };
            assert!((run(&guided) - (2.0 - velocity)).abs() < 1e-5);
        }
    }

    #[test]
    fn mu_rules() {
        let config = EulerConfig::default();
        assert!((calculate_shift(256, &config) - 0.5).abs() < 1e-12);
        assert!((calculate_shift(4096, &config) - 1.15).abs() < 1e-12);
        // Beyond 4300 tokens the number of steps no longer matters.
        assert_eq!(compute_empirical_mu(5000, 4), compute_empirical_mu(5000, 50));
        assert!(compute_empirical_mu(1024, 4) > compute_empirical_mu(1024, 50));
    }
}
