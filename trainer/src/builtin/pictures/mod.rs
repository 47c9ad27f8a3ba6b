//! Pictures in a folder with captions, encoded by a diffusers pipeline.

mod report;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use flowtape_data::media::{FolderOptions, MissingCaptions, PictureItem, ReadOptions, list_pictures};
use flowtape_data::preprocess::{PictureOptions, Preprocess, Preprocessed, Progress, encoders_of};
use flowtape_data::{
    Buckets, CacheHeader, CacheSource, Chain, NemoCache, PipelineText, PixelCodec, Source, TextEmbeddings, TextEncoder,
    VaeCodec,
};
use flowtape_engine::Device;
use flowtape_engine::files::exists;
use flowtape_models::pipeline::PipelineFolder;
use flowtape_models::vae::TileSizes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::Data;
use crate::error::with_reasons;
use crate::hooks::Preview;
use crate::{Recipe, Result};

pub use report::{Nearest, PictureReport};

/// Columns of a grid.
const COLUMNS: usize = 6;
/// Captions of a grid where the recipe names none.
const SHOWN: usize = 24;
/// The seed of grids: the same in every run, so that pictures can be compared.
const GRID_SEED: u64 = 1;

/// Which pictures, and what encodes them.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FolderConfig {
    /// The folder, with captions in `metadata.jsonl` or in files beside the pictures.
    pub path: PathBuf,
    /// The folders below it that are used, and single pictures; all of them if none is named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<PathBuf>,
    /// A diffusers pipeline, whose autoencoder and text encoders make latents and embeddings.
    pub pipeline: PathBuf,
    /// Where those are kept.
    pub cache_dir: PathBuf,
    /// The most pixels of a picture: those of other sizes are brought to the buckets of this budget.
    #[serde(default = "max_pixels")]
    #[schemars(range(min = 1, max = 268_435_456))]
    pub max_pixels: usize,
    /// The step between sides of buckets.
    #[serde(default = "quantization")]
    #[schemars(range(min = 1, max = 4096))]
    pub quantization: usize,
    /// Frames of films (MP4 with H.264, animated GIF, PNG or WebP, folders of pictures), evenly from the first to the last, or from the
    /// first on at 24 a second with their sound, where the pipeline makes that; pictures if none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_384))]
    pub frames: Option<usize>,
    /// Whether the last frame of a film is given to the model beside the first: for Wan's image-to-video.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub last_frame: bool,
    /// Whether films of other kinds, and the sound of films, go through an `ffmpeg` of this machine.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ffmpeg: bool,
    /// Whether a film without sound is a silent one, where the model is trained on sound; else it is an error.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub silence: bool,
    /// Sides in pixels of tiles in which pictures are encoded, so that memory is bounded; the whole picture if none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_384))]
    pub tile: Option<usize>,
    /// Frames of parts in which films are encoded where they do not pass one after the other anyway (LTX-2: multiples of 16), so that memory
    /// is bounded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_384))]
    pub tile_frames: Option<usize>,
    /// What stands for a caption that is missing: an error, an empty one, or the file's name.
    #[serde(default, skip_serializing_if = "is_default")]
    pub missing_captions: MissingCaptions,
    /// Red, green and blue of what shows through where a picture is transparent; white.
    #[serde(default = "white")]
    pub background: [u8; 3],
}

fn is_default(missing: &MissingCaptions) -> bool {
    *missing == MissingCaptions::default()
}

fn max_pixels() -> usize {
    Buckets::MAX_PIXELS
}

fn white() -> [u8; 3] {
    [255; 3]
}

fn quantization() -> usize {
    Buckets::QUANTIZATION
}

impl FolderConfig {
    /// The pictures and their captions, in the order of their paths.
    ///
    /// # Errors
    /// When a folder can't be read, or captions are missing.
    pub fn items(&self) -> Result<Vec<PictureItem>> {
        let options = FolderOptions { missing_captions: self.missing_captions, ..FolderOptions::default() };
        if self.include.is_empty() {
            return Ok(list_pictures(&self.path, &options)?);
        }
        let mut items = Vec::new();
        for part in self.include.iter().map(|part| self.path.join(part)) {
            let folder = if part.is_file() { part.parent().unwrap_or(&part) } else { &part };
            let found = list_pictures(folder, &options)?;
            items.extend(found.into_iter().filter(|item| *folder == *part || item.path == part));
        }
        Ok(items)
    }

    fn preprocess(&self, workers: usize) -> Result<Preprocess> {
        let read = ReadOptions { background: Some(self.background), ..ReadOptions::default() };
        let pictures = PictureOptions { quantization: self.quantization, max_pixels: self.max_pixels, read };
        let pipeline = PipelineFolder::open(&self.pipeline)?;
        let (frames, last_frame, ffmpeg, silence) = (self.frames, self.last_frame, self.ffmpeg, self.silence);
        let tiles = TileSizes { side: self.tile, frames: self.tile_frames };
        Ok(Preprocess { pipeline, pictures, frames, last_frame, ffmpeg, silence, tiles, workers })
    }

    /// Encodes what the cache does not have yet.
    ///
    /// # Errors
    /// When pictures can't be read, or the cache can't be written. The error is the first picture's; of the others a line each is logged.
    pub fn prepare(
        &self,
        workers: usize,
        device: &Device,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Preprocessed> {
        let mut done = self.preprocess(workers)?.run(&self.items()?, &self.cache_dir, device, stop, progress)?;
        let mut failed = done.failed.drain(..);
        let Some(first) = failed.next() else {
            drop(failed);
            return Ok(done);
        };
        failed.for_each(|error| tracing::error!("{}", with_reasons(&error)));
        Err(first.into())
    }

    /// What is trained on: the samples of the cache that are in the folder now, all of them encoded.
    pub(super) fn data(&self, workers: usize, device: &Device) -> Result<Data> {
        let done = self.prepare(workers, device, &AtomicBool::new(false), &mut |_| {})?;
        let source = CacheSource::open(&self.cache_dir)?.select(&done.keys)?;
        let pipeline = PipelineFolder::open(&self.pipeline)?;
        let codec = VaeCodec::load(&pipeline, device)?;
        Ok(Data { source: Arc::new(source), codec: Arc::new(codec), text: Arc::new(PipelineText::new(pipeline)) })
    }

    /// Grids of the recipe's prompts, or of some captions.
    pub(super) fn preview(&self, recipe: &Recipe) -> Result<Preview> {
        let mut prompts = recipe.sampling.prompts.clone();
        if prompts.is_empty() {
            let items = self.items()?;
            let every = items.len().div_ceil(SHOWN).max(1);
            prompts = items.iter().step_by(every).map(|item| item.caption.clone()).collect();
        }
        Ok(preview_of(recipe, prompts))
    }
}

/// Grids of these prompts.
pub(super) fn preview_of(recipe: &Recipe, prompts: Vec<String>) -> Preview {
    let every = recipe.sampling.every_steps;
    let named = recipe.data.folder.as_ref().map(|folder| &folder.pipeline).or(recipe.data.pipeline.as_ref());
    // Of two transformers, which take turns by the noise level, a run trains one.
    let of_one = |path: &&PathBuf| PipelineFolder::open(path).is_ok_and(|p| p.number("boundary_ratio").is_none());
    let pipeline = named.filter(|_| recipe.sampling.pipeline).filter(of_one).cloned();
    Preview { every, prompts, columns: COLUMNS, first_frames: None, seed: GRID_SEED, pipeline, opened: None }
}

/// Samples that were encoded before, by `flowtape preprocess` or by NeMo, and how often an epoch has those of each folder. Grids
/// need the pipeline that they were made with.
pub(crate) fn cached(caches: &[(&Path, usize)], pipeline: Option<&Path>, device: &Device) -> Result<Data> {
    let pipeline = pipeline.map(PipelineFolder::open).transpose()?;
    let mut parts: Vec<(Arc<dyn Source>, usize)> = Vec::new();
    let mut first: Option<CacheHeader> = None;
    for (cache, repeats) in caches {
        if exists(&cache.join("metadata.json"))? {
            parts.push((Arc::new(NemoCache::open(cache)?), *repeats));
            continue;
        }
        let source = CacheSource::open(cache)?;
        if let Some(pipeline) = &pipeline {
            source.encoder().check_weights(cache, encoders_of(pipeline)?)?;
        }
        first.get_or_insert_with(|| source.encoder().clone()).check(cache, source.encoder())?;
        parts.push((Arc::new(source), *repeats));
    }
    let source = match &parts[..] {
        [(only, 1)] => only.clone(),
        _ => Arc::new(Chain::new(parts)),
    };
    let Some(pipeline) = pipeline else {
        return Ok(Data { source, codec: Arc::new(PixelCodec), text: Arc::new(NoText) });
    };
    let codec = Arc::new(VaeCodec::load(&pipeline, device)?);
    Ok(Data { source, codec, text: Arc::new(PipelineText::new(pipeline)) })
}

/// Stands where there is no text encoder.
struct NoText;

impl TextEncoder for NoText {
    fn encode(&self, captions: &[Option<&str>], _: &Device) -> flowtape_data::Result<TextEmbeddings> {
        let what = "a cache has no text encoder: name the pipeline that it was made with in data.pipeline".into();
        Err(flowtape_data::Error::Caption {
            caption: captions.iter().flatten().next().unwrap_or(&"").to_string(),
            what,
        })
    }
}
