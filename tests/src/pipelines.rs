//! Whole pipelines: prompts, then from a prompt to a picture, step by step.

use std::path::Path;

use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::Solver;
use flowtape_models::blocks::{ChannelOrder, patchify, unpatchify};
use flowtape_models::pipeline::{ConditionImage, Generator, PipelineFolder, Request, SoundGuidance};
use serde_json::Value;

use crate::golden::{Any, Golden, max, number, relative, text};
use crate::{Outcome, editing, prompts};

/// The goldens' bound on noise levels and timesteps.
const SIGMAS: f64 = 2e-6;

/// All that a folder `pipe_*` holds.
pub(crate) fn check(dir: &Path, name: &str, out: &mut Vec<Outcome>) -> Any<()> {
    prompts::pipeline(dir, name, out)?;
    let case = Golden::open(dir, name)?.json;
    for (run, asked) in case["runs"].as_object().into_iter().flatten() {
        let images = editing::conditions(dir, asked)?;
        generate(dir, &case, run, asked, &images, out)?;
    }
    Ok(())
}

/// One run, from its noise on.
pub(crate) fn generate(
    dir: &Path,
    case: &Value,
    run: &str,
    asked: &Value,
    images: &[ConditionImage],
    out: &mut Vec<Outcome>,
) -> Any<()> {
    let (inputs, outputs) = (Golden::tensors(dir, "inputs")?, Golden::tensors(dir, "outputs")?);
    let folder = PipelineFolder::open(&dir.join("pipeline"))?;
    let generator = Generator::new(&folder, DType::F32, &Device::cpu())?;
    let size = [number(asked, "height")? as usize, number(asked, "width")? as usize];
    let whole = |key: &str| asked[key].as_u64().map(|value| value as usize);
    let mut request = Request::new(text(asked, "prompt")?);
    request.negative_prompt = asked["negative_prompt"].as_str();
    request.images = images;
    request.size = Some(size);
    request.frames = whole("num_frames");
    request.steps = whole("num_inference_steps");
    request.guidance_scale = asked["guidance_scale"].as_f64();
    request.true_cfg_scale = asked["true_cfg_scale"].as_f64();
    request.max_sequence_length = whole("max_sequence_length");
    (request.sampler, request.shift) = scheduler(asked["scheduler"].as_str())?;
    let sound = inputs.has(&format!("{run}/audio_noise"));
    request.noise = Some(match sound {
        true => inputs.tensor(&format!("{run}/video_noise"))?,
        false => unpacked(&inputs.tensor(&format!("{run}/latents"))?, size)?,
    });
    request.audio_noise = if sound { Some(inputs.tensor(&format!("{run}/audio_noise"))?) } else { None };
    let usual = SoundGuidance::default();
    let scale = |key: &str, default: f64| asked[key].as_f64().unwrap_or(default);
    let both = |key: &str, usual: [f64; 2]| [scale(key, usual[0]), scale(&format!("audio_{key}"), usual[1])];
    let blocks = &asked["spatio_temporal_guidance_blocks"];
    request.with_sound = SoundGuidance {
        audio_guidance_scale: scale("audio_guidance_scale", usual.audio_guidance_scale),
        stg_scale: both("stg_scale", usual.stg_scale),
        stg_blocks: serde_json::from_value(blocks.clone()).unwrap_or(usual.stg_blocks),
        modality_scale: both("modality_scale", usual.modality_scale),
        guidance_rescale: both("guidance_rescale", usual.guidance_rescale),
    };
    let bound = number(&case["tolerance"], "latents_after_step")?;
    let mut steps: Vec<Vec<Tensor>> = Vec::new();
    let made = generator.generate(&request, &mut |_, streams| {
        steps.push(streams.to_vec());
        Ok(())
    })?;
    let schedule = &made.settings.schedule;
    for (what, got) in [("sigmas", &schedule.sigmas), ("timesteps", &schedule.timesteps)] {
        let title = format!("{run}/{what}");
        let got = Tensor::from_slice(got, &[got.len()], &Device::cpu())?;
        let worst = relative(&got, &outputs.tensor(&title)?)?;
        out.push(Outcome::measured(title, worst, SIGMAS, format!("{:?}", got.dims())));
    }
    let named = |(i, streams): (usize, &Vec<Tensor>)| {
        let names = ["latents_after_step", "audio_latents_after_step"].into_iter();
        let titles = names.map(move |name| format!("{run}/{name}.{i}"));
        titles.zip(streams.clone()).collect::<Vec<(String, Tensor)>>()
    };
    for (title, latents) in steps.iter().enumerate().flat_map(named) {
        let want = outputs.tensor(&title)?;
        // A token of sound has all bands of a moment.
        let latents = &if title.contains("/audio_") { patchify(&latents, &[1, latents.dim(3)?])? } else { latents };
        out.push(Outcome::measured(
            title,
            relative(&packed(latents, &want)?, &want)?,
            bound,
            format!("{:?}", want.dims()),
        ));
    }
    if let Some(sound) = &made.audio {
        let (title, bound) = (format!("{run}/audio"), number(&case["tolerance"], "audio")?);
        let want = outputs.tensor(&title)?;
        out.push(Outcome::measured(title, relative(&sound.samples, &want)?, bound, format!("{:?}", want.dims())));
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
    bytes(&frames, run, outputs, out)?;
    Ok(())
}

/// The same as bytes, where they are recorded.
fn bytes(frames: &Tensor, run: &str, outputs: &Golden, out: &mut Vec<Outcome>) -> Any<()> {
    let bytes = format!("{run}/uint8");
    if outputs.has(&bytes) {
        let mut rgb = Vec::new();
        for frame in 0..frames.dim(1)? {
            rgb.extend(
                flowtape_data::media::Picture::from_pixels(&frames.narrow(1, frame, 1)?.reshape(&frames.dims()[2..])?)?
                    .rgb,
            );
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
    if stored.rank() != 3 || latents.rank() == 3 {
        return Ok(latents.clone());
    }
    let side = if stored.dim(2)? == latents.dim(1)? { 1 } else { 2 };
    Ok(patchify(latents, &vec![side; latents.rank() - 2])?)
}
