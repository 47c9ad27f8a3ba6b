//! Goldens of the Euler scheduler: `sampling/scheduler`, driven by its JSON file.

use std::path::Path;

use flowtape_flowmatch::sampler::{calculate_shift, compute_empirical_mu};
use flowtape_flowmatch::{EulerConfig, FlowMatchEulerDiscrete};
use serde_json::Value;

use crate::Outcome;
use crate::pipeline_math::{Any, Golden, broken, number, text};

/// All cases of the scheduler. `root` is the folder of the goldens.
pub fn cases(root: &Path) -> Vec<Outcome> {
    let mut out = Vec::new();
    if let Err(error) = scheduler(&root.join("sampling"), &mut out) {
        out.push(broken("aborted", &*error));
    }
    out.into_iter().map(|o| Outcome { case: format!("sampling/scheduler/{}", o.case), ..o }).collect()
}

fn scheduler(dir: &Path, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, "scheduler")?;
    let tolerance = golden.tolerance("sigmas")?;
    for case in golden.list("cases")? {
        let name = text(case, "name")?;
        let euler = FlowMatchEulerDiscrete::new(serde_json::from_value(case["config"].clone())?)?;
        let arguments = &case["set_timesteps"];
        let mu = arguments["mu"].as_f64();
        let schedule = match &arguments["sigmas"] {
            Value::Array(sigmas) => {
                let sigmas: Option<Vec<f64>> = sigmas.iter().map(Value::as_f64).collect();
                euler.set_sigmas(&sigmas.ok_or("sigmas are numbers")?, mu)?
            }
            _ => euler.set_timesteps(number(arguments, "num_inference_steps")? as usize, mu)?,
        };
        let stride = number(case, "train_sigmas_stride")? as usize;
        let train: Vec<f32> = euler.train_sigmas().iter().step_by(stride).copied().collect();
        for (part, got) in [("sigmas", &schedule.sigmas), ("timesteps", &schedule.timesteps), ("train_sigmas", &train)]
        {
            let name = format!("{name}.{part}");
            out.push(tolerance.outcome(&name, got, &golden.values(&name)?));
        }
        let ends = [euler.sigma_min(), euler.sigma_max()];
        let want = [number(case, "sigma_min")? as f32, number(case, "sigma_max")? as f32];
        out.push(tolerance.outcome(format!("{name}.sigma_min_max"), &ends, &want));
    }
    let compare = |case: String, got: f64, want: f64| {
        let worst = tolerance.worst(&[got], &[want]);
        Outcome { case, worst, bound: tolerance.rtol, detail: format!("{got} for {want}") }
    };
    if let Some(table) = golden.json["flux_calculate_shift"].as_object() {
        for (tokens, mu) in table {
            let got = calculate_shift(tokens.parse()?, &EulerConfig::default());
            out.push(compare(format!("calculate_shift_{tokens}"), got, mu.as_f64().ok_or("mu is a number")?));
        }
    }
    for row in golden.list("flux2_compute_empirical_mu")? {
        let (tokens, steps) = (number(row, "image_seq_len")? as usize, number(row, "num_steps")? as usize);
        let got = compute_empirical_mu(tokens, steps);
        out.push(compare(format!("compute_empirical_mu_{tokens}_{steps}"), got, number(row, "mu")?));
    }
    Ok(())
}
