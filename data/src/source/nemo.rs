//! Cache folders of NeMo's preprocessing.

use std::path::{Path, PathBuf};

use flowtape_engine::{Philox, Tensor};
use serde::Deserialize;

use super::{Media, Sample, SampleHeader, Source, Text};
use crate::torch::TorchFile;
use crate::{Error, Fingerprint, Result, TextEmbeddings};

/// A text of pictures is padded to a multiple of this.
const TEXT_MULTIPLE: usize = 8;

/// `metadata.json`.
#[derive(Deserialize)]
struct Metadata {
    shards: Vec<String>,
}

/// What a shard of the metadata says of a sample.
#[derive(Deserialize)]
struct Item {
    cache_file: PathBuf,
    bucket_resolution: Option<[usize; 2]>,
    crop_resolution: Option<[usize; 2]>,
    num_frames: Option<usize>,
    video_path: Option<String>,
    image_path: Option<String>,
    #[serde(default)]
    prompt: String,
}

/// The samples of a cache folder. `.pt` and `.meta` files are read by a reader that runs nothing.
#[derive(Clone, Debug)]
pub struct NemoCache {
    samples: Vec<(PathBuf, SampleHeader)>,
    /// Caption and picture or video of each.
    sources: Vec<(String, Option<String>)>,
    fingerprint: Fingerprint,
}

impl NemoCache {
    /// Opens a folder with `metadata.json`.
    ///
    /// # Errors
    /// When a file of metadata is missing or broken, or names a sample outside the folder.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("metadata.json");
        let metadata: Metadata = read(&path)?.0;
        let (mut samples, mut sources, mut fingerprint) = (Vec::new(), Vec::new(), Fingerprint::of(b"nemo"));
        for shard in &metadata.shards {
            if Path::new(shard).file_name() != Some(shard.as_ref()) {
                return Err(open(&path, format!("expected names of files beside it, got {shard:?}")));
            }
            let shard = folder.join(shard);
            let (items, bytes): (Vec<Item>, _) = read(&shard)?;
            fingerprint = fingerprint.and(&bytes);
            for item in items {
                let resolution = item.bucket_resolution.or(item.crop_resolution);
                let [width, height] =
                    resolution.ok_or_else(|| open(&shard, "a sample without bucket_resolution".into()))?;
                let frames = item.num_frames.filter(|_| item.video_path.is_some());
                let dims = [3].into_iter().chain(frames).chain([height, width]).collect();
                samples.push((inside(folder, &shard, &item.cache_file)?, SampleHeader { dims }));
                sources.push((item.prompt, item.video_path.or(item.image_path)));
            }
        }
        if samples.is_empty() {
            return Err(open(&path, "it lists no sample: run NeMo's preprocessing again".into()));
        }
        Ok(Self { samples, sources, fingerprint })
    }

    fn sample(&self, index: usize) -> Result<&(PathBuf, SampleHeader)> {
        let found = self.samples.get(index);
        found.ok_or_else(|| Error::batch("sample", format!("a number below {}", self.samples.len()), index))
    }
}

fn open(path: &Path, what: String) -> Error {
    Error::Open { name: path.display().to_string(), what }
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<(T, Vec<u8>)> {
    let bytes = std::fs::read(path).map_err(|e| open(path, e.to_string()))?;
    let value = serde_json::from_slice(&bytes).map_err(|e| open(path, e.to_string()))?;
    Ok((value, bytes))
}

/// A sample's file. Real caches hold absolute paths; one that was moved has its files in the same folders.
fn inside(folder: &Path, shard: &Path, file: &Path) -> Result<PathBuf> {
    use std::path::Component;
    let outside = || open(shard, format!("{} lies outside the cache folder", file.display()));
    if file.components().any(|part| part == Component::ParentDir) {
        return Err(outside());
    }
    if !file.is_absolute() {
        return Ok(folder.join(file));
    }
    if file.starts_with(folder) {
        return Ok(file.into());
    }
    let parts: Vec<_> = file.components().collect();
    match parts[..] {
        [.., Component::Normal(bucket), Component::Normal(name)] => {
            let moved = folder.join(bucket).join(name);
            if moved.exists() { Ok(moved) } else { Err(outside()) }
        }
        _ => Err(outside()),
    }
}

impl Source for NemoCache {
    fn len(&self) -> usize {
        self.samples.len()
    }

    fn header(&self, index: usize) -> Result<SampleHeader> {
        Ok(self.sample(index)?.1.clone())
    }

    fn read(&self, index: usize, _: &mut Philox) -> Result<Sample> {
        let (path, _) = self.sample(index)?;
        let mut tensors = TorchFile::open(path)?.tensors;
        // Everything but latents of pictures has an axis of one sample.
        let single = |name: &str, tensor: Tensor| -> Result<Tensor> {
            match tensor.dims().first() {
                Some(1) if tensor.rank() > 1 => Ok(tensor.squeeze(0)?),
                _ => Err(open(path, format!("{name}: expected one sample, got {:?}", tensor.dims()))),
            }
        };
        if let Some(latent) = tensors.remove("latent") {
            let text = tensors.remove("prompt_embeds");
            let text = text.ok_or_else(|| open(path, "no prompt_embeds".into()))?;
            let text = single("prompt_embeds", text)?;
            let length = text.dim(0)?;
            let text = text.pad(0, 0, length.next_multiple_of(TEXT_MULTIPLE) - length)?;
            let mut embeddings = TextEmbeddings::default().with("text_embeddings", text);
            for name in ["pooled_prompt_embeds", "clip_hidden"] {
                if let Some(tensor) = tensors.remove(name) {
                    embeddings = embeddings.with(name, single(name, tensor)?);
                }
            }
            return Ok(Sample::new(Media::Latents(latent), Text::Embeddings(embeddings)));
        }
        let latents = tensors.remove("video_latents");
        let latents = latents.ok_or_else(|| open(path, "neither latent nor video_latents".into()))?;
        let mut sample =
            Sample::new(Media::Latents(single("video_latents", latents)?), Text::Embeddings(TextEmbeddings::default()));
        let mut embeddings = TextEmbeddings::default();
        for name in ["text_embeddings", "text_mask", "text_embeddings_2", "text_mask_2", "audio_text_embeddings"] {
            if let Some(tensor) = tensors.remove(name) {
                embeddings = embeddings.with(name, single(name, tensor)?);
            }
        }
        for name in ["image_embeds", "audio_latents"] {
            if let Some(tensor) = tensors.remove(name) {
                sample.tensors.insert(name.into(), single(name, tensor)?);
            }
        }
        sample.text = Text::Embeddings(embeddings);
        Ok(sample)
    }

    fn name(&self, index: usize) -> String {
        self.samples.get(index).map_or_else(|| format!("sample {index}"), |(path, _)| path.display().to_string())
    }

    fn file(&self, index: usize) -> Result<Option<String>> {
        let cached = self.sample(index)?.0.display().to_string();
        Ok(Some(self.sources.get(index).and_then(|(_, file)| file.clone()).unwrap_or(cached)))
    }

    fn caption(&self, index: usize) -> Result<Option<String>> {
        Ok(self.sources.get(index).map(|(caption, _)| caption.clone()))
    }

    /// Of the file's name in the cache, which NeMo makes of the picture's, and of the caption: nothing is read.
    fn key(&self, index: usize) -> Result<Fingerprint> {
        let name = self.sample(index)?.0.file_name().unwrap_or_default();
        let caption = self.caption(index)?.unwrap_or_default();
        Ok(Fingerprint::of(name.as_encoded_bytes()).and(&[0]).and(caption.as_bytes()))
    }

    fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_outside_the_folder_are_refused_and_moved_folders_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let open = |file: &str| {
            write("metadata.json", "{\"shards\": [\"shard.json\"]}");
            write("shard.json", &format!("[{{\"cache_file\": {file:?}, \"bucket_resolution\": [64, 32]}}]"));
            NemoCache::open(folder.path())
        };
        assert_eq!(open("64x32/a.pt").unwrap().header(0).unwrap().dims, [3, 32, 64]);
        for outside in ["../a.pt", "64x32/../../a.pt", "/etc/passwd", "/elsewhere/64x32/a.pt"] {
            let error = open(outside).unwrap_err().to_string();
            assert!(error.contains("outside") && error.contains("shard.json"), "{error}");
        }
        std::fs::create_dir(folder.path().join("64x32")).unwrap();
        write("64x32/a.pt", "no archive");
        let moved = open("/elsewhere/64x32/a.pt").unwrap();
        let error = moved.read(0, &mut Philox::new(0)).unwrap_err().to_string();
        assert!(error.contains("64x32/a.pt") && error.contains("torch.save"), "{error}");
        write("metadata.json", "{\"shards\": [\"../shard.json\"]}");
        assert!(NemoCache::open(folder.path()).unwrap_err().to_string().contains("beside it"));
        assert!(NemoCache::open(&folder.path().join("none")).unwrap_err().to_string().contains("metadata.json"));
    }
}
