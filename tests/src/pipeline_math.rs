//! Goldens of the pipeline's maths: `pipeline_math/{sample_timesteps,sigma_statistics,schedule_and_loss,time_shift}`.
//! Everything is driven by the JSON files: what is compared, with which options, within which tolerance.

use std::path::Path;

use flowtape_engine::{Tape, Tensor};
use flowtape_flowmatch::task::determine_task_type;
use flowtape_flowmatch::time_shift::{
    TimeShift, compute_density_for_timestep_sampling, get_flow_match_loss_weight, time_shift,
};
use flowtape_flowmatch::weighting::bsmntw_table;
use flowtape_flowmatch::{
    Batch, DataType, Draws, FlowMatchingConfig, FlowMatchingContext, FlowMatchingPipeline, LinearInterpolationSchedule,
    ModelAdapter, ModelInputs, PhiloxDraws, Recorded, RecordedDraws, SamplingStrategy, TimestepSampler,
};
use serde_json::Value;

use crate::Outcome;
use crate::golden::{Any, Golden, exact, max, number, text};

fn config(kwargs: &Value) -> Any<FlowMatchingConfig> {
    let mut kwargs = kwargs.clone();
    let name = kwargs["timestep_sampling"].as_str().unwrap_or("uniform").to_owned();
    // What the reference does with an unknown name has a key of its own.
    if SamplingStrategy::of_name(&name).is_none() {
        kwargs["timestep_sampling"] = Value::Null;
        kwargs["unknown_timestep_sampling"] = name.into();
    }
    kwargs.as_object_mut().ok_or("an object")?.retain(|_, value| !value.is_null());
    Ok(serde_json::from_value(kwargs)?)
}

/// An adapter for what never runs a model.
struct NoModel;

impl ModelAdapter for NoModel {
    fn name(&self) -> &str {
        "none"
    }
    fn prepare_inputs(
        &self,
        _: &FlowMatchingContext<'_>,
        _: &mut dyn Draws,
    ) -> flowtape_flowmatch::Result<ModelInputs> {
        Ok(ModelInputs::new())
    }
}

fn pipeline(config: FlowMatchingConfig) -> Any<FlowMatchingPipeline> {
    Ok(FlowMatchingPipeline::new(config, NoModel)?)
}

fn recorded(call: &str, values: Vec<f32>) -> Any<Recorded> {
    match call {
        "rand" => Ok(Recorded::Uniform(values)),
        "normal" => Ok(Recorded::Normal(values)),
        "beta" => Ok(Recorded::Beta(values)),
        other => Err(format!("unknown draw `{other}`").into()),
    }
}

pub(crate) fn sample_timesteps(dir: &Path, file: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, file)?;
    for case in golden.list("cases")? {
        let name = text(case, "name")?;
        let mut draws = Vec::new();
        if let Some(draw) = case["mix_decision_draw"].as_f64() {
            draws.push(Recorded::Uniform(vec![draw as f32]));
        }
        let call = case["draw_calls"].as_array().and_then(|c| c.last()?.as_str()).ok_or("no draw_calls")?;
        let input = golden.values(text(case, "input_tensor")?)?;
        let count = input.len();
        draws.push(recorded(call, input)?);
        let mut draws = RecordedDraws::new(draws);
        let sample = pipeline(config(&case["pipeline_kwargs"])?)?.sample_timesteps(count, &mut draws)?;
        let (sigma, timesteps) = (format!("{name}.sigma"), format!("{name}.timesteps"));
        out.push(golden.tolerance("sigma")?.outcome(&sigma, &sample.sigma, &golden.values(&sigma)?));
        out.push(golden.tolerance("timesteps")?.outcome(&timesteps, &sample.timesteps, &golden.values(&timesteps)?));
        let method = text(case, "returned_method")?;
        let holds = sample.method == method && draws.remaining() == 0;
        let detail = format!("{} for {method}, {} draws left", sample.method, draws.remaining());
        out.push(exact(format!("{name}.method"), holds, detail));
    }
    // The parameters of the density helper stand in the description alone.
    let what = text(&golden.json, "what")?;
    let logit = (stated(what, "logit_mean=")?, stated(what, "logit_std=")?);
    let mode_scale = stated(what, "mode_scale=")?;
    for name in golden.names() {
        let Some(scheme) = name.strip_prefix("density.") else { continue };
        let call = if scheme == "logit_normal" { "normal" } else { "rand" };
        let input = golden.values(if call == "normal" { "normal" } else { "u" })?;
        let count = input.len();
        let mut draws = RecordedDraws::new([recorded(call, input)?]);
        let got = compute_density_for_timestep_sampling(scheme, count, logit, mode_scale, &mut draws)?;
        out.push(golden.tolerance("sigma")?.outcome(&name, &got, &golden.values(&name)?));
    }
    Ok(())
}

/// The number after `key` in a description.
fn stated(what: &str, key: &str) -> Any<f64> {
    let (_, rest) = what.split_once(key).ok_or_else(|| format!("the description does not state `{key}`"))?;
    let end = rest.find(|c: char| !(c.is_ascii_digit() || ".-+e".contains(c))).unwrap_or(rest.len());
    Ok(rest[..end].trim_end_matches('.').parse()?)
}

pub(crate) fn sigma_statistics(dir: &Path, file: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, file)?;
    let mut draws = PhiloxDraws::new(20);
    for (index, case) in golden.list("cases")?.iter().enumerate() {
        let config = config(&case["pipeline_kwargs"])?;
        let name = format!("{index:02}.{}_shift{}", config.strategy().name(), config.flow_shift);
        let count = number(case, "n")? as usize;
        // Four times as many draws as the reference's: then what deviates is mostly its own sample.
        let ours = 4 * count;
        let mut sample = pipeline(config)?.sample_timesteps(ours, &mut draws)?;
        let sigma = &mut sample.sigma;
        sigma.sort_unstable_by(f32::total_cmp);
        let mean = sigma.iter().map(|s| f64::from(*s)).sum::<f64>() / ours as f64;
        let deviation = (mean - number(case, "mean")?).abs() / number(case, "mean_standard_error")?;
        let detail = format!("mean {mean:.6} of {ours} draws, in standard errors of the reference's {count}");
        out.push(Outcome::measured(format!("{name}.mean"), deviation, 5.0, detail));
        let quantiles = case["quantiles"].as_object().ok_or("no quantiles")?;
        let mut worst: f64 = 0.0;
        for (level, want) in quantiles {
            let position = (level.parse::<f64>()? * (ours - 1) as f64).round() as usize;
            let got = f64::from(*sigma.get(position).ok_or("a quantile level lies in [0, 1]")?);
            worst = max(worst, (got - want.as_f64().ok_or("a quantile is a number")?).abs());
        }
        let detail = format!("{} quantiles, absolute", quantiles.len());
        out.push(Outcome::measured(format!("{name}.quantiles"), worst, 0.005, detail));
        let method = text(case, "returned_method")?;
        out.push(exact(format!("{name}.method"), sample.method == method, format!("{} for {method}", sample.method)));
    }
    let mix = &golden.json["default_mix_uniform_ratio"];
    if mix.is_object() {
        let (ratio, batches) = (number(mix, "ratio")?, number(mix, "batches")?);
        let default = FlowMatchingConfig::default();
        let sampler = TimestepSampler::new(&default)?;
        let mut uniform = 0.0;
        for _ in 0..batches as usize {
            uniform += f64::from(u8::from(sampler.sample_timesteps(1, &mut draws)?.method == "uniform"));
        }
        let error = (ratio * (1.0 - ratio) / batches).sqrt();
        let worst = (uniform / batches - number(mix, "uniform_fraction")?).abs() / error;
        let detail = format!("{uniform} of {batches} batches, in standard errors");
        out.push(Outcome::measured("mix_uniform_ratio", worst, 7.0, detail));
        out.push(exact("default_ratio", default.mix_uniform_ratio == ratio, format!("{ratio}")));
    }
    Ok(())
}

pub(crate) fn schedule_and_loss(dir: &Path, file: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, file)?;
    let tolerance = golden.tolerance("")?;
    let check = |name: String, got: &Tensor| -> Any<Outcome> {
        let want = golden.tensor(&name)?;
        if got.dims() != want.dims() {
            return Ok(exact(name, false, format!("shape {:?} for {:?}", got.dims(), want.dims())));
        }
        Ok(tolerance.outcome(&name, &got.to_vec::<f32>()?, &want.to_vec::<f32>()?))
    };
    for name in golden.names() {
        if let Some(case) = name.strip_suffix(".x0") {
            let read = |part: &str| golden.tensor(&format!("{case}.{part}"));
            let mixed = LinearInterpolationSchedule.forward(&read("x0")?, &read("x1")?, &read("sigma")?)?;
            out.push(check(format!("{case}.out"), &mixed)?);
        }
        if let Some(steps) = name.strip_prefix("bsmntw_table_") {
            out.push(tolerance.outcome(&name, &bsmntw_table(steps.parse()?), &golden.values(&name)?));
        }
        if let Some(steps) = name.strip_prefix("bsmntw_lookup_").and_then(|n| n.strip_suffix(".sigma")) {
            let config = FlowMatchingConfig {
                num_train_timesteps: steps.parse()?,
                loss_weighting_scheme: "bsmntw".to_owned(),
                ..FlowMatchingConfig::default()
            };
            let got = config.weighting()?.weights(&golden.values(&name)?);
            let name = format!("bsmntw_lookup_{steps}.loss_weight");
            out.push(tolerance.outcome(&name, &got, &golden.values(&name)?));
        }
    }
    for case in golden.list("cases")? {
        let name = text(case, "name")?;
        let read = |part: &str| golden.tensor(&format!("{name}.{part}"));
        let masked = case["returned_loss_mask"].as_bool().unwrap_or(false);
        let (target, tape) = (read("target")?, Tape::new());
        let pred = tape.leaf(&read("pred")?);
        let mut batch = Batch::new(target.clone(), DataType::Image);
        if masked {
            batch = batch.with("loss_mask", read("loss_mask")?);
        }
        let sigma = golden.values(&format!("{name}.sigma"))?;
        let pipeline = pipeline(config(&case["pipeline_kwargs"])?)?;
        let loss = pipeline.compute_loss(&pred, &target, &sigma, Some(&batch))?;
        for (part, got) in [
            ("weighted_loss", &loss.weighted_loss),
            ("average_weighted_loss", &loss.average_weighted_loss),
            ("unweighted_loss", &loss.unweighted_loss),
            ("average_unweighted_loss", &loss.average_unweighted_loss),
            ("loss_weight", &loss.loss_weight),
        ] {
            out.push(check(format!("{name}.{part}"), got)?);
        }
        let gradients = tape.backward(&loss.average_weighted_loss)?;
        out.push(check(format!("{name}.grad_pred"), gradients.of(&pred).ok_or("no gradient of the prediction")?)?);
        let same = match (&loss.loss_mask, masked) {
            (Some(mask), true) => mask.to_vec::<f32>()? == golden.values(&format!("{name}.loss_mask"))?,
            (None, false) => true,
            _ => false,
        };
        out.push(exact(format!("{name}.loss_mask"), same, "handed on untouched"));
    }
    for row in golden.list("determine_task_type")? {
        let (data, prob, draw) = (text(row, "data_type")?, number(row, "i2v_prob")?, number(row, "draw")?);
        let mut draws = RecordedDraws::new([Recorded::Decision(draw)]);
        let task = determine_task_type(&DataType::from(data), prob, &mut draws)?;
        let consumed = 1 - draws.remaining();
        let holds = task.as_str() == text(row, "task_type")? && consumed as f64 == number(row, "draws_consumed")?;
        let detail = format!("{task}, {consumed} draws");
        out.push(exact(format!("task_type.{data}_prob{prob}_draw{draw}"), holds, detail));
    }
    for row in golden.list("constructor_errors")? {
        let kwargs = &row["kwargs"];
        let key = kwargs.as_object().and_then(|o| o.keys().next()).ok_or("no kwargs")?;
        let got = match pipeline(config(kwargs)?) {
            Ok(_) => "no error".to_owned(),
            Err(error) => error.to_string(),
        };
        out.push(exact(format!("error.{key}={}", kwargs[key]), got.contains(key.as_str()), got));
    }
    Ok(())
}

pub(crate) fn time_shifts(dir: &Path, file: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, file)?;
    let tolerance = golden.tolerance("")?;
    let t = golden.values("t")?;
    for case in golden.list("cases")? {
        let name = text(case, "name")?;
        let or = |key: &str, default: f64| case[key].as_f64().unwrap_or(default);
        let (base, most, constant) = (or("base_shift", 0.5), or("max_shift", 1.15), or("constant", 3.0));
        let kind = TimeShift::from_name(text(case, "shift_type")?, base, most, constant);
        let got = time_shift(&t, number(case, "image_seq_len")? as usize, kind);
        out.push(tolerance.outcome(name, &got, &golden.values(name)?));
    }
    for name in golden.names() {
        if let Some(shift) = name.strip_prefix("weight_") {
            let got = get_flow_match_loss_weight(&t, shift.parse()?);
            out.push(tolerance.outcome(&name, &got, &golden.values(&name)?));
        }
    }
    Ok(())
}
