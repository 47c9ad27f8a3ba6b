//! `flowtape preprocess`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use flowtape_data::Buckets;
use flowtape_data::media::MissingCaptions;
use flowtape_data::preprocess::{Preprocessed, Progress};
use flowtape_engine::cpu::awake;
use flowtape_trainer::builtin::pictures::FolderConfig;
use indicatif::ProgressStyle;

use crate::signals::Stop;
use crate::terminal::{bar, note, say};

/// What to encode, and with what.
#[derive(Args)]
pub struct Preprocess {
    /// A folder of pictures with captions: in metadata.jsonl, or in .txt files of their names. For models that edit, `references` in the
    /// metadata names the pictures that a picture was made of.
    folder: PathBuf,
    /// A diffusers pipeline, of which the autoencoder and the text encoders are loaded.
    #[arg(long, value_name = "PIPELINE")]
    model: PathBuf,
    /// The cache to make or go on with.
    #[arg(long, value_name = "CACHE")]
    out: PathBuf,
    /// The most pixels of a picture.
    #[arg(long, default_value_t = Buckets::MAX_PIXELS)]
    max_pixels: usize,
    /// The step between sides of pictures.
    #[arg(long, default_value_t = Buckets::QUANTIZATION)]
    quantization: usize,
    /// Frames of films (MP4 with H.264, animated GIF, PNG or WebP, folders of pictures with a caption beside them), evenly from the
    /// first to the last; without it pictures are made, of the first. For LTX-2, which makes sound, they are the first ones at 24 a second,
    /// with the sound of a WAV beside the film.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=16_384))]
    frames: Option<u16>,
    /// Give the last frame of a film to the model beside the first: for pipelines of Wan that make films between two frames.
    #[arg(long)]
    last_frame: bool,
    /// What stands for a caption that is missing: error, empty or filename (the file's name, its underscores as spaces).
    #[arg(long, value_name = "WAY", default_value = "error", value_parser = missing)]
    missing_captions: MissingCaptions,
    /// Red,green,blue of what shows through where a picture is transparent, such as 255,255,255.
    #[arg(long, value_delimiter = ',', value_name = "R,G,B", default_value = "255,255,255")]
    background: Vec<u8>,
    /// Read films of other kinds (HEVC, AV1, WebM, ..), and the sound of films, through the `ffmpeg` on the PATH.
    #[arg(long)]
    ffmpeg: bool,
    /// Take films without sound as silent ones, where the pipeline makes films with sound.
    #[arg(long)]
    silence: bool,
    /// Sides in pixels of tiles in which pictures are encoded, so that memory is bounded.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=16_384))]
    tile: Option<u16>,
    /// Frames of parts in which films are encoded where they do not pass one after the other anyway (LTX-2: multiples of 16), so that memory
    /// is bounded.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=16_384))]
    tile_frames: Option<u16>,
    /// Threads that read and resize.
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// Where to encode; see `flowtape devices`.
    #[arg(long, default_value = "cpu")]
    device: String,
}

fn missing(name: &str) -> Result<MissingCaptions, String> {
    MissingCaptions::of_name(name).ok_or_else(|| "expected error, empty or filename".to_owned())
}

/// Encodes, and prints what it came to.
pub fn run(args: &Preprocess) -> Result<ExitCode> {
    let Ok(background) = <[u8; 3]>::try_from(&args.background[..]) else {
        bail!("--background: expected three numbers, such as 255,255,255");
    };
    let config = FolderConfig {
        path: args.folder.clone(),
        include: Vec::new(),
        pipeline: args.model.clone(),
        cache_dir: args.out.clone(),
        max_pixels: args.max_pixels,
        quantization: args.quantization,
        frames: args.frames.map(usize::from),
        last_frame: args.last_frame,
        ffmpeg: args.ffmpeg,
        silence: args.silence,
        tile: args.tile.map(usize::from),
        tile_frames: args.tile_frames.map(usize::from),
        missing_captions: args.missing_captions,
        background,
    };
    let stop = Stop::listen().context("listening for Ctrl-C")?;
    let done = prepare(&config, args.workers, &args.device, &stop)?;
    say!("{}", args.out.display());
    say!("{} samples, {} of them encoded now", done.keys.len(), done.encoded);
    Ok(if stop.asked().load(Ordering::Relaxed) { stop.exit_code() } else { ExitCode::SUCCESS })
}

/// Encodes what a cache lacks, with a progress bar where there is something to do.
pub fn prepare(config: &FolderConfig, workers: usize, device: &str, stop: &Stop) -> Result<Preprocessed> {
    // There is nothing to save that is not saved already: the first signal ends it after the samples under way.
    stop.run_begins();
    let device = flowtape_gpu::device(device)?;
    let started = Instant::now();
    let bar = bar(0);
    if let Ok(style) = ProgressStyle::with_template("encoding {bar:30} {pos}/{len}  {per_sec}  ETA {eta}") {
        bar.set_style(style);
    }
    let mut show = |at: Progress| {
        bar.set_length(at.total as u64);
        bar.set_position(at.done as u64);
    };
    let done = awake(&device, || config.prepare(workers, &device, stop.asked(), &mut show));
    bar.finish_and_clear();
    let done = done?;
    if done.encoded > 0 {
        let seconds = started.elapsed().as_secs_f64();
        let speed = done.encoded as f64 / seconds;
        note!("{} of {} samples encoded in {seconds:.1} s, {speed:.1} a second", done.encoded, done.keys.len());
    }
    Ok(done)
}
