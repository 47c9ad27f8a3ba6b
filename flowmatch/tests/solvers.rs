//! Solvers against closed forms and their papers' formulas, and the noise levels of schedulers.
#![allow(clippy::unwrap_used)] // a test

use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::solver::{MAX_LOG_SIGMA, SOLVERS};
use flowtape_flowmatch::{EulerConfig, EulerSchedule, EulerStep, FlowMatchEulerDiscrete, Scheduler, Solver};
use serde_json::json;

/// The standard deviation of the data.
const S: f64 = 0.4;

/// The variance at a noise level where the data are normal.
fn variance(sigma: f64) -> f64 {
    (1.0 - sigma).powi(2) * S * S + sigma * sigma
}

/// The velocity there: `x` follows the square root of the variance.
fn slope(sigma: f64) -> f64 {
    (sigma - (1.0 - sigma) * S * S) / variance(sigma)
}

fn schedule(steps: usize, shift: f64) -> EulerSchedule {
    let euler = FlowMatchEulerDiscrete::new(EulerConfig { shift, ..EulerConfig::default() }).unwrap();
    let sigmas: Vec<f64> = (0..steps).map(|i| 1.0 - i as f64 / steps as f64).collect();
    euler.set_sigmas(&sigmas, None).unwrap()
}

/// Two streams, from 1 and from -2.
fn run(solver: Solver, schedule: &EulerSchedule) -> (Vec<f64>, usize) {
    let start = |x: f64| Tensor::full(&[1, 2], x, DType::F64, &Device::cpu()).unwrap();
    let mut evaluations = 0;
    let mut velocity = |x: &[Tensor], step: EulerStep| {
        evaluations += 1;
        x.iter().map(|x| Ok(x.mul_scalar(slope(f64::from(step.sigma)))?)).collect()
    };
    let mut seen = 0;
    let noise = [start(1.0), start(-2.0)];
    let got = solver
        .integrate(&noise, schedule, &mut velocity, &mut |step, streams| {
            assert_eq!((step.index, streams.len()), (seen, 2));
            seen += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(seen, schedule.len());
    (got.iter().map(|x| x.to_vec::<f64>().unwrap()[1]).collect(), evaluations)
}

#[test]
fn all_come_to_the_closed_form_at_their_order() {
    // Halving the steps divides the error by 2 or by 4; that of the first and last steps of multistep methods is theirs.
    for (solver, least, evaluations) in
        [(Solver::Euler, 1.8, 64), (Solver::Heun, 3.0, 127), (Solver::DpmPlusPlus2M, 2.5, 64), (Solver::UniPc, 2.5, 64)]
    {
        let error = |steps| (run(solver, &schedule(steps, 1.0)).0[0] - S).abs();
        let (coarse, fine) = (error(32), error(64));
        assert!(coarse / fine > least && fine < 0.03, "{}: {coarse} {fine}", solver.name());
        let (got, count) = run(solver, &schedule(64, 1.0));
        assert_eq!(count, evaluations);
        assert!((got[1] + 2.0 * got[0]).abs() < 1e-5, "the streams do not meet");
    }
}

/// Heun's method and DPM-Solver++(2M) in f64, from their papers.
#[test]
fn steps_are_those_of_the_formulas() {
    let schedule = schedule(7, 3.0);
    let levels: Vec<f64> = schedule.sigmas.iter().map(|s| f64::from(*s)).collect();
    let mut x = 1.0;
    for pair in levels.windows(2) {
        let (v, h) = (slope(pair[0]) * x, pair[1] - pair[0]);
        let ahead = slope(pair[1]) * (x + h * v);
        x += if pair[1] == 0.0 { h * v } else { h * (v + ahead) / 2.0 };
    }
    let close = |solver: Solver, want: f64| {
        let got = run(solver, &schedule).0[0];
        assert!((got - want).abs() < 1e-5 * want.abs(), "{}: {got} for {want}", solver.name());
    };
    close(Solver::Heun, x);
    let half_snr = |s: f64| ((1.0 - s) / s).ln();
    let (mut x, mut before) = (1.0, None);
    for (i, pair) in levels.windows(2).enumerate() {
        let s = pair[0].min(f64::from(MAX_LOG_SIGMA));
        let data = x - s * slope(pair[0]) * x;
        let (h, alpha) = (half_snr(pair[1]) - half_snr(s), 1.0 - pair[1]);
        let estimate = match before {
            Some((last, last_data)) if i + 1 < schedule.len() => {
                let r = (half_snr(s) - last) / h;
                (1.0 + 1.0 / (2.0 * r)) * data - last_data / (2.0 * r)
            }
            _ => data,
        };
        x = pair[1] / s * x + alpha * (1.0 - (-h).exp()) * estimate;
        before = Some((half_snr(s), data));
    }
    close(Solver::DpmPlusPlus2M, x);
}

#[test]
fn names_are_read_and_unknown_ones_listed() {
    for (name, solver) in SOLVERS {
        assert_eq!((name.parse::<Solver>().unwrap(), solver.name()), (*solver, *name));
    }
    let error = "ddim".parse::<Solver>().unwrap_err().to_string();
    assert!(SOLVERS.iter().all(|(name, _)| error.contains(name)) && error.contains("ddim"), "{error}");
}

#[test]
fn each_class_has_its_levels() {
    let wan = json!({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "use_flow_sigmas": true,
                     "prediction_type": "flow_prediction", "solver_type": "bh2", "_diffusers_version": "0.42.1"});
    let wan = Scheduler::from_json(&wan).unwrap();
    let own = wan.own(4, None).unwrap();
    // From 1 down to one training step, without that last level, each shifted: 3 s / (1 + 2 s).
    assert_eq!(own.timesteps, [999.0, 900.0, 750.0, 500.0]);
    assert_eq!((wan.solver, own.sigmas[0], own.sigmas[4]), (Solver::UniPc, MAX_LOG_SIGMA, 0.0));
    let mut euler = wan.clone();
    euler.solver = Solver::Euler;
    assert_eq!(euler.own(4, None).unwrap().sigmas[0], 1.0);
    let flux = json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": true});
    let flux = Scheduler::from_json(&flux).unwrap();
    assert!(flux.even(4, None).is_err());
    assert_eq!(flux.with_shift(1.0).unwrap().even(4, None).unwrap().sigmas, [1.0, 0.75, 0.5, 0.25, 0.0]);
}

#[test]
fn what_is_not_supported_is_named() {
    for (config, part) in [
        (json!({"_class_name": "DDIMScheduler"}), "DDIMScheduler"),
        (json!({"_class_name": "UniPCMultistepScheduler"}), "use_flow_sigmas"),
        (
            json!({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": true,
                "prediction_type": "flow_prediction", "algorithm_type": "sde-dpmsolver++"}),
            "dpmsolver++",
        ),
        (
            json!({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": true,
                "prediction_type": "flow_prediction", "solver_order": 3}),
            "solver_order",
        ),
    ] {
        let error = Scheduler::from_json(&config).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
