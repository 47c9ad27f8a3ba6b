//! The `flow_matching` section of a recipe.

use serde::{Deserialize, Serialize};

use crate::{Error, LossWeighting, Result, TimestepSampling};

/// The greatest number of training timesteps.
const MAX_TRAIN_TIMESTEPS: usize = 1_000_000;

/// The strategies that a recipe may name; with its parameters one is a [`TimestepSampling`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum SamplingStrategy {
    /// [`TimestepSampling::Uniform`].
    Uniform,
    /// [`TimestepSampling::LogitNormal`].
    LogitNormal,
    /// [`TimestepSampling::Mode`].
    Mode,
    /// [`TimestepSampling::LogNorm`].
    #[serde(rename = "lognorm")]
    LogNorm,
    /// [`TimestepSampling::Mix`].
    Mix,
    /// [`TimestepSampling::Beta`].
    Beta,
}

impl SamplingStrategy {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Uniform, Self::LogitNormal, Self::Mode, Self::LogNorm, Self::Mix, Self::Beta];

    /// The name in recipes and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::LogitNormal => "logit_normal",
            Self::Mode => "mode",
            Self::LogNorm => "lognorm",
            Self::Mix => "mix",
            Self::Beta => "beta",
        }
    }

    /// The strategy of that name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|strategy| strategy.name() == name)
    }
}

/// Everything that the pipeline can be told, with NeMo's names and defaults.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct FlowMatchingConfig {
    /// Which adapter: `simple`, `flux`, …
    pub adapter_type: String,
    /// Arguments of the adapter's constructor.
    pub adapter_kwargs: serde_json::Map<String, serde_json::Value>,
    /// `uniform`, `logit_normal`, `mode`, `lognorm`, `mix` or `beta`.
    pub timestep_sampling: SamplingStrategy,
    /// A strategy's name that is not known: σ is drawn uniformly under it, whatever `timestep_sampling` says. It is what the
    /// reference does with an unknown `timestep_sampling`, which is refused here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unknown_timestep_sampling: Option<String>,
    /// Mean of `logit_normal`.
    pub logit_mean: f64,
    /// Standard deviation of `logit_normal`.
    pub logit_std: f64,
    /// `s` of `σ = s / (s + (1/u - 1))`, above 0.
    pub flow_shift: f64,
    /// Probability that a whole batch draws uniformly instead (not for `uniform`, `beta`, or without sigma noise).
    pub mix_uniform_ratio: f64,
    /// α of `beta`.
    pub beta_alpha: f64,
    /// β of `beta`.
    pub beta_beta: f64,
    /// Without it σ is plainly uniform and not shifted, whatever the strategy.
    pub use_sigma_noise: bool,
    /// σ is clamped to this from below.
    pub sigma_min: f64,
    /// σ is clamped to this from above.
    pub sigma_max: f64,
    /// `T`: timesteps are `σ · T`.
    pub num_train_timesteps: usize,
    /// Probability that a batch of videos trains image-to-video.
    pub i2v_prob: f64,
    /// Probability that conditioning is dropped.
    pub cfg_dropout_prob: f64,
    /// Whether losses are weighted by σ.
    pub use_loss_weighting: bool,
    /// `linear`, `bsmntw`, `min_snr` or `cosmap`.
    pub loss_weighting_scheme: String,
    /// γ of `min_snr`, above 0.
    pub min_snr_gamma: f64,
    /// Steps between detailed logs.
    pub log_interval: u64,
    /// Steps between one-line logs.
    pub summary_log_interval: u64,
}

impl Default for FlowMatchingConfig {
    fn default() -> Self {
        Self {
            adapter_type: "simple".to_owned(),
            adapter_kwargs: serde_json::Map::new(),
            timestep_sampling: SamplingStrategy::LogitNormal,
            unknown_timestep_sampling: None,
            logit_mean: 0.0,
            logit_std: 1.0,
            flow_shift: 3.0,
            mix_uniform_ratio: 0.1,
            beta_alpha: 2.5,
            beta_beta: 1.5,
            use_sigma_noise: true,
            sigma_min: 0.0,
            sigma_max: 1.0,
            num_train_timesteps: 1000,
            i2v_prob: 0.3,
            cfg_dropout_prob: 0.1,
            use_loss_weighting: true,
            loss_weighting_scheme: "linear".to_owned(),
            min_snr_gamma: 5.0,
            log_interval: 100,
            summary_log_interval: 10,
        }
    }
}

impl FlowMatchingConfig {
    /// The strategy that `timestep_sampling` names, with its parameters.
    pub fn strategy(&self) -> TimestepSampling {
        if let Some(name) = &self.unknown_timestep_sampling {
            return TimestepSampling::Other(name.clone());
        }
        match self.timestep_sampling {
            SamplingStrategy::Uniform => TimestepSampling::Uniform,
            SamplingStrategy::LogitNormal => {
                TimestepSampling::LogitNormal { mean: self.logit_mean, std: self.logit_std }
            }
            SamplingStrategy::Mode => TimestepSampling::Mode { scale: TimestepSampling::MODE_SCALE },
            SamplingStrategy::LogNorm => TimestepSampling::LogNorm,
            SamplingStrategy::Mix => TimestepSampling::Mix,
            SamplingStrategy::Beta => TimestepSampling::Beta { alpha: self.beta_alpha, beta: self.beta_beta },
        }
    }

    /// The weighting that the configuration asks for.
    ///
    /// # Errors
    /// When the scheme is not known.
    pub fn weighting(&self) -> Result<LossWeighting> {
        let Self { flow_shift, num_train_timesteps, min_snr_gamma, .. } = *self;
        let (used, scheme) = (self.use_loss_weighting, &self.loss_weighting_scheme);
        LossWeighting::new(used, scheme, flow_shift, num_train_timesteps, min_snr_gamma)
    }

    /// Checks every value.
    ///
    /// # Errors
    /// The first value that does not fit: its key, what it takes, what it has.
    pub fn validate(&self) -> Result<()> {
        self.problems().into_iter().next().map_or(Ok(()), Err)
    }

    /// All values that do not fit.
    pub fn problems(&self) -> Vec<Error> {
        let mut problems = Vec::new();
        let mut check = |ok: bool, key: &'static str, expected: &str, got: f64| {
            if !ok {
                problems.push(Error::config(key, expected, got));
            }
        };
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let unit = |x: f64| (0.0..=1.0).contains(&x);
        let both = "a positive number (beta_alpha and beta_beta must both be positive)";
        check(positive(self.beta_alpha), "beta_alpha", both, self.beta_alpha);
        check(positive(self.beta_beta), "beta_beta", both, self.beta_beta);
        check(positive(self.flow_shift), "flow_shift", "a positive number", self.flow_shift);
        check(positive(self.min_snr_gamma), "min_snr_gamma", "a positive number", self.min_snr_gamma);
        check(self.logit_mean.is_finite(), "logit_mean", "a finite number", self.logit_mean);
        let std = self.logit_std;
        check(std >= 0.0 && std.is_finite(), "logit_std", "a number that is not negative", std);
        for (key, value) in [
            ("mix_uniform_ratio", self.mix_uniform_ratio),
            ("i2v_prob", self.i2v_prob),
            ("cfg_dropout_prob", self.cfg_dropout_prob),
            ("sigma_min", self.sigma_min),
            ("sigma_max", self.sigma_max),
        ] {
            check(unit(value), key, "a number in [0, 1]", value);
        }
        let least = format!("at least sigma_min = {}", self.sigma_min);
        check(self.sigma_min <= self.sigma_max, "sigma_max", &least, self.sigma_max);
        let timesteps = self.num_train_timesteps;
        let expected = format!("at least 1 and at most {MAX_TRAIN_TIMESTEPS}");
        check((1..=MAX_TRAIN_TIMESTEPS).contains(&timesteps), "num_train_timesteps", &expected, timesteps as f64);
        for (key, value) in [("log_interval", self.log_interval), ("summary_log_interval", self.summary_log_interval)] {
            check(value > 0, key, "a positive number", value as f64);
        }
        let known = self.unknown_timestep_sampling.as_ref().filter(|name| SamplingStrategy::of_name(name).is_some());
        if let Some(known) = known {
            let expected = "a name that is not known (timestep_sampling takes the known ones)";
            problems.push(Error::config("unknown_timestep_sampling", expected, known));
        }
        // The tables of a weighting are as long as there are timesteps.
        if problems.is_empty() {
            problems.extend(self.weighting().err());
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_defaults_are_the_references() {
        let empty: FlowMatchingConfig = serde_json::from_str("{}").unwrap();
        assert_eq!(empty, FlowMatchingConfig::default());
        let strategy = TimestepSampling::LogitNormal { mean: 0.0, std: 1.0 };
        assert_eq!((empty.strategy(), empty.flow_shift, empty.mix_uniform_ratio), (strategy, 3.0, 0.1));
        empty.validate().unwrap();
        for strategy in SamplingStrategy::ALL {
            let config: FlowMatchingConfig =
                serde_json::from_value(serde_json::json!({"timestep_sampling": strategy.name()})).unwrap();
            assert_eq!((config.timestep_sampling, config.strategy().name()), (strategy, strategy.name()));
        }
        let error = serde_json::from_str::<FlowMatchingConfig>(r#"{"flow_shit": 3}"#).unwrap_err().to_string();
        assert!(error.contains("flow_shit") && error.contains("flow_shift"), "{error}");
    }

    #[test]
    fn every_bad_value_is_an_error_that_names_its_key() {
        for (json, key) in [
            (r#"{"beta_alpha": 0}"#, "beta_alpha"),
            (r#"{"beta_beta": -1}"#, "beta_beta"),
            (r#"{"flow_shift": 0}"#, "flow_shift"),
            (r#"{"min_snr_gamma": 0}"#, "min_snr_gamma"),
            (r#"{"logit_std": -0.1}"#, "logit_std"),
            (r#"{"mix_uniform_ratio": 1.1}"#, "mix_uniform_ratio"),
            (r#"{"i2v_prob": -0.1}"#, "i2v_prob"),
            (r#"{"cfg_dropout_prob": 2}"#, "cfg_dropout_prob"),
            (r#"{"sigma_min": 0.6, "sigma_max": 0.5}"#, "sigma_max"),
            (r#"{"sigma_min": -0.1}"#, "sigma_min"),
            (r#"{"num_train_timesteps": 0}"#, "num_train_timesteps"),
            (r#"{"log_interval": 0}"#, "log_interval"),
            (r#"{"summary_log_interval": 0}"#, "summary_log_interval"),
            (r#"{"loss_weighting_scheme": "nope"}"#, "loss_weighting_scheme"),
            (r#"{"unknown_timestep_sampling": "mode"}"#, "unknown_timestep_sampling"),
        ] {
            let config: FlowMatchingConfig = serde_json::from_str(json).unwrap();
            let error = config.validate().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{key}: expected ")), "{json}: {error}");
        }
    }
    #[test]
    fn an_unknown_strategy_is_refused_unless_its_own_key_asks_for_it() {
        for name in ["sigmoid", "logit_normal ", "Logit_Normal", ""] {
            let json = serde_json::json!({"timestep_sampling": name});
            let error = serde_json::from_value::<FlowMatchingConfig>(json).unwrap_err().to_string();
            let listed = SamplingStrategy::ALL.into_iter().all(|strategy| error.contains(strategy.name()));
            assert!(listed && error.contains(&format!("`{name}`")), "{error}");
        }
        let config: FlowMatchingConfig =
            serde_json::from_value(serde_json::json!({"unknown_timestep_sampling": "sigmoid"})).unwrap();
        config.validate().unwrap();
        assert_eq!(config.strategy(), TimestepSampling::Other("sigmoid".into()));
    }
}
