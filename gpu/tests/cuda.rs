//! The CUDA backend's kernels at sizes of their own tiles, on an NVIDIA GPU or else on the emulated machine. The ops' cases
//! and the models are in `tests/tests/backends.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // the helpers of tests may panic

use flowtape_cuda_emulator::launched;
use flowtape_engine::gradcheck::{Draw, Sample, check_dtype};
use flowtape_engine::nn::{Init, Param, ParamBuilder};
use flowtape_engine::ops::RopeLayout;
use flowtape_engine::optim::{AdamW, Optimizer, Rates};
use flowtape_engine::{DType, Device, Gradients, Result, Tape, Tensor, ops};
use flowtape_gpu::cuda::Cuda;

/// Whether the emulated machine runs the tests: where there is no driver, and `FLOWTAPE_REQUIRE=cuda` doesn't forbid it.
fn emulated() -> bool {
    let required = std::env::var("FLOWTAPE_REQUIRE").is_ok_and(|r| r.split(',').any(|d| d == "cuda"));
    let emulated = flowtape_cuda_emulator::stand_in();
    assert!(!required || !emulated, "FLOWTAPE_REQUIRE=cuda, and there is no NVIDIA driver");
    emulated
}

fn device() -> Device {
    emulated();
    static DEVICE: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
    DEVICE.get_or_init(|| Cuda::device(0).unwrap()).clone()
}

/// Checks a sample, and that the kernels of these names ran.
fn check(what: &str, sample: &Sample, dtype: DType, kernels: &[&str]) -> Result<()> {
    let device = device();
    let before: Vec<usize> = kernels.iter().map(|k| launched(k)).collect();
    let checked = check_dtype(sample, dtype, &device, 5)?;
    assert_eq!(checked, Ok(()), "{what} {}", flowtape_cuda_emulator::complaint());
    for (kernel, before) in kernels.iter().zip(before) {
        assert!(!emulated() || launched(kernel) > before, "{what}: {kernel} did not run");
    }
    Ok(())
}

const HALVES: [DType; 2] = [DType::BF16, DType::F16];

#[test]
fn attention_at_the_head_dims_of_its_kernels() -> Result<()> {
    let kernels = ["attention_forward", "attention_delta", "attention_keys", "attention_queries"];
    let mut draw = Draw::new(1);
    for (i, (depth, width)) in
        [(32, 32), (64, 64), (128, 128), (40, 24), (96, 96), (256, 256), (7, 130)].into_iter().enumerate()
    {
        for masked in [false, true] {
            let (queries, keys) = ([70, 33, 129][i % 3], [130, 65, 20][(i + usize::from(masked)) % 3]);
            // Heads inside of rows, as projections leave them; values small enough for a soft softmax.
            let mut tensor = |len: usize, depth: usize| draw.tensor(&[1, len, 2, depth], -1.0, 1.0)?.transpose(1, 2);
            let inputs = vec![tensor(queries, depth)?, tensor(keys, depth)?, tensor(keys, width)?];
            // The last keys are masked out, in some rows all of them.
            let bits: Vec<u32> =
                (0..queries * keys).map(|j| u32::from(j % keys < keys - 5 && j / keys % 16 != 3)).collect();
            let sample = Sample::new(inputs, move |xs| {
                let mask = Tensor::from_slice(&bits, &[1, 1, queries, keys], xs[0].device())?;
                ops::attention(&xs[0], &xs[1], &xs[2], masked.then_some(&mask), None)
            })?;
            for dtype in [HALVES[i % 2], DType::F32] {
                check(
                    &format!("attention {depth} {width} {queries} {keys} {masked} {dtype}"),
                    &sample,
                    dtype,
                    &kernels,
                )?;
            }
        }
    }
    Ok(())
}

#[test]
fn products_of_many_tiles() -> Result<()> {
    let mut draw = Draw::new(2);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        // Rows of 16 bytes and others.
        for [m, k, n] in [[130, 96, 72], [65, 33, 67]] {
            let kernels: &[&str] = match dtype {
                DType::F32 => &["gemm_small"],
                _ => &["gemm_small_nn", "gemm_small_nt", "gemm_small_tn"],
            };
            let what = format!("{dtype} {m} {k} {n}");
            let inputs =
                vec![draw.tensor(&[m, k], -1.0, 1.0)?, draw.tensor(&[n, k], -1.0, 1.0)?, draw.tensor(&[n], -1.0, 1.0)?];
            check(&what, &Sample::new(inputs, |xs| ops::linear(&xs[0], &xs[1], Some(&xs[2])))?, dtype, kernels)?;
            let inputs = vec![draw.tensor(&[3, m, k], -1.0, 1.0)?, draw.tensor(&[3, k, n], -1.0, 1.0)?];
            check(&what, &Sample::new(inputs, |xs| xs[0].matmul(&xs[1]))?, dtype, kernels)?;
        }
    }
    Ok(())
}

#[test]
fn products_of_large_tiles() -> Result<()> {
    let device = device();
    let mut draw = Draw::new(3);
    for (dtype, kernels) in [
        (DType::F32, ["gemm_large"].as_slice()),
        (DType::BF16, &["gemm_large_nn", "gemm_large_nt", "gemm_large_tn"]),
        (DType::F16, &["gemm_large_nn", "gemm_large_nt", "gemm_large_tn"]),
    ] {
        let (m, k, n) = (1000, 40, 1032);
        let (a, b) = (draw.tensor(&[m, k], -1.0, 1.0)?, draw.tensor(&[k, n], -1.0, 1.0)?);
        let expected = a.matmul(&b)?.to_vec::<f64>()?;
        let there = |x: &Tensor| Tensor::from_bytes(&x.to_dtype(dtype)?.to_bytes()?, x.dims(), dtype, &device);
        let before: Vec<usize> = kernels.iter().map(|k| launched(k)).collect();
        for (a, b) in [
            (there(&a)?, there(&b)?),
            (there(&a)?, there(&b.t()?.contiguous()?)?.t()?),
            (there(&a.t()?.contiguous()?)?.t()?, there(&b)?),
            (there(&a.t()?.contiguous()?)?.t()?, there(&b.t()?.contiguous()?)?.t()?),
        ] {
            let got = a.matmul(&b)?.to_vec::<f64>()?;
            let unit = if dtype == DType::F32 { 1e-6 } else { 2f64.powi(-8) };
            let worst =
                expected.iter().zip(&got).map(|(x, y)| (x - y).abs() - unit * (1.0 + x.abs())).fold(f64::MIN, f64::max);
            assert!(worst <= 0.0, "{dtype}: {worst} too much");
        }
        for (kernel, before) in kernels.iter().zip(before) {
            assert!(!emulated() || launched(kernel) > before, "{kernel} did not run");
        }
    }
    Ok(())
}

#[test]
fn rows_of_norms_at_the_widths_of_models() -> Result<()> {
    let mut draw = Draw::new(4);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for width in [1536, 1001, 20] {
            let dims = [2, 3, width];
            let inputs = || -> Result<Vec<Tensor>> {
                Ok(vec![Draw::new(9).tensor(&dims, -1.0, 1.0)?, Draw::new(8).tensor(&[width], 0.5, 1.5)?])
            };
            let mut all = inputs()?;
            all.push(draw.tensor(&[width], -1.0, 1.0)?);
            let sample = Sample::new(all, |xs| ops::layer_norm(&xs[0], Some(&xs[1]), Some(&xs[2]), 1e-5))?;
            check("layer_norm", &sample, dtype, &["norm_forward", "norm_backward"])?;
            let sample = Sample::new(inputs()?, |xs| ops::rms_norm(&xs[0], Some(&xs[1]), 1e-5))?;
            check("rms_norm", &sample, dtype, &["norm_forward", "norm_backward"])?;
        }
    }
    Ok(())
}

/// Shift and scale of x `[B, L, d]` for each sample or token, as they come from a projection, in f32 where `wide`.
fn modulated(xs: &[Tensor], wide: bool) -> Result<[Tensor; 3]> {
    let (x, width) = (&xs[0], xs[0].dims()[2]);
    let dtype = if wide { DType::F32.promote(x.dtype()) } else { x.dtype() };
    let part = |i: usize| xs[1].to_dtype(dtype)?.narrow(2, i * width, width);
    Ok([x.clone(), part(0)?, part(2)?])
}

#[test]
fn norms_with_modulation() -> Result<()> {
    let mut draw = Draw::new(14);
    // Runs of eight and others, several rows for a block and a last one with fewer.
    for (dims, per_token) in
        [([2, 3, 1536], false), ([2, 3, 1001], false), ([2, 601, 40], false), ([2, 5, 48], true), ([2, 5, 21], true)]
    {
        let vectors = [dims[0], if per_token { dims[1] } else { 1 }, 3 * dims[2]];
        let inputs = vec![draw.tensor(&dims, -1.0, 1.0)?, draw.tensor(&vectors, -1.0, 1.0)?];
        for (dtype, wide) in [(DType::F32, false), (DType::BF16, false), (DType::F16, true)] {
            let sample = Sample::new(inputs.clone(), move |xs| {
                let [x, shift, scale] = modulated(xs, wide)?;
                ops::modulated_layer_norm(&x, &shift, &scale, 1e-5)
            })?;
            let sums: &[&str] = if per_token { &[] } else { &["norm_sums"] };
            let kernels = [&["modulated_norm_forward", "modulated_norm_backward"], sums].concat();
            check(&format!("modulated {dims:?} {dtype}"), &sample, dtype, &kernels)?;
        }
    }
    Ok(())
}

/// Cosines and sines `[L, d]` of x `[B, L, H, d]`.
fn tables(x: &Tensor) -> Result<[Tensor; 2]> {
    let (len, width) = (x.dims()[1], x.dims()[3]);
    let angles: Vec<f64> = (0..len * width).map(|i| (i as f64 * 0.37).sin() * 3.0).collect();
    let angles = Tensor::from_slice(&angles, &[len, width], &Device::cpu())?;
    let there = |t: Tensor| t.to_dtype(DType::F32.promote(x.dtype()))?.to_device(x.device());
    Ok([there(angles.cos()?)?, there(angles.sin()?)?])
}

#[test]
fn norms_with_rotation() -> Result<()> {
    let mut draw = Draw::new(15);
    for (layout, name) in [(RopeLayout::Interleaved, "interleaved"), (RopeLayout::Split, "split")] {
        let kernels = [format!("norm_rope_{name}_forward"), format!("norm_rope_{name}_backward"), "norm_sums".into()];
        let kernels: Vec<&str> = kernels.iter().map(String::as_str).collect();
        for dims in [[2, 9, 3, 128], [1, 7, 2, 64], [1, 5, 2, 38], [1, 2100, 4, 8]] {
            // Heads of the second of two projections that lie side by side.
            let [b, len, heads, width] = dims;
            let inputs = vec![draw.tensor(&[b, len, 2 * heads, width], -1.0, 1.0)?, draw.tensor(&[width], 0.5, 1.5)?];
            for (dtype, wide) in [(DType::F32, false), (DType::BF16, true), (DType::F16, false)] {
                let sample = Sample::new(inputs.clone(), move |xs| {
                    let x = xs[0].narrow(2, heads, heads)?;
                    let weight = if wide { xs[1].to_dtype(DType::F32.promote(x.dtype()))? } else { xs[1].clone() };
                    let [cos, sin] = tables(&x)?;
                    ops::rms_norm_rope(&x, &weight, 1e-5, &cos, &sin, layout)
                })?;
                check(&format!("{name} {dims:?} {dtype}"), &sample, dtype, &kernels)?;
            }
        }
    }
    Ok(())
}

/// A result, its gradients, and what forward and backward launched.
type Launched = (Vec<Vec<f32>>, [usize; 2]);

/// A norm and what follows it are one launch, and their gradients two: the values of more launches.
#[test]
fn norms_with_what_follows_take_few_launches() -> Result<()> {
    emulated();
    let cuda = Cuda::open(0)?;
    let device = Device::new(cuda.clone());
    let mut draw = Draw::new(16);
    let x = draw.tensor(&[2, 70, 96], -1.0, 1.0)?;
    let (shift, scale) = (draw.tensor(&[2, 1, 96], -1.0, 1.0)?, draw.tensor(&[2, 1, 96], -1.0, 1.0)?);
    let (heads, weight) = (draw.tensor(&[2, 35, 2, 96], -1.0, 1.0)?, draw.tensor(&[96], 0.5, 1.5)?);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let run = |inputs: &[&Tensor], f: &dyn Fn(&[Tensor]) -> Result<Tensor>| -> Result<Launched> {
            let tape = Tape::new();
            let there = |t: &Tensor| Ok(tape.leaf(&t.to_dtype(dtype)?.to_device(&device)?));
            let inputs = inputs.iter().map(|t| there(t)).collect::<Result<Vec<_>>>()?;
            let before = cuda.usage().launches;
            let y = f(&inputs)?;
            let forward = cuda.usage().launches;
            let mut gradients = Gradients::default();
            tape.backward_with(&[(&y, &inputs[0].detach())], &mut gradients)?;
            let backward = cuda.usage().launches;
            let mut values = vec![y.to_vec()?];
            for input in &inputs {
                values.push(gradients.of(input).unwrap().to_vec()?);
            }
            Ok((values, [forward - before, backward - forward]))
        };
        let same = |what: &str, fused: Launched, composed: Launched| {
            println!("{what} in {dtype}: {:?} launches instead of {:?}", fused.1, composed.1);
            assert!(fused.1 == [1, 2] && composed.1[0] > 1 && composed.1[1] > 2);
            for (i, (a, b)) in fused.0.iter().zip(&composed.0).enumerate() {
                let size = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let unit = if dtype == DType::F32 { 1e-6 } else { 2f32.powi(-8) };
                for (a, b) in a.iter().zip(b) {
                    assert!((a - b).abs() <= unit * size, "{what} {i} in {dtype}: {a} instead of {b}, size {size}");
                }
            }
        };
        let inputs = [&x, &shift, &scale];
        let fused = run(&inputs, &|xs| ops::modulated_layer_norm(&xs[0], &xs[1], &xs[2], 1e-5))?;
        let composed = run(&inputs, &|xs| ops::modulate(&ops::layer_norm(&xs[0], None, None, 1e-5)?, &xs[1], &xs[2]))?;
        same("modulated", fused, composed);
        for layout in [RopeLayout::Interleaved, RopeLayout::Split] {
            let [cos, sin] = tables(&heads.to_dtype(DType::F32)?)?.map(|t| t.to_device(&device));
            let (cos, sin) = (cos?, sin?);
            let fused = run(&[&heads, &weight], &|xs| ops::rms_norm_rope(&xs[0], &xs[1], 1e-5, &cos, &sin, layout))?;
            let composed = run(&[&heads, &weight], &|xs| {
                let normed = ops::rms_norm(&xs[0], Some(&xs[1]), 1e-5)?;
                ops::rope(&normed, &cos.unsqueeze(1)?, &sin.unsqueeze(1)?, layout)
            })?;
            same(&format!("{layout:?}"), fused, composed);
        }
    }
    Ok(())
}

#[test]
fn sums_and_functions_of_many_blocks() -> Result<()> {
    let mut draw = Draw::new(5);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for axes in [vec![0], vec![1], vec![0, 1], vec![1, 2], vec![0, 2], vec![2]] {
            let inputs = vec![draw.tensor(&[40, 24, 48], -1.0, 1.0)?, draw.tensor(&[24, 1], -1.0, 1.0)?];
            let what = format!("{dtype} {axes:?}");
            let sample = Sample::new(inputs, move |xs| {
                let y = ops::pointwise([&xs[0], &xs[1]], |[x, s]| (x * s).gelu_tanh() + x)?;
                y.mean(&axes, true)?.mul(&y)
            })?;
            check(&what, &sample, dtype, &["kernel"])?;
        }
        // Long enough to be cut into chunks that are added in turn.
        let inputs = vec![draw.tensor(&[200, 512], -1.0, 1.0)?];
        check("mean of all", &Sample::new(inputs, |xs| xs[0].square()?.mean_all())?, dtype, &["kernel"])?;
        let inputs = vec![draw.tensor(&[3000, 20], -1.0, 1.0)?];
        check("mean of rows", &Sample::new(inputs, |xs| xs[0].square()?.mean(&[0], false))?, dtype, &["kernel"])?;
    }
    Ok(())
}

/// All parameters of a kind in one launch: the values of one launch each, on the CPU.
#[test]
fn an_update_of_all_parameters_takes_few_launches() -> Result<()> {
    let device = device();
    let shapes: Vec<Vec<usize>> =
        (0..40).map(|i| vec![8 * (i % 5 + 1), 8 + i % 3 * 40]).chain([vec![7], vec![3, 5], vec![2048]]).collect();
    for dtype in [DType::F32, DType::BF16] {
        let run = |device: &Device| -> Result<(Vec<Vec<f32>>, usize)> {
            let builder = ParamBuilder::new(2, dtype, device);
            let params: Vec<Param> = (0..shapes.len())
                .map(|i| builder.get(&format!("p{i}"), &shapes[i], Init::Ones))
                .collect::<Result<_>>()?;
            let mut gradients = Gradients::default();
            for (i, p) in params.iter().enumerate() {
                let mut draw = Draw::new(i as u64);
                let mut there = || {
                    let values = draw.tensor(p.dims(), -1.0, 1.0)?.to_dtype(dtype)?;
                    Tensor::from_bytes(&values.to_bytes()?, p.dims(), dtype, device)
                };
                p.copy_from(&there()?)?;
                gradients.insert(p.var().unwrap(), there()?);
            }
            let clip = Tensor::from_slice(&[0.25f32], &[], device)?;
            let mut adamw = Optimizer::new(AdamW::default());
            adamw.step(&builder.params(), &gradients, Rates { lr: 1e-2, weight_decay: 0.1 }, Some(&clip))?;
            let before = launched("kernel");
            adamw.step(&builder.params(), &gradients, Rates { lr: 1e-2, weight_decay: 0.1 }, Some(&clip))?;
            let launches = launched("kernel") - before;
            Ok((params.iter().map(|p| p.value()?.to_vec()).collect::<Result<_>>()?, launches))
        };
        let ((got, launches), (wanted, _)) = (run(&device)?, run(&Device::cpu())?);
        // Those of odd sizes, and all others.
        assert!(!emulated() || launches == 3, "{launches} launches");
        let unit = if dtype == DType::F32 { 1e-6 } else { 2f32.powi(-8) };
        for (a, b) in got.iter().flatten().zip(wanted.iter().flatten()) {
            assert!((a - b).abs() <= unit * (1.0 + b.abs()), "{dtype}: {a} instead of {b}");
        }
    }
    Ok(())
}

#[test]
fn elements_move_bit_for_bit() -> Result<()> {
    let device = device();
    let kernels = ["transpose_2", "transpose_4", "copy_2", "copy_4", "copy_8", "copy_16", "gather_2", "gather_16"];
    let before = kernels.map(launched);
    for dtype in [DType::F32, DType::BF16, DType::F64, DType::U32] {
        let dims = [3, 70, 5, 40];
        let count: usize = dims.iter().product();
        let host =
            Tensor::from_vec((0..count).map(|i| (i % 251) as f32).collect(), &dims, &Device::cpu())?.to_dtype(dtype)?;
        let there = Tensor::from_bytes(&host.to_bytes()?, &dims, dtype, &device)?;
        let same = |f: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<()> {
            assert_eq!(f(&there)?.to_bytes()?, f(&host)?.to_bytes()?, "{dtype}");
            Ok(())
        };
        for axes in [[0, 3, 2, 1], [3, 2, 1, 0], [0, 2, 1, 3], [1, 0, 3, 2], [2, 3, 0, 1]] {
            same(&|x| x.permute(&axes)?.contiguous())?;
        }
        same(&|x| x.narrow(3, 1, 38)?.contiguous())?;
        same(&|x| x.narrow(3, 8, 24)?.narrow(1, 3, 50)?.contiguous())?;
        same(&|x| x.narrow(3, 4, 4)?.contiguous())?;
        same(&|x| {
            let index = Tensor::from_slice(&[69u32, 0, 3, 3, 68], &[5], x.device())?;
            x.index_select(1, &index)
        })?;
        same(&|x| {
            let index = Tensor::from_slice(&[2u32, 0, 2], &[3], x.device())?;
            x.index_select(0, &index)?
                .narrow(3, 0, 39)?
                .contiguous()?
                .reshape(&[3 * 70 * 5, 39])?
                .index_select(0, &index)
        })?;
    }
    for (kernel, before) in kernels.iter().zip(before) {
        assert!(!emulated() || launched(kernel) > before, "{kernel} did not run");
    }
    Ok(())
}

#[test]
fn an_index_past_the_end_is_an_error_when_values_are_read() -> Result<()> {
    let device = device();
    let table = Tensor::ones(&[4, 3], DType::F32, &device)?;
    let index = Tensor::from_slice(&[0u32, 9], &[2], &device)?;
    let error = table.index_select(0, &index)?.to_vec::<f32>().unwrap_err();
    assert!(error.to_string().contains("got 9"), "{error}");
    // The next read is right again.
    assert_eq!(table.to_vec::<f32>()?, [1.0; 12]);
    Ok(())
}
