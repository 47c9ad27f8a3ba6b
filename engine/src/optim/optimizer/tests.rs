//! What all rules have in common.

use super::files::STEP;
use super::*;
use crate::nn::{Init, ParamBuilder, Placement};
use crate::optim::{AdamW, RULES, RuleEntry, Sgd, functions};
use crate::safetensors::SafeTensors;
use crate::{Device, Philox};

/// Steps of a rule in f64 beside a formula, which gets the step's number (from 1), an element's number, value and gradient,
/// and the rates. After each step another optimiser goes on from a file.
pub(in crate::optim) fn follows<R: Rule + Copy + 'static>(
    rule: &R,
    mut formula: impl FnMut(i32, usize, f64, f64, Rates) -> f64,
) -> Result<()> {
    follows_whole(rule, &[7], |t, p, g, rates| (0..7).map(|i| formula(t, i, p[i], g[i], rates)).collect())
}

/// The same for a parameter of these sizes, where the formula gets all elements at once.
pub(in crate::optim) fn follows_whole<R: Rule + Copy + 'static>(
    rule: &R,
    dims: &[usize],
    mut formula: impl FnMut(i32, &[f64], &[f64], Rates) -> Vec<f64>,
) -> Result<()> {
    let (cpu, folder) = (Device::cpu(), tempfile::tempdir().unwrap());
    let path = folder.path().join("state.safetensors");
    let builder = ParamBuilder::new(4, DType::F64, &cpu);
    let (w, params) = (builder.get("w", dims, Init::Normal { std: 1.0 })?, builder.params());
    let clip = 0.5;
    let mut optimizer = Optimizer::new(*rule);
    let mut expected = w.value()?.to_vec::<f64>()?;
    let mut random = Philox::new(2);
    for t in 1..=4 {
        let rates = Rates { lr: 0.01 / f64::from(t), weight_decay: 0.1 };
        let g = random.normal(dims, &cpu)?.to_dtype(DType::F64)?;
        let clipped: Vec<f64> = g.to_vec::<f64>()?.iter().map(|g| g * clip).collect();
        expected = formula(t, &expected, &clipped, rates);
        let mut gradients = Gradients::default();
        gradients.insert(w.var().unwrap(), g);
        let coefficient = Tensor::from_slice(&[clip], &[], &cpu)?;
        optimizer.step(&params, &gradients, rates, Some(&coefficient))?;
        for (a, b) in w.value()?.to_vec::<f64>()?.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-12, "{rule:?}, step {t}: {a} instead of {b}");
        }
        optimizer.save(&params, &path)?;
        optimizer = Optimizer::new(*rule);
        optimizer.load(&params, &SafeTensors::open(&path)?.into())?;
    }
    let other = ParamBuilder::new(4, DType::F64, &cpu);
    other.get("x", dims, Init::Zeros)?;
    assert!(optimizer.load(&other.params(), &SafeTensors::open(&path)?.into()).is_err());
    Ok(())
}

/// A parameter of `n` elements and a gradient, in the dtypes of weight and gradient, and of the wider copy.
pub(in crate::optim) fn one(n: usize, dtype: DType, masters: DType) -> Result<(Params, Gradients)> {
    let cpu = Device::cpu();
    let builder = ParamBuilder::with_plan(n as u64, Placement::trained(dtype).with_master(masters), &cpu);
    let w = builder.get("w", &[n], Init::Normal { std: 1.0 })?;
    let mut gradients = Gradients::default();
    gradients.insert(w.var().unwrap(), Philox::new(n as u64).normal(&[n], &cpu)?.to_dtype(dtype)?);
    Ok((builder.params(), gradients))
}

const RATES: Rates = Rates { lr: 1e-2, weight_decay: 0.1 };

/// What three steps make of the parameter that is kept, in f64.
pub(in crate::optim) fn trained(rule: impl Rule + 'static, params: &Params, gradients: &Gradients) -> Result<Vec<f64>> {
    trained_by(Optimizer::new(rule), params, gradients)
}

fn trained_by(mut optimizer: Optimizer, params: &Params, gradients: &Gradients) -> Result<Vec<f64>> {
    (0..3).try_for_each(|_| optimizer.step(params, gradients, RATES, None))?;
    params.get("w").unwrap().kept()?.to_vec::<f64>()
}

/// Every rule of the registry as it is without configuration, and with one that has all its parts.
fn rules() -> Vec<Box<dyn Rule>> {
    let configured = serde_json::json!({ "momentum": 0.9, "nesterov": true });
    let default = RULES.iter().map(|entry| RuleEntry::rule(entry.name, serde_json::json!({})).unwrap());
    default.chain([RuleEntry::rule("sgd", configured).unwrap()]).collect()
}

#[test]
fn every_rule_gives_what_it_declares_and_is_found_by_its_name() {
    for rule in rules() {
        let [plain, rounding] = functions(&*rule);
        let slots = rule.slots().len();
        assert_eq!((plain.inputs(), plain.outputs()), (2 + slots, 1 + slots), "{rule:?}");
        assert_eq!(rounding.outputs(), 2 + slots, "{rule:?}");
        let (shared, rates) = (vec![0.5; rule.shared().len()], Rates { lr: 0.1, weight_decay: 0.0 });
        let at = At { rates, step: 1000, before: &shared, shared: &shared };
        assert_eq!(plain.scalars(), 1 + rule.scalars(&at).len(), "{rule:?}");
        let advanced = rule.advance(&shared, rates, &vec![0.25; rule.shared().len()]);
        assert_eq!(advanced.len(), shared.len(), "{rule:?}");
        assert!(rule.shared().iter().all(|(name, _)| !name.contains('.')), "{rule:?}");
        assert!(rule.slots().iter().all(|slot| !slot.contains('.') && *slot != STEP), "{rule:?}");
    }
    let names: HashSet<&str> = RULES.iter().map(|entry| entry.name).collect();
    assert_eq!(names.len(), RULES.len());
    let error = |name: &str, config| RuleEntry::rule(name, config).unwrap_err().to_string();
    assert!(error("adan", serde_json::json!({})).contains("adamw or adam or sgd"));
    assert!(error("sgd", serde_json::json!({ "betas": [0.9, 0.9] })).contains("momentum"));
    assert!(error("adamw", serde_json::json!({ "eps": 0.0 })).contains("eps"));
}

#[test]
fn a_gradient_of_any_float_dtype_is_as_if_widened_first() -> Result<()> {
    // Wider copies as well: the start is that of a run in f32.
    let kinds = [
        (DType::F32, DType::F32),
        (DType::BF16, DType::BF16),
        (DType::F16, DType::F16),
        (DType::BF16, DType::F32),
        (DType::F16, DType::F32),
    ];
    for make in 0..rules().len() {
        for (dtype, masters) in kinds {
            for of_gradient in [DType::F32, DType::BF16, DType::F16] {
                let run = |widened: bool| -> Result<(Vec<f64>, Vec<f64>)> {
                    let (params, gradients) = one(1000, dtype, masters)?;
                    let w = params.get("w").unwrap();
                    let mut given = gradients.of(w).unwrap().to_dtype(of_gradient)?;
                    if widened {
                        given = given.to_dtype(DType::F32)?;
                    }
                    let mut gradients = Gradients::default();
                    gradients.insert(w.var().unwrap(), given);
                    let rule = rules().swap_remove(make);
                    let kept = trained_by(Optimizer::boxed(rule), &params, &gradients)?;
                    Ok((kept, w.value()?.to_vec()?))
                };
                let what = format!("rule {make}, {dtype} with {masters}, gradient in {of_gradient}");
                assert_eq!(run(false)?, run(true)?, "{what}");
            }
        }
    }
    Ok(())
}

#[test]
fn wider_copies_train_as_f32_on_widened_gradients() -> Result<()> {
    for make in 0..rules().len() {
        let optimizer = || Optimizer::boxed(rules().swap_remove(make));
        let (mixed, gradients) = one(1000, DType::BF16, DType::F32)?;
        let (plain, _) = one(1000, DType::F32, DType::F32)?;
        let (w, gradient) = (plain.get("w").unwrap(), gradients.iter().next().unwrap().1);
        let mut widened = Gradients::default();
        widened.insert(w.var().unwrap(), gradient.to_dtype(DType::F32)?);
        // The start is that of a run in f32, too.
        assert_eq!(mixed.get("w").unwrap().kept()?.to_vec::<f32>()?, w.value()?.to_vec::<f32>()?);
        let expected = trained_by(optimizer(), &plain, &widened)?;
        assert_eq!(trained_by(optimizer(), &mixed, &gradients)?, expected);
    }
    Ok(())
}

#[test]
fn a_group_has_rates_of_its_own() -> Result<()> {
    for (pattern, name, holds) in [
        ("*.bias", "blocks.0.bias", true),
        ("*.bias", "bias", false),
        ("blocks.*.norm*", "blocks.10.norm.weight", true),
        ("blocks.*.norm*", "blocks.norm", false),
        ("w", "w", true),
        ("w", "ww", false),
        ("*", "anything", true),
        ("a*a", "a", false),
    ] {
        let group = ParamGroup { pattern: pattern.into(), lr_mult: 1.0, wd_mult: 1.0 };
        assert_eq!(group.holds(name), holds, "{pattern} and {name}");
    }
    let cpu = Device::cpu();
    let run = |groups: Vec<ParamGroup>, rates: Rates, only: Option<usize>| -> Result<Vec<Vec<f64>>> {
        let builder = ParamBuilder::new(3, DType::F64, &cpu);
        let weight = builder.sub("a").get("weight", &[5], Init::Normal { std: 1.0 })?;
        let tensors = [weight, builder.sub("a").get("bias", &[5], Init::Ones)?];
        let mut optimizer = Optimizer::new(AdamW::default()).with_groups(groups);
        for _ in 0..2 {
            let mut gradients = Gradients::default();
            for (_, tensor) in tensors.iter().enumerate().filter(|(i, _)| only.is_none_or(|only| only == *i)) {
                gradients.insert(tensor.var().unwrap(), Tensor::full(&[5], 0.3, DType::F64, &cpu)?);
            }
            optimizer.step(&builder.params(), &gradients, rates, None)?;
        }
        tensors.iter().map(|w| w.value()?.to_vec()).collect()
    };
    let group = ParamGroup { pattern: "*.bias".into(), lr_mult: 0.5, wd_mult: 0.0 };
    let grouped = run(vec![group], RATES, None)?;
    assert_eq!(grouped[0], run(Vec::new(), RATES, Some(0))?[0]);
    let half = Rates { lr: 0.5 * RATES.lr, weight_decay: 0.0 };
    assert_eq!(grouped[1], run(Vec::new(), half, Some(1))?[1]);
    Ok(())
}

#[test]
fn a_file_of_another_rule_is_named_as_such() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let (params, gradients) = one(5, DType::F32, DType::F32)?;
    let mut adamw = Optimizer::new(AdamW::default());
    adamw.step(&params, &gradients, RATES, None)?;
    adamw.save(&params, &path)?;
    let file = SafeTensors::open(&path)?;
    assert_eq!(file.names(), ["exp_avg.w", "exp_avg_sq.w", "step.w"]);
    let error = Optimizer::new(Sgd::default()).load(&params, &file.into()).unwrap_err().to_string();
    assert!(error.contains("exp_avg.w"), "{error}");
    Ok(())
}

/// A parameter of `n` ones in bf16 that `steps` steps of SGD take `by` away from each, and the optimiser.
fn walked(rounding: &Rounding, n: usize, steps: usize, by: f64) -> Result<(Params, Optimizer)> {
    let cpu = Device::cpu();
    let builder = ParamBuilder::with_plan(1, Placement::trained(DType::BF16), &cpu);
    let w = builder.get("w", &[n], Init::Ones)?;
    let mut optimizer = Optimizer::new(Sgd::default()).with_rounding(rounding.clone());
    let mut gradients = Gradients::default();
    gradients.insert(w.var().unwrap(), Tensor::ones(&[n], DType::F32, &cpu)?);
    let rates = Rates { lr: by, weight_decay: 0.0 };
    (0..steps).try_for_each(|_| optimizer.step(&builder.params(), &gradients, rates, None))?;
    Ok((builder.params(), optimizer))
}

#[test]
fn rounding_by_chance_is_right_on_average_and_a_function_of_seed_path_and_step() -> Result<()> {
    let (n, steps, by) = (4096, 300, 1e-4);
    let run = |seed: u64| -> Result<Vec<f64>> {
        let (params, _) = walked(&Rounding::Stochastic(Philox::new(seed)), n, steps, by)?;
        params.get("w").unwrap().kept()?.to_vec()
    };
    let (lost, _) = walked(&Rounding::Nearest, n, steps, by)?;
    assert!(lost.get("w").unwrap().kept()?.to_vec::<f64>()?.iter().all(|w| *w == 1.0));
    let (first, again, other) = (run(1)?, run(1)?, run(2)?);
    assert!(first == again && first != other);
    for values in [first, other] {
        let mean = values.iter().sum::<f64>() / n as f64;
        let deviation = (values.iter().map(|w| (w - mean).powi(2)).sum::<f64>() / n as f64).sqrt();
        let expected = 1.0 - by * steps as f64;
        // Five standard errors; each element has walked a way of its own.
        assert!((mean - expected).abs() < 5.0 * deviation / (n as f64).sqrt(), "{mean} instead of {expected}");
        assert!(deviation > 1e-3, "{deviation}");
    }
    Ok(())
}

#[test]
fn what_rounding_takes_is_kept_for_the_next_step() -> Result<()> {
    for (steps, by) in [(1000, 1e-4), (3000, 3.3e-5), (10, 0.03)] {
        let (params, optimizer) = walked(&Rounding::Kahan, 8, steps, by)?;
        let w = params.get("w").unwrap();
        let lost = optimizer.slot(w, "compensation").unwrap().to_vec::<f64>()?;
        let sum = w.kept()?.to_vec::<f64>()?[0] + lost[0];
        // The sum in f64. What is lost of a weight below 1 is at most 2^-9, and half of the distance of such numbers 2^-18.
        let expected = 1.0 - by * steps as f64;
        assert!((sum - expected).abs() < 2f64.powi(-18) * steps as f64, "{steps} of {by}: {sum} instead of {expected}");
        assert!((w.kept()?.to_vec::<f64>()?[0] - sum).abs() <= 2f64.powi(-9), "the weight itself");
    }
    Ok(())
}

#[test]
fn every_rule_trains_bf16_with_both_roundings_and_goes_on_after_loading() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    for make in 0..rules().len() {
        for rounding in [Rounding::Kahan, Rounding::Stochastic(Philox::new(3))] {
            let optimizer = || Optimizer::boxed(rules().swap_remove(make)).with_rounding(rounding.clone());
            let (whole, gradients) = one(5000, DType::BF16, DType::BF16)?;
            let expected = trained_by(optimizer(), &whole, &gradients)?;
            let (parts, given) = one(5000, DType::BF16, DType::BF16)?;
            let mut before = optimizer();
            (0..2).try_for_each(|_| before.step(&parts, &given, RATES, None))?;
            before.save(&parts, &path)?;
            let mut after = optimizer();
            after.load(&parts, &SafeTensors::open(&path)?.into())?;
            after.step(&parts, &given, RATES, None)?;
            let got = parts.get("w").unwrap().kept()?.to_vec::<f64>()?;
            assert!(got == expected && got.iter().all(|w| w.is_finite()), "rule {make}, {rounding:?}");
            // Close to what f32 comes to.
            let (wide, _) = one(5000, DType::F32, DType::F32)?;
            let mut widened = Gradients::default();
            let gradient = gradients.iter().next().unwrap().1.to_dtype(DType::F32)?;
            widened.insert(wide.get("w").unwrap().var().unwrap(), gradient);
            let wide = trained_by(Optimizer::boxed(rules().swap_remove(make)), &wide, &widened)?;
            let far = got.iter().zip(&wide).map(|(a, b)| (a - b).abs() / (0.1 + b.abs())).fold(0.0, f64::max);
            assert!(far < 0.03, "rule {make}, {rounding:?}: {far}");
        }
    }
    Ok(())
}

#[test]
fn numbers_are_rounded_to_bf16_up_as_often_as_they_are_far_from_below() -> Result<()> {
    let cpu = Device::cpu();
    let rounded = |values: &[f32], fraction: &[f32]| -> Result<Vec<f32>> {
        let [x, f] = [values, fraction].map(|v| Tensor::from_slice(v, &[v.len()], &cpu).unwrap());
        pointwise([&x, &f], |[x, f]| x.round_bf16(f))?.to_vec()
    };
    let step = 2f32.powi(-7);
    // A quarter of the way: up for the greatest quarter of the fractions, away from zero.
    for sign in [1.0, -1.0] {
        let fractions: Vec<f32> = (0..1000).map(|i| i as f32 / 1000.0).collect();
        let all = rounded(&vec![sign * (1.0 + step / 4.0); 1000], &fractions)?;
        assert_eq!(all.iter().filter(|x| **x == sign * (1.0 + step)).count(), 250);
        assert_eq!(all.iter().filter(|x| **x == sign).count(), 750);
    }
    let exact = [0.0, -0.0, 1.0, -3.5, f32::INFINITY, f32::NEG_INFINITY, 1e-40 * 0.0];
    for fraction in [0.0, 0.5, 0.999_999_94] {
        assert_eq!(rounded(&exact, &[fraction; 7])?, exact);
        assert!(rounded(&[f32::NAN], &[fraction])?[0].is_nan());
    }
    // By a half: the nearest one.
    let values: Vec<f32> = Philox::new(1).normal(&[2000], &cpu)?.to_vec()?;
    let nearest = |x: &f32| half::bf16::from_f32(*x).to_f32();
    assert_eq!(rounded(&values, &[0.5; 2000])?, values.iter().map(nearest).collect::<Vec<_>>());
    Ok(())
}
