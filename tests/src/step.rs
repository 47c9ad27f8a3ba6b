//! Goldens of whole training steps: every folder `*_step`, by its `case.json`.

use std::path::Path;

use flowtape_engine::{DType, Device, Tape, Tensor};
use flowtape_flowmatch::{
    Batch, DataType, FlowMatchingConfig, FlowMatchingPipeline, FlowModel, ModelAdapter, ModelInputs, ModelOutput,
    RecordedDraws, StepOptions, StepOutput, TaskType, TimestepSample,
};
use flowtape_models::{MODELS, Transformer, checkpoint, create_adapter};
use serde_json::Value;

use crate::Outcome;
use crate::golden::{Any, Golden, Tolerance, collect, max, number, relative, text};

/// All steps. `root` is the folder of the goldens.
pub fn cases(root: &Path) -> Vec<Outcome> {
    let mut folders: Vec<_> = std::fs::read_dir(root)
        .map(|entries| entries.flatten().map(|e| e.path()).filter(|p| p.join("case.json").exists()).collect())
        .unwrap_or_default();
    folders.sort();
    let name = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let steps = folders.iter().filter(|p| name(p).ends_with("_step"));
    steps.flat_map(|folder| collect(&name(folder), |out| step(folder, out))).collect()
}

/// Replaces what an adapter prepared: entries that a case removes, and recorded projections.
struct Overridden<'a> {
    model: &'a dyn FlowModel,
    removed: Vec<String>,
    given: Vec<(&'static str, Tensor)>,
}

impl FlowModel for Overridden<'_> {
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<ModelOutput> {
        let mut inputs = inputs.clone();
        self.removed.iter().for_each(|name| drop(inputs.remove(name)));
        let carrier = inputs.tensor("hidden_states")?.clone();
        self.given.iter().for_each(|(name, tensor)| inputs.insert(name, tensor.on_tape_of(&carrier)));
        self.model.forward(&inputs)
    }
}

fn kwargs(case: &Value, key: &str) -> serde_json::Map<String, Value> {
    case[key].as_object().cloned().unwrap_or_default()
}

/// A pipeline of the case's arguments around one of our adapters.
pub(crate) fn pipeline(case: &Value, adapter: impl ModelAdapter + 'static) -> Any<FlowMatchingPipeline> {
    let config: FlowMatchingConfig = serde_json::from_value(Value::Object(kwargs(case, "pipeline_kwargs")))?;
    Ok(FlowMatchingPipeline::new(config, adapter)?)
}

/// The batch and the draws of one step, recorded under a prefix.
pub(crate) struct Recorded {
    pub(crate) batch: Batch,
    pub(crate) noise: Tensor,
    pub(crate) sample: TimestepSample,
}

impl Recorded {
    pub(crate) fn read(golden: &Golden, prefix: &str, data_type: DataType, method: &str) -> Any<Self> {
        let batch = Batch::from_tensors(golden.under(&format!("{prefix}batch."))?, Some(data_type))?;
        let values = |name: &str| golden.values(&format!("{prefix}{name}"));
        let sample = TimestepSample { sigma: values("sigma")?, timesteps: values("timesteps")?, method: method.into() };
        Ok(Self { batch, noise: golden.tensor(&format!("{prefix}noise"))?, sample })
    }

    pub(crate) fn run(
        self,
        pipeline: &FlowMatchingPipeline,
        model: &dyn FlowModel,
        task_type: TaskType,
        tape: &Tape,
    ) -> Any<StepOutput> {
        let options = StepOptions { latents_require_grad: true, ..StepOptions::recorded(tape) };
        let noised = pipeline.with_noise(&self.batch, DType::F32, task_type, self.sample, self.noise)?;
        Ok(pipeline.step_from(model, &self.batch, noised, 0, &mut RecordedDraws::default(), &options)?)
    }
}

fn step(folder: &Path, out: &mut Vec<Outcome>) -> Any<()> {
    let case: Value = serde_json::from_slice(&std::fs::read(folder.join("case.json"))?)?;
    let adapter = text(&case, "adapter")?;
    if !MODELS.iter().any(|m| m.adapter == adapter) {
        out.push(Outcome::unbuilt(format!("step ({adapter})")));
        return Ok(());
    }
    let model = checkpoint::load(folder, DType::F32, &Device::cpu())?;
    let files = Files::open(folder)?;
    let bounds = &case["tolerance"]["accept"];
    compare(&case, &*model, &files, Vec::new(), "", (number(bounds, "outputs")?, number(bounds, "grads")?), out)?;
    // What a rounding of the frequencies moves is gone when the recorded projections are fed in.
    let mut given = Vec::new();
    for (name, tensor) in
        [("timestep_proj", "time_text_embed.time_proj"), ("guidance_proj", "time_text_embed.time_proj#1")]
    {
        if files.intermediates.has(tensor) {
            given.push((name, files.intermediates.tensor(tensor)?));
        }
    }
    let bounds = &case["tolerance"]["with_recorded_timestep_projections"];
    let bounds = (number(bounds, "outputs")?, number(bounds, "grads")?);
    compare(&case, &*model, &files, given, " (recorded projections)", bounds, out)
}

struct Files {
    inputs: Golden,
    prepared: Golden,
    outputs: Golden,
    grads: Golden,
    input_grads: Golden,
    intermediates: Golden,
}

impl Files {
    fn open(folder: &Path) -> Any<Self> {
        let open = |name| Golden::tensors(folder, name);
        Ok(Self {
            inputs: open("inputs")?,
            prepared: open("prepared")?,
            outputs: open("outputs")?,
            grads: open("grads")?,
            input_grads: open("input_grads")?,
            intermediates: open("intermediates")?,
        })
    }
}

#[allow(clippy::too_many_arguments)] // a test's table
fn compare(
    case: &Value,
    model: &dyn Transformer,
    files: &Files,
    given: Vec<(&'static str, Tensor)>,
    suffix: &str,
    (output_bound, grad_bound): (f64, f64),
    out: &mut Vec<Outcome>,
) -> Any<()> {
    let pipeline = pipeline(case, create_adapter(text(case, "adapter")?, &kwargs(case, "adapter_kwargs"))?)?;
    let non_tensors = kwargs(case, "prepared_non_tensors");
    let removed = non_tensors.iter().filter(|(_, v)| v.is_null()).map(|(k, _)| k.clone()).collect();
    let tape = Tape::new();
    let task = [TaskType::T2V, TaskType::I2V].into_iter().find(|t| case["task_type"] == t.as_str()).ok_or("a task")?;
    let recorded = Recorded::read(&files.inputs, "", text(case, "data_type")?.into(), text(case, "sampling_method")?)?;
    let sigma = recorded.sample.sigma.clone();
    let overridden = Overridden { model, removed, given };
    let step = recorded.run(&pipeline, &overridden, task, &tape)?;

    let mut push = |name: String, worst: f64, bound: f64, detail: String| {
        out.push(Outcome { case: format!("{name}{suffix}"), worst, bound, detail });
    };
    let mut worst = 0.0;
    for (name, want) in files.prepared.under("")? {
        worst = max(worst, relative(step.inputs.tensor(&name)?, &want)?);
    }
    // Data movement is exact; the timestep is divided, which may round once.
    push("prepared inputs".into(), worst, 2f64.powi(-23), String::new());
    let outputs = [
        ("noisy_latents", &step.noisy_latents),
        ("target", &step.target),
        ("model_pred", step.model_pred()),
        ("unweighted_loss", &step.parts.unweighted_loss),
        ("loss_weight", &step.parts.loss_weight),
        ("weighted_loss", &step.parts.weighted_loss),
        ("average_unweighted_loss", &step.parts.average_unweighted_loss),
        ("average_weighted_loss", &step.parts.average_weighted_loss),
    ];
    for (name, got) in outputs {
        push(name.into(), relative(got, &files.outputs.tensor(name)?)?, output_bound, String::new());
    }
    let (mut worst, mut count) = (0.0, 0);
    for (name, want) in case["metrics"].as_object().into_iter().flatten() {
        let Some(want) = want.as_f64() else { continue };
        let got = step.metrics.get_number(name).unwrap_or(f64::NAN);
        worst = max(worst, Tolerance { rtol: 1.0, atol: 1e-6 }.worst(&[got], &[want]));
        count += 1;
    }
    push("metrics".into(), worst, output_bound, format!("{count} metrics"));

    let tail = Tape::new();
    let pred = tail.leaf(step.model_pred());
    let loss = pipeline.compute_loss(&pred, &step.target, &sigma, None)?.average_weighted_loss;
    let grad = tail.backward(&loss)?;
    let grad = grad.of(&pred).ok_or("no gradient of the prediction")?;
    push(
        "grad model_pred".into(),
        relative(grad, &files.input_grads.tensor("model_pred")?)?,
        grad_bound,
        String::new(),
    );
    let gradients = tape.backward(&step.loss)?;
    let noisy = gradients.of(&step.noisy_latents).ok_or("no gradient of the noisy latents")?;
    push(
        "grad noisy_latents".into(),
        relative(noisy, &files.input_grads.tensor("noisy_latents")?)?,
        grad_bound,
        String::new(),
    );

    let zero: Vec<&str> =
        case["mathematically_zero_gradients"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let without: Vec<String> = serde_json::from_value(case["parameters_without_gradient"].clone())?;
    model.params().check_gradients(&gradients, &without)?;
    let wanted = files.grads.under("")?;
    let (mut worst, mut at) = (0.0, String::new());
    for (name, parameter) in model.params().iter() {
        let Some(want) = wanted.get(name) else {
            if !without.iter().any(|n| n == name) {
                return Err(format!("no golden gradient of {name}").into());
            }
            continue;
        };
        let got = gradients.of(parameter).ok_or_else(|| format!("no gradient of {name}"))?;
        let deviation = if zero.contains(&name) {
            got.to_vec::<f64>()?.into_iter().fold(0.0, |m, v| max(m, v.abs()))
        } else {
            relative(got, want)?
        };
        if deviation >= worst {
            (worst, at) = (deviation, name.to_owned());
        }
    }
    push(format!("grads of {} parameters", wanted.len()), worst, grad_bound, format!("worst: {at}"));
    Ok(())
}
