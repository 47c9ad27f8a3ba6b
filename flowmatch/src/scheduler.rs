//! `scheduler_config.json` of a diffusers pipeline: the noise levels of a run and how it goes along them.

use std::path::Path;

use flowtape_engine::Error as EngineError;
use serde::Deserialize;
use serde_json::Value;

use crate::solver::{MAX_LOG_SIGMA, Solver};
use crate::{Error, EulerConfig, EulerSchedule, FlowMatchEulerDiscrete, Result};

/// The name of the file.
pub const SCHEDULER_CONFIG: &str = "scheduler_config.json";

/// A pipeline's scheduler.
#[derive(Clone, PartialEq, Debug)]
pub struct Scheduler {
    /// How steps are taken.
    pub solver: Solver,
    levels: FlowMatchEulerDiscrete,
    /// The solver that the file names, whose own noise levels differ.
    own: Solver,
}

/// The keys of diffusers' multistep schedulers that matter: those of [`EulerConfig`] have other names there.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
struct MultistepConfig {
    flow_shift: f64,
    use_flow_sigmas: bool,
    prediction_type: String,
    solver_order: usize,
    solver_type: Option<String>,
    algorithm_type: Option<String>,
    predict_x0: bool,
}

impl Default for MultistepConfig {
    fn default() -> Self {
        Self {
            flow_shift: 1.0,
            use_flow_sigmas: false,
            prediction_type: "epsilon".into(),
            solver_order: 2,
            solver_type: None,
            algorithm_type: None,
            predict_x0: true,
        }
    }
}

impl Scheduler {
    /// From the object of `scheduler_config.json`.
    ///
    /// # Errors
    /// When the class is unknown, or a value asks for what is not supported.
    pub fn from_json(config: &Value) -> Result<Self> {
        let solver = match config["_class_name"].as_str().unwrap_or("no _class_name") {
            "FlowMatchEulerDiscreteScheduler" => Solver::Euler,
            "FlowMatchHeunDiscreteScheduler" => Solver::Heun,
            "DPMSolverMultistepScheduler" => Solver::DpmPlusPlus2M,
            "UniPCMultistepScheduler" => Solver::UniPc,
            other => {
                let known = "FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler or \
                             DPMSolverMultistepScheduler";
                return Err(Error::config("_class_name", known, other));
            }
        };
        let wrong = |e: serde_json::Error| Error::config("scheduler", "a scheduler's configuration", e.to_string());
        let mut levels: EulerConfig = EulerConfig::deserialize(config).map_err(wrong)?;
        if matches!(solver, Solver::DpmPlusPlus2M | Solver::UniPc) {
            levels.shift = Self::multistep(MultistepConfig::deserialize(config).map_err(wrong)?)?;
        }
        Ok(Self { solver, own: solver, levels: FlowMatchEulerDiscrete::new(levels)? })
    }

    /// The shift of a multistep scheduler that is one of ours.
    fn multistep(config: MultistepConfig) -> Result<f64> {
        let MultistepConfig { use_flow_sigmas, prediction_type, solver_order, solver_type, algorithm_type, .. } =
            &config;
        if !use_flow_sigmas || prediction_type != "flow_prediction" {
            let expected = "flow_prediction with use_flow_sigmas";
            return Err(Error::config("prediction_type", expected, prediction_type));
        }
        if *solver_order != 2 || !config.predict_x0 {
            return Err(Error::config("solver_order", "2, with predict_x0", solver_order));
        }
        let known = |value: &Option<String>, name: &str| value.as_ref().is_none_or(|value| value == name);
        if !(known(solver_type, "bh2") || known(solver_type, "midpoint")) || !known(algorithm_type, "dpmsolver++") {
            return Err(Error::config("solver_type", "bh2, or midpoint of dpmsolver++", solver_type));
        }
        Ok(config.flow_shift)
    }

    /// Reads the file of a pipeline's folder `scheduler`.
    ///
    /// # Errors
    /// When it can't be read: the error names it.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(SCHEDULER_CONFIG);
        let text = std::fs::read(&path).map_err(|source| EngineError::Io { path: path.clone(), source })?;
        let wrong = |what: String| Error::from(EngineError::Format { path: path.clone(), what });
        let config: Value = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
        Self::from_json(&config).map_err(|e| wrong(e.to_string()))
    }

    /// How noise levels are spaced and shifted.
    pub fn config(&self) -> &EulerConfig {
        self.levels.config()
    }

    /// The same with a static shift instead of the file's, static or dynamic.
    ///
    /// # Errors
    /// When the shift is not a positive number.
    pub fn with_shift(&self, shift: f64) -> Result<Self> {
        let config = EulerConfig { shift, use_dynamic_shifting: false, ..self.config().clone() };
        Ok(Self { levels: FlowMatchEulerDiscrete::new(config)?, ..self.clone() })
    }

    /// Evenly spaced levels `1, .., 1 / n`, shifted: what most pipelines ask for.
    ///
    /// # Errors
    /// Without steps, or without a `mu` that dynamic shifting needs.
    pub fn even(&self, steps: usize, mu: Option<f64>) -> Result<EulerSchedule> {
        self.levels.set_sigmas(&linspace(1.0, 1.0 / steps.max(1) as f64, steps), mu)
    }

    /// The scheduler's own levels. Those of multistep solvers begin just below 1, and the model is told whole timesteps.
    ///
    /// # Errors
    /// Without steps, or without a `mu` that dynamic shifting needs.
    pub fn own(&self, steps: usize, mu: Option<f64>) -> Result<EulerSchedule> {
        if self.solver != self.own || matches!(self.own, Solver::Euler | Solver::Heun) {
            return self.levels.set_timesteps(steps, mu);
        }
        let total = self.config().num_train_timesteps as f64;
        let mut levels = linspace(1.0, 1.0 / total, steps + 1);
        levels.truncate(steps);
        let mut schedule = self.levels.set_sigmas(&levels, mu)?;
        schedule.sigmas[0] = schedule.sigmas[0].min(MAX_LOG_SIGMA);
        for (timestep, sigma) in schedule.timesteps.iter_mut().zip(&schedule.sigmas) {
            // A level's rounding to f32 must not cost a whole timestep.
            *timestep = (f64::from(*sigma) * total + 1e-4).trunc() as f32;
        }
        Ok(schedule)
    }
}

/// NumPy's `linspace`.
fn linspace(first: f64, last: f64, count: usize) -> Vec<f64> {
    let gap = (last - first) / count.saturating_sub(1).max(1) as f64;
    (0..count).map(|i| first + gap * i as f64).collect()
}
