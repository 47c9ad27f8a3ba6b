//! The model against itself: what must not change its prediction, what must, and what it refuses.

use flowtape_engine::nn::ParamBuilder;
use flowtape_engine::{DType, Device, Gradients, Tape, Tensor};
use flowtape_flowmatch::{FlowModel, Input, ModelInputs};
use serde_json::{Value, json};

use super::*;
use crate::testing::{normal, start_at_zero};
use crate::{Transformer, create_model};

fn model(changes: Value) -> QwenImageTransformer2DModel {
    let mut config = json!({
        "in_channels": 8, "out_channels": 2, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2,
        "joint_attention_dim": 10, "axes_dims_rope": [2, 4, 6],
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    let config = QwenImageConfig::from_json(&config).unwrap();
    QwenImageTransformer2DModel::new(config, &ParamBuilder::new(3, DType::F32, &Device::cpu())).unwrap()
}

fn times(values: [f32; 2]) -> Tensor {
    Tensor::from_slice(&values, &[2], &Device::cpu()).unwrap()
}

/// Two samples of a target of 2 x 3 places and, where `references`, a reference of 3 x 1.
fn inputs(references: bool) -> ModelInputs {
    let images = if references { vec![vec![1, 2, 3], vec![1, 3, 1]] } else { vec![vec![1, 2, 3]] };
    let tokens = if references { 9 } else { 6 };
    ModelInputs::new()
        .with("hidden_states", normal(&[2, tokens, 8]))
        .with("encoder_hidden_states", normal(&[2, 5, 10]))
        .with("timestep", times([0.25, 0.7]))
        .with("img_shapes", vec![images; 2])
}

fn predict(model: &QwenImageTransformer2DModel, inputs: &ModelInputs) -> Vec<f32> {
    model.forward(inputs).unwrap().sample.to_vec().unwrap()
}

/// Prediction, and gradients of half its square.
fn gradients(model: &QwenImageTransformer2DModel, inputs: &ModelInputs) -> (Tensor, Gradients) {
    let (tape, mut inputs) = (Tape::new(), inputs.clone());
    inputs.attach(&tape);
    let y = model.forward(&inputs).unwrap().sample;
    let gradients = tape.backward(&y.square().unwrap().sum_all().unwrap().mul_scalar(0.5).unwrap()).unwrap();
    (y.detach(), gradients)
}

/// `max |a - b| / max |b|`.
fn deviation(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
    got.iter().zip(want).fold(0.0, |m: f32, (a, b)| m.max((a - b).abs())) / largest
}

#[test]
fn padding_changes_neither_prediction_nor_gradients() {
    let (model, short) = (model(json!({})), inputs(true));
    let text = Tensor::cat(&[short.tensor("encoder_hidden_states").unwrap(), &normal(&[2, 4, 10])], 1).unwrap();
    let mask = Tensor::ones(&[2, 5], DType::U32, &Device::cpu()).unwrap().to_dtype(DType::F32).unwrap();
    let padded = short.clone().with("encoder_hidden_states", text);
    let unmasked = predict(&model, &padded);
    let padded = padded.with("encoder_hidden_states_mask", mask.pad(1, 0, 4).unwrap());
    let ((got, got_grads), (want, want_grads)) = (gradients(&model, &padded), gradients(&model, &short));
    let (got, want) = (got.to_vec::<f32>().unwrap(), want.to_vec::<f32>().unwrap());
    assert!(deviation(&got, &want) < 2e-6, "{}", deviation(&got, &want));
    assert!(deviation(&unmasked, &want) > 1e-3);
    let without = model.parameters_without_gradient(&short);
    for parameter in model.params().iter().filter(|p| !without.iter().any(|n| n == p.path())) {
        let name = parameter.path();
        let of = |gradients: &Gradients| gradients.of(parameter).unwrap().to_vec::<f32>().unwrap();
        let (got, want) = (of(&got_grads), of(&want_grads));
        // The last block's text queries have no say: rounding alone.
        if !name.starts_with("transformer_blocks.1.attn.add_q") && !name.contains("1.attn.norm_added_q") {
            assert!(deviation(&got, &want) < 2e-5, "{name}: {}", deviation(&got, &want));
        }
    }
}

#[test]
fn references_have_time_zero_where_the_model_says_so() {
    let (plain, edit) = (model(json!({})), model(json!({"zero_cond_t": true})));
    // Without references nothing is at time zero.
    let alone = inputs(false);
    assert_eq!(predict(&edit, &alone), predict(&plain, &alone));
    // At time zero they are like the target.
    let start = inputs(true).with("timestep", times([0.0; 2]));
    assert_eq!(predict(&edit, &start), predict(&plain, &start));
    let later = inputs(true);
    assert!(deviation(&predict(&edit, &later), &predict(&plain, &later)) > 1e-3);
}

#[test]
fn layers_are_frames_but_for_the_condition() {
    let images = [vec![1, 2, 2], vec![2, 1, 1]];
    let frames = [0, 0, 0, 0, 1, 2].map(|f| f as f32);
    let places = [[-1.0, -1.0], [-1.0, 0.0], [0.0, -1.0], [0.0, 0.0], [-1.0, -1.0], [-1.0, -1.0]];
    let expected = |frames: [f32; 6]| -> Vec<f32> {
        frames.iter().zip(places).flat_map(|(frame, [row, column])| [*frame, row, column]).collect()
    };
    assert_eq!(RotaryLayout::Frames.of_images(&images), expected(frames));
    assert_eq!(RotaryLayout::Layers.of_images(&images), expected([0.0, 0.0, 0.0, 0.0, -1.0, 0.0]));
    assert_eq!(RotaryLayout::Frames.of_text(&images, 2), [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]);
    let three = vec![vec![1, 2, 2]; 3];
    assert_eq!(RotaryLayout::Layers.of_text(&three, 1), [2.0; 3]);
    let (frames, layers) = (model(json!({})), model(json!({"use_layer3d_rope": true})));
    assert!(deviation(&predict(&layers, &inputs(true)), &predict(&frames, &inputs(true))) > 1e-4);
}

#[test]
fn a_layered_model_takes_a_flag() {
    let model = model(json!({"use_additional_t_cond": true}));
    assert!(model.forward(&inputs(false)).unwrap_err().to_string().contains("additional_t_cond"));
    let flagged = |flags: [u32; 2]| {
        inputs(false).with("additional_t_cond", Tensor::from_slice(&flags, &[2], &Device::cpu()).unwrap())
    };
    let [zero, one] = [[0, 0], [0, 1]].map(|flags| predict(&model, &flagged(flags)));
    let half = zero.len() / 2;
    assert!(zero[..half] == one[..half] && zero[half..] != one[half..]);
    let (_, gradients) = gradients(&model, &flagged([0, 1]));
    model.params().check_gradients(&gradients, &model.parameters_without_gradient(&flagged([0, 1]))).unwrap();
}

#[test]
fn what_does_not_fit_is_named() {
    let model = model(json!({}));
    let refused = |name: &str, input: Input, part: &str| {
        let mut inputs = inputs(true);
        inputs.insert(name, input);
        let error = model.forward(&inputs).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(part), "{error}");
    };
    refused("guidance", times([3.5; 2]).into(), "use_guidance_embeds");
    refused("img_shapes", vec![vec![vec![1, 3, 3]], vec![vec![1, 9, 1]]].into(), "same shapes");
    refused("img_shapes", vec![vec![vec![1, 2, 3]]; 2].into(), "hidden_states");
    refused("img_shapes", vec![vec![vec![9]]; 2].into(), "frames, rows and columns");
    refused("img_shapes", 1.0.into(), "a number");
    let refused = |key: &str, value: Value| {
        let error = QwenImageConfig::from_json(&json!({ key: value })).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    };
    refused("axes_dims_rope", json!([16, 56, 54]));
    refused("num_layers", json!(0));
    refused("mlp_ratio", json!(4));
}

#[test]
fn a_saved_configuration_makes_the_same_model() {
    let model = model(json!({"zero_cond_t": true, "out_channels": null, "patch_size": 1}));
    let again = create_model(&model.config(), &ParamBuilder::new(3, DType::F32, &Device::cpu())).unwrap();
    assert_eq!(again.config(), model.config());
    let want = predict(&model, &inputs(true));
    assert_eq!((again.forward(&inputs(true)).unwrap().sample.to_vec::<f32>().unwrap(), want.len()), (want, 2 * 9 * 8));
}

#[test]
fn from_a_zero_start_it_predicts_zero() {
    let model = model(json!({"zero_cond_t": true}));
    assert_eq!(model.params().iter().filter(|p| p.zero_init()).count(), 2 * 4 + 4);
    start_at_zero(model.params());
    assert!(predict(&model, &inputs(true)).iter().all(|v| *v == 0.0));
}
