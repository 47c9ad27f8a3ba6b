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

/// The most samples of one request.
pub const MAX_SAMPLES: usize = 10_000;
/// The most pixels of one request's samples together.
const MAX_PIXELS: usize = 1 << 31;
/// The most steps of the solver: diffusers' schedules have 1000.
pub const MAX_INFERENCE_STEPS: usize = 10_000;
/// The greatest scale of guidance: far beyond those that pictures survive.
pub const MAX_GUIDANCE_SCALE: f64 = 1000.0;

impl SamplingConfig {
    /// Checks its numbers.
    ///
    /// # Errors
    /// Names the key whose value is outside its range.
    pub fn check(&self) -> Result<(), String> {
        let (steps, scale) = (self.steps(), self.guidance());
        if !(1..=MAX_INFERENCE_STEPS).contains(&steps) {
            return Err(format!(
                "num_inference_steps: expected a whole number from 1 to {MAX_INFERENCE_STEPS}, got {steps}"
            ));
        }
        if !(scale > 0.0 && scale <= MAX_GUIDANCE_SCALE) {
            return Err(format!(
                "guidance_scale: expected a number above 0 and at most {MAX_GUIDANCE_SCALE}, got {scale}"
            ));
        }
        Ok(())
    }
}

/// Checks how many samples of these sizes are asked for.
///
/// # Errors
/// When it is none, or they take more memory than makes sense.
pub fn check_count(n: usize, dims: &[usize]) -> Result<(), String> {
    if !(1..=MAX_SAMPLES).contains(&n) {
        return Err(format!("expected a whole number from 1 to {MAX_SAMPLES}, got {n}"));
    }
    let pixels = dims.iter().try_fold(n, |pixels, dim| pixels.checked_mul(*dim));
    match pixels.filter(|pixels| *pixels <= MAX_PIXELS) {
        Some(_) => Ok(()),
        None => Err(format!("{n} samples of {dims:?} are more than {MAX_PIXELS} pixels: ask for fewer at once")),
    }
}

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
        let dims = self.data.sample_dims()?;
        let latents = self.data.codec.latent_dims(&dims);
        let at_once = (AT_ONCE / latents.iter().product::<usize>().max(1)).max(1);
        let frame = frame_size(&dims);
        let dtype = self.dtype();
        let mut pixels = Vec::new();
        for (index, prompts) in request.prompts.chunks(at_once).enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let sizes = [&[prompts.len()], &latents[..]].concat();
            let noise = Philox::new(request.seed).fork(index as u64).normal(&sizes, self.device)?;
            let first = request.first_frames.map(|f| &f[index * at_once * frame..][..prompts.len() * frame]);
            let captions: Vec<Option<&str>> = prompts.iter().map(|p| Some(*p)).collect();
            let batch = self.conditioning(&captions, first, &dims, dtype)?;
            let negative = self.conditioning(&vec![None; prompts.len()], first, &dims, dtype)?;
            let task_type = if first.is_some() { TaskType::I2V } else { TaskType::T2V };
            let sampled = self.sample(&batch, Some(&negative), task_type, &noise)?;
            pixels.extend(self.data.codec.decode(&sampled)?.to_vec::<f32>()?);
        }
        Ok(Some(Samples { pixels, dims }))
    }

    /// Latents of a batch's conditions, by Euler's method from `noise`, away from `negative` where there is one and guidance is asked for.
    pub fn sample(
        &self,
        batch: &Batch,
        negative: Option<&Batch>,
        task_type: TaskType,
        noise: &Tensor,
    ) -> Result<Tensor> {
        let euler = FlowMatchEulerDiscrete::new(EulerConfig::default())?;
        // From 1 down in equal steps, as the FLUX pipeline asks for them.
        let steps = self.sampling.steps();
        let sigmas: Vec<f64> = (0..steps).map(|i| 1.0 - i as f64 / steps as f64).collect();
        let schedule = euler.set_sigmas(&sigmas, None)?;
        let scale = self.sampling.guidance();
        let guidance = negative.filter(|_| scale != 1.0).map(|negative| Guidance { negative, scale });
        let sampling = Sampling { adapter: self.adapter, model: self.model, batch, task_type, guidance };
        Ok(euler.sample(&sampling, &noise.to_dtype(self.dtype())?, &schedule)?)
    }

    /// What the model computes in.
    fn dtype(&self) -> DType {
        self.model.params().iter().next().map_or(DType::F32, Param::dtype)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_without_a_meaning_are_refused() {
        let with = |steps, scale| {
            let (num_inference_steps, guidance_scale) = (Some(steps), Some(scale));
            SamplingConfig { num_inference_steps, guidance_scale, ..SamplingConfig::default() }.check()
        };
        assert!([(1, 1.0), (MAX_INFERENCE_STEPS, 1e3)].into_iter().all(|(n, scale)| with(n, scale).is_ok()));
        let wrong =
            [(0, 1.0), (usize::MAX, 1.0), (20, f64::NAN), (20, f64::INFINITY), (20, 0.0), (20, -1.0), (20, 1e9)];
        wrong.into_iter().for_each(|(n, scale)| assert!(with(n, scale).is_err(), "{n} {scale}"));
        assert!(check_count(16, &[1, 8, 8]).is_ok());
        assert!([0, MAX_SAMPLES + 1, usize::MAX].into_iter().all(|n| check_count(n, &[1, 8, 8]).is_err()));
        assert!(check_count(2, &[3, 1 << 62, 2]).is_err() && check_count(100, &[3, 81, 1024, 1024]).is_err());
    }
}
