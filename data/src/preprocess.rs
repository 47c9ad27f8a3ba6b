//! From a folder of pictures or films with captions to a cache of latents and embeddings.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;

use flowtape_engine::{DType, Device, Tensor};
use flowtape_models::pipeline::{
    Asked, ConditionImage, PipelineFolder, PromptEncoder, given_frames, reference_latents,
};
use flowtape_models::{Condition, ModelKind};
use serde_json::Value;

use crate::cache::{CacheHeader, CacheWriter};
use crate::encode::VaeCodec;
use crate::media::{
    ConditionProcessor, Interpolation, Picture, PictureItem, ReadOptions, is_film, read_film, read_picture,
    resize_and_crop, resize_and_crop_frame,
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
    /// Whether the last frame of a film is given to the model beside the first, where the pipeline makes films of given frames.
    pub last_frame: bool,
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
    sample: Option<Pixels>,
}

/// A picture or film in its bucket, and what its model is given beside it.
struct Pixels {
    size: Resolution,
    pixels: Tensor,
    /// Reference images, or given frames.
    images: Vec<ConditionImage>,
}

impl Preprocess {
    /// What the cache's header says of samples that are encoded so.
    ///
    /// # Errors
    /// When a part of the pipeline is missing or can't be read.
    pub fn header(&self) -> Result<CacheHeader> {
        // Everything that changes what is made of a file.
        let films = self.frames.map(|frames| format!(" {frames} frames")).unwrap_or_default();
        let last = if self.last_frame { " last frame" } else { "" };
        let settings = format!("{:?} mean bf16{films}{last}", self.pictures);
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
        let given = self.given()?;
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
                let (send, next, known, buckets, given) = (send.clone(), &next, &known, &buckets, &given);
                scope.spawn(move || {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(item) = items.get(index).filter(|_| !stop.load(Ordering::Relaxed)) else { return };
                        let prepared = self.prepare(item, buckets, given, |key| known.contains(&key));
                        if send.send((index, prepared)).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(send);
            // Loaded when the first picture needs them.
            let mut encoders: Option<Encoders> = None;
            let mut waiting: BTreeMap<Resolution, Vec<(usize, Pixels)>> = BTreeMap::new();
            let mut encode =
                |group: Vec<(usize, Pixels)>, size: Resolution, keys: &[Option<Fingerprint>]| -> Result<usize> {
                    if encoders.is_none() {
                        encoders = Some(Encoders::load(&self.pipeline, given.frames, device)?);
                    }
                    let Some(encoders) = &encoders else { return Ok(0) };
                    let captions: Vec<&str> = group.iter().map(|(index, _)| &*items[*index].caption).collect();
                    let pixels: Vec<&Tensor> = group.iter().map(|(_, sample)| &sample.pixels).collect();
                    // Those with pictures are alone.
                    let images = group.first().map_or(&[][..], |(_, sample)| &sample.images);
                    let pixels = Tensor::stack(&pixels, 0)?.to_device(device)?;
                    for ((index, _), sample) in group.iter().zip(encoders.encode(&pixels, &captions, images)?) {
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
                let Some(sample) = prepared.sample else {
                    at.done += 1;
                    progress(at);
                    continue;
                };
                let size = sample.size;
                // A film is as large as many pictures.
                let group = if self.frames.is_some() || !sample.images.is_empty() {
                    vec![(index, sample)]
                } else {
                    let group = waiting.entry(size).or_default();
                    group.push((index, sample));
                    if group.len() < AT_ONCE {
                        continue;
                    }
                    std::mem::take(group)
                };
                let done = encode(group, size, &keys)?;
                result.encoded += done;
                at.done += done;
                progress(at);
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

    /// What the pipeline's model is given beside a sample.
    fn given(&self) -> Result<Given> {
        let kind = self.pipeline.kind()?;
        let asked = Asked { folder: &self.pipeline, config: &Value::Null, guidance_scale: 1.0, images: 1 };
        let model = ModelKind::of_adapter((kind.generation.adapter)(&asked))?;
        let frames = model.takes(Condition::GivenFrames);
        if self.last_frame && !frames {
            let what = format!("{} makes no films between two frames: leave --last-frame out", self.pipeline.class());
            return Err(Error::Open { name: self.pipeline.path().display().to_string(), what });
        }
        let wanted = kind.pictures.is_some() && (frames || model.takes(Condition::ReferenceImages));
        let processor = wanted.then(|| ConditionProcessor::load(&self.pipeline)).transpose()?;
        let processor = processor.map(|processor| processor.with_most_pixels(self.pictures.max_pixels));
        Ok(Given { frames, processor })
    }

    /// Pixels `[3, H, W]` of a picture or `[3, F, H, W]` of a film in its bucket, and the bucket.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn pixels(&self, item: &PictureItem, buckets: &Buckets) -> Result<(Resolution, Tensor)> {
        let (size, frames) = self.fitted(item, buckets)?;
        Ok((size, self.film(&frames)?))
    }

    /// The frames of a film, or a picture, in its bucket.
    fn fitted(&self, item: &PictureItem, buckets: &Buckets) -> Result<(Resolution, Vec<Picture>)> {
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
            cropped.picture
        };
        Ok((bucket, frames.iter().map(fitted).collect()))
    }

    fn film(&self, frames: &[Picture]) -> Result<Tensor> {
        let pixels = frames.iter().map(|frame| frame.pixels(&Device::cpu())).collect::<Result<Vec<Tensor>>>()?;
        Ok(match self.frames {
            Some(_) => Tensor::stack(&pixels.iter().collect::<Vec<_>>(), 1)?,
            None => pixels[0].clone(),
        })
    }

    /// Reads a picture and brings it to its bucket, unless it is known.
    fn prepare(
        &self,
        item: &PictureItem,
        buckets: &Buckets,
        given: &Given,
        known: impl Fn(Fingerprint) -> bool,
    ) -> Result<Prepared> {
        let content = |path: &Path| match path.is_dir() {
            true => Ok(Fingerprint::of(b"").and_folder(path)?),
            false => std::fs::read(path)
                .map(|bytes| Fingerprint::of(&bytes))
                .map_err(|e| Error::Sample { sample: path.display().to_string(), source: e.into() }),
        };
        let mut key = content(&item.path)?.and(&[0]).and(item.caption.as_bytes());
        let references = if given.references() { &item.references[..] } else { &[] };
        for reference in references {
            key = key.and(&content(reference)?.bits().to_le_bytes());
        }
        if known(key) {
            return Ok(Prepared { key, sample: None });
        }
        let (size, frames) = self.fitted(item, buckets)?;
        let images = match &given.processor {
            None => Vec::new(),
            Some(processor) => {
                let last = frames.last().filter(|_| self.last_frame);
                let pictures: Vec<Picture> = match given.frames {
                    true => frames.first().into_iter().chain(last).cloned().collect(),
                    false => {
                        references.iter().map(|path| read_picture(path, &self.pictures.read)).collect::<Result<_>>()?
                    }
                };
                processor.process_all(&pictures, Some([size.height, size.width]), &Device::cpu())?
            }
        };
        Ok(Prepared { key, sample: Some(Pixels { size, pixels: self.film(&frames)?, images }) })
    }
}

/// What a model is given beside a sample.
struct Given {
    /// Whether those are frames of the sample itself; else they are its reference images.
    frames: bool,
    /// None where it is given nothing.
    processor: Option<ConditionProcessor>,
}

impl Given {
    fn references(&self) -> bool {
        self.processor.is_some() && !self.frames
    }
}

/// Of the files of a pipeline that encode.
///
/// # Errors
/// When a part of the pipeline is missing or can't be read.
pub fn encoders_of(pipeline: &PipelineFolder) -> Result<Fingerprint> {
    let mut fingerprint = Fingerprint::of(pipeline.class().as_bytes());
    let kind = pipeline.kind()?;
    let optional = ["image_encoder"].into_iter().filter(|part| pipeline.has(part));
    for part in kind.prompt_parts.iter().copied().chain(["vae"]).chain(optional) {
        fingerprint = fingerprint.and(part.as_bytes()).and_folder(&pipeline.part(part)?)?;
    }
    Ok(fingerprint)
}

/// What makes latents and embeddings.
struct Encoders {
    codec: VaeCodec,
    prompts: Box<dyn PromptEncoder>,
    /// Whether pictures beside a sample are frames of it.
    frames: bool,
}

impl Encoders {
    fn load(pipeline: &PipelineFolder, frames: bool, device: &Device) -> Result<Self> {
        let codec = VaeCodec::load(pipeline, device)?;
        Ok(Self { codec, prompts: pipeline.prompts(device)?, frames })
    }

    /// A sample for each picture of pixels `[B, 3, H, W]` and its caption, on the host. Pictures beside them are those of all.
    fn encode(&self, pixels: &Tensor, captions: &[&str], images: &[ConditionImage]) -> Result<Vec<Sample>> {
        let latents = self.codec.encode(pixels)?;
        let seen: Vec<ConditionImage> = images.iter().filter(|image| image.seen.is_some()).cloned().collect();
        let texts = self.prompts.encode_with_images(captions, &seen, None)?;
        let host = Device::cpu();
        let given = self.given(images, pixels)?;
        texts
            .iter()
            .enumerate()
            .map(|(i, text)| {
                let mut embeddings = TextEmbeddings::default();
                let mut tensors = given.clone();
                for (name, tensor) in text {
                    // As NeMo stores them: half the room, and a transformer computes in no more.
                    let tensor = tensor.to_device(&host)?.to_dtype(DType::BF16)?.contiguous()?;
                    // A dropped caption takes no picture with it.
                    match *name {
                        "image_embeds" => drop(tensors.insert((*name).to_owned(), tensor)),
                        _ => embeddings = embeddings.with(name, tensor),
                    }
                }
                let latents = latents.narrow(0, i, 1)?.squeeze(0)?.to_device(&host)?.contiguous()?;
                Ok(Sample { tensors, ..Sample::new(Media::Latents(latents), Text::Embeddings(embeddings)) })
            })
            .collect()
    }

    /// Latents of the pictures beside a sample, by the names that adapters read.
    fn given(&self, images: &[ConditionImage], pixels: &Tensor) -> Result<BTreeMap<String, Tensor>> {
        let (vae, device) = (self.codec.autoencoder(), self.codec.device());
        let own =
            |latents: Tensor| -> Result<Tensor> { Ok(latents.squeeze(0)?.to_device(&Device::cpu())?.contiguous()?) };
        if images.is_empty() {
            return Ok(BTreeMap::new());
        }
        if self.frames {
            let frames = if pixels.rank() > 4 { pixels.dim(2)? } else { 1 };
            let latents = own(given_frames(vae, images, frames, device)?)?;
            return Ok(BTreeMap::from([("condition_latents".to_owned(), latents)]));
        }
        let named = |(i, latents): (usize, Tensor)| Ok((format!("context_latents.{i}"), own(latents)?));
        reference_latents(vae, images, device)?.into_iter().enumerate().map(named).collect()
    }
}
