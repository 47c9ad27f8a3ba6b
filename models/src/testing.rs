//! What the tests of adapters and models share.

use std::collections::BTreeMap;

use flowtape_engine::nn::Params;
use flowtape_engine::{DType, Device, Philox, Tensor};
use flowtape_flowmatch::{
    Batch, Draws, FlowMatchingContext, FlowModel, ModelAdapter, ModelInputs, Prediction, RecordedDraws, TaskType,
};

use crate::Result;

/// Standard normal numbers, other ones for other shapes.
pub(crate) fn normal(dims: &[usize]) -> Tensor {
    Philox::new(dims.iter().sum::<usize>() as u64).normal(dims, &Device::cpu()).unwrap()
}

/// The context of a batch of images at σ = 0.5 whose latents are their own noisy ones.
fn context(batch: &Batch, dtype: DType, cfg_dropout_prob: f64) -> Result<FlowMatchingContext<'_>> {
    let (latents, size) = (batch.latents.to_dtype(dtype)?, batch.size()?);
    let each = |value| Tensor::full(&[size], value, DType::F32, &Device::cpu());
    Ok(FlowMatchingContext {
        noisy_latents: latents.clone(),
        latents,
        timesteps: each(500.0)?,
        sigma: each(0.5)?,
        task_type: TaskType::T2V,
        data_type: "image".into(),
        device: Device::cpu(),
        dtype,
        cfg_dropout_prob,
        streams: BTreeMap::new(),
        batch,
    })
}

/// What an adapter makes of a batch in that context.
pub(crate) fn prepare(
    adapter: &dyn ModelAdapter,
    batch: &Batch,
    dtype: DType,
    cfg_dropout_prob: f64,
    draws: &mut dyn Draws,
) -> Result<ModelInputs> {
    adapter.prepare_inputs(&context(batch, dtype, cfg_dropout_prob)?, draws)
}

/// What an adapter makes of a model's output, in f32 and without draws.
pub(crate) fn predict(adapter: &dyn ModelAdapter, model: &dyn FlowModel, batch: &Batch) -> Result<Prediction> {
    let cx = context(batch, DType::F32, 0.0)?;
    adapter.forward(&cx, model, &adapter.prepare_inputs(&cx, &mut RecordedDraws::default())?)
}

/// Sets what DiT starts at zero.
pub(crate) fn start_at_zero(params: &Params) {
    for p in params.iter().filter(|p| p.zero_init()) {
        p.copy_from(&Tensor::zeros(p.dims(), p.dtype(), p.device()).unwrap()).unwrap();
    }
}
