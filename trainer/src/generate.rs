//! Images from prompts.

use flowtape_engine::{Device, Philox, Tensor};
use flowtape_flowmatch::{
    Batch, DataType, EulerConfig, FlowMatchEulerDiscrete, Guidance, ModelAdapter, Sampling, TaskType,
};
use flowtape_models::Transformer;

use crate::Result;
use crate::digits::SIDE;
use crate::recipe::SamplingConfig;
use crate::text::{TokenTable, without_caption};

/// Images that go through the model at once.
const BATCH: usize = 100;

/// One image per prompt, [`crate::digits::PIXELS`] each, grey in about [-1, 1]. Image `i` depends on the seed, `i` and
/// its prompt.
///
/// # Errors
/// When a prompt has an unknown word, or the model fails.
pub fn generate(
    model: &dyn Transformer,
    adapter: &dyn ModelAdapter,
    table: &TokenTable,
    prompts: &[&str],
    seed: u64,
    config: &SamplingConfig,
) -> Result<Vec<f32>> {
    let device = Device::cpu();
    let euler = FlowMatchEulerDiscrete::new(EulerConfig::default())?;
    // From 1 down in equal steps, as the FLUX pipeline asks for them.
    let steps = config.num_inference_steps;
    let sigmas: Vec<f64> = (0..steps).map(|i| 1.0 - i as f64 / steps as f64).collect();
    let schedule = euler.set_sigmas(&sigmas, None)?;
    let mut images = Vec::new();
    for (index, prompts) in prompts.chunks(BATCH).enumerate() {
        let dims = [prompts.len(), 1, SIDE, SIDE];
        let noise = Philox::new(seed).fork(index as u64).normal(&dims, &device)?;
        let dtype = model.params().iter().next().map_or(noise.dtype(), |(_, p)| p.dtype());
        let noise = noise.to_dtype(dtype)?;
        let batch =
            table.embed(Batch::new(Tensor::zeros(&dims, dtype, &device)?, DataType::Image), prompts, &device)?;
        let negative = without_caption(&batch)?;
        let guidance =
            (config.guidance_scale != 1.0).then_some(Guidance { negative: &negative, scale: config.guidance_scale });
        let sampling = Sampling { adapter, model, batch: &batch, task_type: TaskType::T2V, guidance };
        images.extend(euler.sample(&sampling, &noise, &schedule)?.to_vec::<f32>()?);
    }
    Ok(images)
}
