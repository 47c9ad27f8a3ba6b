//! The mel spectrogram in front of LTX-2's audio autoencoder: torchaudio's `MelSpectrogram` of NeMo's preprocessing.

use flowtape_engine::ops::{ConvAxis, Padding, conv, pointwise};
use flowtape_engine::{DType, Tensor};

use crate::{Error, Result};

/// The least size whose logarithm is taken.
const FLOOR: f64 = 1e-5;

/// How a spectrogram is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MelSpectrogram {
    /// Samples a second.
    pub sample_rate: usize,
    /// Samples of a spectrum, an even number.
    pub n_fft: usize,
    /// Samples from one to the next.
    pub hop_length: usize,
    /// Bands.
    pub n_mels: usize,
}

impl Default for MelSpectrogram {
    /// LTX-2's.
    fn default() -> Self {
        Self { sample_rate: 16_000, n_fft: 1024, hop_length: 160, n_mels: 64 }
    }
}

/// Slaney's scale: even up to 1,000 Hz, then by powers.
fn hertz(mel: f64) -> f64 {
    let (step, corner) = (200.0 / 3.0, 15.0);
    if mel < corner { mel * step } else { 1000.0 * ((6.4f64.ln() / 27.0) * (mel - corner)).exp() }
}

fn mel(hertz: f64) -> f64 {
    let (step, corner) = (200.0 / 3.0, 15.0);
    if hertz < 1000.0 { hertz / step } else { corner + (hertz / 1000.0).ln() / (6.4f64.ln() / 27.0) }
}

impl MelSpectrogram {
    /// The triangles of the bands, each of one area (Slaney's norm): `[n_fft / 2 + 1, n_mels]` by rows.
    fn bands(&self) -> Vec<f32> {
        let top = mel(self.sample_rate as f64 / 2.0);
        let at = |i: usize| hertz(top * i as f64 / (self.n_mels + 1) as f64);
        let band = |frequency: f64, m: usize| {
            let (low, middle, high) = (at(m), at(m + 1), at(m + 2));
            let height = ((frequency - low) / (middle - low)).min((high - frequency) / (high - middle)).max(0.0);
            (height * 2.0 / (high - low)) as f32
        };
        let sizes = self.n_fft / 2 + 1;
        let frequency = |k: usize| self.sample_rate as f64 / 2.0 * k as f64 / (sizes - 1) as f64;
        (0..sizes).flat_map(|k| (0..self.n_mels).map(move |m| (k, m))).map(|(k, m)| band(frequency(k), m)).collect()
    }

    /// Cosines and sines under a Hann window: `[2 (n_fft / 2 + 1), 1, n_fft]` by rows.
    fn basis(&self) -> Vec<f32> {
        let n = self.n_fft;
        let turn = |i: usize| 2.0 * std::f64::consts::PI * (i % n) as f64 / n as f64;
        let window: Vec<f64> = (0..n).map(|i| 0.5 - 0.5 * turn(i).cos()).collect();
        let wave = |wave: fn(f64) -> f64| {
            let window = &window;
            (0..=n / 2).flat_map(move |k| (0..n).map(move |i| (wave(turn(k * i)) * window[i]) as f32))
        };
        wave(f64::cos).chain(wave(f64::sin)).collect()
    }

    /// Sizes of the bands of a sound `[C, samples]`, from -1 to 1: `[C, n_mels, T]`, a spectrum around each hop.
    ///
    /// # Errors
    /// When it is too short to be mirrored at its ends.
    pub fn forward(&self, sound: &Tensor) -> Result<Tensor> {
        let (channels, samples, pad) = (sound.dim(0)?, sound.dim(1)?, self.n_fft / 2);
        if samples <= pad {
            let expected = "[C, samples] with more than n_fft / 2 samples";
            return Err(Error::Input { name: "sound".into(), expected, got: format!("{:?}", sound.dims()) });
        }
        let (device, sizes) = (sound.device(), pad + 1);
        let basis = Tensor::from_vec(self.basis(), &[2 * sizes, 1, self.n_fft], device)?;
        let bands = Tensor::from_vec(self.bands(), &[sizes, self.n_mels], device)?;
        let axis = ConvAxis {
            stride: self.hop_length,
            before: pad,
            after: pad,
            padding: Padding::Reflect,
            ..ConvAxis::default()
        };
        let sound = sound.to_dtype(DType::F32)?.contiguous()?.reshape(&[channels, 1, samples])?;
        let both = conv(&sound, &basis, None, &[axis], 1)?;
        let (cosines, sines) = (both.narrow(1, 0, sizes)?, both.narrow(1, sizes, sizes)?);
        let size = pointwise([&cosines, &sines], |[a, b]| (a.square() + b.square()).sqrt())?;
        Ok(size.transpose(1, 2)?.contiguous()?.matmul(&bands)?.transpose(1, 2)?.contiguous()?)
    }

    /// What the autoencoder takes: logarithms of the same, `[1, C, T, n_mels]`.
    ///
    /// # Errors
    /// As above.
    pub fn log_mel(&self, sound: &Tensor) -> Result<Tensor> {
        let mel = self.forward(sound)?.transpose(1, 2)?.unsqueeze(0)?;
        Ok(pointwise([&mel], |[m]| m.maximum(FLOOR).log())?)
    }
}
