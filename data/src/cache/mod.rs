//! The cache: samples that were encoded once, in files that are mapped. `docs/CACHE.md` describes the format.
//!
//! A shard is a safetensors file of samples whose tensors are alike, stacked, so that its header is small and a row is read
//! without the rest. The index has a record of fixed width for each sample. A record is written when its shard is whole, so a
//! folder is good at any moment, and an interrupted run goes on.

mod read;
mod write;

use std::path::{Path, PathBuf};

use flowtape_engine::Error as EngineError;
use flowtape_engine::files::{exists, write_whole};
use serde::{Deserialize, Serialize};

use crate::{Error, Fingerprint, Result};

pub use read::CacheSource;
pub use write::CacheWriter;

/// The version of the format.
pub const VERSION: u32 = 1;
const HEADER: &str = "cache.json";
const INDEX: &str = "index.bin";
/// Tensors of a shard: the latents, and what stands before the names of embeddings and of other tensors.
pub(crate) const LATENTS: &str = "latents";
pub(crate) const TEXT: &str = "text.";
pub(crate) const OTHER: &str = "tensor.";
/// Captions and names of samples: their bytes one after the other, and where each ends.
const STRINGS: [&str; 2] = ["captions", "names"];

/// What is the same for all samples of a cache: `cache.json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheHeader {
    /// [`VERSION`].
    pub version: u32,
    /// What encoded the samples, in words, such as `FluxPipeline`.
    pub encoder: String,
    /// Of the encoders' weights and of all settings that change what they make of a sample.
    pub fingerprint: Fingerprint,
    /// Of the encoders' files alone, where they are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<Fingerprint>,
}

impl CacheHeader {
    /// The header of samples that are encoded so.
    pub fn new(encoder: impl Into<String>, fingerprint: Fingerprint) -> Self {
        Self { version: VERSION, encoder: encoder.into(), fingerprint, weights: None }
    }

    /// That of a folder, where it is a cache.
    ///
    /// # Errors
    /// When it can't be read, or is of another version.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(HEADER);
        if !exists(&path)? {
            return Ok(None);
        }
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let text = std::fs::read(&path).map_err(|source| EngineError::Io { path: path.clone(), source })?;
        let Version { version } = serde_json::from_slice(&text).map_err(|e| open(&path, e))?;
        if version != VERSION {
            let what =
                format!("a cache of version {version}; this program reads version {VERSION}: encode the data again");
            return Err(open(&path, what));
        }
        serde_json::from_slice(&text).map(Some).map_err(|e| open(&path, e))
    }

    fn write(&self, folder: &Path) -> Result<()> {
        let text = format!("{:#}\n", serde_json::json!(self));
        let path = folder.join(HEADER);
        write_whole(&path, |partial| {
            std::fs::write(partial, text).map_err(|source| EngineError::Io { path: path.clone(), source }.into())
        })
    }

    /// Checks that a cache's samples were encoded as it is wanted now.
    ///
    /// # Errors
    /// When they were not: samples of two encoders can't be mixed.
    pub fn check(&self, folder: &Path, wanted: &Self) -> Result<()> {
        if self == wanted {
            return Ok(());
        }
        let Self { encoder, fingerprint, .. } = self;
        let what = format!(
            "its samples were made by {encoder} {fingerprint}, not by {} {} as it is now: name another folder, or remove this one",
            wanted.encoder, wanted.fingerprint
        );
        Err(open(folder, what))
    }

    /// Checks that a cache's samples were encoded by a pipeline with these files ([`crate::preprocess::encoders_of`]), where it is
    /// known which did.
    ///
    /// # Errors
    /// When others did: the samples are stale.
    pub fn check_weights(&self, folder: &Path, weights: Fingerprint) -> Result<()> {
        match self.weights.filter(|own| *own != weights) {
            None => Ok(()),
            Some(own) => {
                let what = format!(
                    "its samples are stale: {} with files {own} encoded them, and those of data.pipeline are {weights} now; \
                     name that pipeline, or encode the data again",
                    self.encoder
                );
                Err(open(folder, what))
            }
        }
    }
}

fn open(path: &Path, what: impl ToString) -> Error {
    Error::Open { name: path.display().to_string(), what: what.to_string() }
}

fn shard_path(folder: &Path, shard: u32) -> PathBuf {
    folder.join(format!("shard-{shard:05}.safetensors"))
}

/// Where a sample is, and what is known of it before it is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Record {
    /// Of everything that the sample was made from.
    pub key: Fingerprint,
    pub shard: u32,
    pub row: u32,
    /// Of the sample's tensors, [`Record::UNHASHED`] where it was not noted.
    pub content: Fingerprint,
    /// Frames, rows and columns of its pixels; no frames for a picture.
    pub frames: u32,
    pub height: u32,
    pub width: u32,
}

impl Record {
    /// Bytes of a record: room for what comes later.
    pub const WIDTH: usize = 64;
    /// Stands for no hash.
    pub const UNHASHED: Fingerprint = Fingerprint::from_bits(0);

    pub fn to_bytes(self) -> [u8; Self::WIDTH] {
        let mut bytes = [0; Self::WIDTH];
        bytes[..8].copy_from_slice(&self.key.bits().to_le_bytes());
        let numbers = [self.shard, self.row, self.frames, self.height, self.width];
        for (place, number) in bytes[8..28].chunks_exact_mut(4).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes[28..36].copy_from_slice(&self.content.bits().to_le_bytes());
        bytes
    }

    pub fn from_bytes(bytes: &[u8; Self::WIDTH]) -> Self {
        let hash = |at: usize| {
            let bytes = bytes[at..at + 8].iter().rev();
            Fingerprint::from_bits(bytes.fold(0, |bits, byte| bits << 8 | u64::from(*byte)))
        };
        let (key, content) = (hash(0), hash(28));
        let mut numbers = bytes[8..28].as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
        let mut next = || numbers.next().unwrap_or_default();
        Self { key, shard: next(), row: next(), frames: next(), height: next(), width: next(), content }
    }

    /// All whole records of a folder: the last may have been cut short, then its sample is not there.
    pub fn read_all(folder: &Path) -> Result<Vec<Self>> {
        let path = folder.join(INDEX);
        if !exists(&path)? {
            return Ok(Vec::new());
        }
        let bytes = std::fs::read(&path).map_err(|source| EngineError::Io { path, source })?;
        Ok(bytes.as_chunks().0.iter().map(Self::from_bytes).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Media, Sample, Source, Text, TextEmbeddings};
    use flowtape_engine::{DType, Device, Philox};

    fn header() -> CacheHeader {
        CacheHeader::new("test", Fingerprint::of(b"weights"))
    }

    fn sample(number: u64, side: usize) -> Sample {
        let cpu = Device::cpu();
        let mut random = Philox::new(number);
        let mut normal = |dims: &[usize]| random.normal(dims, &cpu).unwrap();
        let latents = normal(&[2, side, side]).to_dtype(DType::BF16).unwrap();
        let text = TextEmbeddings::default().with("text_embeddings", normal(&[3, 4]));
        let mut sample = Sample::new(Media::Latents(latents), Text::Embeddings(text));
        sample.tensors.insert("image_embeds".into(), normal(&[1]));
        sample
    }

    fn key(number: u64) -> Fingerprint {
        Fingerprint::of(&number.to_le_bytes())
    }

    fn add(writer: &mut CacheWriter, number: u64, side: usize) {
        let (name, caption) = (format!("{number}.png"), format!("caption é {number}"));
        let pixels = [8 * side, 8 * side];
        writer.add(key(number), &name, &caption, &pixels, sample(number, side)).unwrap();
    }

    fn values(sample: &Sample) -> Vec<Vec<f32>> {
        let Text::Embeddings(text) = &sample.text else { panic!("embeddings") };
        let all = [sample.media.tensor(), &text.tensors["text_embeddings"], &sample.tensors["image_embeds"]];
        all.map(|t| t.to_vec().unwrap()).into()
    }

    #[test]
    fn what_was_written_is_read_in_any_order_and_part() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = CacheWriter::open(folder.path(), &header(), 4).unwrap();
        (0..11).for_each(|i| add(&mut writer, i, 2 + (i % 2) as usize));
        writer.finish().unwrap();
        let all = CacheSource::open(folder.path()).unwrap();
        assert_eq!(all.len(), 11);
        let order = [7, 0, 10, 3];
        let some = all.clone().select(&order.map(key)).unwrap();
        assert!(some.fingerprint() != all.fingerprint());
        for (place, number) in order.into_iter().enumerate() {
            let side = 2 + (number % 2) as usize;
            assert_eq!(some.header(place).unwrap().dims, [3, 8 * side, 8 * side]);
            let read = some.read(place, &mut Philox::new(0)).unwrap();
            assert_eq!((values(&read), read.media.tensor().dtype()), (values(&sample(number, side)), DType::BF16));
            some.verify(place).unwrap();
            assert_eq!(some.file(place).unwrap(), Some(format!("{number}.png")));
            assert!(some.name(place).starts_with(&format!("{number}.png")), "{}", some.name(place));
            assert_eq!(some.caption(place).unwrap(), Some(format!("caption é {number}")));
        }
        assert!(all.select(&[key(99)]).unwrap_err().to_string().contains("1 of 1"));
    }

    #[test]
    fn an_interrupted_run_goes_on_and_another_encoder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = CacheWriter::open(folder.path(), &header(), 2).unwrap();
        (0..5).for_each(|i| add(&mut writer, i, 2));
        drop(writer);
        // What was not flushed is not there; half a record, and a shard without records, are passed over.
        let index = folder.path().join(INDEX);
        let mut bytes = std::fs::read(&index).unwrap();
        assert_eq!(bytes.len(), 4 * Record::WIDTH);
        bytes.extend([1; 10]);
        std::fs::write(&index, bytes).unwrap();
        std::fs::write(shard_path(folder.path(), 2), "half").unwrap();
        let mut writer = CacheWriter::open(folder.path(), &header(), 2).unwrap();
        assert_eq!((0..6).map(|i| writer.contains(key(i))).collect::<Vec<_>>(), [true, true, true, true, false, false]);
        (4..6).for_each(|i| add(&mut writer, i, 2));
        writer.finish().unwrap();
        let source = CacheSource::open(folder.path()).unwrap();
        assert_eq!(source.len(), 6);
        for i in 0..6 {
            assert_eq!(values(&source.read(i, &mut Philox::new(0)).unwrap()), values(&sample(i as u64, 2)));
        }
        let other = CacheHeader { fingerprint: Fingerprint::of(b"other"), ..header() };
        let error = CacheWriter::open(folder.path(), &other, 2).unwrap_err().to_string();
        assert!(error.contains("not by test") && error.contains("remove"), "{error}");
    }

    #[test]
    fn a_damaged_cache_is_told_by_file() {
        let folder = tempfile::tempdir().unwrap();
        assert!(CacheSource::open(folder.path()).unwrap_err().to_string().contains("cache.json"));
        let mut writer = CacheWriter::open(folder.path(), &header(), 2).unwrap();
        (0..2).for_each(|i| add(&mut writer, i, 2));
        writer.finish().unwrap();
        let source = CacheSource::open(folder.path()).unwrap();
        source.verify(1).unwrap();
        // A bit of the first sample's latents, which lie at the end.
        let shard = shard_path(folder.path(), 0);
        let whole = std::fs::read(&shard).unwrap();
        let latents = flowtape_engine::safetensors::SafeTensors::open(&shard).unwrap();
        let bytes = latents.row(LATENTS, 0, &Device::cpu()).unwrap().to_bytes().unwrap();
        let at = whole.windows(bytes.len()).position(|window| window == &*bytes).unwrap();
        drop(latents);
        let mut changed = whole.clone();
        changed[at] ^= 1;
        std::fs::write(&shard, changed).unwrap();
        let again = CacheSource::open(folder.path()).unwrap();
        assert!(again.verify(0).unwrap_err().to_string().contains("hash differs"));
        again.verify(1).unwrap();
        std::fs::write(shard, "cut").unwrap();
        let source = CacheSource::open(folder.path()).unwrap();
        assert!(source.read(0, &mut Philox::new(0)).unwrap_err().to_string().contains("shard-00000"));
        let text = std::fs::read_to_string(folder.path().join(HEADER)).unwrap();
        std::fs::write(folder.path().join(HEADER), text.replace("\"version\": 1", "\"version\": 2")).unwrap();
        assert!(CacheSource::open(folder.path()).unwrap_err().to_string().contains("version 2"));
    }
}
