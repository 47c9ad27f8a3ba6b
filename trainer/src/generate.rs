//! Images and videos from prompts.

use flowtape_engine::nn::Param;
use flowtape_engine::{Device, Philox};
use flowtape_flowmatch::{EulerConfig, FlowMatchEulerDiscrete, Guidance, ModelAdapter, Sampling, TaskType};
use flowtape_models::Transformer;

use crate::Result;
use crate::data::Data;
use crate::recipe::SamplingConfig;

/// Pixels that go through the model at once: 100 images of 8 x 8.
const PIXELS: usize = 6400;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// One prompt for each sample.
    pub prompts: &'a [&'a str],
    /// The first frame of each sample, one after the other: then the model goes on from it.
    pub first_frames: Option<&'a [f32]>,
    /// The same seed gives the same samples.
    pub seed: u64,
    /// Where the model lies.
    pub device: &'a Device,
}

/// One sample for each prompt, grey in about [-1, 1], one after the other. A sample depends on the seed, its place and
/// what is asked for.
///
/// # Errors
/// When a prompt has an unknown word, or the model fails.
pub fn generate(
    model: &dyn Transformer,
    adapter: &dyn ModelAdapter,
    data: &Data,
    request: &Request<'_>,
    config: &SamplingConfig,
) -> Result<Vec<f32>> {
    let device = request.device;
    let euler = FlowMatchEulerDiscrete::new(EulerConfig::default())?;
    // From 1 down in equal steps, as the FLUX pipeline asks for them.
    let steps = config.num_inference_steps;
    let sigmas: Vec<f64> = (0..steps).map(|i| 1.0 - i as f64 / steps as f64).collect();
    let schedule = euler.set_sigmas(&sigmas, None)?;
    let at_once = (PIXELS / data.dims(1).iter().product::<usize>()).max(1);
    let frame = data.video.map_or(0, |v| v.frame());
    let mut samples = Vec::new();
    for (index, prompts) in request.prompts.chunks(at_once).enumerate() {
        let noise = Philox::new(request.seed).fork(index as u64).normal(&data.dims(prompts.len()), device)?;
        let dtype = model.params().iter().next().map_or(noise.dtype(), Param::dtype);
        let noise = noise.to_dtype(dtype)?;
        let first = request.first_frames.map(|f| &f[index * at_once * frame..][..prompts.len() * frame]);
        let captions: Vec<Option<&str>> = prompts.iter().map(|p| Some(*p)).collect();
        let batch = data.conditioning(&captions, first, dtype, device)?;
        let negative = data.conditioning(&vec![None; prompts.len()], first, dtype, device)?;
        let guidance =
            (config.guidance_scale != 1.0).then_some(Guidance { negative: &negative, scale: config.guidance_scale });
        let task_type = if first.is_some() { TaskType::I2V } else { TaskType::T2V };
        let sampling = Sampling { adapter, model, batch: &batch, task_type, guidance };
        samples.extend(euler.sample(&sampling, &noise, &schedule)?.to_vec::<f32>()?);
    }
    Ok(samples)
}
