//! Fused operations on wgpu: fewer kernels than their compositions, and the same values.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use flowtape_engine::gradcheck::Draw;
use flowtape_engine::nn::{Init, ParamBuilder};
use flowtape_engine::optim::{AdamW, AdamWConfig};
use flowtape_engine::{DType, Device, Gradients, Result, Tensor};
use flowtape_gpu::wgpu::{Wgpu, WgpuOptions};
use flowtape_tests::devices::gpus_of;

/// After clipping, parameters of all shapes are updated together: the values of the CPU, one by one.
#[test]
fn an_update_of_all_parameters_takes_few_launches() -> Result<()> {
    if gpus_of("wgpu").is_empty() {
        return Ok(());
    }
    let shapes: Vec<Vec<usize>> =
        (0..40).map(|i| vec![8 * (i % 5 + 1), 8 + i % 3 * 40]).chain([vec![7], vec![3, 5], vec![2048]]).collect();
    let update = |device: &Device, dtype: DType, masters: bool, count: &dyn Fn() -> u64| -> Result<_> {
        let builder = ParamBuilder::new(2, dtype, device);
        let builder = if masters { builder.with_masters(DType::F32) } else { builder };
        let made = shapes.iter().enumerate().map(|(i, dims)| builder.get(&format!("p{i}"), dims, Init::Ones));
        let params: Vec<Tensor> = made.collect::<Result<_>>()?;
        let mut gradients = Gradients::default();
        for (i, p) in params.iter().enumerate() {
            let mut draw = Draw::new(i as u64);
            // Some lie across, as gradients of transposed weights do.
            let across = i % 4 == 0 && p.rank() == 2;
            let dims: Vec<usize> = if across { p.dims().iter().rev().copied().collect() } else { p.dims().to_vec() };
            let gradient = draw.standard(&dims)?.to_dtype(dtype)?.to_device(device)?;
            gradients.insert(p.var().unwrap(), if across { gradient.t()? } else { gradient });
        }
        let clip = Tensor::from_slice(&[0.25f32], &[], device)?;
        let mut adamw = AdamW::new(AdamWConfig::default());
        adamw.step(&builder.params(), &gradients, 1e-2, 0.1, Some(&clip))?;
        let before = count();
        adamw.step(&builder.params(), &gradients, 1e-2, 0.1, Some(&clip))?;
        let launches = count() - before;
        let kept = builder.params();
        let all = kept.kept().map(|(_, t)| t.clone()).chain(params);
        Ok((all.map(|t| t.to_vec::<f64>()).collect::<Result<Vec<_>>>()?, launches))
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
