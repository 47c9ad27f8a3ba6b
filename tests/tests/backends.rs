//! Every op on every device beside the CPU, forward and gradient, against f64 on the CPU; whole steps and runs against
//! goldens and the CPU.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::collections::BTreeMap;
use std::sync::Arc;

use flowtape_engine::backend::call::{Call, ScatterAdd};
use flowtape_engine::backend::{Ran, run_fused};
use flowtape_engine::gradcheck::{Draw, Sample, check_dtype};
use flowtape_engine::nn::{Init, ParamBuilder, Placement};
use flowtape_engine::ops::{RopeLayout, pointwise};
use flowtape_engine::optim::{
    AdamW, Clipping, LossScale, LossScaleConfig, LossScaleState, Optimizer, OptimizerStep, Rates, StepConfig,
    clip_grad_norm,
};
use flowtape_engine::quant::{self, Dequantise, FORMATS, Format, Parts, QTensor};
use flowtape_engine::safetensors::{SafeTensors, Snapshot};
use flowtape_engine::{DType, Device, Error, Gradients, Philox, Result, Tape, Tensor, ops};
use flowtape_flowmatch::{Batch, DataType, FlowMatchingConfig, FlowMatchingPipeline, PhiloxDraws, StepOptions};
use flowtape_gpu::cuda::Cuda;
use flowtape_gpu::wgpu::{Wgpu, WgpuOptions};
use flowtape_models::checkpoint;
use flowtape_models::flux::FluxAdapter;
use flowtape_tests::devices::{gpus, gpus_of, is_slow, say};
use flowtape_tests::{Outcome, goldens, recipes, sampling, step};
use flowtape_trainer::{Recipe, Trainer};

fn all_cases(device: &Device, dtype: DType, seeds: u64) {
    let mut wrong = Vec::new();
    let seeds = if is_slow(device) { 1 } else { seeds };
    for case in ops::cases() {
        for seed in 0..seeds {
            let sample = (case.make)(&mut Draw::new(seed)).unwrap();
            match check_dtype(&sample, dtype, device, seed ^ 2) {
                Ok(Ok(())) => {}
                Ok(Err(what)) => wrong.push(format!("{} (seed {seed}): {what}", case.name)),
                Err(error) => wrong.push(format!("{} (seed {seed}): {error}", case.name)),
            }
        }
    }
    assert!(wrong.is_empty(), "{} on {}:\n{}", dtype, device.backend().name(), wrong.join("\n"));
}

#[test]
fn ops_in_f32() {
    gpus().iter().for_each(|device| all_cases(device, DType::F32, 3));
}

#[test]
fn ops_in_bf16() {
    gpus().iter().for_each(|device| all_cases(device, DType::BF16, 2));
}

#[test]
fn ops_in_f16() {
    gpus().iter().for_each(|device| all_cases(device, DType::F16, 1));
}

#[test]
fn random_numbers_are_those_of_the_cpu() -> Result<()> {
    for device in gpus() {
        for (seed, counter) in [(7, 0), (u64::MAX - 3, u64::from(u32::MAX) - 5)] {
            let on = |device: &Device| -> Result<_> {
                let mut random = Philox::from_state(seed, counter);
                let bits = random.bits(&[37], device)?.to_vec::<u32>()?;
                let uniform = random.uniform(&[3, 341], device)?.to_vec::<f32>()?;
                let normal = random.normal(&[5001], device)?.to_vec::<f32>()?;
                Ok((bits, uniform, normal, random.state()))
            };
            let ((bits, uniform, normal, state), expected) = (on(device)?, on(&Device::cpu())?);
            assert_eq!((bits, uniform, state), (expected.0, expected.1, expected.3));
            for (a, b) in normal.iter().zip(expected.2) {
                assert!((a - b).abs() < 2e-6, "{a} instead of {b}");
            }
        }
    }
    Ok(())
}

#[test]
fn halves_are_rounded_as_on_the_cpu() -> Result<()> {
    let specials =
        [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 65504.0, 65519.9, 65520.0, 1e-8, 6e-8, 6.1e-5];
    let mut draw = Draw::new(5);
    let drawn = (0..4000).map(|i| (draw.number(-1.0, 1.0) * 1.000_3 * 10f64.powi(i % 12 - 7)) as f32);
    let values: Vec<f32> = specials.into_iter().chain(drawn).collect();
    for device in gpus() {
        for dtype in [DType::BF16, DType::F16] {
            let on = |device: &Device| -> Result<(Vec<u8>, Vec<u32>)> {
                let half = Tensor::from_slice(&values, &[values.len()], device)?.to_dtype(dtype)?;
                let wide = half.to_dtype(DType::F32)?.to_vec::<f32>()?.iter().map(|v| v.to_bits()).collect();
                Ok((half.to_bytes()?, wide))
            };
            let (got, expected) = (on(device)?, on(&Device::cpu())?);
            for (i, v) in values.iter().enumerate().filter(|(_, v)| !v.is_nan()) {
                assert_eq!(got.0[2 * i..][..2], expected.0[2 * i..][..2], "{v} to {dtype}");
                assert_eq!(got.1[i], expected.1[i], "{v} through {dtype}");
            }
            assert!(f32::from_bits(got.1[4]).is_nan());
        }
    }
    Ok(())
}

/// What keeps weights in bf16 alone stands on this.
#[test]
fn a_fraction_rounds_as_on_the_cpu() -> Result<()> {
    let mut draw = Draw::new(8);
    let specials = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1.0, -1.003_906_2];
    let drawn = (0..4000).map(|i| (draw.number(-1.0, 1.0) * 10f64.powi(i % 12 - 7)) as f32);
    let values: Vec<f32> = specials.into_iter().chain(drawn).collect();
    let fractions: Vec<f32> = values.iter().map(|_| draw.number(0.0, 1.0) as f32).collect();
    for device in gpus() {
        let on = |device: &Device| -> Result<Vec<u8>> {
            let put = |values: &[f32]| Tensor::from_slice(values, &[values.len()], device);
            pointwise([&put(&values)?, &put(&fractions)?], |[x, fraction]| x.round_bf16(fraction))?.to_bytes()
        };
        assert_eq!(on(device)?, on(&Device::cpu())?, "{}", device.backend().name());
    }
    Ok(())
}

/// Panels of quantised matrices by kernels of the device, and the products that take them: those of the CPU, also where no
/// binding holds all codes.
#[test]
fn quantised_matrices_are_those_of_the_cpu() -> Result<()> {
    let cpu = Device::cpu();
    let small = WgpuOptions { max_binding_size: Some(1 << 10), tune: Some(false), ..WgpuOptions::default() };
    let small = if gpus_of("wgpu").is_empty() { vec![] } else { vec![Device::new(Wgpu::open(None, small)?)] };
    for device in gpus().iter().chain(&small) {
        let name = device.backend().name();
        for (format, dims) in FORMATS.into_iter().flat_map(|f| [[70, 136], [33, 95]].map(|d| (f, d))) {
            let [outputs, width] = dims;
            let mut random = Philox::new(5);
            let dense = random.normal(&dims, &cpu)?;
            let [there, here] = [device, &cpu].map(|d| QTensor::quantise(&dense, format, d));
            let (there, here) = (Arc::new(there?), Arc::new(here?));
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let what = format!("{format:?} {dims:?} {dtype} on {name}");
                for [row, column] in [[0, 0], [3, 8], [1, 31]] {
                    let panel = |w: &QTensor| w.panel(row..outputs - 2, column..width, dtype)?.to_vec::<f64>();
                    for (got, expected) in panel(&there)?.into_iter().zip(panel(&here)?) {
                        // A scale of nf4 is a sum of a product, which a device may round once.
                        let off = if got == expected { 0.0 } else { (got - expected).abs() / expected.abs() };
                        let unit = if dtype == DType::F32 { 2e-7 } else { 2f64.powi(-8) };
                        assert!(off == 0.0 || (format == Format::Nf4 && off < unit), "{what}: {got} for {expected}");
                    }
                }
                let (x, b) = (random.normal(&[2, 3, width], &cpu)?, random.normal(&[outputs], &cpu)?);
                let cotangent = random.normal(&[2, 3, outputs], &cpu)?;
                let results = |weight: &Arc<QTensor>, device: &Device| -> Result<Vec<Vec<f64>>> {
                    let on = |t: &Tensor| t.to_dtype(dtype)?.to_device(device);
                    let tape = Tape::new();
                    let (x, b, cotangent) = (tape.leaf(&on(&x)?), tape.leaf(&on(&b)?), on(&cotangent)?);
                    let y = quant::linear(&x, weight, Some(&b))?;
                    let mut gradients = Gradients::default();
                    tape.backward_with(&[(&y, &cotangent)], &mut gradients)?;
                    let all = [&y, gradients.of(&x).unwrap(), gradients.of(&b).unwrap()];
                    all.into_iter().map(Tensor::to_vec).collect()
                };
                let unit = if dtype == DType::F32 { 1e-5 } else { 2f64.powi(-7) };
                for (got, expected) in results(&there, device)?.iter().zip(&results(&here, &cpu)?) {
                    let most = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
                    let off = got.iter().zip(expected).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
                    assert!(off <= unit * most, "{what}: {off} of {most}");
                }
                // The kernel did it.
                let (words, out) = (Parts::of(format, dims).words(), Tensor::zeros(&dims, dtype, device)?);
                let words = Tensor::zeros(&[words], DType::U32, device)?;
                assert_eq!(run_fused(Dequantise { format, dims, words: &words, start: [0, 0], out: &out })?, Ran::Done);
            }
        }
    }
    Ok(())
}

/// Tensors beyond a binding, more inputs than bindings, more workgroups than an axis has: the same values in parts.
#[test]
fn small_limits_change_no_value() -> Result<()> {
    let Some(plain) = gpus_of("wgpu").into_iter().next() else { return Ok(()) };
    let options = WgpuOptions {
        max_binding_size: Some(1 << 10),
        max_bindings: Some(8),
        max_workgroups: Some(3),
        tune: Some(false),
    };
    let small = Device::new(Wgpu::open(None, options)?);
    let draw = |dims: &[usize]| Philox::new(9).normal(dims, &Device::cpu());
    for dtype in [DType::F32, DType::BF16] {
        let run = |device: &Device| -> Result<Vec<Vec<f64>>> {
            let on = |dims: &[usize]| draw(dims)?.to_dtype(dtype)?.to_device(device);
            let (x, row, w) = (on(&[70, 46])?, on(&[46])?, on(&[46, 90])?);
            let many: Vec<Tensor> = (1..=9).map(|i| on(&[i + 10, 46])?.narrow(0, i, 1)).collect::<Result<_>>()?;
            let m: [&Tensor; 9] = std::array::from_fn(|i| &many[i]);
            let nine = pointwise(m, |[a, b, c, d, e, f, g, h, i]| a * b + c * d - e * f + g * h - i)?;
            let index = Tensor::from_slice(&[69u32, 3, 69, 0, 41], &[5], device)?;
            let tape = Tape::new();
            let (lx, lw) = (tape.leaf(&x), tape.leaf(&w));
            let y = ops::linear(&lx, &lw.t()?, None)?.silu()?.add(&lx.index_select(0, &index)?.sum_all()?)?;
            let gradients = tape.backward(&y.square()?.mean_all()?)?;
            let results = [
                x.mul(&row)?.exp()?,
                x.t()?.contiguous()?,
                x.sum(&[0], false)?,
                x.sum(&[1], false)?,
                x.max(&[0, 1], false)?,
                nine,
                y,
                gradients.of(&lx).unwrap().clone(),
                gradients.of(&lw).unwrap().clone(),
            ];
            results.iter().map(Tensor::to_vec::<f64>).collect()
        };
        let unit = if dtype == DType::F32 { 1e-5 } else { 1.0 / 128.0 };
        for (i, (a, b)) in run(&small)?.into_iter().zip(run(&plain)?).enumerate() {
            assert_eq!(a.len(), b.len());
            let size = b.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            for (a, b) in a.iter().zip(&b) {
                assert!((a - b).abs() <= unit * size, "{dtype} result {i}: {a} instead of {b}, size {size}");
            }
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error_that_names_its_size() -> Result<()> {
    for device in gpus() {
        let error = Tensor::zeros(&[1 << 20, 1 << 20], DType::F32, device).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { bytes, .. } if bytes >= 1 << 42), "{error}");
        // The device goes on working.
        assert_eq!(Tensor::ones(&[3], DType::F32, device)?.sum_all()?.item()?, 3.0);
        let wide = Tensor::ones(&[2], DType::F64, device).and_then(|x| x.exp());
        assert!(matches!(wide.unwrap_err(), Error::DType { .. }));
    }
    Ok(())
}

/// The CPU refuses such an index at once; a GPU goes on and tells of it with the next values that are read.
#[test]
fn an_index_past_the_end_is_told_with_the_next_values() -> Result<()> {
    for device in gpus() {
        let table = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], &[3, 2], device)?;
        let (good, bad) =
            (Tensor::from_slice(&[2u32, 0], &[2], device)?, Tensor::from_slice(&[2u32, 7], &[2], device)?);
        let told = |result: Result<Vec<f32>>| {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::Argument { .. }) && error.to_string().contains('7'), "{error}");
        };
        let unrelated = table.mul_scalar(2.0)?;
        told(table.index_select(0, &bad).and_then(|rows| rows.to_vec()));
        assert_eq!(table.index_select(0, &good)?.to_vec::<f32>()?, [5.0, 6.0, 1.0, 2.0]);
        let sums = Tensor::zeros(&[3, 2], DType::F32, device)?;
        let rows = table.narrow(0, 0, 2)?.contiguous()?;
        ScatterAdd { rows: &rows, index: &bad, out: &sums }.run()?;
        told(unrelated.to_vec());
        assert_eq!(sums.to_vec::<f32>()?, [0.0, 0.0, 0.0, 0.0, 1.0, 2.0]);
    }
    Ok(())
}

/// Goldens for the emulated machine.
const SMALL: [&str; 2] = ["wan_step", "flux_step"];

/// The goldens' training steps and trajectories, of every model.
#[test]
fn model_goldens_are_met() {
    for device in gpus() {
        let root = goldens();
        let outcomes: Vec<Outcome> = if is_slow(device) {
            step::cases_in(&root, device, |name| SMALL.contains(&name))
        } else {
            step::cases_on(&root, device).into_iter().chain(sampling::trajectories_on(&root, device)).collect()
        };
        let failed: Vec<String> = outcomes.iter().filter(|o| o.failed()).map(Outcome::to_string).collect();
        let passed = outcomes.iter().filter(|o| o.passed()).count();
        say(format_args!("{}: {passed} goldens passed, {} failed", device.backend().name(), failed.len()));
        assert!(failed.is_empty() && passed > 0, "{}", failed.join("\n"));
    }
}

/// The recipe of the digits: the same losses as on the CPU. Noise differs by rounding, and each step hands it on.
#[test]
fn the_digits_losses_follow_the_cpu() {
    let path = recipes().join("digits.yaml");
    let losses = |device: &str, batch: usize, steps: u64| -> Vec<(f64, f64)> {
        let settings = [format!("step_scheduler.local_batch_size={batch}"), format!("device={device}")];
        let recipe = Recipe::load(&path, &settings).unwrap();
        let mut trainer = Trainer::new(&recipe).unwrap();
        let step = |_| trainer.step().map(|record| (record.loss, record.grad_norm)).unwrap();
        (0..steps).map(step).collect()
    };
    for kind in ["cuda", "wgpu"] {
        let Some(device) = gpus_of(kind).into_iter().next() else { continue };
        let (batch, steps) = if is_slow(&device) { (2, 3) } else { (8, 20) };
        let mut worst = 0.0f64;
        for (step, (a, b)) in losses(kind, batch, steps).into_iter().zip(losses("cpu", batch, steps)).enumerate() {
            for (a, b) in [(a.0, b.0), (a.1, b.1)] {
                worst = worst.max((a - b).abs() / b);
                assert!((a - b).abs() < 1e-3 * b, "{kind}, step {step}: {a} instead of {b}");
            }
        }
        say(format_args!("digits on {kind}: losses and norms of {steps} steps within {worst:.1e} of the CPU's"));
    }
}

/// A step of a model, its gradients' norm and its update: nothing is read back, and kernels go out many at once.
#[test]
fn a_training_step_reads_nothing_back() {
    if !gpus_of("wgpu").is_empty() {
        let wgpu = Wgpu::open(None, WgpuOptions::default()).unwrap();
        let counts = || (wgpu.counts().reads, wgpu.counts().kernels, wgpu.counts().submissions);
        three_steps(&Device::new(wgpu.clone()), counts);
    }
    if !gpus_of("cuda").is_empty() {
        let cuda = Cuda::open(0).unwrap();
        three_steps(&Device::new(cuda.clone()), || (cuda.usage().reads as u64, cuda.usage().launches as u64, 0));
    }
}

/// `counts` are reads that were waited for, kernels and submissions so far.
fn three_steps(device: &Device, counts: impl Fn() -> (u64, u64, u64)) {
    let model = checkpoint::load(&goldens().join("flux_step"), DType::F32, device).unwrap();
    let channels = model.config()["in_channels"].as_u64().unwrap() as usize / 4;
    let (text, pooled) = ("joint_attention_dim", "pooled_projection_dim");
    let width = |key: &str| model.config()[key].as_u64().unwrap() as usize;
    let pipeline = FlowMatchingPipeline::new(FlowMatchingConfig::default(), FluxAdapter::default()).unwrap();
    let mut adamw = Optimizer::new(AdamW::default());
    let mut random = Philox::new(3);
    let mut last = None;
    for step in 0..3 {
        let before = counts();
        let normal = |random: &mut Philox, dims: &[usize]| random.normal(dims, device).unwrap();
        let batch = Batch::new(normal(&mut random, &[2, channels, 4, 4]), DataType::Image)
            .with("text_embeddings", normal(&mut random, &[2, 5, width(text)]))
            .with("pooled_prompt_embeds", normal(&mut random, &[2, width(pooled)]));
        let tape = Tape::new();
        let options = StepOptions { collect_metrics: false, check_loss: false, ..StepOptions::recorded(&tape) };
        let output = pipeline.step(&*model, &batch, step, &mut PhiloxDraws::new(step), &options).unwrap();
        let loss = output.loss.read_later().unwrap();
        let gradients = tape.backward(&output.loss).unwrap();
        let clipping = clip_grad_norm(&gradients, Some(1.0)).unwrap();
        adamw
            .step(model.params(), &gradients, Rates { lr: 1e-3, weight_decay: 0.01 }, Some(&clipping.coefficient))
            .unwrap();
        let after = counts();
        assert_eq!(after.0, before.0, "step {step}");
        let (kernels, submissions) = (after.1 - before.1, after.2 - before.2);
        assert!(kernels > 200 && submissions <= kernels.div_ceil(128), "{kernels} kernels, {submissions} submissions");
        last = Some((loss, clipping.norm.item().unwrap()));
    }
    let (loss, norm) = last.unwrap();
    assert!(loss.item().unwrap() > 0.0 && norm > 0.0);
}

/// A norm that is not finite updates nothing, on a device that finds out later.
#[test]
fn a_norm_that_is_not_finite_gates_the_update() -> Result<()> {
    for device in gpus() {
        let builder = ParamBuilder::new(1, DType::F32, device);
        let w = builder.get("w", &[5], Init::Ones)?;
        let mut adamw = Optimizer::new(AdamW::default());
        for (value, moves) in [(f32::NAN, false), (f32::INFINITY, false), (1.0, true)] {
            let mut gradients = Gradients::default();
            gradients.insert(w.var().unwrap(), Tensor::from_slice(&[value, 0.5, 1.0, -1.0, 2.0], &[5], device)?);
            let clipping = clip_grad_norm(&gradients, Some(1.0))?;
            adamw.step(
                &builder.params(),
                &gradients,
                Rates { lr: 0.1, weight_decay: 0.0 },
                Some(&clipping.coefficient),
            )?;
            assert_eq!(w.value()?.to_vec::<f32>()? != [1.0; 5], moves, "{value}");
            assert_eq!(Clipping::finite(clipping.norm.item()?).is_ok(), moves);
        }
    }
    Ok(())
}

/// What is saved is what the tensors were when the snapshot was taken, not when its files are written.
#[test]
fn a_snapshot_keeps_the_values_of_its_moment() -> Result<()> {
    for device in [&Device::cpu()].into_iter().chain(gpus()) {
        let folder = tempfile::tempdir().unwrap();
        let values = [1.0f32, -2.0, 3.5];
        let tensor = Tensor::from_slice(&values, &[3], device)?;
        let mut snapshot = Snapshot::default();
        snapshot.add(folder.path(), "state", vec![("w".into(), tensor.clone())], BTreeMap::new(), u64::MAX)?;
        tensor.copy_from(&Tensor::from_slice(&[0f32; 3], &[3], device)?)?;
        let path = folder.path().join("state.safetensors");
        let (name, host) = (device.backend().name(), device.backend().is_host());
        assert_eq!(path.exists(), host, "{name}: only what is not on the host is written later");
        snapshot.write()?;
        assert_eq!(SafeTensors::open(&path)?.get("w", &Device::cpu(), None)?.to_vec::<f32>()?, values, "{name}");
    }
    Ok(())
}

/// A loss scale is a value on the device: an overflow skips the step there, and the host counts updates as the CPU does.
#[test]
fn an_overflow_skips_a_step_without_the_hosts_knowing() -> Result<()> {
    // The last one is not known to the host yet when the state is saved.
    let sizes = [6e4, 1.0, 1.0, 6e4, 1.0, 6e4];
    let run = |device: &Device| -> Result<(Vec<f64>, f64, LossScaleState)> {
        let builder = ParamBuilder::with_plan(1, Placement::trained(DType::F16).with_master(DType::F32), device);
        let (w, params) = (builder.get("w", &[7], Init::Ones)?, builder.params());
        let mut adamw = Optimizer::new(AdamW::default());
        let config = LossScaleConfig { init_scale: 16.0, growth_interval: 3, ..LossScaleConfig::default() };
        let mut scale = LossScale::new(config, device)?;
        for (step, size) in sizes.into_iter().enumerate() {
            let tape = Tape::new();
            let x = Draw::new(step as u64).standard(&[7])?.mul_scalar(size)?.to_dtype(DType::F16)?.to_device(device)?;
            let loss = tape.attach(&x).mul(&w.value()?)?.to_dtype(DType::F32)?.sum_all()?;
            let (config, rates) = (
                StepConfig { micro_batches: 1, max_norm: Some(1.0), skip_non_finite: false },
                Rates { lr: 0.1, weight_decay: 0.1 },
            );
            OptimizerStep::new(config, rates, &mut adamw, &params, Some(&mut scale))?.backward(&tape, &loss, &[])?;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        adamw.save(&params, &path)?;
        let steps = SafeTensors::open(&path)?.get("step.w", &Device::cpu(), None)?.item()?;
        let kept = w.kept()?.to_vec()?;
        Ok((kept, steps, LossScaleState::read(scale.read_later()?)?))
    };
    let (wanted, steps, state) = run(&Device::cpu())?;
    assert_eq!((steps, state), (3.0, LossScaleState { scale: 2.0, growth_tracker: 0, skipped_steps: 3 }));
    for device in gpus() {
        let (got, steps, on_device) = run(device)?;
        assert_eq!((steps, on_device), (3.0, state), "{}", device.backend().name());
        for (a, b) in got.iter().zip(&wanted) {
            assert!((a - b).abs() < 1e-6, "{}: {a} instead of {b}", device.backend().name());
        }
    }
    Ok(())
}

/// Kernel sizes: head dims 64 and 128, wide rows, ragged token counts, masks; gradients too, against f64 on the CPU.
#[test]
fn kernel_sizes_match_the_cpu() {
    let attention = |d: usize, dv: usize, lq: usize, lk: usize, masked: bool| {
        let mut draw = Draw::new((d + lq) as u64);
        let mut tensor = |dims: &[usize]| draw.standard(dims).unwrap();
        let inputs = vec![tensor(&[1, 2, lq, d]), tensor(&[1, 2, lk, d]), tensor(&[1, 2, lk, dv])];
        Sample::new(inputs, move |xs| {
            let keep: Vec<u32> = (0..lq * lk).map(|i| u32::from(i >= lk && i % 7 != 3)).collect();
            let mask = Tensor::from_slice(&keep, &[1, 1, lq, lk], xs[0].device())?;
            ops::attention(&xs[0], &xs[1], &xs[2], masked.then_some(&mask), None)
        })
        .unwrap()
    };
    let mut draw = Draw::new(8);
    let mut tensor = |dims: &[usize]| draw.standard(dims).unwrap();
    let linear = Sample::new(vec![tensor(&[3, 37, 256]), tensor(&[270, 256]), tensor(&[270])], |xs| {
        ops::linear(&xs[0], &xs[1], Some(&xs[2]))
    });
    let layer = Sample::new(vec![tensor(&[2, 19, 384])], |xs| ops::layer_norm(&xs[0], None, None, 1e-6));
    let rms = Sample::new(vec![tensor(&[2, 19, 2, 128]), tensor(&[128])], |xs| {
        ops::rms_norm(&xs[0].transpose(1, 2)?, Some(&xs[1]), 1e-6)
    });
    let modulated = Sample::new(vec![tensor(&[2, 19, 384]), tensor(&[2, 1, 384]), tensor(&[2, 1, 384])], |xs| {
        ops::modulated_layer_norm(&xs[0], &xs[1], &xs[2], 1e-6)
    });
    let turned = |layout: RopeLayout, inputs: Vec<Tensor>| {
        Sample::new(inputs, move |xs| {
            let angles: Vec<f64> = (0..19 * 128).map(|i| (i / 128) as f64 * 0.1 * (1 + i % 7) as f64).collect();
            let angles = Tensor::from_slice(&angles, &[19, 128], &Device::cpu())?;
            let wide = if xs[0].dtype() == DType::F64 { DType::F64 } else { DType::F32 };
            let table = |t: Tensor| t.to_dtype(wide)?.to_device(xs[0].device());
            ops::rms_norm_rope(&xs[0], &xs[1], 1e-6, &table(angles.cos()?)?, &table(angles.sin()?)?, layout)
        })
        .unwrap()
    };
    let heads = vec![tensor(&[2, 19, 2, 128]), tensor(&[128])];
    let [neighbours, halves] = [RopeLayout::Interleaved, RopeLayout::Split].map(|layout| turned(layout, heads.clone()));
    let samples = [
        ("modulated_layer_norm", modulated.unwrap()),
        ("rms_norm_rope of neighbours", neighbours),
        ("rms_norm_rope of halves", halves),
        ("attention of 64, masked", attention(64, 64, 33, 50, true)),
        ("attention of 128", attention(128, 128, 21, 35, false)),
        ("attention of odd widths", attention(20, 9, 18, 17, true)),
        ("linear", linear.unwrap()),
        ("layer_norm", layer.unwrap()),
        ("rms_norm", rms.unwrap()),
    ];
    for device in gpus() {
        for (name, sample) in &samples {
            for dtype in [DType::F32, DType::BF16] {
                check_dtype(sample, dtype, device, 4).unwrap().unwrap_or_else(|e| panic!("{name}: {e}"));
            }
        }
    }
}
