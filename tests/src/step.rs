//! Goldens of whole training steps: every folder `*_step`, by its `case.json`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use flowtape_engine::comm::{Comm, Threads};
use flowtape_engine::platform::HAS_THREADS;
use flowtape_engine::{DType, Device, Gradients, Tape, Tensor};
use flowtape_flowmatch::{
    Batch, DataType, FlowMatchingConfig, FlowMatchingPipeline, FlowModel, ModelAdapter, ModelInputs, ModelOutput,
    Recorded as Draw, RecordedDraws, StepOptions, StepOutput, TaskType, TimestepSample,
};
use flowtape_models::blocks::with_time_projections;
use flowtape_models::ltx2::VIDEO_KEYFRAMES_MASK;
use flowtape_models::{MODELS, Transformer, checkpoint, create_adapter};
use serde_json::Value;

use crate::Outcome;
use crate::golden::{Any, Golden, Tolerance, collect, exact, max, number, relative, text};

/// The folder of a step.
pub(crate) fn check(dir: &Path, _: &str, out: &mut Vec<Outcome>) -> Any<()> {
    step(dir, &Device::cpu(), out)
}

/// All steps on a device. `root` is the folder of the goldens.
pub fn cases_on(root: &Path, device: &Device) -> Vec<Outcome> {
    cases_in(root, device, |_| true)
}

/// The steps on a device whose folders' names are chosen.
pub fn cases_in(root: &Path, device: &Device, chosen: impl Fn(&str) -> bool) -> Vec<Outcome> {
    let mut folders: Vec<_> = std::fs::read_dir(root)
        .map(|entries| entries.flatten().map(|e| e.path()).filter(|p| p.join("case.json").exists()).collect())
        .unwrap_or_default();
    folders.sort();
    let name = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let steps = folders.iter().filter(|p| name(p).ends_with("_step") && chosen(&name(p)));
    steps.flat_map(|folder| collect(&name(folder), |out| step(folder, device, out))).collect()
}

/// Replaces what an adapter prepared: entries that a case removes, and recorded projections by the path of the layer that
/// makes them (`#1`: its second call).
struct Overridden<'a> {
    model: &'a dyn FlowModel,
    removed: Vec<String>,
    given: BTreeMap<String, Tensor>,
    token_ranks: Option<Arc<dyn Comm>>,
}

impl FlowModel for Overridden<'_> {
    fn forward(&self, inputs: &ModelInputs) -> flowtape_flowmatch::Result<ModelOutput> {
        let mut inputs = inputs.clone();
        self.removed.iter().for_each(|name| drop(inputs.remove(name)));
        inputs = inputs.with_optional(ModelInputs::TOKEN_RANKS, self.token_ranks.clone());
        let (given, calls) = (self.given.clone(), RefCell::new(BTreeMap::<String, usize>::new()));
        let probe = move |module: &str| {
            let mut calls = calls.borrow_mut();
            let call = calls.entry(module.to_owned()).or_default();
            *call += 1;
            given.get(&if *call == 1 { module.to_owned() } else { format!("{module}#{}", *call - 1) }).cloned()
        };
        with_time_projections(probe, || self.model.forward(&inputs))
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
    pub(crate) draws: RecordedDraws,
}

impl Recorded {
    pub(crate) fn read(golden: &Golden, prefix: &str, data_type: DataType, method: &str) -> Any<Self> {
        let mut tensors = golden.under(&format!("{prefix}batch."))?;
        // `context_latents.0`, `.1`, … are an ordered list; names sort so up to ten of them.
        let numbered =
            |name: &str| Some(name.rsplit_once('.').filter(|(_, n)| n.parse::<usize>().is_ok())?.0.to_owned());
        let mut lists: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
        for (name, tensor) in tensors.extract_if(.., |name, _| numbered(name).is_some()) {
            lists.entry(numbered(&name).unwrap_or(name)).or_default().push(tensor);
        }
        let batch = Batch { lists, ..Batch::from_tensors(tensors, Some(data_type))? };
        let values = |name: &str| golden.values(&format!("{prefix}{name}"));
        let sample = TimestepSample { sigma: values("sigma")?, timesteps: values("timesteps")?, method: method.into() };
        // The noise of a second stream is drawn by its adapter.
        let audio = format!("{prefix}audio_noise");
        let audio = golden.has(&audio).then(|| golden.tensor(&audio)).transpose()?;
        let draws = RecordedDraws::new(audio.map(Draw::Noise));
        Ok(Self { batch, noise: golden.tensor(&format!("{prefix}noise"))?, sample, draws })
    }

    pub(crate) fn run(
        mut self,
        pipeline: &FlowMatchingPipeline,
        model: &dyn FlowModel,
        task_type: TaskType,
        dtype: DType,
        tape: &Tape,
    ) -> Any<StepOutput> {
        let options = StepOptions { dtype, latents_require_grad: true, ..StepOptions::recorded(tape) };
        let noised = pipeline.with_noise(&self.batch, dtype, task_type, self.sample, self.noise)?;
        Ok(pipeline.step_from(model, &self.batch, noised, 0, &mut self.draws, &options)?)
    }
}

fn step(folder: &Path, device: &Device, out: &mut Vec<Outcome>) -> Any<()> {
    let case: Value = serde_json::from_slice(&std::fs::read(folder.join("case.json"))?)?;
    let adapter = text(&case, "adapter")?;
    if !MODELS.iter().any(|m| m.adapter == adapter) {
        out.push(Outcome::not_built(format!("step ({adapter})")));
        return Ok(());
    }
    let mut model = checkpoint::load(folder, DType::F32, device)?;
    let files = Files::open(folder, device)?;
    let accept = Bounds::read(&case["tolerance"]["accept"])?;
    let plain = Run::new(&case, &*model, &files, BTreeMap::new())?;
    plain.compare(&case, &*model, &files, "", accept, out)?;
    // What a rounding of the frequencies moves is gone when the recorded projections are fed in.
    let mut given = files.intermediates.under("")?;
    let projection = |name: &str| name.ends_with("time_proj") || name.ends_with("timesteps_proj");
    given.retain(|name, _| name.split('#').next().is_some_and(projection));
    let tight = Bounds::read(&case["tolerance"]["with_recorded_timestep_projections"])?;
    let injected = Run::new(&case, &*model, &files, given)?;
    injected.compare(&case, &*model, &files, " (recorded projections)", tight, out)?;
    if files.outputs.has(&format!("extra.{VIDEO_KEYFRAMES_MASK}")) {
        compare_keyframes(&injected, &*model, &files, accept, out)?;
    }
    if files.outputs.has(WITHOUT_FIRST_FRAME) {
        compare_without_first_frame(folder, &case, &*model, &files, accept, out)?;
    }
    model.set_gradient_checkpointing(true);
    let replayed = Run::new(&case, &*model, &files, BTreeMap::new())?;
    out.push(replayed.same_bits(&plain, &*model)?);
    if model.shares_tokens() {
        compare_shared_tokens(&case, &*model, &files, accept, out)?;
    }
    let half = checkpoint::load(folder, DType::BF16, device)?;
    Run::new(&case, &*half, &files, BTreeMap::new())?.compare_half(&case, &*half, &files, out)
}

/// The predictions of the step's inputs with keyframes marked, which some goldens hold beside those of the step.
fn compare_keyframes(
    run: &Run,
    model: &dyn Transformer,
    files: &Files,
    accept: Bounds,
    out: &mut Vec<Outcome>,
) -> Any<()> {
    let mut inputs = run.step.inputs.clone();
    inputs.insert(VIDEO_KEYFRAMES_MASK, files.outputs.tensor(&format!("extra.{VIDEO_KEYFRAMES_MASK}"))?);
    inputs.attach(&Tape::new());
    let predicted = model.forward(&inputs)?;
    let audio = predicted.rest.first().ok_or("no prediction of the sound")?;
    // The film's tokens are latents `[B, C, F, H, W]` by place, the sound's `[B, C, L, M]` by time.
    for (name, got) in [("model_pred", &predicted.sample), ("audio_pred", audio)] {
        let want = files.outputs.tensor(&format!("extra.{name}_keyframes"))?;
        let tokens = match want.rank() {
            5 => want.flatten(2, 4)?.transpose(1, 2)?,
            _ => want.transpose(1, 2)?.flatten(2, 3)?,
        };
        out.push(Outcome::measured(
            format!("{name} with keyframes"),
            relative(got, &tokens)?,
            accept.outputs,
            String::new(),
        ));
    }
    let without = model.parameters_without_gradient(&inputs);
    out.push(exact("all parameters are reached with keyframes", without.is_empty(), without.join(", ")));
    Ok(())
}

/// The step of ranks that share the tokens, each of which runs its blocks again in backward: what they predict, and the sums of their
/// gradients.
fn compare_shared_tokens(
    case: &Value,
    model: &dyn Transformer,
    files: &Files,
    accept: Bounds,
    out: &mut Vec<Outcome>,
) -> Any<()> {
    let device = &files.device;
    if !device.backend().is_host() {
        return Ok(());
    }
    let world = ranks_for(&model.config())?;
    let suffix = &format!(" (tokens on {world} ranks)");
    if !HAS_THREADS {
        out.push(Outcome::skipped(
            format!("step{suffix}"),
            "ranks are threads, of which this platform has no more than one",
        ));
        return Ok(());
    }
    let ranks = Threads::run(world, device, |comm| {
        Run::among(Some(comm), case, model, files, BTreeMap::new()).map_err(|error| error.to_string())
    });
    let mut ranks = ranks.into_iter().collect::<Result<Vec<Run>, String>>()?.into_iter();
    let mut sum = ranks.next().ok_or("no rank")?;
    for mut rank in ranks {
        let same = rank.step.model_pred().to_bytes()? == sum.step.model_pred().to_bytes()?;
        out.push(exact(format!("all ranks predict the same{suffix}"), same, String::new()));
        // Each rank has latents of its own.
        let [of_rank, of_sum] = [&rank, &sum].map(|run| run.step.noisy_latents.var());
        let noisy = of_rank.and_then(|var| rank.gradients.remove(var)).ok_or("no gradient of the noisy latents")?;
        rank.gradients.insert(of_sum.ok_or("no variable")?, noisy);
        sum.gradients.add(rank.gradients)?;
    }
    sum.compare(case, model, files, suffix, accept, out)
}

/// As few ranks as can share out all kinds of heads of a model.
fn ranks_for(config: &Value) -> Any<usize> {
    let heads = |(key, value): (&String, &Value)| value.as_u64().filter(|_| key.ends_with("num_attention_heads"));
    let kinds: Vec<u64> = config.as_object().into_iter().flatten().filter_map(heads).collect();
    let divides_all = |world: &u64| !kinds.is_empty() && kinds.iter().all(|heads| heads.is_multiple_of(*world));
    let world = (2..=kinds.iter().copied().max().unwrap_or(1)).find(divides_all);
    Ok(world.ok_or_else(|| format!("heads of {kinds:?} that ranks can share out"))? as usize)
}

/// The loss of image-to-video without the clean frame, which some goldens hold beside that of the step.
const WITHOUT_FIRST_FRAME: &str = "extra.unweighted_loss_without_first_frame";

/// What a gradient of a mean over all frames is of the mean over all but the first.
fn without_first_frame(grad: &Tensor) -> Any<Tensor> {
    let frames = grad.dim(2)?;
    let share = frames as f64 / (frames - 1) as f64;
    Ok(grad.narrow(2, 1, frames - 1)?.mul_scalar(share)?.pad(2, 1, 0)?)
}

/// The step whose clean first frame is not trained: its loss and gradients are the recorded ones but for the number of frames
/// that the mean is taken of.
fn compare_without_first_frame(
    folder: &Path,
    case: &Value,
    model: &dyn Transformer,
    files: &Files,
    accept: Bounds,
    out: &mut Vec<Outcome>,
) -> Any<()> {
    let mut case = case.clone();
    case["adapter_kwargs"]["train_first_frame"] = false.into();
    let Run { step, gradients, .. } = Run::new(&case, model, files, BTreeMap::new())?;
    let frames = step.model_pred().dim(2)? as f64;
    let share = frames / (frames - 1.0);
    let loss = relative(&step.loss.mul_scalar(share)?, &files.outputs.tensor(WITHOUT_FIRST_FRAME)?)?;
    out.push(Outcome::measured("loss without the first frame", loss, accept.outputs, String::new()));
    let wanted = Golden::tensors(folder, "grads_without_first_frame")?.under("")?;
    let mut worst = (0.0, String::new());
    for (name, want) in &wanted {
        let parameter = model.params().get(name).ok_or_else(|| format!("no parameter {name}"))?;
        let got = gradients.of(parameter).ok_or_else(|| format!("no gradient of {name}"))?;
        let off = relative(&got.mul_scalar(share)?, want)?;
        if off >= worst.0 {
            worst = (off, name.clone());
        }
    }
    let name = format!("grads of {} parameters without the first frame", wanted.len());
    out.push(Outcome::measured(name, worst.0, accept.grads, format!("worst: {}", worst.1)));
    Ok(())
}

/// The recorded step of a folder with any model that takes its batch: what it came to, and its gradients.
///
/// # Errors
/// When a file can't be read or the step fails.
pub fn recorded(folder: &Path, model: &dyn Transformer) -> Any<(StepOutput, Gradients)> {
    let case: Value = serde_json::from_slice(&std::fs::read(folder.join("case.json"))?)?;
    let device = model.params().iter().next().map_or_else(Device::cpu, |parameter| parameter.device().clone());
    let Run { step, gradients, .. } = Run::new(&case, model, &Files::open(folder, &device)?, BTreeMap::new())?;
    Ok((step, gradients))
}

/// What bf16's deviation may be of f32's. `f32_vs_f64_max_relative_deviation` is what roundings of 2^-24 come to in the
/// reference; at bf16's 2^-9 the same roundings come to 2^15 times as much. Weights and inputs, which f32 holds exactly, are
/// rounded as well: about as many roundings again.
const HALF: f64 = 2.0 * (1 << 15) as f64;

#[derive(Clone, Copy)]
struct Bounds {
    outputs: f64,
    grads: f64,
}

impl Bounds {
    fn read(json: &Value) -> Any<Self> {
        Ok(Self { outputs: number(json, "outputs")?, grads: number(json, "grads")? })
    }
}

struct Files {
    device: Device,
    inputs: Golden,
    prepared: Golden,
    outputs: Golden,
    grads: Golden,
    input_grads: Golden,
    intermediates: Golden,
}

impl Files {
    fn open(folder: &Path, device: &Device) -> Any<Self> {
        let open = |name| Ok::<_, Box<dyn std::error::Error>>(Golden::tensors(folder, name)?.on(device));
        Ok(Self {
            device: device.clone(),
            inputs: open("inputs")?,
            prepared: open("prepared")?,
            outputs: open("outputs")?,
            grads: open("grads")?,
            input_grads: open("input_grads")?,
            intermediates: open("intermediates")?,
        })
    }
}

/// A step of ours and its gradients.
struct Run {
    step: StepOutput,
    grad_pred: Tensor,
    gradients: Gradients,
}

impl Run {
    fn new(case: &Value, model: &dyn Transformer, files: &Files, given: BTreeMap<String, Tensor>) -> Any<Self> {
        Self::among(None, case, model, files, given)
    }

    /// The same on one of several ranks that share the tokens.
    fn among(
        token_ranks: Option<Arc<dyn Comm>>,
        case: &Value,
        model: &dyn Transformer,
        files: &Files,
        given: BTreeMap<String, Tensor>,
    ) -> Any<Self> {
        let pipeline = pipeline(case, create_adapter(text(case, "adapter")?, &kwargs(case, "adapter_kwargs"))?)?;
        let non_tensors = kwargs(case, "prepared_non_tensors");
        let removed = non_tensors.iter().filter(|(_, v)| v.is_null()).map(|(k, _)| k.clone()).collect();
        let task = [TaskType::T2V, TaskType::I2V].into_iter().find(|t| case["task_type"] == t.as_str());
        let recorded =
            Recorded::read(&files.inputs, "", text(case, "data_type")?.into(), text(case, "sampling_method")?)?;
        let sigma = recorded.sample.sigma.clone();
        let tape = Tape::new();
        let dtype = model.params().iter().next().map_or(DType::F32, |parameter| parameter.dtype());
        let overridden = Overridden { model, removed, given, token_ranks };
        let step = recorded.run(&pipeline, &overridden, task.ok_or("a task")?, dtype, &tape)?;
        let tail = Tape::new();
        let pred = tail.leaf(step.model_pred());
        let loss = pipeline.compute_loss(&pred, &step.target, &sigma, None)?.average_weighted_loss;
        let grad_pred = tail.backward(&loss)?.of(&pred).ok_or("no gradient of the prediction")?.clone();
        Ok(Self { gradients: tape.backward(&step.loss)?, step, grad_pred })
    }

    fn compare(
        &self,
        case: &Value,
        model: &dyn Transformer,
        files: &Files,
        suffix: &str,
        bounds: Bounds,
        out: &mut Vec<Outcome>,
    ) -> Any<()> {
        let Self { step, grad_pred, gradients } = self;
        let mut push = |name: &str, worst: f64, bound: f64, detail: String| {
            out.push(Outcome::measured(format!("{name}{suffix}"), worst, bound, detail));
        };
        let mut worst = 0.0;
        for (name, want) in files.prepared.under("")? {
            // The reference hands targets of further streams on among the inputs.
            let got = match name.strip_prefix('_').and_then(|name| name.strip_suffix("_target")) {
                Some(stream) => &step.streams.get(stream).ok_or_else(|| format!("no stream {stream}"))?.target,
                None => step.inputs.tensor(&name)?,
            };
            worst = max(worst, relative(got, &want)?);
        }
        // Data movement is exact; the timestep is divided, which may round once.
        push("prepared inputs", worst, 2f64.powi(-23), String::new());
        let outputs = [
            ("noisy_latents", &step.noisy_latents),
            ("target", &step.target),
            ("model_pred", step.model_pred()),
            ("unweighted_loss", &step.parts.unweighted_loss),
            ("loss_weight", &step.parts.loss_weight),
            ("weighted_loss", &step.parts.weighted_loss),
            ("average_unweighted_loss", &step.parts.average_unweighted_loss),
            ("average_weighted_loss", &step.loss),
        ];
        let outputs = outputs.map(|(name, tensor)| (name.to_owned(), tensor));
        let auxiliary = step.auxiliary_losses.iter().map(|(name, loss)| (format!("aux.{name}"), loss));
        for (name, got) in outputs.into_iter().chain(auxiliary) {
            push(&name, relative(got, &files.outputs.tensor(&name)?)?, bounds.outputs, String::new());
        }
        let (mut worst, mut count) = (0.0, 0);
        for (name, want) in case["metrics"].as_object().into_iter().flatten() {
            let Some(want) = want.as_f64() else { continue };
            let got = step.metrics.get_number(name).unwrap_or(f64::NAN);
            worst = max(worst, Tolerance { rtol: 1.0, atol: 1e-6 }.worst(&[got], &[want]));
            count += 1;
        }
        push("metrics", worst, bounds.outputs, format!("{count} metrics"));
        let noisy = gradients.of(&step.noisy_latents).ok_or("no gradient of the noisy latents")?;
        for (name, got) in [("model_pred", grad_pred), ("noisy_latents", noisy)] {
            let want = files.input_grads.tensor(name)?;
            let mut worst = relative(got, &want)?;
            if name == "model_pred" && files.outputs.has(WITHOUT_FIRST_FRAME) {
                // The generator ran backward from both losses, and PyTorch added the second gradient to the first.
                worst = worst.min(relative(&got.add(&without_first_frame(got)?)?, &want)?);
            }
            push(&format!("grad {name}"), worst, bounds.grads, String::new());
        }

        let zero: Vec<String> = serde_json::from_value(case["mathematically_zero_gradients"].clone())?;
        let mut without: Vec<String> = serde_json::from_value(case["parameters_without_gradient"].clone())?;
        let mut ours = model.parameters_without_gradient(&step.inputs);
        without.sort();
        ours.sort();
        push("parameters without gradient", f64::from(u8::from(ours != without)), 0.0, format!("{}", without.len()));
        model.params().check_gradients(gradients, &without)?;
        let wanted = files.grads.under("")?;
        let (mut worst, mut at) = (0.0, String::new());
        for parameter in model.params().iter().filter(|p| !without.iter().any(|n| n == p.path())) {
            let name = parameter.path();
            let want = wanted.get(name).ok_or_else(|| format!("no golden gradient of {name}"))?;
            let got = gradients.of(parameter).ok_or_else(|| format!("no gradient of {name}"))?;
            let deviation = if zero.iter().any(|n| n == name) {
                got.to_vec::<f64>()?.into_iter().fold(0.0, |m, v| max(m, v.abs()))
            } else {
                relative(got, want)?
            };
            if deviation >= worst {
                (worst, at) = (deviation, name.to_owned());
            }
        }
        push(&format!("grads of {} parameters", wanted.len()), worst, bounds.grads, format!("worst: {at}"));
        Ok(())
    }

    /// The step in bf16, weights and activations, against the goldens, as far as the reference's f32 is from f64.
    fn compare_half(&self, case: &Value, model: &dyn Transformer, files: &Files, out: &mut Vec<Outcome>) -> Any<()> {
        let Self { step, gradients, .. } = self;
        let f32_off = &case["f32_vs_f64_max_relative_deviation"];
        let mut push = |name: &str, worst: f64, f32_off: f64, detail: String| {
            out.push(Outcome::measured(format!("{name} (bf16)"), worst, HALF * f32_off, detail));
        };
        let pred = number(f32_off, "model_pred")?;
        push("model_pred", relative(step.model_pred(), &files.outputs.tensor("model_pred")?)?, pred, String::new());
        let loss = relative(&step.loss, &files.outputs.tensor("average_weighted_loss")?)?;
        push("average_weighted_loss", loss, pred, "bound of model_pred".into());
        let noisy = gradients.of(&step.noisy_latents).ok_or("no gradient of the noisy latents")?;
        let worst = relative(noisy, &files.input_grads.tensor("noisy_latents")?)?;
        // The worst element of one tensor is one draw, at times a lucky one: then the median of the parameters, whose gradients
        // came the same way, says better what roundings come to.
        let median = number(f32_off, "median_param_grad")?;
        let noisy_off = number(f32_off, "noisy_latents_grad")?.max(median);
        push("grad noisy_latents", worst, noisy_off, String::new());

        let zero: Vec<String> = serde_json::from_value(case["mathematically_zero_gradients"].clone())?;
        let top = |t: &Tensor| -> Any<f64> { Ok(t.to_vec::<f64>()?.into_iter().fold(0.0, |m, v| max(m, v.abs()))) };
        let (mut deviations, mut of_zero, mut largest) = (Vec::new(), 0.0, 0.0);
        for (name, want) in files.grads.under("")? {
            let parameter = model.params().get(&name).ok_or_else(|| format!("no parameter {name}"))?;
            let got = gradients.of(parameter).ok_or_else(|| format!("no gradient of {name}"))?;
            largest = max(largest, top(&want)?);
            if zero.contains(&name) {
                of_zero = max(of_zero, top(got)?);
            } else {
                deviations.push((relative(got, &want)?, name));
            }
        }
        deviations.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (worst, name) = deviations.last().cloned().ok_or("no gradients")?;
        let count = deviations.len();
        let worst_off = number(&f32_off["worst_param_grad"], "value")?;
        push(&format!("grads of {count} parameters"), worst, worst_off, format!("worst: {name}"));
        push("grads, median", deviations[count / 2].0, median, String::new());
        push("grads that are zero", of_zero / largest, worst_off, format!("{} of the largest", zero.len()));
        let bf16 = |t: &Tensor| t.dtype() == DType::BF16;
        // Where several gradients of one parameter or leaf meet, their sum is f32.
        let summed = |t: &Tensor| t.dtype() == DType::F32;
        let narrow = bf16(step.model_pred())
            && gradients.iter().all(|(_, g)| bf16(g) || summed(g))
            && gradients.iter().any(|(_, g)| bf16(g));
        let wide = [&step.loss, &step.target, step.inputs.tensor("timestep").or(step.inputs.tensor("timesteps"))?];
        let wide = wide.iter().all(|t| t.dtype() == DType::F32);
        out.push(exact(
            "dtypes (bf16)",
            narrow && wide,
            "loss, target, times and sums of gradients in f32, the rest in bf16",
        ));
        Ok(())
    }

    /// Whether loss and all gradients have the bits of another run of the model.
    fn same_bits(&self, other: &Self, model: &dyn Transformer) -> Any<Outcome> {
        let mut different = Vec::new();
        if self.step.loss.to_bytes()? != other.step.loss.to_bytes()? {
            different.push("loss");
        }
        for parameter in model.params().iter() {
            let bytes = |run: &Self| run.gradients.of(parameter).map(Tensor::to_bytes).transpose();
            if bytes(self)? != bytes(other)? {
                different.push(parameter.path());
            }
        }
        Ok(exact("gradient checkpointing keeps the bits", different.is_empty(), different.join(", ")))
    }
}
