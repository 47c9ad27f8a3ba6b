use std::sync::{Arc, Mutex};

use flowtape_engine::Device;
use tracing::field::{Field, Visit};
use tracing::span;

use super::*;
use crate::{Metric, ModelOutput, PhiloxDraws, Recorded, RecordedDraws};

/// Predicts `scale · x`.
struct Scaled(f64);

impl FlowModel for Scaled {
    fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput> {
        Ok(inputs.tensor("x")?.mul_scalar(self.0)?.into())
    }
}

/// Hands `x_t` on, and adds the auxiliary loss that it holds, if any.
struct Plain(Option<f64>);

impl ModelAdapter for Plain {
    fn name(&self) -> &str {
        "plain"
    }
    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, _: &mut dyn Draws) -> Result<ModelInputs> {
        Ok(ModelInputs::new().with("x", cx.noisy_latents.clone()).with("sigma", cx.sigma.clone()))
    }
    fn auxiliary_losses(&self, cx: &FlowMatchingContext<'_>, _: &Prediction) -> Result<Vec<(String, Tensor)>> {
        let Some(extra) = self.0 else { return Ok(Vec::new()) };
        let zero = cx.noisy_latents.mean_all()?.mul_scalar(0.0)?;
        Ok(vec![("extra_loss".to_owned(), zero.add_scalar(extra)?)])
    }
}

fn model(scale: f64) -> Scaled {
    Scaled(scale)
}

fn pipeline(config: FlowMatchingConfig) -> FlowMatchingPipeline {
    FlowMatchingPipeline::new(config, Plain(None)).unwrap()
}

fn batch(data_type: DataType) -> Batch {
    let dims: &[usize] = if data_type == DataType::Image { &[3, 2, 2, 4] } else { &[3, 2, 1, 2, 4] };
    let values: Vec<f32> = (0..48).map(|i| (f64::from(i) * 0.7).sin() as f32).collect();
    Batch::new(Tensor::from_slice(&values, dims, &Device::cpu()).unwrap(), data_type)
}

fn step(config: FlowMatchingConfig, batch: &Batch, options: &StepOptions) -> Result<StepOutput> {
    pipeline(config).step(&model(0.5), batch, 1, &mut PhiloxDraws::new(3), options)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_vec::<f64>().unwrap()
}

#[test]
fn a_step_gives_losses_a_gradient_and_hands_the_mask_on() {
    for data in [DataType::Image, DataType::Video] {
        let batch = batch(data);
        let tape = Tape::new();
        let options = StepOptions { latents_require_grad: true, ..StepOptions::recorded(&tape) };
        let out = step(FlowMatchingConfig::default(), &batch, &options).unwrap();
        assert_eq!(out.weighted_loss().dims(), batch.latents.dims());
        assert_eq!((out.loss.rank(), out.loss.requires_grad()), (0, true));
        assert!(out.loss_mask().is_none());
        // The loss is mean(w (0.5 x - target)²), so its gradient in x is w (0.5 x - target) / n.
        let (x, target) = (values(&out.noisy_latents), values(&out.target));
        let gradients = tape.backward(&out.loss).unwrap();
        let gradient = values(gradients.of(&out.noisy_latents).unwrap());
        let per = x.len() / 3;
        for (i, g) in gradient.iter().enumerate() {
            let w = f64::from(out.parts.weights[i / per]);
            let want = w * (0.5 * x[i] - target[i]) / x.len() as f64;
            assert!((g - want).abs() < 1e-6, "{g} {want}");
        }
        let mask = Tensor::from_slice(&[1.0f32, 0.0, 0.0], &[3], &Device::cpu()).unwrap();
        let masked = step(FlowMatchingConfig::default(), &batch.clone().with("loss_mask", mask), &options).unwrap();
        assert_eq!(values(masked.loss_mask().unwrap()), [1.0, 0.0, 0.0]);
        assert_eq!(values(&masked.loss), values(&out.loss));
    }
}

#[test]
fn noise_target_and_losses_follow_their_formulas() {
    let batch = batch(DataType::Image);
    let config = FlowMatchingConfig { flow_shift: 2.0, ..FlowMatchingConfig::default() };
    let out = step(config.clone(), &batch, &StepOptions::default()).unwrap();
    assert!(!out.loss.requires_grad());
    let (clean, noise) = (values(&batch.latents), values(&out.noised.noise));
    let (x, target, plain) = (values(&out.noisy_latents), values(&out.target), values(&out.parts.unweighted_loss));
    let mut weighted = Vec::new();
    for i in 0..clean.len() {
        let s = f64::from(out.noised.sample.sigma[i / 16]);
        assert!((x[i] - ((1.0 - s) * clean[i] + s * noise[i])).abs() < 1e-6);
        assert!((target[i] - (noise[i] - clean[i])).abs() < 1e-6);
        assert!((plain[i] - (0.5 * x[i] - target[i]).powi(2)).abs() < 1e-5);
        weighted.push(plain[i] * (1.0 + 2.0 * s));
    }
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    assert!((out.parts.average_unweighted_loss.item().unwrap() - mean(&plain)).abs() < 1e-5);
    assert!((out.loss.item().unwrap() - mean(&weighted)).abs() < 1e-5);
    assert_eq!(out.parts.loss_weight.dims(), [3, 1, 1, 1]);
    // Without weights both losses are one.
    let off =
        step(FlowMatchingConfig { use_loss_weighting: false, ..config }, &batch, &StepOptions::default()).unwrap();
    assert_eq!(values(off.weighted_loss()), values(&off.parts.unweighted_loss));
    assert_eq!(off.parts.weights, [1.0; 3]);
}

#[test]
fn metrics_have_the_references_keys_and_can_be_left_out() {
    let batch = batch(DataType::Image);
    let out = step(FlowMatchingConfig::default(), &batch, &StepOptions::default()).unwrap();
    let keys: Vec<&str> = out.metrics.iter().map(|(name, _)| name).collect();
    let mut want = [
        "loss",
        "unweighted_loss",
        "sigma_min",
        "sigma_max",
        "sigma_mean",
        "weight_min",
        "weight_max",
        "timestep_min",
        "timestep_max",
        "noisy_min",
        "noisy_max",
        "sampling_method",
        "task_type",
        "data_type",
    ];
    want.sort_unstable();
    assert_eq!(keys, want);
    assert_eq!(out.metrics.get_number("loss"), Some(out.loss.item().unwrap()));
    assert_eq!(out.metrics.get("data_type"), Some(&Metric::Text("image".to_owned())));
    let quiet = StepOptions { collect_metrics: false, ..StepOptions::default() };
    let without = step(FlowMatchingConfig::default(), &batch, &quiet).unwrap();
    assert!(without.metrics.is_empty());
    assert_eq!(values(&without.loss), values(&out.loss));
}

#[test]
fn seeds_decide_and_a_step_can_be_replayed() {
    let batch = batch(DataType::Video);
    let (config, options) = (FlowMatchingConfig::default(), StepOptions::default());
    let pipeline = pipeline(config);
    let run = |seed| pipeline.step(&model(0.5), &batch, 1, &mut PhiloxDraws::new(seed), &options).unwrap();
    let out = run(3);
    assert_eq!(values(&out.loss), values(&run(3).loss));
    assert_ne!(values(&out.loss), values(&run(4).loss));
    let Noised { task_type, sample, noise, .. } = out.noised;
    let noised = pipeline.with_noise(&batch, DType::F32, task_type, sample, noise).unwrap();
    let mut none = RecordedDraws::default();
    let replayed = pipeline.step_from(&model(0.5), &batch, noised, 1, &mut none, &options).unwrap();
    assert_eq!(values(&replayed.loss), values(&out.loss));
}

#[test]
fn draws_come_in_the_documented_order() {
    let batch = batch(DataType::Video);
    let noise = Tensor::ones(batch.latents.dims(), DType::F32, &Device::cpu()).unwrap();
    let mut draws = RecordedDraws::new([
        Recorded::Decision(0.1),
        Recorded::Uniform(vec![0.9]),
        Recorded::Normal(vec![0.0; 3]),
        Recorded::Noise(noise),
    ]);
    let out = pipeline(FlowMatchingConfig::default()).step(&model(0.5), &batch, 1, &mut draws, &StepOptions::default());
    let out = out.unwrap();
    assert_eq!((draws.remaining(), out.noised.task_type, out.noised.sample.sigma[0]), (0, TaskType::I2V, 0.75));
}

#[test]
fn images_are_never_i2v() {
    let config = FlowMatchingConfig { i2v_prob: 1.0, ..FlowMatchingConfig::default() };
    let task = |data| step(config.clone(), &batch(data), &StepOptions::default()).unwrap().noised.task_type;
    assert_eq!((task(DataType::Image), task(DataType::Video)), (TaskType::T2V, TaskType::I2V));
}

#[test]
fn exploded_losses_are_errors_where_they_are_checked() {
    let batch = batch(DataType::Image);
    let pipeline = pipeline(FlowMatchingConfig::default());
    for scale in [1e3, f64::NAN] {
        let run = |options: &StepOptions| pipeline.step(&model(scale), &batch, 7, &mut PhiloxDraws::new(1), options);
        let error = run(&StepOptions::default()).unwrap_err();
        assert!(matches!(error, Error::LossExploded { step: 7, .. }));
        assert!(error.to_string().starts_with("Loss exploded: "), "{error}");
        let loss = run(&StepOptions { check_loss: false, ..StepOptions::default() }).unwrap().loss.item().unwrap();
        assert!(loss.is_nan() || loss > 100.0);
    }
}

#[test]
fn auxiliary_losses_are_added_reported_and_checked() {
    let batch = batch(DataType::Image);
    let run = |extra| {
        let pipeline = FlowMatchingPipeline::new(FlowMatchingConfig::default(), Plain(extra)).unwrap();
        pipeline.step(&model(0.5), &batch, 1, &mut PhiloxDraws::new(3), &StepOptions::default())
    };
    let (plain, more) = (run(None).unwrap(), run(Some(2.5)).unwrap());
    let (a, b) = (plain.loss.item().unwrap(), more.loss.item().unwrap());
    assert!((b - a - 2.5).abs() < 1e-5);
    assert_eq!(more.metrics.get_number("extra_loss"), Some(2.5));
    assert_eq!(more.metrics.get_number("loss"), Some(b));
    assert!((more.parts.average_weighted_loss.item().unwrap() - a).abs() < 1e-9);
    assert!(matches!(run(Some(f64::NAN)), Err(Error::LossExploded { .. })));
}

#[test]
fn half_precision_reaches_the_model_and_the_loss_stays_f32() {
    let options = StepOptions { dtype: DType::BF16, ..StepOptions::default() };
    let out = step(FlowMatchingConfig::default(), &batch(DataType::Image), &options).unwrap();
    assert_eq!((out.noisy_latents.dtype(), out.model_pred().dtype()), (DType::BF16, DType::BF16));
    for tensor in [&out.loss, out.weighted_loss(), &out.target, &out.noised.noise, &out.noised.noisy_latents] {
        assert_eq!(tensor.dtype(), DType::F32);
    }
}

#[test]
fn a_prediction_of_another_shape_is_an_error() {
    struct Flat;
    impl FlowModel for Flat {
        fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput> {
            Ok(inputs.tensor("x")?.reshape(&[48])?.into())
        }
    }
    let pipeline = pipeline(FlowMatchingConfig::default());
    let batch = batch(DataType::Image);
    let error = pipeline.step(&Flat, &batch, 1, &mut PhiloxDraws::new(1), &StepOptions::default()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("plain adapter") && text.contains("[3, 2, 2, 4]") && text.contains("[48]"), "{text}");
    let error = ModelInputs::new().with("n", 2.0).tensor("n").unwrap_err().to_string();
    assert!(error.contains("`n`") && error.contains("a tensor") && error.contains("a number"), "{error}");
}

/// Keeps the messages of all events.
#[derive(Clone, Default)]
struct Keep(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Keep {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Message(String);
        impl Visit for Message {
            fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    self.0 = format!("{value:?}");
                }
            }
        }
        let mut message = Message(String::new());
        event.record(&mut message);
        self.0.lock().unwrap().push(message.0);
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[test]
fn logs_are_detailed_short_or_absent_by_their_intervals() {
    let config = FlowMatchingConfig { log_interval: 4, summary_log_interval: 2, ..FlowMatchingConfig::default() };
    let (pipeline, batch) = (pipeline(config), batch(DataType::Image));
    let keep = Keep::default();
    tracing::subscriber::with_default(keep.clone(), || {
        for global_step in 0..5 {
            let mut draws = PhiloxDraws::new(1);
            pipeline.step(&model(0.5), &batch, global_step, &mut draws, &StepOptions::default()).unwrap();
        }
    });
    let messages = keep.0.lock().unwrap().clone();
    assert_eq!(messages.len(), 6, "{messages:#?}");
    for (pair, step) in [(&messages[..2], 0), (&messages[4..], 4)] {
        assert!(pair[0].contains(&format!("[STEP {step}] FLOW MATCHING")) && pair[0].contains("[SIGMA] Mean"));
        assert!(pair[1].contains("LOSS DEBUG") && pair[1].contains("1 + 3 * σ"));
    }
    assert!(messages[2].starts_with("[STEP 2] σ=[") && messages[3].starts_with("[STEP 2] Loss: "));
}
