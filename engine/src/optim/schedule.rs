//! Learning rate and weight decay by step (Megatron's `OptimizerParamScheduler`, as NeMo uses it).

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How the learning rate falls after warm-up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum DecayStyle {
    /// Not at all.
    #[serde(rename = "constant")]
    Constant,
    /// Along a line.
    #[serde(rename = "linear")]
    Linear,
    /// Along half a cosine.
    #[serde(rename = "cosine")]
    #[default]
    Cosine,
    /// As one over the root of the step.
    #[serde(rename = "inverse-square-root")]
    InverseSquareRoot,
    /// Warm-up, stable, decay: constant until the last `wsd_decay_steps`.
    #[serde(rename = "WSD")]
    Wsd,
}

/// The last part of a warm-up, stable, decay schedule.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum WsdDecayStyle {
    /// Along a line.
    Linear,
    /// Along half a cosine.
    Cosine,
    /// `2 * 0.5^ratio - 1`.
    #[default]
    Exponential,
    /// `1 - sqrt(ratio)`.
    MinusSqrt,
}

/// How weight decay changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum WdIncrStyle {
    /// Not at all.
    #[default]
    Constant,
    /// Along a line.
    Linear,
    /// Along half a cosine.
    Cosine,
}

/// A schedule as a recipe writes it: what is left out follows from the optimiser and the number of steps.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct LrSchedulerConfig {
    /// How the learning rate falls.
    pub lr_decay_style: DecayStyle,
    /// Steps of rising; `min(1000, total / 10)` if left out.
    pub lr_warmup_steps: Option<u64>,
    /// The step at which `min_lr` is reached; the total if left out.
    pub lr_decay_steps: Option<u64>,
    /// Rate of step 0 when warming up; a tenth of the optimiser's if left out.
    pub init_lr: Option<f64>,
    /// Rate after warm-up; the optimiser's if left out.
    pub max_lr: Option<f64>,
    /// Rate at the end; a hundredth of the optimiser's if left out.
    pub min_lr: Option<f64>,
    /// Weight decay at step 0; the optimiser's if left out.
    pub start_wd: Option<f64>,
    /// Weight decay at the end; the optimiser's if left out.
    pub end_wd: Option<f64>,
    /// Steps of change of the weight decay; the total if left out.
    pub wd_incr_steps: Option<u64>,
    /// How weight decay changes.
    pub wd_incr_style: WdIncrStyle,
    /// Steps of decay of [`DecayStyle::Wsd`], which needs it.
    pub wsd_decay_steps: Option<u64>,
    /// Their form.
    pub lr_wsd_decay_style: WsdDecayStyle,
}

/// A schedule without open ends.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LrScheduler {
    style: DecayStyle,
    warmup_steps: u64,
    decay_steps: u64,
    init_lr: f64,
    max_lr: f64,
    min_lr: f64,
    wd: (f64, f64),
    wd_steps: u64,
    wd_style: WdIncrStyle,
    wsd_steps: u64,
    wsd_style: WsdDecayStyle,
}

impl LrScheduler {
    /// Fills in what the configuration leaves out.
    ///
    /// # Errors
    /// When a value is outside its range: rates that do not rise from `min_lr` to `max_lr`, a warm-up that does not end
    /// before the decay, no `wsd_decay_steps`, weight decay that falls or changes under a constant style.
    pub fn new(config: &LrSchedulerConfig, lr: f64, weight_decay: f64, total_steps: u64) -> Result<Self> {
        let out = Self {
            style: config.lr_decay_style,
            warmup_steps: config.lr_warmup_steps.unwrap_or((total_steps / 10).min(1000)),
            decay_steps: config.lr_decay_steps.unwrap_or(total_steps),
            init_lr: config.init_lr.unwrap_or(0.1 * lr),
            max_lr: config.max_lr.unwrap_or(lr),
            min_lr: config.min_lr.unwrap_or(0.01 * lr),
            wd: (config.start_wd.unwrap_or(weight_decay), config.end_wd.unwrap_or(weight_decay)),
            wd_steps: config.wd_incr_steps.unwrap_or(total_steps),
            wd_style: config.wd_incr_style,
            wsd_steps: config.wsd_decay_steps.unwrap_or(0),
            wsd_style: config.lr_wsd_decay_style,
        };
        let fail = |what: &str, got: String| Err(Error::Argument { op: "lr_scheduler", expected: what.into(), got });
        if !(0.0 <= out.min_lr && out.min_lr <= out.max_lr && 0.0 <= out.init_lr && out.init_lr <= out.max_lr) {
            return fail("0 <= min_lr <= max_lr and 0 <= init_lr <= max_lr", format!("{out:?}"));
        }
        if out.warmup_steps >= out.decay_steps {
            let got = format!("lr_warmup_steps {} and lr_decay_steps {}", out.warmup_steps, out.decay_steps);
            return fail("lr_warmup_steps below lr_decay_steps", got);
        }
        if out.style == DecayStyle::Wsd && !(1..=out.decay_steps).contains(&out.wsd_steps) {
            return fail("wsd_decay_steps from 1 to lr_decay_steps for WSD", out.wsd_steps.to_string());
        }
        let (start, end) = out.wd;
        if !(0.0 <= start && start <= end) || (out.wd_style == WdIncrStyle::Constant && start != end) {
            return fail("0 <= start_wd <= end_wd, equal for a constant style", format!("{start} and {end}"));
        }
        Ok(out)
    }

    /// The configuration without open ends that gives this schedule.
    pub fn config(&self) -> LrSchedulerConfig {
        LrSchedulerConfig {
            lr_decay_style: self.style,
            lr_warmup_steps: Some(self.warmup_steps),
            lr_decay_steps: Some(self.decay_steps),
            init_lr: Some(self.init_lr),
            max_lr: Some(self.max_lr),
            min_lr: Some(self.min_lr),
            start_wd: Some(self.wd.0),
            end_wd: Some(self.wd.1),
            wd_incr_steps: Some(self.wd_steps),
            wd_incr_style: self.wd_style,
            wsd_decay_steps: Some(self.wsd_steps).filter(|steps| *steps > 0),
            lr_wsd_decay_style: self.wsd_style,
        }
    }

    /// The learning rate of a step, from 0.
    pub fn lr(&self, step: u64) -> f64 {
        let (s, warmup, end) = (step as f64, self.warmup_steps as f64, self.decay_steps as f64);
        if self.warmup_steps > 0 && step <= self.warmup_steps {
            return self.init_lr + (self.max_lr - self.init_lr) * s / warmup;
        }
        if self.style == DecayStyle::Constant {
            return self.max_lr;
        }
        if step > self.decay_steps {
            return self.min_lr;
        }
        let ratio = (s - warmup) / (end - warmup);
        let coefficient = match self.style {
            DecayStyle::Constant => 1.0,
            DecayStyle::Linear => 1.0 - ratio,
            DecayStyle::Cosine => 0.5 * ((PI * ratio).cos() + 1.0),
            DecayStyle::InverseSquareRoot => {
                return (self.max_lr * warmup.max(1.0).sqrt() / s.max(1.0).sqrt()).max(self.min_lr);
            }
            DecayStyle::Wsd => {
                let start = end - self.wsd_steps as f64;
                let ratio = (s - start) / self.wsd_steps as f64;
                match self.wsd_style {
                    _ if s <= start => 1.0,
                    WsdDecayStyle::Linear => 1.0 - ratio,
                    WsdDecayStyle::Cosine => 0.5 * ((PI * ratio).cos() + 1.0),
                    WsdDecayStyle::Exponential => 2.0 * 0.5f64.powf(ratio) - 1.0,
                    WsdDecayStyle::MinusSqrt => 1.0 - ratio.sqrt(),
                }
            }
        };
        self.min_lr + coefficient * (self.max_lr - self.min_lr)
    }

    /// The weight decay of a step, from 0.
    pub fn weight_decay(&self, step: u64) -> f64 {
        let (start, end) = self.wd;
        if step > self.wd_steps || self.wd_steps == 0 {
            return end;
        }
        let ratio = step as f64 / self.wd_steps as f64;
        let coefficient = match self.wd_style {
            WdIncrStyle::Constant => return end,
            WdIncrStyle::Linear => ratio,
            WdIncrStyle::Cosine => 0.5 * ((PI * (1.0 - ratio)).cos() + 1.0),
        };
        start + coefficient * (end - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_schedules_are_errors() {
        let wrong = [
            LrSchedulerConfig { lr_warmup_steps: Some(100), ..Default::default() },
            LrSchedulerConfig { min_lr: Some(1.0), ..Default::default() },
            LrSchedulerConfig { lr_decay_style: DecayStyle::Wsd, ..Default::default() },
            LrSchedulerConfig { end_wd: Some(0.5), ..Default::default() },
        ];
        for config in wrong {
            assert!(LrScheduler::new(&config, 1e-3, 0.1, 100).is_err(), "{config:?}");
        }
    }

    #[test]
    fn a_schedule_that_is_written_out_is_the_same_in_a_longer_run() -> Result<()> {
        for style in [DecayStyle::Constant, DecayStyle::Linear, DecayStyle::InverseSquareRoot, DecayStyle::Wsd] {
            let wsd = Some(5).filter(|_| style == DecayStyle::Wsd);
            let open = LrSchedulerConfig { lr_decay_style: style, wsd_decay_steps: wsd, ..Default::default() };
            let schedule = LrScheduler::new(&open, 0.1, 0.2, 100)?;
            assert_eq!(LrScheduler::new(&schedule.config(), 7.0, 7.0, 1000)?, schedule);
        }
        Ok(())
    }

    #[test]
    fn a_cosine_rises_to_its_peak_and_falls_to_its_end() -> Result<()> {
        let s = LrScheduler::new(&LrSchedulerConfig::default(), 1.0, 0.1, 100)?;
        assert_eq!((s.lr(0), s.lr(10), s.lr(100), s.lr(1000)), (0.1, 1.0, 0.01, 0.01));
        assert!((s.lr(55) - 0.505).abs() < 1e-12 && s.weight_decay(50) == 0.1);
        Ok(())
    }
}
