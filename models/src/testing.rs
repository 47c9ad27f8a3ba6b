//! What the tests of adapters and models share.

use flowtape_engine::{DType, Device, Philox, Tensor};
use flowtape_flowmatch::{Batch, Draws, FlowMatchingContext, ModelAdapter, ModelInputs, TaskType};

use crate::Result;

/// Standard normal numbers, other ones for other shapes.
pub(crate) fn normal(dims: &[usize]) -> Tensor {
    Philox::new(dims.iter().sum::<usize>() as u64).normal(dims, &Device::cpu()).unwrap()
}

/// What an adapter makes of a batch of images at σ = 0.5 whose latents are their own noisy ones.
pub(crate) fn prepare(
    adapter: &dyn ModelAdapter,
    batch: &Batch,
    dtype: DType,
    cfg_dropout_prob: f64,
    draws: &mut dyn Draws,
) -> Result<ModelInputs> {
    let latents = batch.latents.to_dtype(dtype)?;
    let size = batch.size()?;
    let each = |value| Tensor::full(&[size], value, DType::F32, &Device::cpu());
    let cx = FlowMatchingContext {
        noisy_latents: latents.clone(),
        latents,
        timesteps: each(500.0)?,
        sigma: each(0.5)?,
        task_type: TaskType::T2V,
        data_type: "image".into(),
        device: Device::cpu(),
        dtype,
        cfg_dropout_prob,
        batch,
    };
    adapter.prepare_inputs(&cx, draws)
}
