//! Whole pipelines: prompts, then from a prompt to a picture, step by step.

use std::path::Path;

use flowtape_data::media::Picture;
use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::Solver;
use flowtape_models::blocks::{ChannelOrder, patchify, unpatchify};
use flowtape_models::pipeline::{Generator, PipelineFolder, Request};
use serde_json::Value;

use crate::golden::{Any, Golden, max, number, relative, text};
use crate::{Outcome, text::pipeline_prompts};

/// The goldens' bound on noise levels and timesteps.
const SIGMAS: f64 = 2e-6;

/// All that a folder `pipe_*` holds.
pub(crate) fn check(dir: &Path, name: &str, out: &mut Vec<Outcome>) -> Any<()> {
    pipeline_prompts(dir, name, out)?;
    let case = Golden::open(dir, name)?.json;
    for (run, asked) in case["runs"].as_object().into_iter().flatten() {
        generate(dir, &case, run, asked, out)?;
    }
    Ok(())
}

/// One run, from its noise on.
fn generate(dir: &Path, case: &Value, run: &str, asked: &Value, out: &mut Vec<Outcome>) -> Any<()> {
    let (inputs, outputs) = (Golden::tensors(dir, "inputs")?, Golden::tensors(dir, "outputs")?);
    let folder = PipelineFolder::open(&dir.join("pipeline"))?;
    let generator = Generator::new(&folder, DType::F32, &Device::cpu())?;
    let size = [number(asked, "height")? as usize, number(asked, "width")? as usize];
    let whole = |key: &str| asked[key].as_u64().map(|value| value as usize);
    let mut request = Request::new(text(asked, "prompt")?);
    request.negative_prompt = asked["negative_prompt"].as_str();
    request.size = Some(size);
    request.frames = whole("num_frames");
    request.steps = whole("num_inference_steps");
    request.guidance_scale = asked["guidance_scale"].as_f64();
    request.true_cfg_scale = asked["true_cfg_scale"].as_f64();
    request.max_sequence_length = whole("max_sequence_length");
    (request.sampler, request.shift) = scheduler(asked["scheduler"].as_str())?;
    request.noise = Some(unpacked(&inputs.tensor(&format!("{run}/latents"))?, size)?);
    let bound = number(&case["tolerance"], "latents_after_step")?;
    let mut steps: Vec<Tensor> = Vec::new();
    let made = generator.generate(&request, &mut |_, streams| {
        steps.push(streams[0].clone());
        Ok(())
    })?;
    let schedule = &made.settings.schedule;
    for (what, got) in [("sigmas", &schedule.sigmas), ("timesteps", &schedule.timesteps)] {
        let title = format!("{run}/{what}");
        let got = Tensor::from_slice(got, &[got.len()], &Device::cpu())?;
        let worst = relative(&got, &outputs.tensor(&title)?)?;
        out.push(Outcome::measured(title, worst, SIGMAS, format!("{:?}", got.dims())));
    }
    for (i, latents) in steps.iter().enumerate() {
        let title = format!("{run}/latents_after_step.{i}");
        let want = outputs.tensor(&title)?;
        out.push(Outcome::measured(
            title,
            relative(&packed(latents, &want)?, &want)?,
            bound,
            format!("{:?}", want.dims()),
        ));
    }
    pixels(&made.pixels, run, case, &outputs, out)
}

/// The picture or film, as numbers from 0 to 1 and as bytes.
fn pixels(pixels: &Tensor, run: &str, case: &Value, outputs: &Golden, out: &mut Vec<Outcome>) -> Any<()> {
    let bound: f64 = text(&case["tolerance"], "image")?.split(' ').next().ok_or("a bound of the image")?.parse()?;
    let want = outputs.tensor(&format!("{run}/image"))?;
    // Films are stored frame by frame.
    let frames = if pixels.rank() == 5 { pixels.transpose(1, 2)? } else { pixels.unsqueeze(1)? };
    let stored = if want.rank() == 5 { want.clone() } else { want.unsqueeze(1)? };
    let (got, image) = (frames.contiguous()?.to_vec::<f64>()?, stored.to_vec::<f64>()?);
    let shown = got.iter().map(|x| (x / 2.0 + 0.5).clamp(0.0, 1.0));
    let worst = shown.zip(&image).map(|(a, b)| (a - b).abs()).fold(0.0, max);
    let worst = if frames.dims() == stored.dims() { worst } else { f64::INFINITY };
    out.push(Outcome::measured(format!("{run}/image"), worst, bound, format!("{:?}", want.dims())));
    let bytes = format!("{run}/uint8");
    if outputs.has(&bytes) {
        let mut rgb = Vec::new();
        for frame in 0..frames.dim(1)? {
            rgb.extend(Picture::from_pixels(&frames.narrow(1, frame, 1)?.reshape(&frames.dims()[2..])?)?.rgb);
        }
        let want = outputs.values(&bytes)?;
        let worst = rgb.iter().zip(&want).map(|(a, b)| f64::from((f32::from(*a) - b).abs())).fold(0.0, max);
        let worst = if rgb.len() == want.len() { worst } else { f64::INFINITY };
        out.push(Outcome::measured(bytes, worst, 1.0, ""));
    }
    Ok(())
}

/// A scheduler that a run has instead of its pipeline's, such as `FlowMatchEulerDiscreteScheduler(shift=3.0)`.
fn scheduler(text: Option<&str>) -> Any<(Option<Solver>, Option<f64>)> {
    let Some(text) = text else { return Ok((None, None)) };
    let shift = text.strip_prefix("FlowMatchEulerDiscreteScheduler(shift=").and_then(|rest| rest.strip_suffix(')'));
    Ok((Some(Solver::Euler), Some(shift.ok_or_else(|| format!("unknown scheduler {text}"))?.parse()?)))
}

/// Rows and columns of tokens of a picture of this size.
fn grid(tokens: usize, [height, width]: [usize; 2]) -> Any<[usize; 2]> {
    let rows = (1..=tokens).find(|rows| tokens.is_multiple_of(*rows) && rows * rows * width == tokens * height);
    let rows = rows.ok_or_else(|| format!("{tokens} tokens are no grid of {height} x {width} pixels"))?;
    Ok([rows, tokens / rows])
}

/// Latents of tokens of 2 x 2, where they are tokens.
fn unpacked(latents: &Tensor, size: [usize; 2]) -> Any<Tensor> {
    if latents.rank() != 3 {
        return Ok(latents.clone());
    }
    Ok(unpatchify(latents, &grid(latents.dim(1)?, size)?, &[2, 2], ChannelOrder::Slowest)?)
}

/// Latents as they are stored: as they are, or as tokens.
fn packed(latents: &Tensor, stored: &Tensor) -> Any<Tensor> {
    if stored.rank() != 3 {
        return Ok(latents.clone());
    }
    let side = if stored.dim(2)? == latents.dim(1)? { 1 } else { 2 };
    Ok(patchify(latents, &vec![side; latents.rank() - 2])?)
}
