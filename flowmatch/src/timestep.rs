//! How σ is drawn: the strategy, the flow shift, the clamp.

use std::f32::consts::PI;

use flowtape_engine::platform::math::{exp, sin_cos};

use crate::{Draws, FlowMatchingConfig, Result, SamplingStrategy};

/// The distribution of `u` before the flow shift (of σ itself for [`TimestepSampling::Beta`]).
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub enum TimestepSampling {
    /// Uniform in `[0, 1)`.
    Uniform,
    /// Sigmoid of a normal (Esser et al. 2024, the Stable Diffusion 3 paper).
    LogitNormal {
        /// Mean of the normal.
        mean: f64,
        /// Its standard deviation.
        std: f64,
    },
    /// The mode-heavy density of the same paper.
    Mode {
        /// How heavy the mode is.
        scale: f64,
    },
    /// Sigmoid of a standard normal.
    LogNorm,
    /// The same; differs from it by name alone, as in the reference.
    Mix,
    /// σ itself is Beta(α, β); no flow shift.
    Beta {
        /// α > 0.
        alpha: f64,
        /// β > 0.
        beta: f64,
    },
    /// A name that is not known (`unknown_timestep_sampling`): uniform under that name, as in the reference.
    Other(String),
}

impl TimestepSampling {
    /// `mode`'s scale in the pipeline.
    pub const MODE_SCALE: f64 = 1.29;

    /// The name in recipes and metrics.
    pub fn name(&self) -> &str {
        match self {
            Self::Uniform => SamplingStrategy::Uniform.name(),
            Self::LogitNormal { .. } => SamplingStrategy::LogitNormal.name(),
            Self::Mode { .. } => SamplingStrategy::Mode.name(),
            Self::LogNorm => SamplingStrategy::LogNorm.name(),
            Self::Mix => SamplingStrategy::Mix.name(),
            Self::Beta { .. } => SamplingStrategy::Beta.name(),
            Self::Other(name) => name,
        }
    }

    /// `n` values of `u`. Arithmetic is f32, in the reference's order, so that the rounding agrees.
    ///
    /// # Errors
    /// When the draws run out.
    pub fn sample(&self, n: usize, draws: &mut dyn Draws) -> Result<Vec<f32>> {
        let mut u = match self {
            Self::Uniform | Self::Other(_) | Self::Mode { .. } => draws.uniform(n)?,
            Self::LogitNormal { .. } | Self::LogNorm | Self::Mix => draws.normal(n)?,
            Self::Beta { alpha, beta } => draws.beta(n, *alpha, *beta)?,
        };
        match self {
            Self::Uniform | Self::Other(_) | Self::Beta { .. } => {}
            Self::LogitNormal { mean, std } => {
                u.iter_mut().for_each(|u| *u = sigmoid(*u * *std as f32 + *mean as f32));
            }
            Self::LogNorm | Self::Mix => u.iter_mut().for_each(|u| *u = sigmoid(*u)),
            Self::Mode { scale } => u.iter_mut().for_each(|u| *u = mode(*u, *scale as f32).clamp(0.0, 1.0)),
        }
        Ok(u)
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The inverse distribution function of mode sampling, not clamped.
pub(crate) fn mode(u: f32, scale: f32) -> f32 {
    1.0 - u - scale * (sin_cos(PI * u / 2.0).1.powi(2) - 1.0 + u)
}

/// σ, timesteps and how they were drawn: one value per sample.
#[derive(Clone, PartialEq, Debug)]
pub struct TimestepSample {
    /// In `[sigma_min, sigma_max]`.
    pub sigma: Vec<f32>,
    /// `σ · num_train_timesteps`.
    pub timesteps: Vec<f32>,
    /// The strategy's name; `uniform` where the mix decided so, `uniform_no_shift` without sigma noise.
    pub method: String,
}

/// Draws σ as the configuration says.
#[derive(Clone, PartialEq, Debug)]
pub struct TimestepSampler {
    strategy: TimestepSampling,
    use_sigma_noise: bool,
    mix_uniform_ratio: f64,
    flow_shift: f32,
    sigma_min: f32,
    sigma_max: f32,
    num_train_timesteps: usize,
}

impl TimestepSampler {
    /// From a configuration.
    ///
    /// # Errors
    /// When the configuration is not valid.
    pub fn new(config: &FlowMatchingConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            strategy: config.strategy(),
            use_sigma_noise: config.use_sigma_noise,
            mix_uniform_ratio: config.mix_uniform_ratio,
            flow_shift: config.flow_shift as f32,
            sigma_min: config.sigma_min as f32,
            sigma_max: config.sigma_max as f32,
            num_train_timesteps: config.num_train_timesteps,
        })
    }

    /// The strategy.
    pub fn strategy(&self) -> &TimestepSampling {
        &self.strategy
    }

    /// σ and timesteps of `batch_size` samples.
    ///
    /// # Errors
    /// When the draws run out.
    pub fn sample_timesteps(&self, batch_size: usize, draws: &mut dyn Draws) -> Result<TimestepSample> {
        if let Some(known) = draws.timesteps(batch_size)? {
            return Ok(known);
        }
        if !self.use_sigma_noise {
            return Ok(self.finish(draws.uniform(batch_size)?, "uniform_no_shift"));
        }
        if let TimestepSampling::Beta { .. } = self.strategy {
            return Ok(self.finish(self.strategy.sample(batch_size, draws)?, "beta"));
        }
        // One decision for the whole batch; nothing is drawn where there is nothing to decide.
        let uniform = self.strategy == TimestepSampling::Uniform
            || (self.mix_uniform_ratio > 0.0
                && draws.uniform(1)?.iter().any(|draw| f64::from(*draw) < self.mix_uniform_ratio));
        let strategy = if uniform { &TimestepSampling::Uniform } else { &self.strategy };
        let u = strategy.sample(batch_size, draws)?;
        let sigma = u.into_iter().map(|u| flow_shift(u, self.flow_shift)).collect();
        Ok(self.finish(sigma, strategy.name()))
    }

    /// Timesteps of given σ.
    pub fn timesteps(&self, sigma: &[f32]) -> Vec<f32> {
        sigma.iter().map(|s| s * self.num_train_timesteps as f32).collect()
    }

    fn finish(&self, mut sigma: Vec<f32>, method: &str) -> TimestepSample {
        // Not `clamp`: it panics when the bounds cross, and NaN must stay visible.
        sigma.iter_mut().for_each(|s| *s = clamp(*s, self.sigma_min, self.sigma_max));
        let timesteps = self.timesteps(&sigma);
        TimestepSample { sigma, timesteps, method: method.to_owned() }
    }
}

fn clamp(x: f32, low: f32, high: f32) -> f32 {
    if x.is_nan() { x } else { x.max(low).min(high) }
}

/// `σ = s / (s + (1/u - 1))`, with `u` clamped to 1e-5 from below.
pub fn flow_shift(u: f32, shift: f32) -> f32 {
    shift * (1.0 / (shift + (1.0 / u.max(1e-5) - 1.0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PhiloxDraws, Recorded, RecordedDraws};

    fn config(name: &str) -> FlowMatchingConfig {
        let known = SamplingStrategy::of_name(name);
        FlowMatchingConfig {
            timestep_sampling: known.unwrap_or(SamplingStrategy::Mode),
            unknown_timestep_sampling: known.is_none().then(|| name.to_owned()),
            mix_uniform_ratio: 0.0,
            ..FlowMatchingConfig::default()
        }
    }

    fn names() -> impl Iterator<Item = &'static str> {
        SamplingStrategy::ALL.into_iter().map(SamplingStrategy::name)
    }

    fn sample(config: &FlowMatchingConfig, n: usize, seed: u64) -> TimestepSample {
        TimestepSampler::new(config).unwrap().sample_timesteps(n, &mut PhiloxDraws::new(seed)).unwrap()
    }

    fn one(config: &FlowMatchingConfig, draw: Recorded) -> f32 {
        let mut draws = RecordedDraws::new([draw]);
        TimestepSampler::new(config).unwrap().sample_timesteps(1, &mut draws).unwrap().sigma[0]
    }

    #[test]
    fn every_strategy_stays_in_range_under_its_own_name() {
        for name in names().chain(["something_else"]) {
            for shift in [1e-4, 1.0, 3.0, 1e4] {
                let got = sample(&FlowMatchingConfig { flow_shift: shift, ..config(name) }, 500, 3);
                assert_eq!((got.method.as_str(), got.sigma.len(), got.timesteps.len()), (name, 500, 500));
                for (s, t) in got.sigma.iter().zip(&got.timesteps) {
                    assert!(s.is_finite() && (0.0..=1.0).contains(s), "{name} {shift} {s}");
                    assert_eq!(*t, s * 1000.0);
                }
            }
        }
    }

    #[test]
    fn without_sigma_noise_sigma_is_the_plain_draw() {
        for name in ["beta", "logit_normal"] {
            let config = FlowMatchingConfig { use_sigma_noise: false, mix_uniform_ratio: 1.0, ..config(name) };
            let mut draws = RecordedDraws::new([Recorded::Uniform(vec![0.2, 0.9])]);
            let got = TimestepSampler::new(&config).unwrap().sample_timesteps(2, &mut draws).unwrap();
            assert_eq!((got.sigma, got.method.as_str()), (vec![0.2, 0.9], "uniform_no_shift"));
        }
    }

    #[test]
    fn closed_forms() {
        let shift = |u: f64| 3.0 * u / (1.0 + 2.0 * u);
        let near = |got: f32, want: f64| assert!((f64::from(got) - want).abs() < 1e-6, "{got} {want}");
        near(one(&config("uniform"), Recorded::Uniform(vec![0.5])), 0.75);
        // The lower clamp of u alone: 0 becomes 1e-5, and 1 stays.
        near(one(&config("uniform"), Recorded::Uniform(vec![0.0])), shift(1e-5));
        near(one(&config("uniform"), Recorded::Uniform(vec![1.0])), 1.0);
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let moved = FlowMatchingConfig { logit_mean: 0.7, logit_std: 1.6, ..config("logit_normal") };
        near(one(&moved, Recorded::Normal(vec![-0.4])), shift(sigmoid(-0.4 * 1.6 + 0.7)));
        for name in ["lognorm", "mix"] {
            let ignored = FlowMatchingConfig { logit_mean: 0.7, logit_std: 1.6, ..config(name) };
            near(one(&ignored, Recorded::Normal(vec![-0.4])), shift(sigmoid(-0.4)));
        }
        let u = 0.3f64;
        let mode = 1.0 - u - 1.29 * ((std::f64::consts::PI * u / 2.0).cos().powi(2) - 1.0 + u);
        near(one(&config("mode"), Recorded::Uniform(vec![0.3])), shift(mode));
        near(one(&config("beta"), Recorded::Beta(vec![0.4])), 0.4);
    }

    #[test]
    fn sigma_is_clamped_after_the_shift() {
        for (low, high) in [(0.2, 0.6), (0.875, 1.0), (0.5, 0.5)] {
            for name in names() {
                let got = sample(&FlowMatchingConfig { sigma_min: low, sigma_max: high, ..config(name) }, 300, 5);
                assert!(got.sigma.iter().all(|s| (low as f32..=high as f32).contains(s)), "{name}");
            }
        }
    }

    #[test]
    fn the_mix_decides_for_a_whole_batch_and_strictly_below_its_ratio() {
        for name in ["logit_normal", "lognorm", "mode", "mix"] {
            let config = FlowMatchingConfig { mix_uniform_ratio: 0.25, ..config(name) };
            let sampler = TimestepSampler::new(&config).unwrap();
            let mut draws = RecordedDraws::new([Recorded::Uniform(vec![0.249]), Recorded::Uniform(vec![0.5, 0.5])]);
            let got = sampler.sample_timesteps(2, &mut draws).unwrap();
            assert_eq!((got.method.as_str(), got.sigma), ("uniform", vec![0.75, 0.75]));
            let own = if name == "mode" { Recorded::Uniform(vec![0.5]) } else { Recorded::Normal(vec![0.0]) };
            let mut draws = RecordedDraws::new([Recorded::Uniform(vec![0.25]), own]);
            assert_eq!(sampler.sample_timesteps(1, &mut draws).unwrap().method, name);
            assert_eq!(draws.remaining(), 0);
        }
        // With a ratio of 1 every batch is uniform; beta and uniform decide nothing.
        assert_eq!(sample(&FlowMatchingConfig { mix_uniform_ratio: 1.0, ..config("mix") }, 4, 1).method, "uniform");
        assert_eq!(sample(&FlowMatchingConfig { mix_uniform_ratio: 1.0, ..config("beta") }, 4, 1).method, "beta");
    }

    #[test]
    fn beta_has_its_moments_no_shift_and_repeats() {
        for (a, b) in [(2.5, 1.5), (1.2, 3.4), (0.3, 0.6)] {
            let config = FlowMatchingConfig { beta_alpha: a, beta_beta: b, flow_shift: 9.0, ..config("beta") };
            let n = 100_000;
            let got = sample(&config, n, 11);
            assert_eq!(got, sample(&config, n, 11));
            assert_ne!(got, sample(&config, n, 12));
            let mean = got.sigma.iter().map(|s| f64::from(*s)).sum::<f64>() / n as f64;
            let variance = got.sigma.iter().map(|s| (f64::from(*s) - mean).powi(2)).sum::<f64>() / n as f64;
            let want = a * b / ((a + b) * (a + b) * (a + b + 1.0));
            assert!((mean - a / (a + b)).abs() < 5.0 * (want / n as f64).sqrt(), "{a} {b} {mean}");
            assert!((variance / want - 1.0).abs() < 0.03, "{a} {b} {variance} {want}");
        }
    }
}
