//! One training step: from a batch to a loss.

use std::collections::BTreeMap;

use flowtape_engine::{DType, Tape, Tensor};
use tracing::{Level, debug, enabled};

use crate::log::LossValues;
use crate::metrics::Range;
use crate::schedule::per_sample;
use crate::{
    Batch, DataType, Draws, Error, FlowMatchingConfig, FlowMatchingContext, FlowModel, LinearInterpolationSchedule,
    LossWeighting, Metrics, ModelAdapter, ModelInputs, NoisedStream, Prediction, Result, TaskType, TimestepSample,
    TimestepSampler, log, task,
};

/// Flow-matching training for any model behind a [`ModelAdapter`].
///
/// ```
/// use flowtape_engine::{DType, Device, Tensor};
/// use flowtape_flowmatch::{
///     Batch, DataType, Draws, FlowMatchingConfig, FlowMatchingContext, FlowMatchingPipeline, FlowModel, ModelAdapter,
///     ModelInputs, ModelOutput, PhiloxDraws, Result, StepOptions,
/// };
///
/// struct Zero;
/// impl FlowModel for Zero {
///     fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput> {
///         Ok(inputs.tensor("x")?.mul_scalar(0.0)?.into())
///     }
/// }
/// struct Plain;
/// impl ModelAdapter for Plain {
///     fn name(&self) -> &str {
///         "plain"
///     }
///     fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, _: &mut dyn Draws) -> Result<ModelInputs> {
///         Ok(ModelInputs::new().with("x", cx.noisy_latents.clone()))
///     }
/// }
/// # fn main() -> Result<()> {
/// let pipeline = FlowMatchingPipeline::new(FlowMatchingConfig::default(), Plain)?;
/// let latents = Tensor::zeros(&[2, 1, 4, 4], DType::F32, &Device::cpu())?;
/// let batch = Batch::new(latents, DataType::Image);
/// let out = pipeline.step(&Zero, &batch, 0, &mut PhiloxDraws::new(7), &StepOptions::default())?;
/// assert!(out.loss.item()? > 0.0);
/// # Ok(())
/// # }
/// ```
pub struct FlowMatchingPipeline {
    config: FlowMatchingConfig,
    adapter: Box<dyn ModelAdapter>,
    sampler: TimestepSampler,
    weighting: LossWeighting,
    schedule: LinearInterpolationSchedule,
}

impl std::fmt::Debug for FlowMatchingPipeline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlowMatchingPipeline")
            .field("adapter", &self.adapter.name())
            .field("config", &self.config)
            .finish()
    }
}

/// How a step runs.
#[derive(Clone, Debug)]
pub struct StepOptions {
    /// The compute dtype of latents and model inputs. Noise, target and loss are f32 in any case.
    pub dtype: DType,
    /// Where the step is recorded; without a tape nothing is.
    pub tape: Option<Tape>,
    /// Whether the noisy latents are a leaf of the tape, so that `backward` gives their gradient.
    pub latents_require_grad: bool,
    /// Whether [`StepOutput::metrics`] is filled, which waits for the device.
    pub collect_metrics: bool,
    /// Whether a loss that is NaN or above 100 is an error, which waits for the device.
    pub check_loss: bool,
}

impl Default for StepOptions {
    fn default() -> Self {
        Self { dtype: DType::F32, tape: None, latents_require_grad: false, collect_metrics: true, check_loss: true }
    }
}

impl StepOptions {
    /// The defaults, recorded on `tape`.
    pub fn recorded(tape: &Tape) -> Self {
        Self { tape: Some(tape.clone()), ..Self::default() }
    }
}

/// A batch with its noise, before the model sees it.
#[derive(Clone, Debug)]
pub struct Noised {
    /// The task of the whole batch.
    pub task_type: TaskType,
    /// σ and timesteps, one per sample.
    pub sample: TimestepSample,
    /// `ε`, f32 in the shape of the latents.
    pub noise: Tensor,
    /// `x_t`, f32 in the shape of the latents.
    pub noisy_latents: Tensor,
}

/// A loss in all its forms.
#[derive(Clone, Debug)]
pub struct Loss {
    /// Per element, f32 in the shape of the target.
    pub weighted_loss: Tensor,
    /// Its mean over all elements, 0-d.
    pub average_weighted_loss: Tensor,
    /// Per element, without weights.
    pub unweighted_loss: Tensor,
    /// Its mean over all elements, 0-d.
    pub average_unweighted_loss: Tensor,
    /// `[B, 1, …]` f32.
    pub loss_weight: Tensor,
    /// The same on the host, one per sample.
    pub weights: Vec<f32>,
    /// The batch's `loss_mask`, handed on and never applied.
    pub loss_mask: Option<Tensor>,
}

/// What a step gives.
#[derive(Clone, Debug)]
pub struct StepOutput {
    /// The loss to differentiate, 0-d f32: the average weighted loss and all auxiliary losses.
    pub loss: Tensor,
    /// The loss of the main prediction in all its forms.
    pub parts: Loss,
    /// Auxiliary losses of the adapter, by name, 0-d.
    pub auxiliary_losses: Vec<(String, Tensor)>,
    /// σ, timesteps, noise and task.
    pub noised: Noised,
    /// `x_t` as the adapter got it: in the compute dtype, on the tape, a leaf where asked for.
    pub noisy_latents: Tensor,
    /// Further streams of the batch with their noise.
    pub streams: BTreeMap<String, NoisedStream>,
    /// What the model was called with.
    pub inputs: ModelInputs,
    /// What the adapter made of its output; `velocity` is the prediction.
    pub prediction: Prediction,
    /// The velocity `ε - x_0`, f32.
    pub target: Tensor,
    /// NeMo's metrics and the auxiliary losses, or nothing where they were not asked for.
    pub metrics: Metrics,
}

impl StepOutput {
    /// The per-element weighted loss.
    pub fn weighted_loss(&self) -> &Tensor {
        &self.parts.weighted_loss
    }

    /// The batch's loss mask.
    pub fn loss_mask(&self) -> Option<&Tensor> {
        self.parts.loss_mask.as_ref()
    }

    /// The prediction, in the shape of the latents.
    pub fn model_pred(&self) -> &Tensor {
        &self.prediction.velocity
    }
}

impl FlowMatchingPipeline {
    /// A pipeline of a valid configuration. The configuration's `adapter_type` is not looked at: `adapter` is it.
    ///
    /// # Errors
    /// When a value of the configuration does not fit.
    pub fn new(config: FlowMatchingConfig, adapter: impl ModelAdapter + 'static) -> Result<Self> {
        let sampler = TimestepSampler::new(&config)?;
        let (weighting, schedule) = (config.weighting()?, LinearInterpolationSchedule);
        Ok(Self { config, adapter: Box::new(adapter), sampler, weighting, schedule })
    }

    /// The configuration.
    pub fn config(&self) -> &FlowMatchingConfig {
        &self.config
    }

    /// The adapter.
    pub fn adapter(&self) -> &dyn ModelAdapter {
        self.adapter.as_ref()
    }

    /// The weighting.
    pub fn weighting(&self) -> &LossWeighting {
        &self.weighting
    }

    /// σ and timesteps of `batch_size` samples.
    ///
    /// # Errors
    /// When the draws run out.
    pub fn sample_timesteps(&self, batch_size: usize, draws: &mut dyn Draws) -> Result<TimestepSample> {
        self.sampler.sample_timesteps(batch_size, draws)
    }

    /// The task of a batch of `data_type`; see [`task::determine_task_type`].
    ///
    /// # Errors
    /// When the draws run out.
    pub fn determine_task_type(&self, data_type: &DataType, draws: &mut dyn Draws) -> Result<TaskType> {
        task::determine_task_type(data_type, self.config.i2v_prob, draws)
    }

    /// Draws the task, σ and the noise of a batch, and mixes `x_t`.
    ///
    /// # Errors
    /// When the draws run out or the latents have no batch axis.
    pub fn add_noise(&self, batch: &Batch, dtype: DType, draws: &mut dyn Draws) -> Result<Noised> {
        let task_type = self.determine_task_type(&batch.data_type, draws)?;
        let sample = self.sample_timesteps(batch.size()?, draws)?;
        let noise = draws.noise(batch.latents.dims(), batch.latents.device())?;
        self.with_noise(batch, dtype, task_type, sample, noise)
    }

    /// The same with σ and noise given: to replay a step.
    ///
    /// # Errors
    /// When there is not one σ per sample, or the noise has another shape than the latents.
    pub fn with_noise(
        &self,
        batch: &Batch,
        dtype: DType,
        task_type: TaskType,
        sample: TimestepSample,
        noise: Tensor,
    ) -> Result<Noised> {
        let clean = batch.latents.detach().to_dtype(dtype)?.to_dtype(DType::F32)?;
        let sigma = host_values(&sample.sigma, &batch.latents)?;
        let noisy_latents = self.schedule.forward(&clean, &noise, &sigma)?;
        Ok(Noised { task_type, sample, noise, noisy_latents })
    }

    /// The loss of a prediction, both `[B, …]`, at one `sigma` per sample; f32 inside.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn compute_loss(
        &self,
        model_pred: &Tensor,
        target: &Tensor,
        sigma: &[f32],
        batch: Option<&Batch>,
    ) -> Result<Loss> {
        let unweighted_loss = self.adapter.compute_loss(model_pred, target)?;
        let weights = self.weighting.weights(sigma);
        let loss_weight = per_sample(&host_values(&weights, target)?, &unweighted_loss)?;
        let average_unweighted_loss = unweighted_loss.mean_all()?;
        // Without weights there is nothing to multiply: the same bits in less time.
        let (weighted_loss, average_weighted_loss) = match self.weighting {
            LossWeighting::Off => (unweighted_loss.clone(), average_unweighted_loss.clone()),
            _ => {
                let weighted = unweighted_loss.mul(&loss_weight)?;
                let average = weighted.mean_all()?;
                (weighted, average)
            }
        };
        Ok(Loss {
            weighted_loss,
            average_weighted_loss,
            unweighted_loss,
            average_unweighted_loss,
            loss_weight,
            weights,
            loss_mask: batch.and_then(|b| b.get("loss_mask")).cloned(),
        })
    }

    /// One step: draws, noise, the model, the loss. `global_step` decides what is logged.
    ///
    /// # Errors
    /// When the batch does not fit the adapter or the model, or the loss exploded and `check_loss` is set.
    pub fn step(
        &self,
        model: &dyn FlowModel,
        batch: &Batch,
        global_step: u64,
        draws: &mut dyn Draws,
        options: &StepOptions,
    ) -> Result<StepOutput> {
        let noised = self.add_noise(batch, options.dtype, draws)?;
        self.step_from(model, batch, noised, global_step, draws, options)
    }

    /// The rest of a step whose noise is given; `draws` serves further streams and the adapter.
    ///
    /// # Errors
    /// Those of [`Self::step`].
    pub fn step_from(
        &self,
        model: &dyn FlowModel,
        batch: &Batch,
        noised: Noised,
        global_step: u64,
        draws: &mut dyn Draws,
        options: &StepOptions,
    ) -> Result<StepOutput> {
        let latents = batch.latents.detach().to_dtype(options.dtype)?;
        self.log_noise(global_step, &latents, &noised)?;

        let plain = noised.noisy_latents.to_dtype(options.dtype)?;
        let noisy_latents = match &options.tape {
            Some(tape) if options.latents_require_grad => tape.leaf(&plain),
            Some(tape) => tape.attach(&plain),
            None => plain,
        };
        let sigma = host_values(&noised.sample.sigma, &latents)?;
        let cx = FlowMatchingContext {
            noisy_latents: noisy_latents.clone(),
            latents: latents.clone(),
            timesteps: host_values(&noised.sample.timesteps, &latents)?,
            streams: NoisedStream::of_batch(self.adapter(), batch, &sigma, draws)?,
            sigma,
            task_type: noised.task_type,
            data_type: batch.data_type.clone(),
            device: latents.device().clone(),
            dtype: options.dtype,
            cfg_dropout_prob: self.config.cfg_dropout_prob,
            batch,
        };
        let mut inputs = self.adapter.prepare_inputs(&cx, draws)?;
        if let Some(tape) = &options.tape {
            // Text and conditioning meet parameters before any latent does: they must carry the tape too.
            inputs.attach(tape);
        }
        let prediction = self.adapter.forward(&cx, model, &inputs)?;

        let target = self.schedule.velocity(&latents.to_dtype(DType::F32)?, &noised.noise)?;
        let parts = self.compute_loss(&prediction.velocity, &target, &noised.sample.sigma, Some(batch))?;
        let auxiliary_losses = self.adapter.auxiliary_losses(&cx, &prediction)?;
        let mut loss = parts.average_weighted_loss.clone();
        for (_, auxiliary) in &auxiliary_losses {
            loss = loss.add(auxiliary)?;
        }
        if options.check_loss {
            let value = loss.item()?;
            if value.is_nan() || value > 100.0 {
                return Err(Error::LossExploded { loss: value, step: global_step });
            }
        }
        let mut out = StepOutput {
            loss,
            parts,
            auxiliary_losses,
            noised,
            noisy_latents,
            streams: cx.streams,
            inputs,
            prediction,
            target,
            metrics: Metrics::default(),
        };
        self.log_loss(global_step, &out)?;
        if options.collect_metrics {
            out.metrics = metrics(&out, &batch.data_type)?;
        }
        Ok(out)
    }

    /// What is logged at this step: detailed, in one line, or nothing.
    fn detail(&self, step: u64) -> Option<bool> {
        let detailed = step.is_multiple_of(self.config.log_interval);
        let due = detailed || step.is_multiple_of(self.config.summary_log_interval);
        (due && enabled!(target: log::TARGET, Level::DEBUG)).then_some(detailed)
    }

    fn log_noise(&self, step: u64, latents: &Tensor, noised: &Noised) -> Result<()> {
        match self.detail(step) {
            Some(true) => {
                debug!(target: log::TARGET, "{}", log::detailed(step, self.config.flow_shift, latents, noised)?);
            }
            Some(false) => debug!(target: log::TARGET, "{}", log::summary(step, noised)?),
            None => {}
        }
        Ok(())
    }

    fn log_loss(&self, step: u64, out: &StepOutput) -> Result<()> {
        let Some(detailed) = self.detail(step) else { return Ok(()) };
        let loss = LossValues {
            weighted: out.loss.item()?,
            unweighted: out.parts.average_unweighted_loss.item()?,
            weights: &out.parts.weights,
        };
        if detailed {
            let formula = self.weighting.formula();
            debug!(
                target: log::TARGET, "{}",
                log::loss_detailed(step, &formula, out.model_pred(), &out.target, loss)?
            );
        } else {
            debug!(target: log::TARGET, "{}", log::loss_summary(step, loss));
        }
        Ok(())
    }
}

/// One f32 per sample, beside `like`.
fn host_values(values: &[f32], like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from_slice(values, &[values.len()], like.device())?)
}

fn metrics(out: &StepOutput, data_type: &DataType) -> Result<Metrics> {
    let TimestepSample { sigma, timesteps, method } = &out.noised.sample;
    let noisy = Range::of_tensor(&out.noisy_latents)?;
    let (sigma, timesteps, weight) = (Range::of(sigma), Range::of(timesteps), Range::of(&out.parts.weights));
    let mut metrics = Metrics::default();
    for (name, value) in [
        ("loss", out.loss.item()?),
        ("unweighted_loss", out.parts.average_unweighted_loss.item()?),
        ("sigma_min", sigma.min),
        ("sigma_max", sigma.max),
        ("sigma_mean", sigma.mean),
        ("weight_min", weight.min),
        ("weight_max", weight.max),
        ("timestep_min", timesteps.min),
        ("timestep_max", timesteps.max),
        ("noisy_min", noisy.min),
        ("noisy_max", noisy.max),
    ] {
        metrics.number(name, value);
    }
    metrics.text("sampling_method", method);
    metrics.text("task_type", out.noised.task_type);
    metrics.text("data_type", data_type);
    for (name, value) in &out.auxiliary_losses {
        metrics.number(name, value.item()?);
    }
    Ok(metrics)
}

#[cfg(test)]
mod tests;
