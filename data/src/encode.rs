//! What turns pixels and captions into what a model is trained on.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::Batch;
use flowtape_models::pipeline::PipelineFolder;
use flowtape_models::vae::{self, Autoencoder, MelSpectrogram, TileSizes};
use serde_json::Value;

use crate::collate::padded;
use crate::media::SoundFormat;
use crate::{Error, Result};

/// Pixels to latents and back: an autoencoder, or nothing at all.
pub trait LatentCodec: Send + Sync {
    /// Latents of pixels `[B, C, H, W]` or `[B, C, F, H, W]` from -1 to 1, on their device.
    ///
    /// # Errors
    /// When the sizes do not fit, or memory runs out.
    fn encode(&self, pixels: &Tensor) -> Result<Tensor>;

    /// Pixels of latents, about -1 to 1.
    ///
    /// # Errors
    /// When the sizes do not fit, or memory runs out.
    fn decode(&self, latents: &Tensor) -> Result<Tensor>;

    /// Sizes of the latents of pixels of these sizes, with or without the axis of samples.
    fn latent_dims(&self, pixels: &[usize]) -> Vec<usize>;
}

/// Latents that are the pixels.
#[derive(Clone, Copy, Debug, Default)]
pub struct PixelCodec;

impl LatentCodec for PixelCodec {
    fn encode(&self, pixels: &Tensor) -> Result<Tensor> {
        Ok(pixels.clone())
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(latents.clone())
    }

    fn latent_dims(&self, pixels: &[usize]) -> Vec<usize> {
        pixels.to_vec()
    }
}

/// What models see of captions: tensors by the names that adapters read, such as `text_embeddings` `[B, T, D]`,
/// `text_mask` `[B, T]` and `pooled_prompt_embeds` `[B, D]`.
#[derive(Clone, Debug, Default)]
pub struct TextEmbeddings {
    /// By name.
    pub tensors: BTreeMap<String, Tensor>,
}

impl TextEmbeddings {
    /// With one more tensor.
    #[must_use]
    pub fn with(mut self, name: &str, tensor: Tensor) -> Self {
        self.tensors.insert(name.to_owned(), tensor);
        self
    }

    /// The batch with these tensors.
    pub fn into_batch(self, mut batch: Batch) -> Batch {
        batch.tensors.extend(self.tensors);
        batch
    }
}

/// Captions to embeddings.
pub trait TextEncoder: Send + Sync {
    /// Embeddings of one caption per sample, on `device`; `None` is a dropped caption, for classifier-free guidance.
    ///
    /// # Errors
    /// When it does not take a caption: the error says what it takes.
    fn encode(&self, captions: &[Option<&str>], device: &Device) -> Result<TextEmbeddings>;
}

/// A pipeline's autoencoder: latents as its transformer sees them, of what is most likely for the pixels.
#[derive(Debug)]
pub struct VaeCodec {
    vae: Box<dyn Autoencoder>,
    device: Device,
}

impl VaeCodec {
    /// Loads the part `vae` onto a device.
    ///
    /// # Errors
    /// When it is missing or broken.
    pub fn load(pipeline: &PipelineFolder, device: &Device) -> Result<Self> {
        let vae = vae::load(&pipeline.part("vae")?, Some(DType::F32), device)?;
        Ok(Self { vae, device: device.clone() })
    }

    /// With pictures taken in tiles and clips in parts.
    ///
    /// # Errors
    /// When a tile or part is no whole number of latents.
    pub fn with_tiles(mut self, tiles: TileSizes) -> Result<Self> {
        tiles.apply(&mut *self.vae)?;
        Ok(self)
    }

    /// The autoencoder.
    pub fn autoencoder(&self) -> &dyn Autoencoder {
        &*self.vae
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether these are pictures for an autoencoder of films: to it they are films of one frame.
    fn is_still(&self, tensor: &Tensor) -> bool {
        tensor.rank() == 4 && self.vae.has_frames()
    }

    fn take(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.to_device(&self.device)?.to_dtype(DType::F32)?)
    }
}

impl LatentCodec for VaeCodec {
    fn encode(&self, pixels: &Tensor) -> Result<Tensor> {
        let still = self.is_still(pixels);
        let taken = self.take(pixels)?;
        let mean = self.vae.encode(&if still { taken.unsqueeze(2)? } else { taken })?.mean;
        let latents = self.vae.normalise(&mean)?;
        Ok(if still { latents.squeeze(2)? } else { latents }.to_device(pixels.device())?)
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let still = self.is_still(latents);
        let taken = self.take(latents)?;
        let raw = self.vae.denormalise(&if still { taken.unsqueeze(2)? } else { taken })?;
        let pixels = self.vae.decode(&raw)?;
        Ok(if still { pixels.narrow(2, 0, 1)?.squeeze(2)? } else { pixels }.to_device(latents.device())?)
    }

    fn latent_dims(&self, pixels: &[usize]) -> Vec<usize> {
        match pixels {
            [channels, height, width] if self.vae.has_frames() => {
                let mut dims = self.vae.latent_dims(&[*channels, 1, *height, *width]);
                dims.remove(1);
                dims
            }
            _ => self.vae.latent_dims(pixels),
        }
    }
}

/// A pipeline's autoencoder of sound, and the spectrogram in front of it: latents as its transformer hears them, of what is most likely.
#[derive(Debug)]
pub struct SoundCodec {
    vae: Box<dyn Autoencoder>,
    mel: MelSpectrogram,
    device: Device,
}

/// The part that encodes sound.
const AUDIO_VAE: &str = "audio_vae";

/// The spectrogram in front of an autoencoder of this configuration.
fn spectrogram(config: &Value) -> MelSpectrogram {
    let usual = MelSpectrogram::default();
    let number = |key: &str, usual: usize| config[key].as_u64().map_or(usual, |number| number as usize);
    MelSpectrogram {
        sample_rate: number("sample_rate", usual.sample_rate),
        hop_length: number("mel_hop_length", usual.hop_length),
        n_mels: number("mel_bins", usual.n_mels),
        ..usual
    }
}

impl SoundCodec {
    /// Loads the part `audio_vae` onto a device.
    ///
    /// # Errors
    /// When it is missing or broken, or no autoencoder of sound.
    pub fn load(pipeline: &PipelineFolder, device: &Device) -> Result<Self> {
        let vae = vae::load(&pipeline.part(AUDIO_VAE)?, Some(DType::F32), device)?;
        Ok(Self { mel: spectrogram(&vae.config()), vae, device: device.clone() })
    }

    /// How sound has to be given, which is known without the weights.
    ///
    /// # Errors
    /// When the configuration is missing or broken.
    pub fn format(pipeline: &PipelineFolder) -> Result<SoundFormat> {
        let path = pipeline.part(AUDIO_VAE)?;
        let config = vae::load_config(&path)?;
        let (mel, channels) = (spectrogram(&config), config["in_channels"].as_u64().unwrap_or(0) as usize);
        if mel.sample_rate == 0 || mel.hop_length == 0 || mel.n_mels == 0 || !(1..=2).contains(&channels) {
            let what = "expected an autoencoder of sound: in_channels 1 or 2, and sample_rate, mel_hop_length and mel_bins above 0";
            return Err(Error::Open { name: path.display().to_string(), what: what.into() });
        }
        Ok(SoundFormat { channels, sampling_rate: mel.sample_rate })
    }

    /// Latents `[C, L, M]` of sound `[channels, samples]`, on its device.
    ///
    /// # Errors
    /// When it is too short, or has other channels.
    pub fn encode(&self, sound: &Tensor) -> Result<Tensor> {
        let log_mel = self.mel.log_mel(&sound.to_device(&self.device)?)?;
        let latents = self.vae.normalise(&self.vae.encode(&log_mel)?.mean)?;
        Ok(latents.squeeze(0)?.to_device(sound.device())?)
    }
}

/// A pipeline's text encoders, for a few prompts: they are loaded when a prompt comes that was not encoded before, and let go
/// then, since a transformer trains beside them. Embeddings of a dropped caption are zero.
pub struct PipelineText {
    pipeline: PipelineFolder,
    /// Of one prompt each, on the host.
    known: Mutex<BTreeMap<String, TextEmbeddings>>,
}

impl PipelineText {
    /// Loads nothing yet.
    pub fn new(pipeline: PipelineFolder) -> Self {
        Self { pipeline, known: Mutex::default() }
    }
}

impl TextEncoder for PipelineText {
    fn encode(&self, captions: &[Option<&str>], device: &Device) -> Result<TextEmbeddings> {
        /// Prompts that are encoded at once.
        const AT_ONCE: usize = 8;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        // The empty prompt tells the sizes of a dropped one.
        let wanted = captions.iter().map(|caption| caption.unwrap_or_default());
        let mut missing: Vec<&str> = wanted.clone().filter(|caption| !known.contains_key(*caption)).collect();
        missing.sort_unstable();
        missing.dedup();
        if !missing.is_empty() {
            let encoder = self.pipeline.prompts(device)?;
            for prompts in missing.chunks(AT_ONCE) {
                for (prompt, tensors) in prompts.iter().zip(encoder.encode(prompts, None)?) {
                    let mut one = TextEmbeddings::default();
                    for (name, tensor) in tensors {
                        one = one.with(name, tensor.to_device(&Device::cpu())?.contiguous()?);
                    }
                    known.insert((*prompt).to_owned(), one);
                }
            }
        }
        let mut all = TextEmbeddings::default();
        let names = known.values().next().into_iter().flat_map(|one| one.tensors.keys().cloned());
        for name in names.collect::<Vec<String>>() {
            let row = |(caption, prompt): (&Option<&str>, &str)| -> Result<Tensor> {
                let one = known.get(prompt).and_then(|one| one.tensors.get(&name));
                let one = one.ok_or_else(|| Error::batch("prompt", "one that was encoded", prompt))?;
                Ok(match caption {
                    Some(_) => one.clone(),
                    None => Tensor::zeros(one.dims(), one.dtype(), one.device())?,
                })
            };
            let rows = captions.iter().zip(wanted.clone()).map(row).collect::<Result<Vec<Tensor>>>()?;
            let rows = padded(rows)?;
            let rows: Vec<&Tensor> = rows.iter().collect();
            all = all.with(&name, Tensor::stack(&rows, 0)?.to_device(device)?);
        }
        Ok(all)
    }
}
