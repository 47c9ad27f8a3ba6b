//! Goldens of the autoencoders, by the class that `case.json` names, and of the vocoders.

use std::path::Path;

use flowtape_engine::{DType, Device, Tensor};
use flowtape_models::vae::{self, AUTOENCODERS, FrameTiling, MelSpectrogram, Tiling, Vocoder};
use serde_json::Value;

use crate::Outcome;
use crate::golden::{Any, Golden, max, number, relative, text};

/// Encode (moments, mean, sample), normalised latents, decode, and both in tiles.
pub(crate) fn check(dir: &Path, _: &str, out: &mut Vec<Outcome>) -> Any<()> {
    check_on(dir, &Device::cpu(), out)
}

/// The same on a device.
pub(crate) fn check_on(dir: &Path, device: &Device, out: &mut Vec<Outcome>) -> Any<()> {
    let case: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("case.json"))?)?;
    let class = text(&case, "class")?;
    if !AUTOENCODERS.iter().any(|kind| kind.class == class) {
        out.push(Outcome::not_built(class));
        return Ok(());
    }
    if case["runs"].is_null() {
        return sound(dir, &case, device, out);
    }
    let bounds = [number(&case["tolerance"], "mean/logvar/latents")?, number(&case["tolerance"], "decoded")?];
    let (inputs, outputs) = (Golden::tensors(dir, "inputs")?.on(device), Golden::tensors(dir, "outputs")?.on(device));
    let mut model = vae::load(dir, None, device)?;
    let mut compare = |name: String, got: &flowtape_engine::Tensor| -> Any<()> {
        let bound = bounds[usize::from(name.ends_with("decoded"))];
        let worst = relative(got, &outputs.tensor(&name)?)?;
        out.push(Outcome::measured(name, worst, bound, format!("{:?}", got.dims())));
        Ok(())
    };
    for run in case["runs"].as_object().into_iter().flat_map(|runs| runs.keys()) {
        let input = |name: &str| inputs.tensor(&format!("{run}/{name}"));
        let pixels = input("x")?;
        let posterior = model.encode(&pixels)?;
        compare(format!("{run}/mean"), &posterior.mean)?;
        compare(format!("{run}/logvar"), &posterior.logvar)?;
        compare(format!("{run}/sample"), &posterior.sample(&input("noise")?)?)?;
        let mode = model.normalise(&posterior.mean)?;
        compare(format!("{run}/latent_mode"), &mode)?;
        // A picture's latents may be stored without the axis of frames.
        let nemo = format!("{run}/nemo_latent");
        if outputs.has(&nemo) {
            let noise = format!("{run}/nemo_noise");
            let stored = match inputs.has(&noise) {
                true => {
                    let noise = inputs.tensor(&noise)?.reshape(posterior.mean.dims())?;
                    model.normalise(&posterior.sample(&noise)?)?
                }
                false => mode.clone(),
            };
            compare(nemo.clone(), &stored.reshape(outputs.tensor(&nemo)?.dims())?)?;
        }
        let latents = model.denormalise(&input("z_normalised")?)?;
        compare(format!("{run}/z"), &latents)?;
        compare(format!("{run}/decoded"), &model.decode(&latents)?)?;
        let dims = model.latent_dims(pixels.dims());
        compare_dims(&dims, mode.dims())?;
    }
    for (run, tiling) in case["tiling"].as_object().into_iter().flatten() {
        let arguments = &tiling["enable_tiling"];
        let (in_time, in_space) = (tiling["framewise"] == true, tiling["tiled"] != false);
        model.set_tiling(in_space.then(|| Tiling::from_json(arguments)).transpose()?)?;
        model.set_frame_tiling(in_time.then(|| FrameTiling::from_json(arguments)).transpose()?)?;
        let posterior = model.encode(&inputs.tensor(&format!("{run}/x"))?)?;
        compare(format!("{run}/tiled_mean"), &posterior.mean)?;
        compare(format!("{run}/tiled_logvar"), &posterior.logvar)?;
        let latents = model.denormalise(&inputs.tensor(&format!("{run}/z_normalised"))?)?;
        compare(format!("{run}/z"), &latents)?;
        compare(format!("{run}/tiled_decoded"), &model.decode(&latents)?)?;
    }
    Ok(())
}

/// A folder of one run, on sound, and the spectrogram in front of it.
fn sound(dir: &Path, case: &Value, device: &Device, out: &mut Vec<Outcome>) -> Any<()> {
    let (inputs, outputs) = (Golden::tensors(dir, "inputs")?.on(device), Golden::tensors(dir, "outputs")?.on(device));
    let model = vae::load(dir, None, device)?;
    let log_mel = outputs.tensor("log_mel")?;
    let posterior = model.encode(&log_mel)?;
    let latent = model.normalise(&posterior.mean)?;
    compare_dims(&model.latent_dims(log_mel.dims()), latent.dims())?;
    let z = model.denormalise(&inputs.tensor("z_normalised")?)?;
    let mean = number(&case["tolerance"], "mean")?;
    let decoded = (model.decode(&z)?, number(&case["tolerance"], "decoded")?);
    let all = [("mean", posterior.mean), ("logvar", posterior.logvar), ("nemo_latent", latent), ("z", z)];
    let all = all.into_iter().map(|(name, tensor)| (name, tensor, mean));
    for (name, tensor, bound) in all.chain([("decoded", decoded.0, decoded.1)]) {
        let worst = relative(&tensor, &outputs.tensor(name)?)?;
        out.push(Outcome::measured(name, worst, bound, format!("{:?}", tensor.dims())));
    }
    let sound = if inputs.has("waveform") { inputs.tensor("waveform")? } else { outputs.tensor("waveform")? };
    let spectrogram = MelSpectrogram::default();
    let want = outputs.tensor("mel")?;
    let got = spectrogram.forward(&sound)?.unsqueeze(0)?;
    let bound = number(&case["tolerance"], "mel")?;
    out.push(Outcome::measured("mel", relative(&got, &want)?, bound, format!("{:?}", want.dims())));
    // A narrow autoencoder takes some of the bands.
    let taken = log_mel.dim(3)?;
    let every = (0..taken as u32).map(|i| i * (spectrogram.n_mels / taken.max(1)) as u32).collect();
    let every = Tensor::from_vec(every, &[taken], device)?;
    let got = spectrogram.log_mel(&sound)?.index_select(3, &every)?;
    let pairs = got.to_vec::<f64>()?.into_iter().zip(log_mel.to_vec::<f64>()?);
    let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, max);
    let worst = if got.dims() == log_mel.dims() { worst } else { f64::INFINITY };
    out.push(Outcome::measured(
        "log_mel",
        worst,
        1e-4,
        case["tolerance"]["log_mel"].as_str().unwrap_or_default().to_owned(),
    ));
    Ok(())
}

/// What LTX-2's vocoders make of spectrograms.
pub(crate) fn vocoder(dir: &Path, name: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let case = Golden::open(dir, name)?.json;
    let (inputs, outputs) = (Golden::tensors(dir, "inputs")?, Golden::tensors(dir, "outputs")?);
    let bound = number(&case["tolerance"], "waveform")?;
    for run in case["config"].as_object().into_iter().flat_map(|runs| runs.keys()) {
        let title = format!("{run}/waveform");
        let vocoder = Vocoder::load(&dir.join(run), DType::F32, &Device::cpu())?;
        let (got, want) = (vocoder.forward(&inputs.tensor(&format!("{run}/mel"))?)?, outputs.tensor(&title)?);
        out.push(Outcome::measured(title, relative(&got, &want)?, bound, format!("{:?}", want.dims())));
    }
    Ok(())
}

fn compare_dims(said: &[usize], got: &[usize]) -> Any<()> {
    if said == got { Ok(()) } else { Err(format!("latent_dims says {said:?}, latents have {got:?}").into()) }
}
