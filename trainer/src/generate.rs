//! Images and videos from prompts.

use std::sync::atomic::{AtomicBool, Ordering};

use flowtape_engine::nn::Param;
use flowtape_engine::{DType, Device, Philox, Tensor};
use flowtape_flowmatch::{Batch, EulerConfig, FlowMatchEulerDiscrete, Guidance, ModelAdapter, Sampling, TaskType};
use flowtape_models::Transformer;

use crate::Result;
use crate::data::Data;
use crate::recipe::SamplingConfig;

/// Numbers of latents that go through the model at once: 100 images of 8 x 8.
const AT_ONCE: usize = 6400;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// One prompt for each sample.
    pub prompts: &'a [&'a str],
    /// The pixels of the first frame of each sample, one after the other: then the model goes on from it.
    pub first_frames: Option<&'a [f32]>,
    /// The same seed gives the same samples.
    pub seed: u64,
}

/// Generated pixels.
#[derive(Clone, PartialEq, Debug)]
pub struct Samples {
    /// From about -1 to 1, one sample after the other.
    pub pixels: Vec<f32>,
    /// Sizes of one: `[C, H, W]` or `[C, F, H, W]`.
    pub dims: Vec<usize>,
}

/// A model, and what makes pictures with it.
pub(crate) struct Generator<'a> {
    pub model: &'a dyn Transformer,
    pub adapter: &'a dyn ModelAdapter,
    pub data: &'a Data,
    pub sampling: &'a SamplingConfig,
    pub device: &'a Device,
}

impl Generator<'_> {
    /// One sample for each prompt. A sample depends on the seed, its place and what is asked for. None where it was asked to
    /// stop: it looks between batches.
    pub fn generate(&self, request: &Request<'_>, stop: &AtomicBool) -> Result<Option<Samples>> {
        let euler = FlowMatchEulerDiscrete::new(EulerConfig::default())?;
        // From 1 down in equal steps, as the FLUX pipeline asks for them.
        let steps = self.sampling.num_inference_steps;
        let sigmas: Vec<f64> = (0..steps).map(|i| 1.0 - i as f64 / steps as f64).collect();
        let schedule = euler.set_sigmas(&sigmas, None)?;
        let dims = self.data.sample_dims()?;
        let latents = self.data.codec.latent_dims(&dims);
        let at_once = (AT_ONCE / latents.iter().product::<usize>().max(1)).max(1);
        let frame = frame_size(&dims);
        let dtype = self.model.params().iter().next().map_or(DType::F32, Param::dtype);
        let mut pixels = Vec::new();
        for (index, prompts) in request.prompts.chunks(at_once).enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let sizes = [&[prompts.len()], &latents[..]].concat();
            let noise = Philox::new(request.seed).fork(index as u64).normal(&sizes, self.device)?.to_dtype(dtype)?;
            let first = request.first_frames.map(|f| &f[index * at_once * frame..][..prompts.len() * frame]);
            let captions: Vec<Option<&str>> = prompts.iter().map(|p| Some(*p)).collect();
            let batch = self.conditioning(&captions, first, &dims, dtype)?;
            let negative = self.conditioning(&vec![None; prompts.len()], first, &dims, dtype)?;
            let scale = self.sampling.guidance_scale;
            let guidance = (scale != 1.0).then_some(Guidance { negative: &negative, scale });
            let task_type = if first.is_some() { TaskType::I2V } else { TaskType::T2V };
            let (adapter, model) = (self.adapter, self.model);
            let sampling = Sampling { adapter, model, batch: &batch, task_type, guidance };
            let sampled = euler.sample(&sampling, &noise, &schedule)?;
            pixels.extend(self.data.codec.decode(&sampled)?.to_vec::<f32>()?);
        }
        Ok(Some(Samples { pixels, dims }))
    }

    /// What samples are conditioned on: one prompt each (none: a dropped caption) and the first frame of each where there is
    /// one; the latents are zero but for that.
    fn conditioning(
        &self,
        prompts: &[Option<&str>],
        first_frames: Option<&[f32]>,
        dims: &[usize],
        dtype: DType,
    ) -> Result<Batch> {
        let latents = match first_frames {
            Some(frames) => {
                let (frame, sample) = (frame_size(dims), dims.iter().product());
                let mut pixels = vec![0f32; prompts.len() * sample];
                let starts = pixels.chunks_exact_mut(sample).zip(frames.chunks_exact(frame));
                starts.for_each(|(sample, frame)| sample[..frame.len()].copy_from_slice(frame));
                let pixels = Tensor::from_vec(pixels, &[&[prompts.len()], dims].concat(), self.device)?;
                self.data.codec.encode(&pixels)?.to_dtype(dtype)?
            }
            None => {
                let sizes = [&[prompts.len()], &self.data.codec.latent_dims(dims)[..]].concat();
                Tensor::zeros(&sizes, dtype, self.device)?
            }
        };
        let data_type = flowtape_data::collate::data_type(latents.dims())?;
        Ok(self.data.text.encode(prompts, self.device)?.into_batch(Batch::new(latents, data_type)))
    }
}

/// Pixels of a frame of one channel.
fn frame_size(dims: &[usize]) -> usize {
    dims.iter().rev().take(2).product()
}
