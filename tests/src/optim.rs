//! Goldens of the optimiser: `optim_flux/`. Training steps, AdamW and clipping alone, tables of schedules.

use std::collections::BTreeMap;
use std::path::Path;

use flowtape_engine::nn::{Init, Param, ParamBuilder, Params};
use flowtape_engine::optim::{AdamW, LrScheduler, LrSchedulerConfig, Optimizer, Rates, clip_grad_norm};
use flowtape_engine::safetensors::SafeTensors;
use flowtape_engine::{DType, Device, Gradients, Tape, Tensor};
use flowtape_flowmatch::TaskType;
use flowtape_models::flux::FluxAdapter;
use flowtape_models::{Transformer, checkpoint};
use serde_json::Value;

use crate::Outcome;
use crate::golden::{Any, Golden, Tolerance, collect, max, number, relative, text};
use crate::step::{Recorded, pipeline};

/// The folder `optim_flux/`.
pub(crate) fn check(dir: &Path, _: &str, out: &mut Vec<Outcome>) -> Any<()> {
    out.extend(collect("lr_schedules", |out| schedules(dir, out)));
    out.extend(collect("unit", |out| unit(dir, out)));
    training(dir, out)
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
}

fn schedules(dir: &Path, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, "lr_schedules")?;
    let tolerance = Tolerance { rtol: 1e-9, atol: 1e-15 };
    for (i, case) in golden.list("schedules")?.iter().enumerate() {
        let config: LrSchedulerConfig = serde_json::from_value(case["lr_scheduler"].clone())?;
        let (lr, wd) = (number(case, "base_lr")?, number(case, "base_weight_decay")?);
        let schedule = LrScheduler::new(&config, lr, wd, number(case, "total_steps")? as u64)?;
        let name = format!("{i} {}", text(&case["resolved"], "lr_decay_style")?);
        for (what, of) in [
            ("lr", Box::new(|s| schedule.lr(s)) as Box<dyn Fn(u64) -> f64>),
            ("weight_decay", Box::new(|s| schedule.weight_decay(s))),
        ] {
            let want = numbers(&case[format!("{what}_used_at_step")]);
            let got: Vec<f64> = (0..want.len() as u64).map(of).collect();
            let worst = tolerance.worst(&got, &want);
            out.push(Outcome::measured(format!("{name} {what}"), worst, 1e-9, format!("{} steps", want.len())));
        }
    }
    Ok(())
}

fn optimiser(case: &Value) -> Any<(Optimizer, Rates)> {
    let settings = &case["optimizer"];
    let betas: (f64, f64) = serde_json::from_value(settings["betas"].clone())?;
    let rule = AdamW { betas, eps: number(settings, "eps")? };
    let rates = Rates { lr: number(settings, "lr")?, weight_decay: number(settings, "weight_decay")? };
    Ok((Optimizer::new(rule), rates))
}

/// Parameters with these values, and one gradient for each.
fn parameters(values: &BTreeMap<String, Tensor>) -> Any<Params> {
    let builder = ParamBuilder::new(0, DType::F32, &Device::cpu());
    for (name, value) in values {
        builder.get(name, value.dims(), Init::Zeros)?.copy_from(value)?;
    }
    Ok(builder.params())
}

fn gradients_of(params: &Params, gradient: impl Fn(&str) -> Any<Tensor>) -> Any<Gradients> {
    let mut out = Gradients::default();
    for parameter in params.iter() {
        out.insert(parameter.var().ok_or("a variable")?, gradient(parameter.path())?);
    }
    Ok(out)
}

fn unit(dir: &Path, out: &mut Vec<Outcome>) -> Any<()> {
    let case: Value = serde_json::from_slice(&std::fs::read(dir.join("case.json"))?)?;
    let golden = Golden::tensors(dir, "adamw_and_clip_unit")?;
    let (mut adamw, rates) = optimiser(&case)?;
    let params = parameters(&BTreeMap::from([("p".into(), golden.tensor("p0")?)]))?;
    let (grads, trajectory) = (golden.tensor("grads")?, golden.tensor("trajectory")?);
    let mut worst = 0.0;
    for step in 0..grads.dim(0)? {
        let row = |t: &Tensor| t.narrow(0, step, 1)?.squeeze(0)?.contiguous();
        adamw.step(&params, &gradients_of(&params, |_| Ok(row(&grads)?))?, rates, None)?;
        worst = max(worst, relative(&params.get("p").ok_or("p")?.value()?, &row(&trajectory)?)?);
    }
    out.push(Outcome::measured("adamw", worst, 1e-6, format!("{} steps", grads.dim(0)?)));
    let max_norm = number(&case["clip"], "max_norm")?;
    for i in (0..).take_while(|i| golden.has(&format!("clip{i}/norm"))) {
        let inputs = golden.under(&format!("clip{i}/in."))?;
        let params = parameters(&inputs)?;
        let gradients = gradients_of(&params, |name| Ok(inputs[name].clone()))?;
        let clipping = clip_grad_norm(&gradients, Some(max_norm))?;
        let norm = Tolerance { rtol: 1e-6, atol: 0.0 }
            .worst(&[clipping.norm.item()?], &[golden.tensor(&format!("clip{i}/norm"))?.item()?]);
        let mut worst = norm;
        for (name, value) in &inputs {
            let clipped = value.mul(&clipping.coefficient)?;
            worst = max(worst, relative(&clipped, &golden.tensor(&format!("clip{i}/out.{name}"))?)?);
        }
        out.push(Outcome::measured(format!("clip{i}"), worst, 1e-6, "norm and gradients"));
    }
    Ok(())
}

fn training(dir: &Path, out: &mut Vec<Outcome>) -> Any<()> {
    let case: Value = serde_json::from_slice(&std::fs::read(dir.join("case.json"))?)?;
    let inputs = Golden::tensors(dir, "inputs")?;
    let bounds = &case["tolerance"];
    let schedule = &case["lr_scheduler"];
    let config: LrSchedulerConfig = serde_json::from_value(serde_json::json!({
        "lr_decay_style": schedule["lr_decay_style"],
        "lr_warmup_steps": schedule["lr_warmup_steps"],
        "min_lr": schedule["min_lr"],
    }))?;
    let adapter = FluxAdapter::from_kwargs(case["adapter_kwargs"].as_object().ok_or("kwargs")?)?;
    let pipeline = pipeline(&case, adapter)?;
    for (index, run) in case["runs"].as_array().ok_or("runs")?.iter().enumerate() {
        let name = text(run, "name")?;
        let model = checkpoint::load(&dir.join(text(&case, "model")?), DType::F32, &Device::cpu())?;
        let (mut adamw, Rates { lr, weight_decay: wd }) = optimiser(&case)?;
        let schedule = LrScheduler::new(&config, lr, wd, number(schedule, "total_steps")? as u64)?;
        let [mut losses, mut norms, mut rates] = [0.0; 3];
        for (s, step) in run["steps"].as_array().ok_or("steps")?.iter().enumerate() {
            let micro = numbers(&step["micro_losses"]);
            let mut gradients = Gradients::default();
            for (m, want) in micro.iter().enumerate() {
                let prefix = format!("{name}/step{s}/micro{m}.");
                let tape = Tape::new();
                let recorded = Recorded::read(&inputs, &prefix, "image".into(), "logit_normal")?;
                let output = recorded.run(&pipeline, &*model, TaskType::T2V, DType::F32, &tape)?;
                let loss = Tolerance { rtol: 1.0, atol: 0.0 }.worst(&[output.loss.item()?], &[*want]);
                losses = max(losses, loss);
                gradients.add(tape.backward(&output.loss.mul_scalar(1.0 / micro.len() as f64)?)?)?;
            }
            let of_model = model.params().iter().map(Param::var);
            let mut own = Gradients::default();
            for var in of_model.flatten() {
                if let Some(gradient) = gradients.remove(var) {
                    own.insert(var, gradient);
                }
            }
            let clipping = clip_grad_norm(&own, Some(number(&case["clip"], "max_norm")?))?;
            let one = Tolerance { rtol: 1.0, atol: 0.0 };
            norms = max(norms, one.worst(&[clipping.norm.item()?], &[number(step, "grad_norm_before_clip")?]));
            let (lr, wd) = (schedule.lr(s as u64), schedule.weight_decay(s as u64));
            rates = max(rates, one.worst(&[lr, wd], &[number(step, "lr_used")?, number(step, "weight_decay_used")?]));
            adamw.step(model.params(), &own, Rates { lr, weight_decay: wd }, Some(&clipping.coefficient))?;
        }
        for (what, worst, bound) in [("loss", losses, "loss"), ("grad_norm", norms, "grad_norm"), ("lr", rates, "lr")] {
            let bound = number(&bounds[bound], "rtol")?;
            out.push(Outcome::measured(format!("{name} {what}"), worst, bound, ""));
        }
        let file = if index == 0 {
            "final_parameters".into()
        } else {
            format!("final_parameters_{}_sample", name.trim_start_matches("adamw_"))
        };
        parameters_after(dir, &file, name, &*model, out)?;
        if index == 0 {
            let moments = SafeTensors::open(dir.join("adam_state_sample.safetensors"))?;
            let mut worst = 0.0;
            for key in moments.names() {
                let (kind, parameter) = key.split_once('.').ok_or("a key")?;
                let got = model.params().get(parameter).and_then(|p| adamw.slot(p, kind)).ok_or("moments")?;
                worst = max(worst, relative(got, &moments.get(&key, &Device::cpu(), None)?)?);
            }
            // The moments are sums of gradients, so they share the gradient norms' bound.
            let bound = number(&bounds["grad_norm"], "rtol")?;
            out.push(Outcome::measured(format!("{name} moments"), worst, bound, ""));
        }
    }
    Ok(())
}

/// As the case states it: at most 1e-3 in any parameter, and 5e-5 in the median tensor.
fn parameters_after(dir: &Path, file: &str, name: &str, model: &dyn Transformer, out: &mut Vec<Outcome>) -> Any<()> {
    let wanted = Golden::tensors(dir, file)?.under("")?;
    let mut deviations = Vec::new();
    for (key, want) in &wanted {
        let got = model.params().get(key).ok_or_else(|| format!("no parameter {key}"))?.value()?;
        deviations.push(got.sub(want)?.to_vec::<f64>()?.into_iter().fold(0.0, |m, d| max(m, d.abs())));
    }
    deviations.sort_by(f64::total_cmp);
    let detail = format!("{} tensors", wanted.len());
    let worst = deviations.last().copied().unwrap_or(f64::INFINITY);
    out.push(Outcome::measured(format!("{name} parameters"), worst, 1e-3, &*detail));
    let worst = deviations.get(deviations.len() / 2).copied().unwrap_or(f64::INFINITY);
    out.push(Outcome::measured(format!("{name} parameters (median)"), worst, 5e-5, detail));
    Ok(())
}
