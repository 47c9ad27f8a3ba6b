//! Sizes that no memory has, on every way in: an error that names them, before anything is allocated.
#![allow(clippy::unwrap_used, clippy::panic)] // tests may panic

use std::sync::{Mutex, PoisonError};

use flowtape_engine::meta::Meta;
use flowtape_engine::nn::{Init, ParamBuilder};
use flowtape_engine::{DType, Device, Error, Philox, Result, Tensor};

/// Products that exceed the address space, or wrap to 0 or to a small number.
const ABSURD: [&[usize]; 5] = [
    &[usize::MAX, 2],
    &[1 << 32, 1 << 32],
    &[usize::MAX, usize::MAX, 0],
    &[1 << 62, 4, 1 << 62, 4],
    &[(1 << 63) + 1, 2],
];

/// The CPU's memory is counted for the whole process: the tests take turns.
static TURN: Mutex<()> = Mutex::new(());

fn is_said<T: std::fmt::Debug>(what: &str, dims: &[usize], result: Result<T>) {
    let error = result.unwrap_err();
    let named = dims.iter().any(|d| error.to_string().contains(&d.to_string()));
    assert!(matches!(error, Error::Shape { .. } | Error::OutOfMemory { .. }) && named, "{what} of {dims:?}: {error}");
}

#[test]
fn absurd_sizes_are_errors_before_any_allocation() -> Result<()> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let meta = Meta::default();
    for device in [Device::cpu(), meta.device()] {
        let one = Tensor::ones(&[1], DType::F32, &device)?;
        let none = Tensor::zeros(&[0], DType::F32, &device)?;
        let before = device.backend().memory().used;
        for dims in ABSURD {
            is_said("zeros", dims, Tensor::zeros(dims, DType::BF16, &device));
            is_said("from_slice", dims, Tensor::from_slice::<f32>(&[], dims, &device));
            is_said("from_slice", dims, Tensor::from_slice(&[1.0f32, 2.0], dims, &device));
            is_said("from_bytes", dims, Tensor::from_bytes(&[], dims, DType::F32, &device));
            is_said("expand", dims, one.expand(dims));
            is_said("reshape", dims, none.reshape(dims));
            is_said("normal", dims, Philox::new(1).normal(dims, &device));
            is_said("parameter", dims, ParamBuilder::new(1, DType::F32, &device).get("w", dims, Init::Ones));
        }
        // Views without end, whose results none could hold.
        let (tall, wide) = (one.reshape(&[1, 1])?.expand(&[1 << 40, 1])?, one.reshape(&[1, 1])?.expand(&[1, 1 << 40])?);
        is_said("add", &[1 << 40], tall.add(&wide));
        is_said("matmul", &[1 << 40], tall.matmul(&wide));
        is_said("index_select", &[1 << 40], {
            let index = Tensor::from_slice(&[0u32], &[1], &device)?.expand(&[1 << 40])?;
            tall.transpose(0, 1).and_then(|t| t.expand(&[1 << 30, 1 << 32])).and_then(|t| t.index_select(0, &index))
        });
        assert!(one.pad(0, usize::MAX, 2).is_err() && one.split(&[usize::MAX, 2], 0).is_err());
        assert_eq!(device.backend().memory().used, before);
    }
    Ok(())
}

#[test]
fn memory_that_the_system_has_not_is_told_with_the_tensors_name() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let sizes = [1 << 30, 1 << 28];
    let text = |error: Error| {
        assert!(matches!(&error, Error::OutOfMemory { device, .. } if device == "cpu"), "{error}");
        error.to_string()
    };
    let plain =
        text(Tensor::from_slice(&[1.0f32], &[1], &Device::cpu()).unwrap().expand(&sizes).unwrap().exp().unwrap_err());
    assert!(plain.contains("f32 [1073741824, 268435456]"), "{plain}");
    let named = ParamBuilder::new(1, DType::BF16, &Device::cpu()).get("blocks.0.weight", &sizes, Init::Ones);
    let named = text(named.unwrap_err());
    assert!(named.contains("parameter blocks.0.weight") && named.contains("[1073741824, 268435456]"), "{named}");
}
