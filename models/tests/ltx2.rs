//! LTX-2's adapter by NeMo's behaviours, and what the goldens do not reach in its transformer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // the helpers of tests may panic

use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::{DType, Device, Tape, Tensor};
use flowtape_flowmatch::{
    Batch, FlowMatchingConfig, FlowMatchingContext, FlowMatchingPipeline, FlowModel, ModelAdapter, ModelInputs,
    ModelOutput, NoisedStream, PhiloxDraws, Recorded, RecordedDraws, Result, StepOptions, TaskType,
};
use flowtape_models::ltx2::LTX2Adapter;
use flowtape_models::{Transformer, create_adapter, create_model};
use serde_json::{Map, Value, json};

const SIGMA: [f32; 2] = [0.25, 0.75];

fn normal(dims: &[usize], seed: u64) -> Tensor {
    flowtape_engine::Philox::new(seed).normal(dims, &Device::cpu()).unwrap()
}

fn tensor(values: &[f32], dims: &[usize]) -> Tensor {
    Tensor::from_slice(values, dims, &Device::cpu()).unwrap()
}

fn values(x: &Tensor) -> Vec<f64> {
    x.to_vec().unwrap()
}

/// The greatest difference, relative to the greatest value.
fn deviation(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (values(a), values(b));
    let largest = b.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0.0, |m: f64, d| if d > m || d.is_nan() { d } else { m })
        / largest
}

/// Two videos of 2 x 2 x 3 latents with five latent frames of audio.
fn batch() -> Batch {
    Batch::new(normal(&[2, 4, 2, 2, 3], 1), "video".into())
        .with("audio_latents", normal(&[2, 2, 5, 16], 2))
        .with("text_embeddings", normal(&[2, 3, 24], 3))
        .with("audio_text_embeddings", normal(&[2, 3, 16], 4))
        .with("text_mask", tensor(&[1.0, 1.0, 1.0, 1.0, 1.0, 0.0], &[2, 3]))
}

/// The context of a batch; the audio's noise is recorded.
fn context(batch: &Batch) -> Result<FlowMatchingContext<'_>> {
    let sigma = tensor(&SIGMA, &[2]);
    let dims = batch.get("audio_latents").map_or(&[0][..], Tensor::dims);
    let mut draws = RecordedDraws::new([Recorded::Noise(normal(dims, 5))]);
    let streams = NoisedStream::of_batch(&LTX2Adapter::default(), batch, &sigma, &mut draws)?;
    assert_eq!(draws.remaining(), 0);
    Ok(FlowMatchingContext {
        noisy_latents: batch.latents.clone(),
        latents: batch.latents.clone(),
        timesteps: sigma.mul_scalar(1000.0).unwrap(),
        sigma,
        task_type: TaskType::T2V,
        data_type: "video".into(),
        device: Device::cpu(),
        dtype: DType::F32,
        cfg_dropout_prob: 1.0,
        streams,
        batch,
    })
}

fn prepare(batch: &Batch) -> Result<ModelInputs> {
    // Draws that hold nothing: none may be asked for.
    LTX2Adapter::default().prepare_inputs(&context(batch)?, &mut RecordedDraws::default())
}

/// Returns a part of its inputs, as a model of one or two streams.
struct Echo(usize);

impl FlowModel for Echo {
    fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput> {
        let audio = inputs.tensor("audio_hidden_states")?.mul_scalar(0.5)?;
        let sample = inputs.tensor("hidden_states")?.mul_scalar(2.0)?;
        Ok(ModelOutput { sample, rest: vec![audio; self.0] })
    }
}

fn model(seed: u64, dtype: DType, options: Value) -> Box<dyn Transformer> {
    let mut config = json!({
        "_class_name": "LTX2VideoTransformer3DModel", "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "gated_attn": true,
        "cross_attn_mod": true, "audio_in_channels": 32, "audio_out_channels": 32, "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "audio_gated_attn": true,
        "audio_cross_attn_mod": true, "rope_type": "split", "use_prompt_embeddings": false
    });
    config.as_object_mut().unwrap().extend(options.as_object().cloned().unwrap_or_default());
    create_model(&config, &ParamBuilder::new(seed, dtype, &Device::cpu())).unwrap()
}

#[test]
fn audio_is_noised_with_its_videos_sigma_and_a_noise_of_its_own() {
    let (batch, noise) = (batch(), normal(&[2, 2, 5, 16], 5));
    let inputs = prepare(&batch).unwrap();
    let audio = batch.get("audio_latents").unwrap();
    let target = context(&batch).unwrap().stream("audio").unwrap().target.clone();
    assert_eq!(values(&target), values(&noise.sub(audio).unwrap()));
    // Token l of sample b holds channel c and bin m at c * 16 + m.
    let (clean, noise, tokens) = (values(audio), values(&noise), values(inputs.tensor("audio_hidden_states").unwrap()));
    for (b, c, l, m) in [(0, 0, 0, 0), (0, 1, 4, 15), (1, 0, 3, 7), (1, 1, 2, 1)] {
        let (at, sigma) = (((b * 2 + c) * 5 + l) * 16 + m, f64::from(SIGMA[b]));
        let want = (1.0 - sigma) * clean[at] + sigma * noise[at];
        assert!((tokens[(b * 5 + l) * 32 + c * 16 + m] - want).abs() < 1e-6);
    }
}

#[test]
fn the_model_is_told_times_per_token_and_sizes() {
    let inputs = prepare(&batch()).unwrap();
    for (name, len) in [("timestep", 12), ("audio_timestep", 5)] {
        let want = SIGMA.iter().flat_map(|s| vec![f64::from(s * 1000.0); len]).collect::<Vec<_>>();
        assert_eq!(values(inputs.tensor(name).unwrap()), want);
    }
    for name in ["sigma", "audio_sigma"] {
        assert_eq!(values(inputs.tensor(name).unwrap()), [250.0, 750.0]);
    }
    for (name, want) in [("num_frames", 2.0), ("height", 2.0), ("width", 3.0), ("audio_num_frames", 5.0), ("fps", 24.0)]
    {
        assert_eq!(inputs.number(name).unwrap(), want);
    }
    // Guidance dropout does not exist here, whatever the context says.
    let text = batch().get("text_embeddings").map(values);
    assert_eq!(Some(values(inputs.tensor("encoder_hidden_states").unwrap())), text);
}

#[test]
fn each_missing_key_is_named_and_images_are_refused() {
    for key in ["audio_latents", "text_embeddings", "audio_text_embeddings", "text_mask"] {
        let mut batch = batch();
        batch.tensors.remove(key);
        let error = prepare(&batch).unwrap_err().to_string();
        assert!(error.contains(&format!("`{key}`")), "{error}");
    }
    let error = prepare(&Batch { latents: normal(&[2, 4, 2, 3], 1), ..batch() }).unwrap_err().to_string();
    assert!(error.contains("5-D") && error.contains("[2, 4, 2, 3]"), "{error}");
    let error = prepare(&batch().with("audio_latents", normal(&[2, 2, 5], 1))).unwrap_err().to_string();
    assert!(error.contains("4-D") && error.contains("[2, 2, 5]"), "{error}");
}

#[test]
fn both_streams_come_back_unpacked() {
    let (batch, adapter) = (batch(), LTX2Adapter::default());
    let (inputs, cx) = (prepare(&batch).unwrap(), context(&batch).unwrap());
    let prediction = adapter.forward(&cx, &Echo(1), &inputs).unwrap();
    assert_eq!(values(&prediction.velocity), values(&batch.latents.mul_scalar(2.0).unwrap()));
    let target = &cx.stream("audio").unwrap().target;
    assert_eq!(prediction.auxiliary["audio"].dims(), target.dims());
    let (p, t) = (values(&prediction.auxiliary["audio"]), values(target));
    let mean = p.iter().zip(&t).map(|(p, t)| (p - t).powi(2)).sum::<f64>() / t.len() as f64;
    let losses = adapter.auxiliary_losses(&cx, &prediction).unwrap();
    assert_eq!(losses.len(), 1);
    assert_eq!(losses[0].0, "audio_loss");
    assert!((losses[0].1.item().unwrap() - mean).abs() < 1e-6 * mean);
    for outputs in [0, 2] {
        let error = adapter.forward(&cx, &Echo(outputs), &inputs).unwrap_err().to_string();
        assert!(error.contains("video and audio") && error.contains(&format!("{} outputs", outputs + 1)), "{error}");
    }
}

#[test]
fn the_weight_scales_the_audios_share_of_the_loss() {
    let step = |weight: f64| {
        let kwargs = Map::from_iter([("audio_loss_weight".into(), json!(weight))]);
        let adapter = create_adapter("ltx2", &kwargs).unwrap();
        let pipeline = FlowMatchingPipeline::new(FlowMatchingConfig::default(), adapter).unwrap();
        pipeline.step(&Echo(1), &batch(), 0, &mut PhiloxDraws::new(6), &StepOptions::default()).unwrap()
    };
    let [none, one, half] = [0.0, 1.0, 0.5].map(step);
    let video = none.parts.average_weighted_loss.item().unwrap();
    assert_eq!(none.loss.item().unwrap(), video);
    let audio = one.metrics.get_number("audio_loss").unwrap();
    assert!(audio > 0.0 && half.metrics.get_number("audio_loss").unwrap() == audio / 2.0);
    for (step, weight) in [(one, 1.0), (half, 0.5)] {
        assert!((step.loss.item().unwrap() - (video + weight * audio)).abs() < 1e-5);
    }
    let kwargs = Map::from_iter([("audio_weight".into(), json!(1.0))]);
    let Err(error) = create_adapter("ltx2", &kwargs) else { panic!("an unknown argument was taken") };
    assert!(error.to_string().contains("audio_loss_weight"), "{error}");
}

#[test]
fn times_of_tokens_are_computed_once_where_they_are_one() {
    let (model, mut inputs) = (model(1, DType::F32, Value::Null), prepare(&batch()).unwrap());
    let shared = model.forward(&inputs).unwrap();
    for name in ["timestep", "audio_timestep"] {
        inputs.insert(name, inputs.tensor(name).unwrap().contiguous().unwrap());
    }
    let each = model.forward(&inputs).unwrap();
    assert!(deviation(&each.sample, &shared.sample) < 1e-6 && deviation(&each.rest[0], &shared.rest[0]) < 1e-6);
    // The time of one token moves that token most, and the others through attention alone.
    let mut times = values(inputs.tensor("timestep").unwrap());
    times[4] = 10.0;
    inputs.insert("timestep", tensor(&times.iter().map(|t| *t as f32).collect::<Vec<_>>(), &[2, 12]));
    let moved = values(&model.forward(&inputs).unwrap().sample.sub(&each.sample).unwrap());
    let largest = |token: usize| moved[4 * token..][..4].iter().fold(0.0, |m: f64, d| m.max(d.abs()));
    assert!((0..12).all(|token| token == 4 || largest(token) < largest(4)));
    assert!((12..24).all(|token| largest(token) == 0.0));
}

#[test]
fn a_text_without_a_single_kept_token_counts_whole_as_in_the_reference() {
    // Every score is lowered alike, which softmax does not see but for the rounding of numbers near 10,000.
    let (model, mut inputs) = (model(1, DType::F32, Value::Null), prepare(&batch()).unwrap());
    let run = |inputs: &mut ModelInputs, keep: f64| {
        for name in ["encoder_attention_mask", "audio_encoder_attention_mask"] {
            inputs.insert(name, Tensor::full(&[2, 3], keep, DType::F32, &Device::cpu()).unwrap());
        }
        model.forward(inputs).unwrap().sample
    };
    let (kept, masked) = (run(&mut inputs, 1.0), run(&mut inputs, 0.0));
    assert!(deviation(&masked, &kept) < 1e-3);
}

#[test]
fn bf16_stays_within_its_rounding() {
    let inputs = prepare(&batch()).unwrap();
    let exact = model(1, DType::F32, Value::Null).forward(&inputs).unwrap();
    let mut half = inputs.clone();
    for (name, input) in inputs.iter() {
        if name.ends_with("hidden_states") {
            let flowtape_flowmatch::Input::Tensor(x) = input else { panic!("{name} is a tensor") };
            half.insert(name, x.to_dtype(DType::BF16).unwrap());
        }
    }
    let rounded = model(1, DType::BF16, Value::Null).forward(&half).unwrap();
    assert_eq!((rounded.sample.dtype(), rounded.rest[0].dtype()), (DType::BF16, DType::BF16));
    // Some twenty roundings of 2^-9 lie one after the other; they add up at random.
    assert!(deviation(&rounded.sample, &exact.sample) < 20.0 * 2f64.powi(-9));
    assert!(deviation(&rounded.rest[0], &exact.rest[0]) < 20.0 * 2f64.powi(-9));
}

#[test]
fn zeroed_modulation_predicts_zero_and_keyframes_get_no_gradient() {
    let model = model(2, DType::F32, json!({"use_keyframes_abs_pos_embedding": true}));
    let mut inputs = prepare(&batch()).unwrap();
    assert_eq!(model.parameters_without_gradient(&inputs), ["keyframes_abs_pos_embedding"]);
    let tape = Tape::new();
    inputs.attach(&tape);
    let output = model.forward(&inputs).unwrap();
    let loss = output.sample.square().unwrap().sum_all().unwrap();
    let loss = loss.add(&output.rest[0].square().unwrap().sum_all().unwrap()).unwrap();
    let gradients = tape.backward(&loss).unwrap();
    model.params().check_gradients(&gradients, &model.parameters_without_gradient(&inputs)).unwrap();
    assert!(model.params().check_gradients(&gradients, &[]).is_err());
    for p in model.params().iter().filter(|p| p.zero_init()) {
        p.copy_from(&Tensor::zeros(p.dims(), DType::F32, &Device::cpu()).unwrap()).unwrap();
    }
    let output = model.forward(&prepare(&batch()).unwrap()).unwrap();
    assert!(values(&output.sample).iter().chain(&values(&output.rest[0])).all(|v| *v == 0.0));
}

#[test]
fn a_configuration_that_does_not_fit_is_an_error_that_says_where() {
    let fits = json!({
        "_class_name": "LTX2VideoTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12,
        "cross_attention_dim": 24, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16, "rope_type": "split", "num_layers": 0, "caption_channels": 4
    });
    let make = |config: &Value| create_model(config, &ParamBuilder::new(0, DType::F32, &Device::cpu()));
    assert!(make(&fits).is_ok());
    for (key, change) in [
        ("qk_norm", json!({"qk_norm": "layer_norm"})),
        ("rope_type", json!({"rope_type": "spiral"})),
        ("activation_fn", json!({"activation_fn": "relu"})),
        ("audio_cross_attention_dim", json!({"audio_cross_attention_dim": 18})),
        ("cross_attention_dim", json!({"cross_attention_dim": 26})),
        ("attention_head_dim", json!({"attention_head_dim": 0})),
        // Heads of three columns have no pairs.
        ("num_attention_heads", json!({"num_attention_heads": 8, "attention_head_dim": 3})),
        ("rope_typ", json!({"rope_typ": "split"})),
    ] {
        let mut config = fits.clone();
        config.as_object_mut().unwrap().extend(change.as_object().cloned().unwrap());
        let Err(error) = make(&config) else { panic!("{change} was taken") };
        assert!(error.to_string().contains(key), "{error}");
    }
}
