//! `flowtape sample`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use flowtape_trainer::Trained;
use flowtape_trainer::compose::{
    Options, Request, SOLVERS, Solver, SoundGuidance, TileSizes, compose, has_pipeline, is_pipeline,
};
use flowtape_trainer::generate::{MAX_GUIDANCE_SCALE, MAX_INFERENCE_STEPS, MAX_SAMPLES};
use flowtape_trainer::generation::GenerationFile;
use flowtape_trainer::picture::{beside, check_path, load_grey, save_grey, save_samples};

use crate::terminal::{note, say};
use crate::weights::{Dtype, with_factor};

/// What to generate.
#[derive(Args)]
pub struct Sample {
    /// A run folder, or that of a diffusers pipeline.
    #[arg(required_unless_present = "config")]
    from: Option<PathBuf>,
    /// NeMo's YAML of generating: it says all but the device.
    #[arg(short, long, value_name = "YAML", conflicts_with_all = ["from", "prompt"])]
    config: Option<PathBuf>,
    /// A setting of that file, such as inference.height=512; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    settings: Vec<String>,
    /// What to draw, such as "a handwritten seven".
    #[arg(long, required_unless_present = "config")]
    prompt: Option<String>,
    /// How many: 16 of a run in a grid, 1 of a pipeline; several of a pipeline are a file each.
    #[arg(long, value_parser = |text: &str| whole(text, MAX_SAMPLES))]
    n: Option<usize>,
    /// The same seed gives the same images.
    #[arg(long, default_value_t = 0, value_parser = seed)]
    seed: u64,
    /// Where to sample; the run's own device by default.
    #[arg(long)]
    device: Option<String>,
    /// Sample with the weights of the last step, though their average was kept.
    #[arg(long)]
    raw: bool,
    /// Steps of the solver; the run's or the pipeline's own number by default.
    #[arg(long, value_parser = |text: &str| whole(text, MAX_INFERENCE_STEPS))]
    steps: Option<usize>,
    /// Scale of guidance, told to models that are distilled for it, else of classifier-free guidance; the run's own by default.
    #[arg(long, value_parser = scale)]
    guidance: Option<f64>,
    /// A grey PNG of a frame's size, from which the videos go on: for models trained on image-to-video.
    #[arg(long, value_name = "PNG")]
    first_frame: Option<PathBuf>,
    /// An adapter to fold into the model, and what its change is multiplied with, as in `style.safetensors=0.8`; may be repeated.
    #[arg(long = "lora", value_name = "PATH[=FACTOR]")]
    loras: Vec<String>,
    /// Pass over keys of adapters that the model has no use for.
    #[arg(long)]
    allow_unused: bool,
    /// The PNG to write, which its name ends in; videos are animated, and those of a run have their frames beside it in NAME_frames.png,
    /// and the first video's first frame, for --first-frame, in NAME_first.png.
    #[arg(long, default_value = "samples.png")]
    out: PathBuf,
    #[command(flatten)]
    pipeline: OfPipeline,
}

/// What can be asked of a pipeline, or of a run whose data names one.
#[derive(Args)]
#[command(next_help_heading = "Of a pipeline, or of a run whose data names one")]
struct OfPipeline {
    /// What the pictures are led away from.
    #[arg(long, value_name = "PROMPT")]
    negative: Option<String>,
    /// A picture to edit, or a film's first frame (a second one is its last); may be repeated.
    #[arg(long = "image", value_name = "PICTURE")]
    images: Vec<PathBuf>,
    /// Scale of classifier-free guidance beside a told one: the model runs a second time, on --negative.
    #[arg(long, value_name = "SCALE", value_parser = scale)]
    true_cfg: Option<f64>,
    /// Width and height in pixels; of a run those that it was trained on.
    #[arg(long, value_name = "WxH", value_parser = size)]
    size: Option<[usize; 2]>,
    /// Frames of a film.
    #[arg(long, value_parser = |text: &str| whole(text, 1 << 14))]
    frames: Option<usize>,
    /// A static shift of the noise levels instead of the scheduler's.
    #[arg(long, value_parser = scale)]
    shift: Option<f64>,
    /// How steps are taken: euler, heun, dpm++2m or unipc; the pipeline's own way by default.
    #[arg(long, value_parser = sampler)]
    sampler: Option<Solver>,
    /// Tokens that the prompt is cut or padded to.
    #[arg(long, value_parser = |text: &str| whole(text, 1 << 14))]
    max_sequence_length: Option<usize>,
    /// Scale of guidance of the sound of films.
    #[arg(long, value_name = "SCALE", value_parser = strength)]
    audio_guidance: Option<f64>,
    /// Scale of spatio-temporal guidance of films with sound, away from a run in which tokens of --stg-blocks see themselves alone.
    #[arg(long, value_name = "SCALE", value_parser = strength)]
    stg: Option<f64>,
    /// The blocks of --stg, such as 28,29.
    #[arg(long, value_name = "BLOCKS", value_delimiter = ',')]
    stg_blocks: Vec<u32>,
    /// Scale of guidance away from a run in which film and sound do not see each other; 1 is none.
    #[arg(long, value_name = "SCALE", value_parser = strength)]
    modality: Option<f64>,
    /// How far guidance of films with sound gives back the deviation of what it begins with: 0 to 1.
    #[arg(long, value_name = "SHARE", value_parser = share)]
    rescale: Option<f64>,
    /// Sides in pixels of tiles in which pictures are decoded, so that memory is bounded.
    #[arg(long, value_parser = |text: &str| whole(text, 1 << 14))]
    tile: Option<usize>,
    /// Frames of parts in which films are decoded where they do not pass one after the other anyway (LTX-2: multiples of 16), so that memory
    /// is bounded.
    #[arg(long, value_parser = |text: &str| whole(text, 1 << 14))]
    tile_frames: Option<usize>,
    /// What a pipeline's transformer computes in; a run's is the recipe's.
    #[arg(long)]
    dtype: Option<Dtype>,
}

impl OfPipeline {
    fn asked(&self) -> bool {
        let Self {
            negative,
            images,
            true_cfg,
            size,
            frames,
            shift,
            sampler,
            max_sequence_length,
            dtype,
            tile,
            tile_frames,
            ..
        } = self;
        let of_pictures = !images.is_empty() || size.is_some() || frames.is_some() || negative.is_some();
        let of_steps = true_cfg.is_some() || shift.is_some() || sampler.is_some() || max_sequence_length.is_some();
        let of_memory = tile.is_some() || tile_frames.is_some();
        of_pictures || of_steps || dtype.is_some() || of_memory || self.sound() != SoundGuidance::default()
    }

    /// Guidance of films with sound.
    fn sound(&self) -> SoundGuidance {
        let usual = SoundGuidance::default();
        let both = |asked: Option<f64>, usual: [f64; 2]| asked.map_or(usual, |scale| [scale; 2]);
        SoundGuidance {
            audio_guidance_scale: self.audio_guidance.unwrap_or(usual.audio_guidance_scale),
            stg_scale: both(self.stg, usual.stg_scale),
            stg_blocks: if self.stg_blocks.is_empty() { usual.stg_blocks } else { self.stg_blocks.clone() },
            modality_scale: both(self.modality, usual.modality_scale),
            guidance_rescale: both(self.rescale, usual.guidance_rescale),
        }
    }
}

/// A whole number from 1 on.
fn whole(text: &str, most: usize) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=most).contains(number));
    number.ok_or_else(|| format!("expected a whole number from 1 to {most}"))
}

fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("expected a whole number from 0 to {}", u64::MAX))
}

/// A scale of guidance or a shift.
fn scale(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| *number > 0.0 && *number <= MAX_GUIDANCE_SCALE);
    number.ok_or_else(|| format!("expected a number above 0 and at most {MAX_GUIDANCE_SCALE}"))
}

/// A scale of guidance that may be 0.
fn strength(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..=MAX_GUIDANCE_SCALE).contains(number));
    number.ok_or_else(|| format!("expected a number from 0 to {MAX_GUIDANCE_SCALE}"))
}

/// A share.
fn share(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..=1.0).contains(number));
    number.ok_or_else(|| "expected a number from 0 to 1".to_owned())
}

/// `WxH` as height and width.
fn size(text: &str) -> Result<[usize; 2], String> {
    let side = |text: &str| text.parse().ok().filter(|side| (1..=1 << 14).contains(side));
    let sides = text.split_once('x').and_then(|(width, height)| Some([side(height)?, side(width)?]));
    sides.ok_or_else(|| "expected width and height in pixels, such as 1024x768".to_owned())
}

/// A solver's name.
fn sampler(text: &str) -> Result<Solver, String> {
    let names: Vec<&str> = SOLVERS.iter().map(|(name, _)| *name).collect();
    text.parse().map_err(|_| format!("expected one of {}", names.join(", ")))
}

/// Generates, and writes the pictures.
pub fn run(args: &Sample) -> Result<ExitCode> {
    if let Some(path) = &args.config {
        let device = flowtape_gpu::device(args.device.as_deref().unwrap_or("cpu"))?;
        let file = GenerationFile::load(path, &args.settings)?;
        let written = file.run(&device, &mut |prompt, step| note!("prompt {}, step {step}", prompt + 1))?;
        written.iter().for_each(|path| say!("{}", path.display()));
        return Ok(ExitCode::SUCCESS);
    }
    let Some(from) = &args.from else { bail!("expected a run folder or that of a pipeline") };
    check_path(&args.out)?;
    let loras = args.loras.iter().map(|text| with_factor(text)).collect::<Result<Vec<_>>>()?;
    // Its last weights and grey frames are asked of the run alone.
    let of_run = args.raw || args.first_frame.is_some();
    if is_pipeline(from) || args.pipeline.asked() || (!of_run && has_pipeline(from)?) {
        return of_pipeline(from, args, &loras);
    }
    let load = if args.raw { Trained::load_raw } else { Trained::load };
    let mut trained = load(from, args.device.as_deref())?;
    trained.add_adapters(&loras, args.allow_unused)?;
    if let Some(steps) = args.steps {
        trained.sampling.num_inference_steps = Some(steps);
    }
    if let Some(scale) = args.guidance {
        trained.sampling.guidance_scale = Some(scale);
    }
    let first_frame = match (&args.first_frame, &trained.sample_dims()?[..]) {
        (Some(path), [.., height, width]) => Some(load_grey(path, (*height, *width))?),
        _ => None,
    };
    let n = args.n.unwrap_or(16);
    let samples = trained.sample(args.prompt.as_deref().unwrap_or_default(), n, args.seed, first_frame.as_deref())?;
    let columns = (n as f64).sqrt().ceil() as usize;
    save_samples(&samples, columns, |kind| beside(&args.out, kind))?;
    say!("{}", args.out.display());
    if let [1, _, height, width] = samples.dims[..] {
        let path = beside(&args.out, "_first");
        save_grey(&path, &samples.pixels[..height * width], (height, width))?;
        say!("{}  (the first frame, for --first-frame)", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Pictures and films with all that a pipeline can be asked.
fn of_pipeline(from: &Path, args: &Sample, loras: &[(PathBuf, f64)]) -> Result<ExitCode> {
    if args.first_frame.is_some() || args.raw {
        bail!("--first-frame and --raw are for runs, without the options of pipelines");
    }
    let asked = &args.pipeline;
    let device = flowtape_gpu::device(args.device.as_deref().unwrap_or("cpu"))?;
    let request = Request {
        negative_prompt: asked.negative.as_deref(),
        size: asked.size,
        frames: asked.frames,
        steps: args.steps,
        guidance_scale: args.guidance,
        true_cfg_scale: asked.true_cfg,
        shift: asked.shift,
        sampler: asked.sampler,
        max_sequence_length: asked.max_sequence_length,
        seed: args.seed,
        n: args.n.unwrap_or(1),
        with_sound: asked.sound(),
        ..Request::new(args.prompt.as_deref().unwrap_or_default())
    };
    let options = Options {
        dtype: asked.dtype.unwrap_or(Dtype::Bf16).into(),
        device: &device,
        transformers: &[],
        loras,
        allow_unused: args.allow_unused,
        images: &asked.images,
        tiles: TileSizes { side: asked.tile, frames: asked.tile_frames },
        fps: None,
        out: &args.out,
    };
    let written = compose(from, &request, &options, &mut |step| note!("step {step}"))?;
    written.iter().for_each(|path| say!("{}", path.display()));
    Ok(ExitCode::SUCCESS)
}
