//! `flowtape sample`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flowtape_trainer::Trained;
use flowtape_trainer::generate::{MAX_GUIDANCE_SCALE, MAX_INFERENCE_STEPS, MAX_SAMPLES};
use flowtape_trainer::picture::{beside, check_path, load_grey, save_grey, save_samples};

use crate::terminal::say;
use crate::weights::with_factor;

/// What to generate.
#[derive(Args)]
pub struct Sample {
    /// A run folder.
    run: PathBuf,
    /// What to draw, such as "a handwritten seven".
    #[arg(long)]
    prompt: String,
    /// How many images.
    #[arg(long, default_value_t = 16, value_parser = |text: &str| whole(text, MAX_SAMPLES))]
    n: usize,
    /// The same seed gives the same images.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where to sample; the run's own device by default.
    #[arg(long)]
    device: Option<String>,
    /// Sample with the weights of the last step, though their average was kept.
    #[arg(long)]
    raw: bool,
    /// Euler steps; the run's own number by default.
    #[arg(long, value_parser = |text: &str| whole(text, MAX_INFERENCE_STEPS))]
    steps: Option<usize>,
    /// Scale of classifier-free guidance; the run's own by default.
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
    /// The PNG to write, which its name ends in; videos are animated, and their frames stand beside it in NAME_frames.png,
    /// and the first video's first one, for --first-frame, in NAME_first.png.
    #[arg(long, default_value = "samples.png")]
    out: PathBuf,
}

/// A whole number from 1 on.
fn whole(text: &str, most: usize) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=most).contains(number));
    number.ok_or_else(|| format!("expected a whole number from 1 to {most}"))
}

/// A scale of guidance.
fn scale(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| *number > 0.0 && *number <= MAX_GUIDANCE_SCALE);
    number.ok_or_else(|| format!("expected a number above 0 and at most {MAX_GUIDANCE_SCALE}"))
}

/// Generates, and writes the pictures.
pub fn run(args: &Sample) -> Result<ExitCode> {
    check_path(&args.out)?;
    let load = if args.raw { Trained::load_raw } else { Trained::load };
    let mut trained = load(&args.run, args.device.as_deref())?;
    let loras = args.loras.iter().map(|text| with_factor(text)).collect::<Result<Vec<_>>>()?;
    trained.add_adapters(&loras, args.allow_unused)?;
    if let Some(steps) = args.steps {
        trained.sampling.num_inference_steps = steps;
    }
    if let Some(scale) = args.guidance {
        trained.sampling.guidance_scale = scale;
    }
    let first_frame = match (&args.first_frame, &trained.sample_dims()?[..]) {
        (Some(path), [.., height, width]) => Some(load_grey(path, (*height, *width))?),
        _ => None,
    };
    let samples = trained.sample(&args.prompt, args.n, args.seed, first_frame.as_deref())?;
    let columns = (args.n as f64).sqrt().ceil() as usize;
    save_samples(&samples, columns, |kind| beside(&args.out, kind))?;
    say!("{}", args.out.display());
    if let [1, _, height, width] = samples.dims[..] {
        let path = beside(&args.out, "_first");
        save_grey(&path, &samples.pixels[..height * width], (height, width))?;
        say!("{}  (the first frame, for --first-frame)", path.display());
    }
    Ok(ExitCode::SUCCESS)
}
