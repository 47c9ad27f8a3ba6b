//! Files that strangers wrote: whatever their bytes are, reading them gives a value or an error.
//!
//! Each target reads one kind of file. `tests/tests/fuzz.rs` gives them mutated real files; the crate in `fuzz/` lets libFuzzer
//! drive them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};

use flowtape_data::cache::CacheHeader;
use flowtape_data::media::{FolderOptions, list_pictures};
use flowtape_data::torch::TorchFile;
use flowtape_data::{CacheSource, CacheWriter, Fingerprint, Media, NemoCache, Sample, Source, Text, TextEmbeddings};
use flowtape_engine::safetensors::{SafeTensors, Shards, save};
use flowtape_engine::{DType, Device, Philox, Tensor};
use flowtape_models::checkpoint::load_config;
use flowtape_models::pipeline::PipelineFolder;
use flowtape_trainer::Recipe;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use crate::golden::Any;
use crate::goldens;

/// A kind of file.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// What it is called.
    pub name: &'static str,
    /// Real files of that kind.
    pub seeds: fn() -> Any<Vec<Vec<u8>>>,
    /// Reads a file with these bytes as far as it goes; whether that is to its end.
    pub read: fn(&[u8]) -> bool,
}

/// All kinds.
pub const TARGETS: &[Target] = &[
    Target { name: "recipe", seeds: recipes, read: recipe },
    Target { name: "cache_header", seeds: || of_cache("cache.json"), read: |bytes| cache("cache.json", bytes) },
    Target { name: "cache_index", seeds: || of_cache("index.bin"), read: |bytes| cache("index.bin", bytes) },
    Target { name: "cache_shard", seeds: || of_cache(SHARD), read: |bytes| cache(SHARD, bytes) },
    Target { name: "nemo_index", seeds: || Ok(vec![std::fs::read(nemo_folder().join(NEMO))?]), read: nemo },
    Target {
        name: "safetensors",
        seeds: || Ok(vec![std::fs::read(golden("lora_flux/adapter_model.safetensors"))?]),
        read: safetensors,
    },
    Target { name: "shard_index", seeds: shard_indices, read: shard_index },
    Target { name: "torch_archive", seeds: torch_files, read: |bytes| TorchFile::parse(bytes).is_ok() },
    Target {
        name: "torch_pickle",
        seeds: || torch_files()?.iter().map(|file| pickle_of(file)).collect(),
        read: pickle,
    },
    Target { name: "model_config", seeds: configs, read: config },
    Target { name: "pipeline_index", seeds: pipelines, read: pipeline },
    Target {
        name: "parquet",
        seeds: || Ok(vec![std::fs::read(own("data/tests/captions/metadata.parquet"))?]),
        read: parquet,
    },
];

/// Reads a file of a kind: what libFuzzer calls.
pub fn run(name: &str, bytes: &[u8]) {
    if let Some(target) = TARGETS.iter().find(|target| target.name == name) {
        (target.read)(bytes);
    }
}

const SHARD: &str = "shard-00000.safetensors";
const NEMO: &str = "metadata_shard_0000.json";
const STEM: &str = "model";

fn golden(path: &str) -> PathBuf {
    goldens().join(path)
}

fn own(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

thread_local! {
    /// Folders that targets write into, by the target: made once for a thread.
    static FOLDERS: RefCell<BTreeMap<&'static str, tempfile::TempDir>> = const { RefCell::new(BTreeMap::new()) };
}

/// A target's folder, filled when it is first asked for; false where it can't be made.
fn within(target: &'static str, fill: fn(&Path) -> Any<()>, read: impl FnOnce(&Path) -> bool) -> bool {
    let path = FOLDERS.with(|folders| -> Any<PathBuf> {
        let mut folders = folders.borrow_mut();
        if let Some(folder) = folders.get(target) {
            return Ok(folder.path().into());
        }
        let folder = tempfile::tempdir()?;
        fill(folder.path())?;
        let path = folder.path().to_owned();
        folders.insert(target, folder);
        Ok(path)
    });
    path.is_ok_and(|path| read(&path))
}

fn recipes() -> Any<Vec<Vec<u8>>> {
    let own = ["recipes/digits.yaml", "recipes/moving_digits_wan.yaml"].map(own);
    let files = own.into_iter().chain([golden("recipe_flux_lora/config.yaml")]);
    files.map(|path| Ok(std::fs::read(path)?)).collect()
}

fn recipe(bytes: &[u8]) -> bool {
    Recipe::from_yaml(Path::new("recipe.yaml"), bytes, &[]).is_ok()
}

/// Three samples of two sizes.
fn make_cache(folder: &Path) -> Any<()> {
    let header = CacheHeader::new("test", Fingerprint::of(b"weights"));
    let mut writer = CacheWriter::open(folder, &header, 8)?;
    let cpu = Device::cpu();
    for number in 0..3u64 {
        let mut random = Philox::new(number);
        let side = 2 + (number % 2) as usize;
        let text = TextEmbeddings::default().with("text_embeddings", random.normal(&[3, 4], &cpu)?);
        let latents = random.normal(&[2, side, side], &cpu)?.to_dtype(DType::BF16)?;
        let key = Fingerprint::of(&number.to_le_bytes());
        let sample = Sample::new(Media::Latents(latents), Text::Embeddings(text));
        writer.add(key, &format!("{number}.png"), "a caption", &[8 * side, 8 * side], sample)?;
    }
    Ok(writer.finish()?)
}

fn of_cache(file: &str) -> Any<Vec<Vec<u8>>> {
    let folder = tempfile::tempdir()?;
    make_cache(folder.path())?;
    Ok(vec![std::fs::read(folder.path().join(file))?])
}

/// Reads a cache one of whose files has these bytes.
fn cache(file: &'static str, bytes: &[u8]) -> bool {
    within(file, make_cache, |folder| {
        std::fs::write(folder.join(file), bytes).is_ok()
            && CacheSource::open(folder).is_ok_and(|source| read_all(&source))
    })
}

/// Reads some samples of a source in every way.
fn read_all(source: &dyn Source) -> bool {
    source.fingerprint();
    (0..source.len().min(8)).all(|i| {
        source.name(i);
        let known =
            [source.file(i).is_ok(), source.caption(i).is_ok(), source.key(i).is_ok(), source.verify(i).is_ok()];
        source.header(i).is_ok() && source.read(i, &mut Philox::new(0)).is_ok() && known == [true; 4]
    })
}

fn nemo_folder() -> PathBuf {
    golden("data/image_cache")
}

fn nemo(bytes: &[u8]) -> bool {
    let copy = |folder: &Path| -> Any<()> {
        std::fs::write(folder.join("metadata.json"), format!("{{\"shards\": [\"{NEMO}\"]}}"))?;
        for entry in std::fs::read_dir(nemo_folder())? {
            let bucket = entry?.path();
            if bucket.is_dir() {
                let to = folder.join(bucket.file_name().unwrap_or_default());
                std::fs::create_dir(&to)?;
                for file in std::fs::read_dir(&bucket)? {
                    let file = file?.path();
                    std::fs::copy(&file, to.join(file.file_name().unwrap_or_default()))?;
                }
            }
        }
        Ok(())
    };
    within(NEMO, copy, |folder| {
        std::fs::write(folder.join(NEMO), bytes).is_ok() && NemoCache::open(folder).is_ok_and(|cache| read_all(&cache))
    })
}

fn safetensors(bytes: &[u8]) -> bool {
    within(
        "safetensors",
        |_| Ok(()),
        |folder| {
            // A mapped file is not written in place.
            let path = folder.join("a.safetensors");
            let written = std::fs::remove_file(&path).or(Ok(())).and_then(|()| std::fs::write(&path, bytes));
            written.is_ok()
                && SafeTensors::open(&path).is_ok_and(|file| {
                    file.metadata();
                    file.names().iter().all(|name| {
                        let cpu = Device::cpu();
                        let row = file.row(name, 0, &cpu).is_ok();
                        file.dims(name).is_some() && file.get(name, &cpu, Some(DType::F32)).is_ok() && row
                    })
                })
        },
    )
}

/// Two shards, whose index is the target.
fn make_shards(folder: &Path) -> Any<()> {
    let cpu = Device::cpu();
    for number in 1..=2 {
        let tensor = Tensor::ones(&[number, 2], DType::F32, &cpu)?;
        let path = folder.join(format!("{STEM}-0000{number}-of-00002.safetensors"));
        save(path, &[(format!("layer{number}.weight"), tensor)], &BTreeMap::new())?;
    }
    Ok(())
}

fn shard_indices() -> Any<Vec<Vec<u8>>> {
    let file = |number: usize| format!("\"layer{number}.weight\": \"{STEM}-0000{number}-of-00002.safetensors\"");
    let index = format!("{{\"metadata\": {{\"total_size\": 24}}, \"weight_map\": {{{}, {}}}}}", file(1), file(2));
    Ok(vec![index.into_bytes()])
}

fn shard_index(bytes: &[u8]) -> bool {
    within("shard_index", make_shards, |folder| {
        std::fs::write(folder.join(format!("{STEM}.safetensors.index.json")), bytes).is_ok()
            && Shards::open(folder, STEM).is_ok_and(|shards| {
                let shards = shards.without_known_prefix();
                shards.names().all(|name| shards.get(name, &Device::cpu(), None).is_ok())
            })
    })
}

/// One of each golden cache.
fn torch_files() -> Any<Vec<Vec<u8>>> {
    let mut files = Vec::new();
    for cache in ["data/image_cache", "data/video_cache"] {
        let mut folders: Vec<PathBuf> =
            std::fs::read_dir(golden(cache))?.map(|entry| Ok(entry?.path())).collect::<Any<_>>()?;
        folders.retain(|path| path.is_dir());
        folders.sort();
        let mut inside: Vec<PathBuf> = match folders.first() {
            Some(folder) => std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Any<_>>()?,
            None => Vec::new(),
        };
        inside.sort();
        if let Some(file) = inside.first() {
            files.push(std::fs::read(file)?);
        }
    }
    Ok(files)
}

/// The pickle in an archive.
fn pickle_of(archive: &[u8]) -> Any<Vec<u8>> {
    let mut zip = ZipArchive::new(Cursor::new(archive))?;
    for number in 0..zip.len() {
        let mut file = zip.by_index(number)?;
        if file.name()?.ends_with("data.pkl") {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            return Ok(bytes);
        }
    }
    Err("no data.pkl".into())
}

/// Reads an archive with this pickle, and with storages for it: a changed archive would be told by its checksums alone.
fn pickle(bytes: &[u8]) -> bool {
    let archive = || -> Any<Vec<u8>> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        zip.start_file("archive/data.pkl", stored)?;
        zip.write_all(bytes)?;
        for key in 0..8 {
            zip.start_file(format!("archive/data/{key}"), stored)?;
            zip.write_all(&[0; 1 << 14])?;
        }
        Ok(zip.finish()?.into_inner())
    };
    archive().is_ok_and(|archive| TorchFile::parse(&archive).is_ok())
}

fn configs() -> Any<Vec<Vec<u8>>> {
    ["flux_step", "wan_step", "ltx2_step"]
        .iter()
        .map(|step| Ok(std::fs::read(golden(step).join("config.json"))?))
        .collect()
}

fn config(bytes: &[u8]) -> bool {
    within(
        "config",
        |_| Ok(()),
        |folder| {
            let path = folder.join("config.json");
            std::fs::write(&path, bytes).is_ok() && load_config(&path).is_ok()
        },
    )
}

fn pipelines() -> Any<Vec<Vec<u8>>> {
    Ok(vec![std::fs::read(golden("pipe_flux/pipeline/model_index.json"))?])
}

/// A folder of pictures with captions in Parquet.
fn parquet(bytes: &[u8]) -> bool {
    within(
        "parquet",
        |folder| Ok(["a.png", "b.png"].iter().try_for_each(|name| std::fs::write(folder.join(name), b""))?),
        |folder| {
            std::fs::write(folder.join("metadata.parquet"), bytes).is_ok()
                && list_pictures(folder, &FolderOptions::default()).is_ok()
        },
    )
}

fn pipeline(bytes: &[u8]) -> bool {
    within(
        "pipeline",
        |_| Ok(()),
        |folder| {
            std::fs::write(folder.join("model_index.json"), bytes).is_ok()
                && PipelineFolder::open(folder)
                    .is_ok_and(|pipeline| pipeline.kind().is_ok() && pipeline.part("vae").is_err())
        },
    )
}
