//! `flowtape import`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flowtape_data::cache::CacheHeader;
use flowtape_data::{CacheWriter, Fingerprint, LooseFiles, NemoCache, Source};
use flowtape_engine::Philox;

use crate::terminal::{delivered, say};

/// Samples of a shard.
const SHARD: usize = 256;

/// What to take over.
#[derive(Args)]
pub struct Import {
    /// A cache folder of NeMo's preprocessing (with metadata.json), one of musubi-tuner (Wan, Qwen-Image or FLUX.2), or a folder of
    /// safetensors files of a sample each, with latents, text.NAME and tensor.NAME.
    folder: PathBuf,
    /// The cache to make or go on with.
    #[arg(long, value_name = "CACHE")]
    out: PathBuf,
}

/// Copies the samples, and prints how many there are.
pub fn run(args: &Import) -> Result<ExitCode> {
    let (source, kind): (Box<dyn Source>, String) = if args.folder.join("metadata.json").exists() {
        (Box::new(NemoCache::open(&args.folder)?), "NeMo".into())
    } else {
        let source = LooseFiles::open(&args.folder)?;
        let kind = source.kind().to_owned();
        (Box::new(source), kind)
    };
    // What encoded them is not known: the folder stands for it, so that two are not mixed.
    let header = CacheHeader::new(kind, Fingerprint::of(b"nemo").and(args.folder.as_os_str().as_encoded_bytes()));
    let mut writer = CacheWriter::open(&args.out, &header, SHARD)?;
    let mut copied = 0;
    for index in 0..source.len() {
        let name = source.name(index);
        let key = Fingerprint::of(name.as_bytes());
        if writer.contains(key) {
            continue;
        }
        let dims = source.header(index)?.dims;
        let sample = source.read(index, &mut Philox::new(0))?;
        let caption = source.caption(index)?.unwrap_or_default();
        writer.add(key, &name, &caption, dims.get(1..).unwrap_or_default(), sample)?;
        copied += 1;
    }
    writer.finish()?;
    say!("{}", args.out.display());
    say!("{} samples, {copied} of them copied now", source.len());
    delivered()
}
