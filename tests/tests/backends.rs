//! Every op on every device beside the CPU: forward and gradient, against f64 on the CPU.

use flowtape_engine::gradcheck::{Draw, check_dtype};
use flowtape_engine::ops::pointwise;
use flowtape_engine::{DType, Device, Error, Philox, Result, Tape, Tensor, ops};
use flowtape_gpu::wgpu::{Wgpu, WgpuOptions};
use flowtape_tests::devices::{gpus, say};
use flowtape_tests::{Outcome, goldens, sampling, step};

fn all_cases(device: &Device, dtype: DType, seeds: u64) {
    let mut wrong = Vec::new();
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
            let on = |device: &Device| -> Result<(Vec<u32>, Vec<f32>, Vec<f32>, (u64, u64))> {
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

/// Tensors beyond a binding, more inputs than bindings, more workgroups than an axis has: the same values in parts.
#[test]
fn small_limits_change_no_value() -> Result<()> {
    let Some(plain) = gpus().first() else { return Ok(()) };
    let options = WgpuOptions { max_binding_size: Some(1 << 10), max_bindings: Some(8), max_workgroups: Some(3) };
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
        for (i, (a, b)) in run(&small)?.into_iter().zip(run(plain)?).enumerate() {
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
        assert!(matches!(Tensor::ones(&[2], DType::F64, device).unwrap_err(), Error::DType { .. }));
    }
    Ok(())
}

/// The goldens' training steps and trajectories, of every model.
#[test]
fn model_goldens_are_met() {
    for device in gpus() {
        let root = goldens();
        let outcomes: Vec<Outcome> =
            step::cases_on(&root, device).into_iter().chain(sampling::trajectories_on(&root, device)).collect();
        let failed: Vec<String> =
            outcomes.iter().filter(|o| !o.is_skipped() && !o.passed()).map(Outcome::to_string).collect();
        let passed = outcomes.iter().filter(|o| o.passed()).count();
        say(format_args!("{}: {passed} goldens passed, {} failed", device.backend().name(), failed.len()));
        assert!(failed.is_empty() && passed > 0, "{}", failed.join("\n"));
    }
}
