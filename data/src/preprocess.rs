//! From a folder of pictures or films with captions to a cache of latents and embeddings.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;

use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::DataType;
use flowtape_models::pipeline::{
    Asked, ConditionImage, Pictures, PipelineFolder, PromptEncoder, given_frames, reference_latents,
};
use flowtape_models::vae::TileSizes;
use flowtape_models::{Condition, ModelKind};
use serde_json::Value;

use crate::cache::{CacheHeader, CacheWriter};
use crate::encode::{SoundCodec, VaeCodec};
use crate::media::{
    ConditionProcessor, Interpolation, Picture, PictureItem, ReadOptions, SoundFormat, is_film, read_film,
    read_film_at, read_picture, read_sound, resize_and_crop, resize_and_crop_frame, sound_beside,
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
    /// Frames of films, evenly from the first to the last, or, where the pipeline makes films with sound, as many a second as those have,
    /// from the first on; pictures where there are none.
    pub frames: Option<usize>,
    /// Whether the last frame of a film is given to the model beside the first, where the pipeline makes films of given frames.
    pub last_frame: bool,
    /// Whether films that are not read here, and the sound of films, go through an `ffmpeg` of this machine.
    pub ffmpeg: bool,
    /// Whether a film without sound is a silent one, where the pipeline makes films with sound; else it is an error.
    pub silence: bool,
    /// How much of a picture or film the autoencoder takes at once, where memory is to be bounded: latents are near those of the whole.
    pub tiles: TileSizes,
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
    /// `[channels, samples]`, where the model is trained on sound.
    sound: Option<Tensor>,
}

impl Preprocess {
    /// Pictures of the usual sizes, each encoded whole, with one thread that reads.
    pub fn new(pipeline: PipelineFolder) -> Self {
        Self {
            pipeline,
            pictures: PictureOptions::default(),
            frames: None,
            last_frame: false,
            ffmpeg: false,
            silence: false,
            tiles: TileSizes::default(),
            workers: 1,
        }
    }

    /// What the cache's header says of samples that are encoded so.
    ///
    /// # Errors
    /// When a part of the pipeline is missing or can't be read, or it does not make what is asked for.
    pub fn header(&self) -> Result<CacheHeader> {
        // Everything that changes what is made of a file.
        let given = self.given()?;
        let films = self.frames.map(|frames| format!(" {frames} frames")).unwrap_or_default();
        let last = if self.last_frame { " last frame" } else { "" };
        let sound = given.sound.map(|sound| format!(" {} a second with sound", sound.fps)).unwrap_or_default();
        let beside = given.processor.map(|processor| format!(" {processor:?}")).unwrap_or_default();
        let whole = self.tiles == TileSizes::default();
        let tiles = if whole { String::new() } else { format!(" {:?}", self.tiles) };
        let settings = format!("{:?} mean bf16{films}{last}{sound}{beside}{tiles}", self.pictures);
        let weights = encoders_of(&self.pipeline)?;
        let header = CacheHeader::new(self.pipeline.class(), weights.and(settings.as_bytes()));
        Ok(CacheHeader { weights: Some(weights), ..header })
    }

    /// Encodes what a cache does not have yet. A picture that can't be read is left out and told. Where it is asked to stop, the
    /// rest is left for another time.
    ///
    /// # Errors
    /// When the pipeline can't be loaded, the cache holds samples that were encoded otherwise or can't be written, or no thread can be
    /// started.
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
                let thread = std::thread::Builder::new().name("preprocess".into());
                let work = move || {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(item) = items.get(index).filter(|_| !stop.load(Ordering::Relaxed)) else { return };
                        let prepared = self.prepare(item, buckets, given, |key| known.contains(&key));
                        if send.send((index, prepared)).is_err() {
                            return;
                        }
                    }
                };
                thread.spawn_scoped(scope, work).map_err(Error::Thread)?;
            }
            drop(send);
            // Loaded when the first picture needs them.
            let mut encoders: Option<Encoders> = None;
            let mut waiting: BTreeMap<Resolution, Vec<(usize, Pixels)>> = BTreeMap::new();
            let mut encode =
                |group: Vec<(usize, Pixels)>, size: Resolution, keys: &[Option<Fingerprint>]| -> Result<usize> {
                    if encoders.is_none() {
                        encoders = Some(self.encoders(&given, device)?);
                    }
                    let Some(encoders) = &encoders else { return Ok(0) };
                    let captions: Vec<&str> = group.iter().map(|(index, _)| &*items[*index].caption).collect();
                    let pixels: Vec<&Tensor> = group.iter().map(|(_, sample)| &sample.pixels).collect();
                    // Those with pictures are alone.
                    let images = group.first().map_or(&[][..], |(_, sample)| &sample.images);
                    let sound = group.first().and_then(|(_, sample)| sample.sound.as_ref());
                    let pixels = Tensor::stack(&pixels, 0)?.to_device(device)?;
                    for ((index, _), sample) in group.iter().zip(encoders.encode(&pixels, &captions, images, sound)?) {
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

    /// Loads what encodes.
    fn encoders(&self, given: &Given, device: &Device) -> Result<Encoders> {
        let codec = VaeCodec::load(&self.pipeline, device)?.with_tiles(self.tiles)?;
        let sound = given.sound.as_ref().map(|_| SoundCodec::load(&self.pipeline, device)).transpose()?;
        Ok(Encoders { codec, prompts: self.pipeline.prompts(device)?, pictures: given.pictures, sound })
    }

    /// What the pipeline's model is given beside a sample.
    fn given(&self) -> Result<Given> {
        let kind = self.pipeline.kind()?;
        let asked = Asked { folder: &self.pipeline, config: &Value::Null, guidance_scale: 1.0, images: 1 };
        let model = ModelKind::of_adapter((kind.generation.adapter)(&asked))?;
        let refused = |why: &str| {
            let what = format!("{} makes {why}", self.pipeline.class());
            Err(Error::Open { name: self.pipeline.path().display().to_string(), what })
        };
        if self.frames.is_some() && model.capabilities.data == DataType::Image {
            return refused("pictures, not films: leave --frames out");
        }
        if self.last_frame && !model.takes(Condition::GivenFrames) {
            return refused("no films between two frames: leave --last-frame out");
        }
        let pictures = kind.pictures.filter(|pictures| model.takes(pictures.condition()));
        let processor = pictures.map(|_| ConditionProcessor::load(&self.pipeline)).transpose()?;
        let processor = processor.map(|processor| processor.with_most_pixels(self.pictures.max_pixels));
        Ok(Given { pictures, processor, sound: self.sound()? })
    }

    /// What sound a model of the pipeline is trained on, where it is.
    fn sound(&self) -> Result<Option<Sound>> {
        let kind = self.pipeline.kind()?;
        let asked = Asked { folder: &self.pipeline, config: &Value::Null, guidance_scale: 1.0, images: 0 };
        if !ModelKind::of_adapter((kind.generation.adapter)(&asked))?.takes(Condition::Audio) {
            return Ok(None);
        }
        let fps = kind.generation.fps;
        let Some(frames) = self.frames else {
            let what =
                format!("{} makes films with sound: say how many --frames are taken of each", self.pipeline.class());
            return Err(Error::Open { name: self.pipeline.path().display().to_string(), what });
        };
        Ok(Some(Sound { fps, seconds: frames as f64 / fps, format: SoundCodec::format(&self.pipeline)? }))
    }

    /// Pixels `[3, H, W]` of a picture or `[3, F, H, W]` of a film in its bucket, and the bucket.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn pixels(&self, item: &PictureItem, buckets: &Buckets) -> Result<(Resolution, Tensor)> {
        let (size, frames) = self.fitted(item, buckets, self.sound()?.map(|sound| sound.fps))?;
        Ok((size, self.film(&frames)?))
    }

    /// The frames of a film, or a picture, in its bucket.
    fn fitted(&self, item: &PictureItem, buckets: &Buckets, fps: Option<f64>) -> Result<(Resolution, Vec<Picture>)> {
        let read = &self.pictures.read;
        let frames = match self.frames {
            Some(frames) => match fps {
                Some(fps) => read_film_at(&item.path, frames, fps, read, self.ffmpeg)?,
                None => read_film(&item.path, frames, read, self.ffmpeg)?,
            },
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
        if given.sound.is_some() {
            key = match sound_beside(&item.path) {
                Some(sound) => key.and(&content(&sound)?.bits().to_le_bytes()),
                None if self.ffmpeg => key.and(b"its own sound"),
                None => key.and(b"silence"),
            };
        }
        if known(key) {
            return Ok(Prepared { key, sample: None });
        }
        let sound = given.sound.as_ref().map(|sound| self.heard(item, sound)).transpose()?;
        let (size, frames) = self.fitted(item, buckets, given.sound.as_ref().map(|sound| sound.fps))?;
        let images = match &given.processor {
            None => Vec::new(),
            Some(processor) => {
                let last = frames.last().filter(|_| self.last_frame);
                let pictures: Vec<Picture> = match given.references() {
                    false => frames.first().into_iter().chain(last).cloned().collect(),
                    true => {
                        references.iter().map(|path| read_picture(path, &self.pictures.read)).collect::<Result<_>>()?
                    }
                };
                processor.process_all(&pictures, Some([size.height, size.width]), &Device::cpu())?
            }
        };
        Ok(Prepared { key, sample: Some(Pixels { size, pixels: self.film(&frames)?, images, sound }) })
    }

    /// The sound of a film.
    fn heard(&self, item: &PictureItem, sound: &Sound) -> Result<Tensor> {
        if let Some(heard) = read_sound(&item.path, sound.seconds, sound.format, self.ffmpeg)? {
            return Ok(heard);
        }
        if !self.silence {
            let what = "no sound: put a WAV of its name beside it, ask for --ffmpeg, which takes a film's own, or for --silence";
            return Err(Error::Sample { sample: item.path.display().to_string(), source: what.into() });
        }
        let samples = (sound.seconds * sound.format.sampling_rate as f64).round_ties_even() as usize;
        Ok(Tensor::zeros(&[sound.format.channels, samples], DType::F32, &Device::cpu())?)
    }
}

/// What a model is given beside a sample.
struct Given {
    /// None where it is given nothing.
    pictures: Option<Pictures>,
    /// Makes them ready.
    processor: Option<ConditionProcessor>,
    sound: Option<Sound>,
}

/// Sound that a model is trained on, from a film's beginning on.
struct Sound {
    /// Frames of films in a second.
    fps: f64,
    seconds: f64,
    format: SoundFormat,
}

impl Given {
    /// Whether those are the sample's reference images, and not frames of the sample itself.
    fn references(&self) -> bool {
        self.pictures.is_some_and(|pictures| pictures.condition() == Condition::ReferenceImages)
    }
}

/// Of the files of a pipeline that encode.
///
/// # Errors
/// When a part of the pipeline is missing or can't be read.
pub fn encoders_of(pipeline: &PipelineFolder) -> Result<Fingerprint> {
    let mut fingerprint = Fingerprint::of(pipeline.class().as_bytes());
    let kind = pipeline.kind()?;
    let optional = ["image_encoder", "audio_vae"].into_iter().filter(|part| pipeline.has(part));
    for part in kind.prompt_parts.iter().copied().chain(["vae"]).chain(optional) {
        fingerprint = fingerprint.and(part.as_bytes()).and_folder(&pipeline.part(part)?)?;
    }
    Ok(fingerprint)
}

/// What makes latents and embeddings.
struct Encoders {
    codec: VaeCodec,
    prompts: Box<dyn PromptEncoder>,
    /// What pictures beside a sample are.
    pictures: Option<Pictures>,
    sound: Option<SoundCodec>,
}

impl Encoders {
    /// A sample for each picture of pixels `[B, 3, H, W]` and its caption, on the host. Pictures and sound beside them are those of all.
    fn encode(
        &self,
        pixels: &Tensor,
        captions: &[&str],
        images: &[ConditionImage],
        sound: Option<&Tensor>,
    ) -> Result<Vec<Sample>> {
        let latents = self.codec.encode(pixels)?;
        let seen: Vec<ConditionImage> = images.iter().filter(|image| image.seen.is_some()).cloned().collect();
        let texts = self.prompts.encode_with_images(captions, &seen, None)?;
        let host = Device::cpu();
        let mut given = self.given(images, pixels)?;
        if let Some((codec, sound)) = self.sound.as_ref().zip(sound) {
            given.insert("audio_latents".into(), codec.encode(sound)?.contiguous()?);
        }
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
        // The latents of a first frame are the film's own.
        if images.is_empty() || self.pictures == Some(Pictures::FirstFrame) {
            return Ok(BTreeMap::new());
        }
        if self.pictures == Some(Pictures::Frames) {
            let frames = if pixels.rank() > 4 { pixels.dim(2)? } else { 1 };
            let latents = own(given_frames(vae, images, frames, device)?)?;
            return Ok(BTreeMap::from([("condition_latents".to_owned(), latents)]));
        }
        let named = |(i, latents): (usize, Tensor)| Ok((format!("context_latents.{i}"), own(latents)?));
        reference_latents(vae, images, device)?.into_iter().enumerate().map(named).collect()
    }
}
