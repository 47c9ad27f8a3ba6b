//! Sound to files.

use std::path::Path;

use flowtape_engine::Tensor;
use flowtape_engine::files::write_whole;
use hound::{SampleFormat, WavSpec, WavWriter};

use crate::{Error, Result};

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
