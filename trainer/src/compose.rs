//! Pictures and films of a diffusers pipeline, written with what made them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use flowtape_data::media::{ConditionProcessor, Picture, ReadOptions, read_picture, write_film, write_png, write_wav};
use flowtape_engine::cpu::awake;
use flowtape_engine::{DType, Device, Tensor};
use flowtape_models::Transformer;
use flowtape_models::peft::load_any;
use flowtape_models::pipeline::{
    ConditionImage, Generated, Generator, KnownPrompts, PipelineFolder, PromptEncoder, Waveform,
};

pub use flowtape_flowmatch::solver::{SOLVERS, Solver};
pub use flowtape_models::pipeline::{MODEL_INDEX, Request, SoundGuidance};
pub use flowtape_models::vae::TileSizes;

use crate::builtin::pictures::cached;
use crate::checkpoints::Content;
use crate::generate::Samples;
use crate::picture::beside;
use crate::run::RunFolder;
use crate::state::ema_folder;
use crate::trainer::trained_model;
use crate::weights::check_used;
use crate::{Recipe, Result, generate};

/// What a pipeline or a run of one is asked for beside the request.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// What the transformer computes in.
    pub dtype: DType,
    /// Where everything runs.
    pub device: &'a Device,
    /// Folders of transformers in place of the pipeline's, by their part's name.
    pub transformers: &'a [(&'static str, PathBuf)],
    /// Adapters to fold in, each with its factor.
    pub loras: &'a [(PathBuf, f64)],
    /// Whether keys of adapters that are of no use are passed over.
    pub allow_unused: bool,
    /// Pictures to edit, or the first frame of a film, or its first and last.
    pub images: &'a [PathBuf],
    /// Tiles in which pictures, and parts in which films are decoded, where memory is to be bounded.
    pub tiles: TileSizes,
    /// Frames of a film in a second, if others than the pipeline's.
    pub fps: Option<f64>,
    /// The PNG to write; several get numbers before the ending.
    pub out: &'a Path,
}

/// Whether a folder is a pipeline's.
pub fn is_pipeline(folder: &Path) -> bool {
    folder.join(MODEL_INDEX).is_file()
}

/// The pipeline that a run's data names.
fn pipeline_of(recipe: &Recipe) -> Option<&PathBuf> {
    recipe.data.folder.as_ref().map(|folder| &folder.pipeline).or(recipe.data.pipeline.as_ref())
}

/// Whether a run's samples are made as a pipeline makes pictures, unless something else is asked for.
///
/// # Errors
/// When it is no run folder.
pub fn has_pipeline(run: &Path) -> Result<bool> {
    let (_, recipe) = RunFolder::open(run)?;
    Ok(recipe.sampling.pipeline && pipeline_of(&recipe).is_some())
}

/// Pixels of what a run was trained on, as its cache knows them: the first sample's `[3, H, W]` or `[3, F, H, W]`.
fn trained_dims(recipe: &Recipe) -> Result<Option<Vec<usize>>> {
    let data = &recipe.data;
    let cache = data.folder.as_ref().map(|folder| &folder.cache_dir).or(data.cache_dir.as_ref());
    let Some(cache) = cache.or_else(|| data.caches.first().map(|cache| &cache.path)) else { return Ok(None) };
    let dims = cached(&[(cache, 1)], None, &Device::cpu())?.sample_dims()?;
    // A cache of another program may know its latents alone.
    Ok(Some(dims).filter(|dims| dims.first() == Some(&3)))
}

/// Generates with a pipeline's folder or, with a run's checkpoint in it, a run that names a pipeline in `data`. Writes a PNG for each
/// picture and film, and a WAV for a film's sound, and gives their paths.
///
/// # Errors
/// When a part is missing or broken, what is asked for does not fit, or a file can't be written.
pub fn compose(
    named: &Path,
    request: &Request<'_>,
    options: &Options<'_>,
    on_step: &mut dyn FnMut(usize),
) -> Result<Vec<PathBuf>> {
    let fold = |model: &dyn Transformer| -> flowtape_models::Result<()> {
        for (path, factor) in options.loras {
            let (weights, unused) = load_any(path, model.params(), &model.class())?;
            check_used(path, &unused, weights.0.is_empty(), options.allow_unused)
                .map_err(|error| flowtape_models::Error::Model { model: "adapter".into(), source: Box::new(error) })?;
            weights.merge_into(model.params(), *factor)?;
        }
        Ok(())
    };
    let mut asked = request.clone();
    let mut make = |folder: &PipelineFolder, generator: Generator<'_>, request: &Request<'_>| -> Result<Generated> {
        let images = images(folder, options.images, request.size)?;
        let request = Request { images: &images, ..request.clone() };
        let made = awake(options.device, || {
            generator.with_tiles(options.tiles).on_load(&fold).generate(&request, &mut |step, _| {
                on_step(step.index + 1);
                Ok(())
            })
        });
        Ok(made?)
    };
    let (pipeline, weights, generated);
    if is_pipeline(named) {
        let folder = PipelineFolder::open(named)?;
        pipeline = named.to_owned();
        let mut generator = Generator::new(&folder, options.dtype, options.device)?;
        for (name, path) in options.transformers {
            generator = generator.with_folder(name, path.clone());
        }
        weights = hashes(&generator.transformer_folder("transformer")?)?;
        generated = make(&folder, generator, &asked)?;
    } else {
        let (run, recipe) = RunFolder::open(named)?;
        let Some(path) = pipeline_of(&recipe) else {
            let what = "expected a pipeline's folder or a run whose `data` names one: its samples have one size and no other options";
            return Err(crate::Error::Run { path: named.into(), what: what.into() });
        };
        let checkpoint = run.checkpoints().newest_whole()?;
        let checkpoint = ema_folder(&checkpoint)?.unwrap_or(checkpoint);
        let model = trained_model(&recipe, &checkpoint, options.device)?;
        let folder = PipelineFolder::open(path)?;
        pipeline = path.clone();
        weights = hashes(&checkpoint)?;
        let generator = Generator::new(&folder, recipe.dtype.into(), options.device)?.with_transformer(&*model);
        asked.steps = asked.steps.or(recipe.sampling.num_inference_steps);
        asked.guidance_scale = asked.guidance_scale.or(recipe.sampling.guidance_scale);
        // A picture that is edited has a size of its own.
        if asked.size.is_none()
            && options.images.is_empty()
            && let Some(dims) = trained_dims(&recipe)?
        {
            asked.size = dims.last_chunk().copied();
            asked.frames = asked.frames.or_else(|| (dims.len() > 3).then(|| dims[1]));
        }
        generated = make(&folder, generator, &asked)?;
    }
    let mut texts = texts(request, &generated, &pipeline);
    texts.push(("weights", weights));
    let mut paths = write(&generated.pixels, options.fps.unwrap_or(generated.fps), &texts, options.out)?;
    if let Some(sound) = &generated.audio {
        paths.extend(write_sound(sound, &paths)?);
    }
    Ok(paths)
}

/// Samples of a model in a pipeline: those that [`compose`] makes of a run's checkpoint with the same seed, size and settings of the
/// recipe. None where it was asked to stop: it looks between prompts.
pub(crate) fn samples(
    pipeline: &KnownPrompts,
    model: &dyn Transformer,
    recipe: &Recipe,
    dims: &[usize],
    asked: &generate::Request<'_>,
    stop: &AtomicBool,
) -> Result<Option<Samples>> {
    let generator = Generator::new(pipeline.folder(), recipe.dtype.into(), pipeline.device())?;
    let generator = generator.with_transformer(model).with_prompts(pipeline);
    // All at once, while the text encoders are there.
    pipeline.encode(asked.prompts, None)?;
    let mut made = Samples { pixels: Vec::new(), dims: dims.to_vec() };
    for prompt in asked.prompts {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let request = Request {
            size: dims.last_chunk().copied(),
            frames: (dims.len() > 3).then(|| dims[1]),
            steps: recipe.sampling.num_inference_steps,
            guidance_scale: recipe.sampling.guidance_scale,
            seed: asked.seed,
            ..Request::new(prompt)
        };
        let generated = generator.generate(&request, &mut |_, _| Ok(()))?;
        made.dims = generated.pixels.dims()[1..].to_vec();
        made.pixels.extend(generated.pixels.to_vec::<f32>()?);
    }
    Ok(Some(made))
}

/// The sound of each film as a WAV of its name.
fn write_sound(sound: &Waveform, films: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let one = |(i, film): (usize, &PathBuf)| {
        let path = film.with_extension("wav");
        write_wav(&path, &sound.samples.narrow(0, i, 1)?.squeeze(0)?, sound.sampling_rate)?;
        Ok(path)
    };
    films.iter().enumerate().map(one).collect()
}

/// Pictures that the pipeline goes by, as it takes them.
fn images(folder: &PipelineFolder, paths: &[PathBuf], size: Option<[usize; 2]>) -> Result<Vec<ConditionImage>> {
    if paths.is_empty() {
        return Ok(Vec::new());
    }
    let read = |path: &PathBuf| read_picture(path, &ReadOptions::default());
    let pictures = paths.iter().map(read).collect::<flowtape_data::Result<Vec<_>>>()?;
    Ok(ConditionProcessor::load(folder)?.process_all(&pictures, size, &Device::cpu())?)
}

/// The hashes of a folder's weights, as `sha256sum` prints them.
fn hashes(folder: &Path) -> Result<String> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .map_err(crate::error::io(folder))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|end| end == "safetensors"))
        .collect();
    files.sort();
    let line = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(format!("{}  {name}", Content::of(path)?.sha256))
    };
    Ok(files.iter().map(line).collect::<Result<Vec<_>>>()?.join("\n"))
}

/// What made a picture, by keyword.
fn texts(request: &Request<'_>, generated: &Generated, pipeline: &Path) -> Vec<(&'static str, String)> {
    let settings = &generated.settings;
    let mut texts = vec![
        ("prompt", request.prompt.to_owned()),
        ("seed", request.seed.to_string()),
        ("sampler", settings.sampler.name().to_owned()),
        ("steps", settings.steps.to_string()),
        ("pipeline", pipeline.display().to_string()),
    ];
    let numbers = [
        ("guidance_scale", settings.guidance_scale),
        ("true_cfg_scale", settings.true_cfg_scale),
        ("shift", settings.shift),
    ];
    texts.extend(numbers.into_iter().filter_map(|(name, number)| Some((name, number?.to_string()))));
    texts.extend(settings.negative_prompt.clone().map(|negative| ("negative_prompt", negative)));
    texts
}

/// Pixels `[n, 3, H, W]` or `[n, 3, F, H, W]` as one file each.
fn write(pixels: &Tensor, fps: f64, texts: &[(&str, String)], out: &Path) -> Result<Vec<PathBuf>> {
    let n = pixels.dim(0)?;
    let mut paths = Vec::new();
    for i in 0..n {
        let one = pixels.narrow(0, i, 1)?.squeeze(0)?;
        let path = if n == 1 { out.to_owned() } else { beside(out, &format!("_{i}")) };
        let texts = [texts, &[("picture", i.to_string())]].concat();
        if one.rank() == 3 {
            write_png(&path, &Picture::from_pixels(&one)?, &texts)?;
        } else {
            let frame = |at| Ok(Picture::from_pixels(&one.narrow(1, at, 1)?.squeeze(1)?)?);
            let frames = (0..one.dim(1)?).map(frame).collect::<Result<Vec<_>>>()?;
            write_film(&path, &frames, fps, &texts)?;
        }
        paths.push(path);
    }
    Ok(paths)
}
