//! Every model at sizes where the CPU's kernels have whole blocks and ragged ends: heads of 64 and 128, some three hundred
//! tokens, masks where a model has them. f32 and bf16 run on the kernels, the same weights and inputs in f64 on the
//! compositions, which the kernels must agree with; a counting device says that it was so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // tests may panic

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use flowtape_engine::backend::call::{Call, Checked};
use flowtape_engine::backend::{Backend, Decorator, Fused, Ran};
use flowtape_engine::nn::{Param, ParamBuilder};
use flowtape_engine::{DType, Device, Philox, Result, Tape, Tensor};
use flowtape_flowmatch::{
    Batch, DataType, FlowMatchingContext, Input, ModelAdapter, ModelInputs, NoisedStream, PhiloxDraws, TaskType,
};
use flowtape_models::{MODELS, ModelKind, Transformer, create_adapter, create_model};
use flowtape_tests::Outcome;
use serde_json::{Map, Value, json};

/// How often each fused operation was done by a kernel, and how often it was declined.
type Counts = BTreeMap<&'static str, [usize; 2]>;

/// The CPU, with its fused operations counted.
#[derive(Debug)]
struct Counted {
    cpu: Device,
    counts: Arc<Mutex<Counts>>,
}

impl Decorator for Counted {
    fn inner(&self) -> &dyn Backend {
        self.cpu.backend()
    }

    fn fused(&self, call: Checked<Fused<'_>>) -> Result<Ran> {
        let ran = self.inner().fused(call)?;
        // Random numbers are drawn on the host where a backend has no kernel: no composition of operations.
        if !matches!(*call, Fused::Random { .. }) {
            self.counts.lock().unwrap().entry(call.name()).or_default()[usize::from(ran == Ran::Declined)] += 1;
        }
        Ok(ran)
    }
}

/// Where the tensors of a case are made: standard normal numbers that bf16 can hold.
struct Maker {
    device: Device,
    counts: Arc<Mutex<Counts>>,
}

impl Maker {
    fn new() -> Self {
        let counts = Arc::<Mutex<Counts>>::default();
        Self { device: Device::new(Counted { cpu: Device::cpu(), counts: counts.clone() }), counts }
    }

    fn normal(&self, dims: &[usize]) -> Tensor {
        let values = Philox::new(dims.iter().sum::<usize>() as u64).normal(dims, &self.device).unwrap();
        values.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap()
    }

    /// A mask of two samples of `len` places: which hold a token, by sample and place.
    fn mask(&self, len: usize, is_token: impl Fn(usize, usize) -> bool) -> Tensor {
        let marks = (0..2 * len).map(|i| u32::from(is_token(i / len, i % len)));
        Tensor::from_vec(marks.collect(), &[2, len], &self.device).unwrap()
    }
}

const TEXT: usize = 41;
const TEXT_WIDTH: usize = 96;

/// The configuration of a model with heads of a width, and two samples for its adapter.
fn case(adapter: &str, [heads, head_dim]: [usize; 2], make: &Maker) -> (Value, Batch) {
    let width = heads * head_dim;
    let axes = [head_dim / 4, head_dim / 8 * 3, head_dim / 8 * 3];
    let (image, video) = (DataType::from("image"), DataType::from("video"));
    let text = || make.normal(&[2, TEXT, TEXT_WIDTH]);
    let (config, batch) = match adapter {
        "simple" => (
            json!({
                "in_channels": 4, "out_channels": 4, "num_layers": 1, "text_dim": TEXT_WIDTH, "ffn_dim": 2 * width,
            }),
            Batch::new(make.normal(&[2, 4, 3, 18, 22]), video).with("text_embeddings", text()),
        ),
        "wan_i2v" => (
            json!({
                "in_channels": 12, "out_channels": 4, "num_layers": 1, "text_dim": TEXT_WIDTH, "ffn_dim": 2 * width,
                "image_dim": 40, "added_kv_proj_dim": width,
            }),
            Batch::new(make.normal(&[2, 4, 3, 18, 22]), video)
                .with("condition_latents", make.normal(&[2, 4, 3, 18, 22]))
                .with("image_embeds", make.normal(&[2, 17, 40]))
                .with("text_embeddings", text()),
        ),
        "wan_ti2v" => (
            json!({
                "in_channels": 4, "out_channels": 4, "num_layers": 1, "text_dim": TEXT_WIDTH, "ffn_dim": 2 * width,
            }),
            Batch::new(make.normal(&[2, 4, 3, 18, 22]), video).with("text_embeddings", text()),
        ),
        "flux" => (
            json!({
                "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": TEXT_WIDTH,
                "pooled_projection_dim": 48, "guidance_embeds": true, "axes_dims_rope": axes,
            }),
            Batch::new(make.normal(&[2, 4, 30, 34]), image)
                .with("text_embeddings", text())
                .with("pooled_prompt_embeds", make.normal(&[2, 48])),
        ),
        "flux2" => (
            json!({
                "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": TEXT_WIDTH,
                "axes_dims_rope": vec![head_dim / 4; 4],
            }),
            Batch::new(make.normal(&[2, 16, 15, 17]), image).with("text_embeddings", text()),
        ),
        "flux2_edit" => (
            json!({
                "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": TEXT_WIDTH,
                "axes_dims_rope": vec![head_dim / 4; 4],
            }),
            Batch::new(make.normal(&[2, 16, 11, 13]), image)
                .with_list("context_latents", vec![make.normal(&[2, 16, 7, 9]), make.normal(&[2, 16, 5, 7])])
                .with("text_embeddings", text()),
        ),
        "qwen_image" => (
            json!({
                "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": TEXT_WIDTH,
                "axes_dims_rope": axes,
            }),
            Batch::new(make.normal(&[2, 4, 30, 34]), image).with("text_embeddings", text()),
        ),
        "qwen_image_edit" => (
            json!({
                "in_channels": 16, "out_channels": 4, "num_layers": 1, "joint_attention_dim": TEXT_WIDTH,
                "axes_dims_rope": axes, "zero_cond_t": true,
            }),
            Batch::new(make.normal(&[2, 4, 22, 26]), image)
                .with_list("context_latents", vec![make.normal(&[2, 4, 14, 18]), make.normal(&[2, 4, 10, 14])])
                .with("text_embeddings", text())
                .with("text_attention_mask", make.mask(TEXT, |sample, i| sample == 0 || i < 20)),
        ),
        "hunyuan" => (
            json!({
                "in_channels": 9, "out_channels": 4, "num_layers": 1, "num_refiner_layers": 1,
                "text_embed_dim": TEXT_WIDTH, "text_embed_2_dim": 48, "image_embed_dim": 40,
                "rope_axes_dim": axes,
            }),
            Batch::new(make.normal(&[2, 4, 3, 9, 11]), video)
                .with("text_embeddings", text())
                .with("text_mask", make.mask(TEXT, |sample, i| sample == 1 || i % 3 != 0))
                .with("text_embeddings_2", make.normal(&[2, 13, 48]))
                .with("text_mask_2", make.mask(13, |sample, _| sample == 0))
                .with("image_embeds", make.normal(&[2, 17, 40])),
        ),
        "ltx2" => (
            json!({
                "in_channels": 16, "out_channels": 16, "num_layers": 1, "cross_attention_dim": width, "gated_attn": true,
                "cross_attn_mod": true, "audio_in_channels": 32, "audio_out_channels": 32,
                "audio_num_attention_heads": 4, "audio_attention_head_dim": 64, "audio_cross_attention_dim": 256,
                "audio_gated_attn": true, "audio_cross_attn_mod": true, "rope_type": "split",
                "use_prompt_embeddings": false,
            }),
            Batch::new(make.normal(&[2, 16, 3, 9, 11]), video)
                .with("audio_latents", make.normal(&[2, 2, 50, 16]))
                .with("text_embeddings", make.normal(&[2, TEXT, width]))
                .with("audio_text_embeddings", make.normal(&[2, TEXT, 256]))
                .with("text_mask", make.mask(TEXT, |sample, i| sample == 0 || i < 20)),
        ),
        "chroma" => (
            json!({
                "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": TEXT_WIDTH,
                "axes_dims_rope": axes, "approximator_num_channels": 32, "approximator_hidden_dim": 80,
                "approximator_layers": 2,
            }),
            Batch::new(make.normal(&[2, 4, 30, 34]), image)
                .with("text_embeddings", text())
                .with("text_attention_mask", make.mask(TEXT, |sample, i| sample == 0 || i < 20)),
        ),
        "z_image" => (
            json!({
                "in_channels": 4, "dim": width, "n_heads": heads, "n_layers": 1, "n_refiner_layers": 1,
                "cap_feat_dim": TEXT_WIDTH, "axes_dims": axes,
            }),
            Batch::new(make.normal(&[2, 4, 30, 34]), image)
                .with("text_embeddings", text())
                .with("text_attention_mask", make.mask(TEXT, |sample, i| sample == 0 || i < 20)),
        ),
        "lumina2" => (
            json!({
                "in_channels": 4, "hidden_size": width, "num_layers": 1, "num_refiner_layers": 1,
                "num_attention_heads": heads, "num_kv_heads": heads / 2, "cap_feat_dim": TEXT_WIDTH,
                "axes_dim_rope": axes,
            }),
            Batch::new(make.normal(&[2, 4, 30, 34]), image)
                .with("text_embeddings", text())
                .with("text_attention_mask", make.mask(TEXT, |sample, i| sample == 0 || i < 20)),
        ),
        "qwen_image_21" => (
            json!({
                "in_channels": 16, "out_channels": 16, "num_layers": 2, "context_in_dim": TEXT_WIDTH,
                "axes_dims_rope": axes,
            }),
            Batch::new(make.normal(&[2, 16, 14, 18]), image)
                .with("text_embeddings", text())
                .with("text_attention_mask", make.mask(TEXT, |sample, i| sample == 0 || i < 20)),
        ),
        "qwen_image_21_edit" => (
            json!({
                "in_channels": 16, "out_channels": 16, "num_layers": 1, "context_in_dim": TEXT_WIDTH,
                "axes_dims_rope": axes,
            }),
            // 12 places for the first image, and 15 for the second.
            Batch::new(make.normal(&[2, 16, 10, 14]), image)
                .with_list("context_latents", vec![make.normal(&[2, 16, 6, 8]), make.normal(&[2, 16, 6, 10])])
                .with("text_embeddings", text())
                .with("text_attention_mask", make.mask(TEXT, |sample, i| sample == 0 || i < 38))
                .with("image_pad_mask", make.mask(TEXT, |sample, i| (4 - sample..31 - sample).contains(&i))),
        ),
        "flux3" => (
            json!({
                "in_channels": 16, "cond_in_channels": 16, "num_layers": 1, "num_single_layers": 1,
                "joint_attention_dim": TEXT_WIDTH, "axes_dims_rope": vec![head_dim / 4; 4],
            }),
            Batch::new(make.normal(&[2, 16, 11, 13]), image)
                .with_list("context_latents", vec![make.normal(&[2, 16, 7, 9]), make.normal(&[2, 16, 5, 7])])
                .with("text_embeddings", text()),
        ),
        "krea2" => (
            json!({
                "in_channels": 16, "num_layers": 1, "num_key_value_heads": heads / 2, "intermediate_size": 2 * width,
                "text_hidden_dim": 128, "num_text_layers": 3, "text_num_attention_heads": 2,
                "text_num_key_value_heads": 1, "text_intermediate_size": 200, "num_layerwise_text_blocks": 1,
                "num_refiner_text_blocks": 1, "axes_dims_rope": axes,
            }),
            Batch::new(make.normal(&[2, 4, 30, 34]), image)
                .with("text_embeddings", make.normal(&[2, TEXT, 3, 128]))
                .with("text_attention_mask", make.mask(TEXT, |sample, i| sample == 0 || !(20..=36).contains(&i))),
        ),
        other => panic!("no case of the model behind the adapter {other}"),
    };
    let mut config = config;
    // Some say it by the width of the model.
    if config["dim"].is_null() && config["hidden_size"].is_null() {
        config["num_attention_heads"] = heads.into();
        config["attention_head_dim"] = head_dim.into();
    }
    (config, batch)
}

/// A batch's context in bf16, so that every dtype can hold what an adapter makes of it.
fn context<'a>(adapter: &dyn ModelAdapter, batch: &'a Batch, make: &Maker) -> FlowMatchingContext<'a> {
    let sigma = Tensor::from_slice(&[0.25f32, 0.75], &[2], &make.device).unwrap();
    FlowMatchingContext {
        noisy_latents: batch.latents.to_dtype(DType::BF16).unwrap(),
        latents: batch.latents.to_dtype(DType::BF16).unwrap(),
        timesteps: sigma.mul_scalar(1000.0).unwrap(),
        streams: NoisedStream::of_batch(adapter, batch, &sigma, &mut PhiloxDraws::new(5)).unwrap(),
        sigma,
        task_type: TaskType::I2V,
        data_type: batch.data_type.clone(),
        device: make.device.clone(),
        dtype: DType::BF16,
        cfg_dropout_prob: 0.0,
        batch,
    }
}

/// What the goldens allow a step in f32 where both sides have the same projections of time, as here: five to ten times what
/// f32's rounding comes to.
const F32_PREDICTIONS: f64 = 5e-6;
/// The same of gradients.
const F32_GRADIENTS: f64 = 3e-5;
/// What bf16's deviation may be of f32's. It rounds to 2^-9 where f32 rounds to 2^-24: the same roundings, added up by the
/// same graph, come to 2^15 times as much. Within a kernel all sums are f32, so there are fewer of them (a third of that is
/// usual); twice as much is allowed because which of them add up is chance.
const BF16: f64 = 2.0 * (1 << 15) as f64;

/// Predictions, or gradients, by name.
type Numbers = BTreeMap<String, Vec<f64>>;

struct Run {
    predictions: Numbers,
    gradients: Numbers,
    counts: Counts,
}

/// The model in a dtype, with the parameters of `weights`: its predictions, and the gradients of the sum of their products
/// with fixed numbers.
fn run(
    config: &Value,
    dtype: DType,
    weights: &dyn Transformer,
    adapter: &dyn ModelAdapter,
    (cx, inputs): (&FlowMatchingContext<'_>, &ModelInputs),
    make: &Maker,
) -> Run {
    let model = create_model(config, &ParamBuilder::new(0, dtype, &make.device)).unwrap();
    for (to, from) in model.params().iter().zip(weights.params().iter()) {
        to.copy_from(&from.value().unwrap()).unwrap();
    }
    let mut own = inputs.clone();
    for (name, input) in inputs.iter() {
        if let Input::Tensor(tensor) = input
            && tensor.dtype() == DType::BF16
        {
            own.insert(name, tensor.to_dtype(dtype).unwrap());
        }
    }
    let tape = Tape::new();
    own.attach(&tape);
    make.counts.lock().unwrap().clear();
    let prediction = adapter.forward(cx, &*model, &own).unwrap();
    let all = prediction.auxiliary.into_iter().chain([("velocity".to_owned(), prediction.velocity)]);
    let (mut loss, mut predictions) = (None::<Tensor>, Numbers::new());
    for (name, tensor) in all {
        assert_eq!(tensor.dtype(), dtype, "{name}");
        let wide = tensor.to_dtype(DType::F32.promote(dtype)).unwrap();
        let cotangent = make.normal(tensor.dims()).to_dtype(wide.dtype()).unwrap();
        let term = wide.mul(&cotangent).unwrap().sum_all().unwrap();
        loss = Some(loss.map_or(term.clone(), |l| l.add(&term).unwrap()));
        predictions.insert(name, tensor.to_vec().unwrap());
    }
    let gradients = tape.backward(&loss.unwrap()).unwrap();
    let counts = std::mem::take(&mut *make.counts.lock().unwrap());
    model.params().check_gradients(&gradients, &model.parameters_without_gradient(inputs)).unwrap();
    let of = |p: &Param| Some((p.path().to_owned(), gradients.of(p)?.to_vec::<f64>().unwrap()));
    Run { predictions, gradients: model.params().iter().filter_map(of).collect(), counts }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |m, v| v.abs().max(m))
}

/// The worst `max |a - b| / max |b|` and its name. A tensor that is zero but for f64's rounding is compared with the
/// largest one of all.
fn worst(got: &Numbers, want: &Numbers) -> (f64, String) {
    assert!(got.keys().eq(want.keys()));
    let all = want.values().map(|v| largest(v)).fold(0.0, f64::max);
    let deviation = |name: &String| {
        let (got, want) = (&got[name], &want[name]);
        let own = largest(want);
        let scale = if own < 1e-12 * all { all } else { own };
        let off = got
            .iter()
            .zip(want)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, |m: f64, d| if d > m || d.is_nan() { d } else { m });
        off / scale
    };
    let all = want.keys().map(|name| (deviation(name), name.clone()));
    all.reduce(|a, b| if b.0 > a.0 || b.0.is_nan() { b } else { a }).unwrap()
}

fn check(kind: &ModelKind, heads: [usize; 2], out: &mut Vec<Outcome>) {
    let make = Maker::new();
    let (mut config, batch) = case(kind.adapter, heads, &make);
    config["_class_name"] = kind.class.into();
    let adapter = create_adapter(kind.adapter, &Map::new()).unwrap();
    let cx = context(&*adapter, &batch, &make);
    let inputs = adapter.prepare_inputs(&cx, &mut PhiloxDraws::new(6)).unwrap();
    // Numbers that bf16 holds: all three models have the same weights.
    let weights = create_model(&config, &ParamBuilder::new(3, DType::BF16, &make.device)).unwrap();
    let [exact, single, half] = [DType::F64, DType::F32, DType::BF16]
        .map(|dtype| run(&config, dtype, &*weights, &*adapter, (&cx, &inputs), &make));
    let title = format!("{} {}x{}", kind.adapter, heads[0], heads[1]);
    // Every fused operation ran as a composition in f64, and on a kernel in the others. The composition of a norm with what
    // follows it asks for the plain norm, which is declined as well.
    assert!(exact.counts.values().all(|[done, _]| *done == 0), "{title}: {:?}", exact.counts);
    for run in [&single, &half] {
        assert!(run.counts.values().all(|[_, declined]| *declined == 0), "{title}: {:?}", run.counts);
        let mut asked: BTreeMap<_, _> = run.counts.iter().map(|(name, [done, _])| (*name, *done)).collect();
        for (plain, more) in [
            ("norm", ["modulated norm", "norm and rope"]),
            ("norm backward", ["modulated norm backward", "norm and rope backward"]),
        ] {
            let nested: usize = more.iter().filter_map(|name| asked.get(name)).sum();
            *asked.entry(plain).or_default() += nested;
        }
        let declined: BTreeMap<_, _> = exact.counts.iter().map(|(name, [_, declined])| (*name, *declined)).collect();
        assert_eq!(asked, declined, "{title}");
        let kinds = ["attention", "attention backward", "norm", "norm backward"];
        assert!(kinds.iter().all(|kind| asked.get(kind).is_some_and(|n| *n > 0)), "{title}: {asked:?}");
    }
    let mut compare = |what: &str, f32_bound: f64, of: fn(&Run) -> &Numbers| {
        let [single, half] = [&single, &half].map(|run| worst(of(run), of(&exact)));
        for (dtype, (worst, detail), bound) in [("f32", single.clone(), f32_bound), ("bf16", half, BF16 * single.0)] {
            out.push(Outcome::measured(format!("{title} {dtype} {what}"), worst, bound, detail));
        }
    };
    compare("predictions", F32_PREDICTIONS, |run| &run.predictions);
    compare("gradients", F32_GRADIENTS, |run| &run.gradients);
}

#[test]
fn kernels_agree_with_compositions_in_every_model() {
    let mut out = Vec::new();
    for kind in MODELS {
        for heads in [[4, 64], [2, 128]] {
            check(kind, heads, &mut out);
        }
    }
    out.iter().for_each(|outcome| println!("{outcome}"));
    let failed = out.iter().filter(|o| !o.passed()).count();
    assert_eq!(failed, 0, "{failed} of {} deviations are above their bounds", out.len());
}
