//! The model against itself: what must not change its prediction, what must, and what it refuses.

use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::{DType, Device, Gradients, Philox, Tape, Tensor};
use flowtape_flowmatch::{FlowModel, ModelInputs};
use serde_json::{Value, json};

use super::*;
use crate::{Transformer, create_model};

fn model(changes: Value, dtype: DType) -> HunyuanVideo15Transformer3DModel {
    let mut config = json!({
        "in_channels": 5, "out_channels": 2, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
        "num_refiner_layers": 1, "text_embed_dim": 10, "text_embed_2_dim": 6,
        "image_embed_dim": 8, "rope_axes_dim": [4, 4, 4],
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    // Narrower than diffusers', which takes long.
    let config = HunyuanVideo15Config { byt5_hidden_dim: 16, ..HunyuanVideo15Config::from_json(&config).unwrap() };
    HunyuanVideo15Transformer3DModel::new(config, &ParamBuilder::new(3, dtype, &Device::cpu())).unwrap()
}

fn normal(seed: u64, dims: &[usize]) -> Tensor {
    Philox::new(seed).normal(dims, &Device::cpu()).unwrap()
}

fn mask(rows: &[&[f32]]) -> Tensor {
    Tensor::from_vec(rows.concat(), &[rows.len(), rows[0].len()], &Device::cpu()).unwrap()
}

/// Two samples whose texts have padding in between and at the end.
fn inputs() -> ModelInputs {
    ModelInputs::new()
        .with("hidden_states", normal(1, &[2, 5, 2, 3, 4]))
        .with("timestep", Tensor::from_vec(vec![250f32, 700.0], &[2], &Device::cpu()).unwrap())
        .with("encoder_hidden_states", normal(2, &[2, 5, 10]))
        .with("encoder_attention_mask", mask(&[&[1.0, 0.0, 1.0, 0.0, 0.0], &[1.0, 1.0, 1.0, 0.0, 1.0]]))
        .with("encoder_hidden_states_2", normal(3, &[2, 3, 6]))
        .with("encoder_attention_mask_2", mask(&[&[0.0, 1.0, 1.0], &[1.0, 0.0, 0.0]]))
        .with("image_embeds", normal(4, &[2, 4, 8]))
}

fn run(model: &HunyuanVideo15Transformer3DModel, inputs: &ModelInputs) -> Tensor {
    model.forward(inputs).unwrap().sample
}

/// The gradients of half the squared prediction.
fn gradients(model: &HunyuanVideo15Transformer3DModel, mut inputs: ModelInputs) -> (Tensor, Gradients) {
    let tape = Tape::new();
    inputs.attach(&tape);
    let y = run(model, &inputs);
    (y.detach(), tape.backward(&y.square().unwrap().sum_all().unwrap().mul_scalar(0.5).unwrap()).unwrap())
}

/// `max |a - b| / max |b|`.
fn deviation(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims());
    let (got, want) = (got.to_vec::<f64>().unwrap(), want.to_vec::<f64>().unwrap());
    let largest = want.iter().fold(f64::MIN_POSITIVE, |m, v| v.abs().max(m));
    got.iter().zip(&want).fold(0.0, |m, (a, b)| f64::max(m, (a - b).abs())) / largest
}

/// The places of a mask's row that hold a token.
fn tokens(mask: &Tensor, row: usize) -> Tensor {
    let marks = mask.narrow(0, row, 1).unwrap().to_vec::<f32>().unwrap();
    let at: Vec<u32> = (0..marks.len()).filter(|i| marks[*i] != 0.0).map(|i| i as u32).collect();
    Tensor::from_slice(&at, &[at.len()], &Device::cpu()).unwrap()
}

#[test]
fn padding_changes_neither_prediction_nor_gradients() {
    let (model, all) = (model(json!({}), DType::F32), inputs());
    let (together, joint) = gradients(&model, all.clone());
    // Each sample by itself, its padding taken out: the reference's order of tokens before padding, without padding.
    let alone = [0, 1].map(|row| {
        let mut one = ModelInputs::new();
        for (name, _) in all.iter() {
            one.insert(name, all.tensor(name).unwrap().narrow(0, row, 1).unwrap());
        }
        for (text, mask) in [
            ("encoder_hidden_states", "encoder_attention_mask"),
            ("encoder_hidden_states_2", "encoder_attention_mask_2"),
        ] {
            let at = tokens(all.tensor(mask).unwrap(), row);
            for name in [text, mask] {
                one.insert(name, one.tensor(name).unwrap().index_select(1, &at).unwrap());
            }
        }
        gradients(&model, one)
    });
    for (row, (prediction, _)) in alone.iter().enumerate() {
        let worst = deviation(&together.narrow(0, row, 1).unwrap(), prediction);
        assert!(worst < 2e-6, "sample {row}: {worst}");
    }
    let without = model.parameters_without_gradient(&all);
    for parameter in model.params().iter() {
        let name = parameter.path();
        let of = |gradients: &Gradients| gradients.of(parameter).cloned();
        let Some(got) = of(&joint) else {
            assert!(without.iter().any(|n| n == name), "{name}");
            continue;
        };
        let want = of(&alone[0].1).unwrap().add(&of(&alone[1].1).unwrap()).unwrap();
        // Shifting all scores of a query alike changes no weight: this gradient is rounding alone.
        if !name.ends_with("attn.to_k.bias") || !name.starts_with("context_embedder") {
            assert!(deviation(&got, &want) < 2e-5, "{name}: {}", deviation(&got, &want));
        }
    }
}

#[test]
fn a_caption_without_tokens_gives_a_finite_prediction() {
    let none = mask(&[&[0.0; 5], &[1.0; 5]]);
    let model = model(json!({}), DType::F32);
    let (prediction, gradients) = gradients(&model, inputs().with("encoder_attention_mask", none));
    assert!(prediction.is_finite().unwrap());
    assert!(gradients.iter().all(|(_, g)| g.is_finite().unwrap()));
}

#[test]
fn zero_image_embeddings_mean_text_to_video() {
    let model = model(json!({}), DType::F32);
    let zeros = inputs().with("image_embeds", Tensor::zeros(&[2, 4, 8], DType::F32, &Device::cpu()).unwrap());
    let (before, grads) = gradients(&model, zeros.clone());
    let image = |name: &str| name.starts_with("image_embedder.");
    for parameter in model.params().iter().filter(|p| image(p.path())) {
        let name = parameter.path();
        let gradient = grads.of(parameter).unwrap_or_else(|| panic!("no gradient of {name}"));
        assert!(gradient.to_vec::<f32>().unwrap().iter().all(|g| *g == 0.0), "{name}");
        parameter.copy_from(&normal(5, parameter.dims())).unwrap();
    }
    assert_eq!(run(&model, &zeros).to_bytes().unwrap(), before.to_bytes().unwrap());
    // An image of one sample is enough for all to have one.
    let one =
        Tensor::cat(&[&normal(6, &[1, 4, 8]), &Tensor::zeros(&[1, 4, 8], DType::F32, &Device::cpu()).unwrap()], 0);
    let second = |x: &Tensor| x.narrow(0, 1, 1).unwrap();
    let after = run(&model, &zeros.with("image_embeds", one.unwrap()));
    assert!(deviation(&second(&after), &second(&before)) > 1e-3);
}

#[test]
fn a_second_time_needs_a_meanflow_model() {
    let r = Tensor::from_vec(vec![10f32, 20.0], &[2], &Device::cpu()).unwrap();
    let error = model(json!({}), DType::F32).forward(&inputs().with("timestep_r", r.clone())).unwrap_err().to_string();
    assert!(error.contains("timestep_r") && error.contains("use_meanflow"), "{error}");
    let meanflow = model(json!({"use_meanflow": true}), DType::F32);
    let (without, grads) = gradients(&meanflow, inputs());
    let with_r = inputs().with("timestep_r", r);
    assert!(deviation(&run(&meanflow, &with_r), &without) > 1e-3);
    let names: Vec<_> = meanflow.params().iter().filter(|p| grads.of(*p).is_none()).map(|p| p.path()).collect();
    assert_eq!(names.len(), 10, "{names:?}");
    meanflow.params().check_gradients(&grads, &meanflow.parameters_without_gradient(&inputs())).unwrap();
    let (_, grads) = gradients(&meanflow, with_r.clone());
    meanflow.params().check_gradients(&grads, &meanflow.parameters_without_gradient(&with_r)).unwrap();
    assert!(meanflow.parameters_without_gradient(&with_r).iter().all(|name| !name.contains("embedder_r")));
}

#[test]
fn what_is_missing_or_does_not_fit_is_named() {
    let model = model(json!({}), DType::F32);
    for name in ["encoder_attention_mask", "encoder_attention_mask_2", "encoder_hidden_states_2", "image_embeds"] {
        let mut inputs = inputs();
        inputs.remove(name);
        assert!(model.forward(&inputs).unwrap_err().to_string().contains(name));
    }
    let image = inputs().with("hidden_states", normal(1, &[2, 5, 3, 4]));
    assert!(model.forward(&image).unwrap_err().to_string().contains("[B, C, F, H, W]"));
    let refused = |key: &str, value: Value| {
        let error = HunyuanVideo15Config::from_json(&json!({ key: value })).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    };
    refused("rope_axes_dim", json!([16, 56, 54]));
    refused("qk_norm", json!("layer_norm"));
    refused("num_layers", json!(0));
    refused("byt5_hidden_dim", json!(64));
    refused("guidance_embeds", json!(true));
}

#[test]
fn a_saved_configuration_makes_the_same_model() {
    let patched = json!({"patch_size": 2, "patch_size_t": 2, "mlp_ratio": 2.5, "out_channels": null});
    let model = model(patched, DType::F32);
    let again = create_model(&model.config(), &ParamBuilder::new(0, DType::F32, &Device::cpu())).unwrap();
    let shapes = |m: &dyn Transformer| -> Vec<_> {
        m.params().iter().map(|p| (p.path().to_owned(), p.dims().to_vec())).collect()
    };
    // The width that diffusers fixes is not in the configuration.
    let fixed = |(name, _): &(String, Vec<usize>)| name.starts_with("context_embedder_2.linear");
    let others = |m: &dyn Transformer| shapes(m).into_iter().filter(|shape| !fixed(shape)).collect::<Vec<_>>();
    assert_eq!(others(&model), others(&*again));
    assert_eq!(again.params().get("context_embedder_2.linear_2.weight").unwrap().dims(), [2048, 2048]);
    assert_eq!(model.params().get("transformer_blocks.0.ff.net.2.weight").unwrap().dims(), [24, 60]);
    let latents = inputs().with("hidden_states", normal(1, &[2, 5, 4, 2, 6]));
    assert_eq!(run(&model, &latents).dims(), [2, 5, 4, 2, 6]);
    assert!(model.config().get("byt5_hidden_dim").is_none());
}

#[test]
fn the_zero_start_adds_nothing_to_the_residual_stream() {
    let model = model(json!({}), DType::F32);
    for p in model.params().iter().filter(|p| p.zero_init() && !p.path().starts_with("proj_out.")) {
        p.copy_from(&Tensor::zeros(p.dims(), DType::F32, &Device::cpu()).unwrap()).unwrap();
    }
    let other =
        inputs().with("encoder_hidden_states", normal(7, &[2, 5, 10])).with("image_embeds", normal(8, &[2, 4, 8]));
    assert_eq!(run(&model, &inputs()).to_bytes().unwrap(), run(&model, &other).to_bytes().unwrap());
    assert!(model.params().get("proj_out.weight").unwrap().zero_init());
}
