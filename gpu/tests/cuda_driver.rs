//! What the CUDA backend asks of its driver, and what it says when the driver fails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // the helpers of tests may panic

use std::sync::{Mutex, MutexGuard, PoisonError};

use flowtape_cuda_emulator::{Settings, Usage, install, set, usage};
use flowtape_engine::{DType, Device, Error, Result, Tensor};
use flowtape_gpu::cuda::{Cuda, reports};

/// The driver is one for the process: a test has it alone, as it was made.
fn driver(change: impl FnOnce(&mut Settings)) -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(install());
    set(|settings| {
        *settings = Settings { memory: 1 << 30, ..Settings::default() };
        change(settings);
    });
    alone
}

/// Memory of the device that uploads go through.
const LANDING: usize = 16 << 20;

fn opened() -> Result<(Cuda, Device)> {
    let cuda = Cuda::open(0)?;
    Ok((cuda.clone(), Device::new(cuda)))
}

fn refusal() -> String {
    Cuda::open(0).unwrap_err().to_string()
}

#[test]
fn a_driver_that_is_too_old_is_said() {
    let _alone = driver(|d| d.version = 11_080);
    assert!(refusal().contains("the driver is of CUDA 11.8; install one of CUDA 12.0"), "{}", refusal());
    assert!(reports()[0].unusable.as_ref().unwrap().contains("11.8"));
}

#[test]
fn a_missing_device_is_said() {
    let _alone = driver(|d| d.devices = 0);
    assert!(refusal().contains("can't use cuda:0") && refusal().contains("nvidia-smi"), "{}", refusal());
    assert!(reports()[0].unusable.as_ref().unwrap().contains("no device"));
}

#[test]
fn an_old_device_is_said() {
    let _alone = driver(|d| (d.capability, d.devices) = ((7, 5), 2));
    assert!(refusal().contains("7.5; 8.0 (Ampere) is the least"), "{}", refusal());
    let names: Vec<String> = reports().into_iter().filter(|r| r.unusable.is_some()).map(|r| r.name).collect();
    assert_eq!(names, ["cuda:0", "cuda:1"]);
}

#[test]
fn a_usable_device_is_reported_with_its_driver() {
    let _alone = driver(|d| d.capability = (9, 0));
    let text = reports()[0].to_string();
    for part in ["cuda:0", "emulated GPU", "CUDA 13.0", "1024 MiB", "9.0"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(reports()[0].unusable.is_none());
}

#[test]
fn all_memory_goes_back() -> Result<()> {
    for ordered in [true, false] {
        let _alone = driver(|d| d.ordered = ordered);
        let before = usage();
        let (cuda, device) = opened()?;
        // More than the pinned segments hold at once.
        let values: Vec<f32> = (0..5_000_000).map(|i| i as f32).collect();
        let x = Tensor::from_slice(&values, &[values.len()], &device)?;
        assert_eq!(x.to_vec::<f32>()?, values);
        let y = x.narrow(0, 3, 6000)?.reshape(&[20, 300])?.t()?.contiguous()?.sum(&[1], false)?;
        assert_eq!(y.to_vec::<f32>()?.len(), 300);
        let pool = cuda.usage().pool;
        assert_eq!(pool.used + pool.kept, (usage().allocated - before.allocated - LANDING) as u64);
        assert!(pool.used >= 4 * 5_000_300 && pool.peak >= 4 * 5_006_000);
        drop((x, y));
        // Sizes that were there before cost no allocation.
        let made = usage().allocations;
        Tensor::from_slice(&values, &[values.len()], &device)?.narrow(0, 0, 6000)?.square()?;
        assert_eq!(usage().allocations, made);
        drop((cuda, device));
        let after = Usage { allocations: before.allocations, launches: before.launches, ..usage() };
        assert_eq!(after, before);
    }
    Ok(())
}

#[test]
fn kernels_are_printed_once_and_launches_are_counted() -> Result<()> {
    let _alone = driver(|_| {});
    let (cuda, device) = opened()?;
    let before = usage().launches;
    let run = |n: usize| Tensor::ones(&[n, 32], DType::BF16, &device)?.exp()?.sum(&[1], false)?.to_vec::<f32>();
    run(8)?;
    let first = cuda.usage();
    assert_eq!(first.launches, usage().launches - before);
    // Another size is the same kernels.
    run(24)?;
    let second = cuda.usage();
    assert_eq!((second.printed, second.launches), (first.printed, 2 * first.launches));
    Ok(())
}

#[test]
fn what_does_not_fit_names_the_tensor_and_what_is_free() -> Result<()> {
    let _alone = driver(|d| d.memory = LANDING + (4 << 20));
    let device = Cuda::device(0)?;
    let kept = Tensor::ones(&[1 << 16], DType::F32, &device)?;
    let error = Tensor::ones(&[5000, 700], DType::BF16, &device).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { bytes, .. } if bytes >= 7_000_000), "{error}");
    for part in ["bf16 [5000, 700]", "of 20971520 bytes are free", "checkpoint", "emulated GPU"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    // What is kept for reuse is given back before that is said, and the device goes on.
    drop(Tensor::ones(&[1 << 19], DType::F32, &device)?);
    Tensor::ones(&[9 << 16], DType::F32, &device)?;
    assert_eq!(kept.sum_all()?.item()?, f64::from(1 << 16));
    Ok(())
}

#[test]
fn a_failed_kernel_is_seen_late_and_is_no_panic() -> Result<()> {
    for (code, words) in [(700, "illegal memory access"), (719, "launch failure")] {
        let _alone = driver(|_| {});
        let (cuda, device) = opened()?;
        assert!(!cuda.is_lost());
        let x = Tensor::ones(&[64], DType::F32, &device)?;
        set(|d| d.fails = code);
        // The launch itself says nothing.
        let y = x.exp()?;
        let error = y.to_vec::<f32>().unwrap_err();
        assert!(matches!(error, Error::DeviceFailed { .. }), "{error}");
        for part in [words, "launched last: ", "kernel", "the last checkpoint is good", &code.to_string()] {
            assert!(error.to_string().contains(part), "{error}");
        }
        // From here on all is an error, and nothing else.
        assert!(y.add(&x).and_then(|z| z.to_vec::<f32>()).is_err() && x.to_vec::<f32>().is_err());
        assert!(Tensor::ones(&[1 << 20], DType::F32, &device).is_err());
        assert!(cuda.is_lost());
        drop((x, y, device, cuda));
    }
    Ok(())
}

#[test]
fn numbers_of_64_bits_are_converted_and_not_computed_with() -> Result<()> {
    let _alone = driver(|_| {});
    let device = Cuda::device(0)?;
    let x = Tensor::from_slice(&[1.5f64, -2.25], &[2], &device)?;
    assert_eq!(x.to_dtype(DType::BF16)?.to_vec::<f32>()?, [1.5, -2.25]);
    assert!(matches!(x.exp().unwrap_err(), Error::DType { .. }));
    Ok(())
}
