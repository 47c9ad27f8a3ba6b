//! Sound to files, and the sound of films.

use std::path::{Path, PathBuf};

use flowtape_engine::files::write_whole;
use flowtape_engine::{Device, Tensor};
use hound::{SampleFormat, WavReader, WavSpec, WavWriter};

use super::ffmpeg;
use super::film::Any;
use crate::{Error, Result};

/// How sound is given to an autoencoder.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SoundFormat {
    /// 1 or 2.
    pub channels: usize,
    /// Samples a second.
    pub sampling_rate: usize,
}

/// The WAV beside a film, `film.wav` of `film.mp4`, where there is one.
pub fn sound_beside(film: &Path) -> Option<PathBuf> {
    ["wav", "WAV"].into_iter().map(|ending| film.with_extension(ending)).find(|path| path.is_file())
}

/// The first `seconds` of a film's sound `[channels, samples]` from -1 to 1, silent where it ends before: that of the WAV beside it or,
/// through ffmpeg where that is asked for, the film's own. Nothing where there is none.
///
/// # Errors
/// When it can't be read; the error names the file.
pub fn read_sound(film: &Path, seconds: f64, format: SoundFormat, with_ffmpeg: bool) -> Result<Option<Tensor>> {
    let SoundFormat { channels, sampling_rate } = format;
    let beside = sound_beside(film);
    let read = match &beside {
        Some(path) => read_wav(path, seconds, format).map(Some),
        None if with_ffmpeg && film.is_file() => {
            let apart = |turns: Vec<f32>| (0..channels).map(|c| every(&turns, c, channels)).collect();
            ffmpeg::sound(film, sampling_rate, channels, seconds).map(|sound| sound.map(apart))
        }
        None => Ok(None),
    };
    let named = |source| Error::Sample { sample: beside.as_deref().unwrap_or(film).display().to_string(), source };
    let Some(sound): Option<Vec<Vec<f32>>> = read.map_err(named)? else { return Ok(None) };
    let samples = (seconds * sampling_rate as f64).round_ties_even() as usize;
    let whole = |channel: &Vec<f32>| channel.iter().copied().chain(std::iter::repeat(0.0)).take(samples).collect();
    let values: Vec<f32> = sound.iter().flat_map::<Vec<f32>, _>(whole).collect();
    Ok(Some(Tensor::from_vec(values, &[channels, samples], &Device::cpu())?))
}

/// One of values that take turns.
fn every(turns: &[f32], first: usize, step: usize) -> Vec<f32> {
    turns.iter().skip(first).step_by(step).copied().collect()
}

/// The channels of a WAV, at the rate that is asked for. One is heard on both sides.
fn read_wav(path: &Path, seconds: f64, format: SoundFormat) -> Any<Vec<Vec<f32>>> {
    let mut reader = WavReader::open(path)?;
    let spec = reader.spec();
    let (own, rate) = (usize::from(spec.channels), spec.sample_rate as usize);
    if own != format.channels && own != 1 || rate == 0 {
        return Err(
            format!("{own} channels of {rate} samples a second, where {} channels are taken", format.channels).into()
        );
    }
    // With some more, which the last samples of another rate depend on.
    let most = ((seconds + 1.0) * rate as f64) as usize * own;
    let turns: Vec<f32> = match spec.sample_format {
        SampleFormat::Float => reader.samples::<f32>().take(most).collect::<hound::Result<_>>()?,
        SampleFormat::Int => {
            let full = 2f32.powi(i32::from(spec.bits_per_sample) - 1);
            reader.samples::<i32>().take(most).map(|sample| Ok(sample? as f32 / full)).collect::<hound::Result<_>>()?
        }
    };
    if let Some(wrong) = turns.iter().find(|sample| !sample.is_finite()) {
        return Err(format!("a sample of {wrong}").into());
    }
    let channel = |c: usize| resampled(&every(&turns, c.min(own - 1), own), rate, format.sampling_rate);
    Ok((0..format.channels).map(channel).collect())
}

/// Sound at another rate: what both rates can hold, through a sinc under a Hann window. Before and behind it is silence.
pub fn resampled(sound: &[f32], from: usize, to: usize) -> Vec<f32> {
    /// Zeros of the sinc on each side.
    const ZEROS: f64 = 32.0;
    /// What is kept of the frequencies that the lower rate can hold; the window takes the rest to fall off.
    const KEPT: f64 = 0.97;
    if from == to {
        return sound.to_vec();
    }
    let (from, to) = (from as f64, to as f64);
    let scale = KEPT * (to / from).min(1.0);
    let reach = ZEROS / scale;
    let tap = |distance: f64| {
        let turn = std::f64::consts::PI * distance * scale;
        let sinc = if turn == 0.0 { 1.0 } else { turn.sin() / turn };
        scale * sinc * (0.5 + 0.5 * (turn / ZEROS).cos())
    };
    let at = |i: usize| {
        let middle = i as f64 * from / to;
        let first = (middle - reach).ceil().max(0.0) as usize;
        let last = ((middle + reach).floor() as usize + 1).min(sound.len());
        let taps = sound.iter().enumerate().take(last).skip(first);
        taps.map(|(k, sample)| f64::from(*sample) * tap(k as f64 - middle)).sum::<f64>() as f32
    };
    (0..(sound.len() as f64 * to / from).ceil() as usize).map(at).collect()
}

/// Writes a waveform `[channels, samples]` from -1 to 1 as WAV of 16 bits, whole or not at all.
///
/// # Errors
/// When it is not of rank 2, or the file can't be written.
pub fn write_wav(path: &Path, waveform: &Tensor, sampling_rate: usize) -> Result<()> {
    let &[channels, samples] = waveform.dims() else {
        return Err(Error::batch("a waveform", "[channels, samples]", format!("{:?}", waveform.dims())));
    };
    let failed = |what: String| Error::Open { name: path.display().to_string(), what };
    let wrong = || failed(format!("{channels} channels of {sampling_rate} samples a second are no WAV"));
    let spec = WavSpec {
        channels: u16::try_from(channels).map_err(|_| wrong())?,
        sample_rate: u32::try_from(sampling_rate).map_err(|_| wrong())?,
        bits_per_sample: 16,
        sample_format: SampleFormat::Int,
    };
    let values = waveform.to_vec::<f32>()?;
    write_whole(path, |partial| {
        let told = |error: hound::Error| failed(error.to_string());
        let mut writer = WavWriter::create(partial, spec).map_err(told)?;
        for at in 0..samples {
            for channel in 0..channels {
                let level = values[channel * samples + at].clamp(-1.0, 1.0) * f32::from(i16::MAX);
                writer.write_sample(level.round() as i16).map_err(told)?;
            }
        }
        writer.finalize().map_err(told)
    })
}
