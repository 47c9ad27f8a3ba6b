//! From a folder of pictures or films with captions to a cache of latents and embeddings.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;

use flowtape_engine::{DType, Device, Tensor};
use flowtape_models::pipeline::{PipelineFolder, PromptEncoder};

use crate::cache::{CacheHeader, CacheWriter};
use crate::encode::VaeCodec;
use crate::media::{
    Interpolation, Picture, PictureItem, ReadOptions, is_film, read_film, read_picture, resize_and_crop,
    resize_and_crop_frame,
};
use crate::{Buckets, Error, Fingerprint, LatentCodec, Media, Resolution, Result, Sample, Text, TextEmbeddings};

/// Samples of a shard of the cache.
const SHARD: usize = 256;
/// Samples that are encoded at once.
const AT_ONCE: usize = 8;

/// What pictures are made into before they are encoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PictureOptions {
    /// The step between sides of buckets.
    pub quantization: usize,
    /// The most pixels of a bucket.
    pub max_pixels: usize,
    /// How files are read: turned, blended.
    pub read: ReadOptions,
}

impl Default for PictureOptions {
    fn default() -> Self {
        Self { quantization: Buckets::QUANTIZATION, max_pixels: Buckets::MAX_PIXELS, read: ReadOptions::default() }
    }
}

/// Encodes pictures with the parts of a pipeline.
#[derive(Clone, Debug)]
pub struct Preprocess {
    /// Whose autoencoder and text encoders.
    pub pipeline: PipelineFolder,
    /// Sizes and colours.
    pub pictures: PictureOptions,
    /// Frames of films, evenly from the first to the last; pictures where there are none.
    pub frames: Option<usize>,
    /// Whether films that are not read here go through an `ffmpeg` of this machine.
    pub ffmpeg: bool,
    /// Threads that read and resize.
    pub workers: usize,
}

/// How far it has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Samples that are done: encoded now or before, or failed.
    pub done: usize,
    /// All of them.
    pub total: usize,
}

/// What became of a folder.
#[derive(Debug, Default)]
pub struct Preprocessed {
    /// What the cache calls each sample, in the order of the items; those that failed are not among them.
    pub keys: Vec<Fingerprint>,
    /// Samples that were encoded now.
    pub encoded: usize,
    /// Samples that can't be read, with the reason.
    pub failed: Vec<Error>,
}

/// A picture, ready to be encoded.
struct Prepared {
    key: Fingerprint,
    /// None where the cache has it.
    pixels: Option<(Resolution, Tensor)>,
}

impl Preprocess {
    /// What the cache's header says of samples that are encoded so.
    ///
    /// # Errors
    /// When a part of the pipeline is missing or can't be read.
    pub fn header(&self) -> Result<CacheHeader> {
        // Everything that changes what is made of a file.
        let films = self.frames.map(|frames| format!(" {frames} frames")).unwrap_or_default();
        let settings = format!("{:?} mean bf16{films}", self.pictures);
        let weights = encoders_of(&self.pipeline)?;
        let header = CacheHeader::new(self.pipeline.class(), weights.and(settings.as_bytes()));
        Ok(CacheHeader { weights: Some(weights), ..header })
    }

    /// Encodes what a cache does not have yet. A picture that can't be read is left out and told. Where it is asked to stop, the
    /// rest is left for another time.
    ///
    /// # Errors
    /// When the pipeline can't be loaded, or the cache holds samples that were encoded otherwise or can't be written.
    pub fn run(
        &self,
        items: &[PictureItem],
        cache: &Path,
        device: &Device,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Preprocessed> {
        let buckets = Buckets::new(self.pictures.quantization, self.pictures.max_pixels)?;
        // A film is as large as many pictures.
        let at_once = if self.frames.is_some() { 1 } else { AT_ONCE };
        let mut writer = CacheWriter::open(cache, &self.header()?, SHARD)?;
        let known = writer.keys();
        let mut keys: Vec<Option<Fingerprint>> = vec![None; items.len()];
        let mut result = Preprocessed::default();
        let mut at = Progress { done: 0, total: items.len() };
        progress(at);
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| -> Result<()> {
            // No more pictures wait than the workers and a batch hold.
            let (send, received) = sync_channel(AT_ONCE + self.workers);
            for _ in 0..self.workers.max(1) {
                let (send, next, known, buckets) = (send.clone(), &next, &known, &buckets);
                scope.spawn(move || {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(item) = items.get(index).filter(|_| !stop.load(Ordering::Relaxed)) else { return };
                        let prepared = self.prepare(item, buckets, |key| known.contains(&key));
                        if send.send((index, prepared)).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(send);
            // Loaded when the first picture needs them.
            let mut encoders: Option<Encoders> = None;
            let mut waiting: BTreeMap<Resolution, Vec<(usize, Tensor)>> = BTreeMap::new();
            let mut encode =
                |group: Vec<(usize, Tensor)>, size: Resolution, keys: &[Option<Fingerprint>]| -> Result<usize> {
                    if encoders.is_none() {
                        encoders = Some(Encoders::load(&self.pipeline, device)?);
                    }
                    let Some(encoders) = &encoders else { return Ok(0) };
                    let captions: Vec<&str> = group.iter().map(|(index, _)| &*items[*index].caption).collect();
                    let pixels: Vec<&Tensor> = group.iter().map(|(_, pixels)| pixels).collect();
                    let samples = encoders.encode(&Tensor::stack(&pixels, 0)?.to_device(device)?, &captions)?;
                    for ((index, _), sample) in group.iter().zip(samples) {
                        let (item, Some(key)) = (&items[*index], keys[*index]) else { continue };
                        let sizes: Vec<usize> = self.frames.into_iter().chain([size.height, size.width]).collect();
                        writer.add(key, &item.name, &item.caption, &sizes, sample)?;
                    }
                    Ok(group.len())
                };
            for (index, prepared) in received {
                let prepared = match prepared {
                    Ok(prepared) => prepared,
                    Err(error) => {
                        result.failed.push(error);
                        at.done += 1;
                        progress(at);
                        continue;
                    }
                };
                keys[index] = Some(prepared.key);
                let Some((size, pixels)) = prepared.pixels else {
                    at.done += 1;
                    progress(at);
                    continue;
                };
                let group = waiting.entry(size).or_default();
                group.push((index, pixels));
                if group.len() == at_once {
                    let done = encode(std::mem::take(group), size, &keys)?;
                    result.encoded += done;
                    at.done += done;
                    progress(at);
                }
            }
            for (size, group) in waiting.into_iter().filter(|(_, group)| !group.is_empty()) {
                let done = encode(group, size, &keys)?;
                result.encoded += done;
                at.done += done;
                progress(at);
            }
            Ok(())
        })?;
        writer.finish()?;
        result.keys = keys.into_iter().flatten().collect();
        Ok(result)
    }

    /// Pixels `[3, H, W]` of a picture or `[3, F, H, W]` of a film in its bucket, and the bucket.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn pixels(&self, item: &PictureItem, buckets: &Buckets) -> Result<(Resolution, Tensor)> {
        let read = &self.pictures.read;
        let frames = match self.frames {
            Some(frames) => read_film(&item.path, frames, read, self.ffmpeg)?,
            // Of a film its first frame.
            None if is_film(&item.path) || item.path.is_dir() => read_film(&item.path, 1, read, self.ffmpeg)?,
            None => vec![read_picture(&item.path, read)?],
        };
        let first = frames.first().ok_or_else(|| Error::batch("frames", "at least one", "none"))?;
        let bucket = buckets.resolutions[buckets.of(Resolution::new(first.width, first.height))];
        let fitted = |frame: &Picture| {
            let (width, height) = (bucket.width, bucket.height);
            let cropped = match self.frames {
                Some(_) => resize_and_crop_frame(frame, width, height, Interpolation::Linear),
                None => resize_and_crop(frame, width, height),
            };
            cropped.picture.pixels(&Device::cpu())
        };
        let fitted = frames.iter().map(fitted).collect::<Result<Vec<Tensor>>>()?;
        let pixels = match self.frames {
            Some(_) => Tensor::stack(&fitted.iter().collect::<Vec<_>>(), 1)?,
            None => fitted[0].clone(),
        };
        Ok((bucket, pixels))
    }

    /// Reads a picture and brings it to its bucket, unless it is known.
    fn prepare(&self, item: &PictureItem, buckets: &Buckets, known: impl Fn(Fingerprint) -> bool) -> Result<Prepared> {
        let unreadable =
            |e: std::io::Error| Error::Sample { sample: item.path.display().to_string(), source: e.into() };
        let content = if item.path.is_dir() {
            Fingerprint::of(b"").and_folder(&item.path)?
        } else {
            Fingerprint::of(&std::fs::read(&item.path).map_err(unreadable)?)
        };
        let key = content.and(&[0]).and(item.caption.as_bytes());
        if known(key) {
            return Ok(Prepared { key, pixels: None });
        }
        Ok(Prepared { key, pixels: Some(self.pixels(item, buckets)?) })
    }
}

/// Of the files of a pipeline that encode.
///
/// # Errors
/// When a part of the pipeline is missing or can't be read.
pub fn encoders_of(pipeline: &PipelineFolder) -> Result<Fingerprint> {
    let mut fingerprint = Fingerprint::of(pipeline.class().as_bytes());
    for part in pipeline.kind()?.prompt_parts.iter().chain(&["vae"]) {
        fingerprint = fingerprint.and(part.as_bytes()).and_folder(&pipeline.part(part)?)?;
    }
    Ok(fingerprint)
}

/// What makes latents and embeddings.
struct Encoders {
    codec: VaeCodec,
    prompts: Box<dyn PromptEncoder>,
}

impl Encoders {
    fn load(pipeline: &PipelineFolder, device: &Device) -> Result<Self> {
        let codec = VaeCodec::load(pipeline, device)?;
        Ok(Self { codec, prompts: pipeline.prompts(device)? })
    }

    /// A sample for each picture of pixels `[B, 3, H, W]` and its caption, on the host.
    fn encode(&self, pixels: &Tensor, captions: &[&str]) -> Result<Vec<Sample>> {
        let latents = self.codec.encode(pixels)?;
        let texts = self.prompts.encode(captions, None)?;
        let host = Device::cpu();
        texts
            .iter()
            .enumerate()
            .map(|(i, text)| {
                let mut embeddings = TextEmbeddings::default();
                for (name, tensor) in text {
                    // As NeMo stores them: half the room, and a transformer computes in no more.
                    embeddings = embeddings.with(name, tensor.to_device(&host)?.to_dtype(DType::BF16)?.contiguous()?);
                }
                let latents = latents.narrow(0, i, 1)?.squeeze(0)?.to_device(&host)?.contiguous()?;
                Ok(Sample::new(Media::Latents(latents), Text::Embeddings(embeddings)))
            })
            .collect()
    }
}
