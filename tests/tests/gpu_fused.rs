//! Fused operations on wgpu: fewer kernels than their compositions, and the same values.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use flowtape_engine::gradcheck::Draw;
use flowtape_engine::nn::{Init, Param, ParamBuilder, Placement};
use flowtape_engine::ops::{self, RopeLayout};
use flowtape_engine::optim::{AdamW, Optimizer, Rates};
use flowtape_engine::{DType, Device, Gradients, Result, Tape, Tensor};
use flowtape_gpu::wgpu::{Wgpu, WgpuOptions};
use flowtape_tests::devices::gpus_of;

/// A function of tensors; the last of them are no variables.
type Op = fn(&[Tensor]) -> Result<Tensor>;

/// A fused operation beside its composition, and how many kernels fewer it takes, forward and backward.
struct Case {
    name: &'static str,
    inputs: Vec<Vec<usize>>,
    variables: usize,
    ops: [Op; 2],
    saved: [u64; 2],
}

fn modulated(x: &[Tensor]) -> Result<Tensor> {
    ops::modulated_layer_norm(&x[0], &x[1], &x[2], 1e-6)
}

fn norm_and_modulation(x: &[Tensor]) -> Result<Tensor> {
    ops::modulate(&ops::layer_norm(&x[0], None, None, 1e-6)?, &x[1], &x[2])
}

/// The second of three projections side by side, as models have them.
fn query(x: &Tensor) -> Result<Tensor> {
    let [b, l, h, d] = [0, 1, 2, 3].map(|axis| x.dims()[axis]);
    x.reshape(&[b, l, 3, h / 3, d])?.narrow(2, 1, 1)?.reshape(&[b, l, h / 3, d])
}

fn turned(x: &[Tensor], layout: RopeLayout) -> Result<Tensor> {
    ops::rms_norm_rope(&query(&x[0])?, &x[1], 1e-6, &x[2], &x[3], layout)
}

fn norm_and_rotation(x: &[Tensor], layout: RopeLayout) -> Result<Tensor> {
    let normed = ops::rms_norm(&query(&x[0])?, Some(&x[1]), 1e-6)?;
    ops::rope(&normed, &x[2].unsqueeze(1)?, &x[3].unsqueeze(1)?, layout)
}

fn cases() -> Vec<Case> {
    let rows = vec![2, 19, 384];
    let shared = vec![2, 1, 384];
    let turned_inputs = |d: usize| vec![vec![2, 19, 6, d], vec![d], vec![19, d], vec![19, d]];
    vec![
        Case {
            name: "modulation of a sample",
            inputs: vec![rows.clone(), shared.clone(), shared],
            variables: 3,
            ops: [modulated, norm_and_modulation],
            saved: [1, 1],
        },
        Case {
            name: "modulation of each token",
            inputs: vec![rows.clone(), rows.clone(), rows],
            variables: 3,
            ops: [modulated, norm_and_modulation],
            saved: [1, 0],
        },
        Case {
            name: "rotation of neighbours",
            inputs: turned_inputs(128),
            variables: 2,
            ops: [|x| turned(x, RopeLayout::Interleaved), |x| norm_and_rotation(x, RopeLayout::Interleaved)],
            saved: [1, 1],
        },
        Case {
            name: "rotation of halves",
            inputs: turned_inputs(64),
            variables: 2,
            ops: [|x| turned(x, RopeLayout::Split), |x| norm_and_rotation(x, RopeLayout::Split)],
            saved: [1, 1],
        },
    ]
}

/// Output and gradients, and the kernels that forward and backward took.
fn run(wgpu: &Wgpu, dtype: DType, case: &Case, op: Op) -> Result<(Vec<Vec<f64>>, [u64; 2])> {
    let device = Device::new(wgpu.clone());
    let mut draw = Draw::new(7);
    let tape = Tape::new();
    let mut inputs = Vec::new();
    for (i, dims) in case.inputs.iter().enumerate() {
        let dtype = if i < case.variables { dtype } else { DType::F32 };
        let there = draw.standard(dims)?.to_dtype(dtype)?.to_device(&device)?;
        inputs.push(if i < case.variables { tape.leaf(&there) } else { there });
    }
    let count = || wgpu.counts().kernels;
    let before = count();
    let y = op(&inputs)?;
    let forward = count() - before;
    let cotangent = draw.standard(y.dims())?.to_dtype(dtype)?.to_device(&device)?;
    let before = count();
    let mut gradients = Gradients::default();
    tape.backward_with(&[(&y, &cotangent)], &mut gradients)?;
    let backward = count() - before;
    let all = inputs[..case.variables].iter().map(|x| gradients.of(x).unwrap().clone());
    let values = [y.detach()].into_iter().chain(all).map(|t| t.to_vec()).collect::<Result<_>>()?;
    Ok((values, [forward, backward]))
}

/// How far apart, as a share of the largest value, and the share of values that differ.
fn distance(a: &[f64], b: &[f64]) -> [f64; 2] {
    assert_eq!(a.len(), b.len());
    let size = b.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let off = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    let differ = off.clone().filter(|d| *d != 0.0).count();
    [off.fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m }) / size, differ as f64 / a.len() as f64]
}

#[test]
fn a_fused_operation_is_its_composition_in_fewer_kernels() -> Result<()> {
    if gpus_of("wgpu").is_empty() {
        return Ok(());
    }
    let open = |max_binding_size| Wgpu::open(None, WgpuOptions { max_binding_size, ..WgpuOptions::default() });
    // The second does all but a few rows in parts.
    let (wgpu, small) = (open(None)?, open(Some(4 << 10))?);
    for case in cases() {
        // Sums in f32 whose terms were rounded or not may end up at neighbouring halves: a step of the largest value apart.
        for (dtype, unit) in [(DType::F32, 2e-6), (DType::BF16, 2f64.powi(-7)), (DType::F16, 2f64.powi(-10))] {
            let [fused, composed] = case.ops;
            let what = format!("{} in {dtype}", case.name);
            let (expected, more) = run(&wgpu, dtype, &case, composed)?;
            let (got, kernels) = run(&wgpu, dtype, &case, fused)?;
            for i in 0..2 {
                assert!(kernels[i] + case.saved[i] <= more[i], "{what}: {kernels:?} kernels, {more:?} composed");
            }
            let (in_parts, _) = run(&small, dtype, &case, fused)?;
            for (i, ((a, b), c)) in got.iter().zip(&expected).zip(&in_parts).enumerate() {
                // Output and the gradient of x are rounded at the same places, so that halves hardly ever differ.
                let most = if i < 2 && dtype != DType::F32 { 0.01 } else { 1.0 };
                for [off, differ] in [distance(a, b), distance(c, b)] {
                    assert!(off <= unit && differ <= most, "{what}, tensor {i}: {off:.1e} off, {differ} of all");
                }
            }
        }
    }
    Ok(())
}

/// After clipping, parameters of all shapes are updated together: the values of the CPU, one by one.
#[test]
fn an_update_of_all_parameters_takes_few_launches() -> Result<()> {
    if gpus_of("wgpu").is_empty() {
        return Ok(());
    }
    let shapes: Vec<Vec<usize>> =
        (0..40).map(|i| vec![8 * (i % 5 + 1), 8 + i % 3 * 40]).chain([vec![7], vec![3, 5], vec![2048]]).collect();
    let update = |device: &Device, dtype: DType, masters: bool, count: &dyn Fn() -> u64| -> Result<_> {
        let placement = Placement::trained(dtype);
        let placement = if masters { placement.with_master(DType::F32) } else { placement };
        let builder = ParamBuilder::with_plan(2, placement, device);
        let made = shapes.iter().enumerate().map(|(i, dims)| builder.get(&format!("p{i}"), dims, Init::Ones));
        let params: Vec<Param> = made.collect::<Result<_>>()?;
        let mut gradients = Gradients::default();
        for (i, p) in params.iter().enumerate() {
            let mut draw = Draw::new(i as u64);
            // Some lie across, as gradients of transposed weights do.
            let across = i % 4 == 0 && p.dims().len() == 2;
            let dims: Vec<usize> = if across { p.dims().iter().rev().copied().collect() } else { p.dims().to_vec() };
            let gradient = draw.standard(&dims)?.to_dtype(dtype)?.to_device(device)?;
            gradients.insert(p.var().unwrap(), if across { gradient.t()? } else { gradient });
        }
        let clip = Tensor::from_slice(&[0.25f32], &[], device)?;
        let mut adamw = Optimizer::new(AdamW::default());
        adamw.step(&builder.params(), &gradients, Rates { lr: 1e-2, weight_decay: 0.1 }, Some(&clip))?;
        let before = count();
        adamw.step(&builder.params(), &gradients, Rates { lr: 1e-2, weight_decay: 0.1 }, Some(&clip))?;
        let launches = count() - before;
        let all = params.iter().map(|p| p.kept()).chain(params.iter().map(|p| p.value()));
        Ok((all.map(|t| t?.to_vec::<f64>()).collect::<Result<Vec<_>>>()?, launches))
    };
    for (dtype, masters) in [(DType::F32, false), (DType::BF16, false), (DType::BF16, true), (DType::F16, true)] {
        let (wanted, _) = update(&Device::cpu(), dtype, masters, &|| 0)?;
        for max_bindings in [None, Some(8)] {
            let wgpu = Wgpu::open(None, WgpuOptions { max_bindings, ..WgpuOptions::default() })?;
            let (got, launches) = update(&Device::new(wgpu.clone()), dtype, masters, &|| wgpu.counts().kernels)?;
            assert!(max_bindings.is_some() || launches <= 15, "{launches} launches for {} parameters", shapes.len());
            let unit = if dtype == DType::F32 { 1e-6 } else { 2f64.powi(-8) };
            for (a, b) in got.iter().flatten().zip(wanted.iter().flatten()) {
                assert!((a - b).abs() <= unit * (1.0 + b.abs()), "{dtype}: {a} instead of {b}");
            }
        }
    }
    Ok(())
}
