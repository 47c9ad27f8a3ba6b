//! Goldens of the Euler scheduler: `sampling/scheduler`, driven by its JSON file.

use std::path::Path;

use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::sampler::{calculate_shift, compute_empirical_mu};
use flowtape_flowmatch::{
    Batch, DataType, EulerConfig, EulerSchedule, FlowMatchEulerDiscrete, Guidance, Sampling, TaskType,
};
use flowtape_models::blocks::patchify;
use flowtape_models::checkpoint;
use flowtape_models::flux::FluxAdapter;
use serde_json::Value;

use crate::Outcome;
use crate::golden::{Any, Golden, collect, number, relative, text};

/// Euler trajectories on a device. `root` is the folder of the goldens.
pub fn trajectories_on(root: &Path, device: &Device) -> Vec<Outcome> {
    let dir = root.join("sampling");
    collect("sampling/flux_trajectory", |out| trajectory(&dir, "flux_trajectory", device, out))
}

/// The same on the CPU.
pub(crate) fn trajectories(dir: &Path, file: &str, out: &mut Vec<Outcome>) -> Any<()> {
    trajectory(dir, file, &Device::cpu(), out)
}

/// Tables of sigmas and timesteps.
pub(crate) fn scheduler(dir: &Path, file: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, file)?;
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
        Outcome::measured(case, worst, tolerance.rtol, format!("{got} for {want}"))
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

/// Euler trajectories of the model of `flux_step/`: the latents after every step.
fn trajectory(dir: &Path, file: &str, device: &Device, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, file)?.on(device);
    let bound = text(&golden.json["tolerance"], "latents")?.rsplit(' ').next().ok_or("a bound")?.parse()?;
    let model = checkpoint::load(&dir.join("../flux_step"), DType::F32, device)?;
    let noise = golden.tensor("latents")?;
    let batch = |prefix: &str| -> Any<Batch> {
        let text = golden.tensor(&format!("{prefix}text_embeddings"))?;
        let pooled = golden.tensor(&format!("{prefix}pooled"))?;
        let batch = Batch::new(noise.clone(), DataType::Image);
        Ok(batch.with("text_embeddings", text).with("pooled_prompt_embeds", pooled))
    };
    let (positive, negative) = (batch("")?, batch("negative_")?);
    for run in golden.list("runs")? {
        let name = text(run, "name")?;
        let adapter = FluxAdapter { guidance_scale: number(run, "guidance")?, ..FluxAdapter::default() };
        let sampling = Sampling {
            adapter: &adapter,
            model: &*model,
            batch: &positive,
            task_type: TaskType::T2V,
            guidance: run["true_cfg_scale"].as_f64().map(|scale| Guidance { negative: &negative, scale }),
        };
        let euler = FlowMatchEulerDiscrete::new(EulerConfig::default())?;
        let recorded = |what: &str| golden.values(&format!("{name}.{what}"));
        let schedule = EulerSchedule { sigmas: recorded("sigmas")?, timesteps: recorded("timesteps")? };
        let mut velocities = Vec::new();
        let last = euler.integrate(&noise, &schedule, |x, step| {
            let velocity = sampling.guided_velocity(x, step)?;
            velocities.push((x.clone(), velocity.clone()));
            Ok(velocity)
        })?;
        let mut compare = |what: String, got: &Tensor, packed: bool| -> Any<()> {
            let got = if packed { patchify(got, &[2, 2])? } else { got.clone() };
            let worst = relative(&got, &golden.tensor(&what)?)?;
            out.push(Outcome::measured(what, worst, bound, ""));
            Ok(())
        };
        for (i, (x, velocity)) in velocities.iter().enumerate() {
            compare(format!("{name}.velocity{i}"), velocity, true)?;
            if i > 0 {
                compare(format!("{name}.latents_after{}", i - 1), x, true)?;
            }
        }
        compare(format!("{name}.final"), &last, false)?;
    }
    Ok(())
}
