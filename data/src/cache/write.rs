//! Writing a cache.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use flowtape_engine::safetensors::save;
use flowtape_engine::{DType, Device, Error as EngineError, Tensor};

use super::{CacheHeader, INDEX, LATENTS, OTHER, Record, STRINGS, TEXT, open, shard_path};
use crate::{Error, Fingerprint, Media, Result, Sample, Text};

/// Adds samples to a cache; those that are not flushed when it is dropped are not there.
#[derive(Debug)]
pub struct CacheWriter {
    folder: PathBuf,
    index: File,
    next_shard: u32,
    known: HashSet<Fingerprint>,
    /// Samples of a shard.
    shard_size: usize,
    /// Samples that are not written yet, by what their tensors are like.
    pending: BTreeMap<String, Vec<Pending>>,
}

#[derive(Debug)]
struct Pending {
    record: Record,
    strings: [String; 2],
    tensors: BTreeMap<String, Tensor>,
}

impl CacheWriter {
    /// Makes a cache of shards of at most `shard_size` samples, or goes on with one whose samples were encoded alike.
    ///
    /// # Errors
    /// When the folder can't be written, or holds samples that were encoded otherwise.
    pub fn open(folder: &Path, header: &CacheHeader, shard_size: usize) -> Result<Self> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::from(EngineError::Io { path, source })
        };
        std::fs::create_dir_all(folder).map_err(io(folder))?;
        match CacheHeader::read(folder)? {
            Some(found) => found.check(folder, header)?,
            None => header.write(folder)?,
        }
        let records = Record::read_all(folder)?;
        let path = folder.join(INDEX);
        let index = OpenOptions::new().append(true).create(true).open(&path).map_err(io(&path))?;
        // A record that was cut short goes.
        index.set_len((records.len() * Record::WIDTH) as u64).map_err(io(&path))?;
        Ok(Self {
            folder: folder.into(),
            index,
            next_shard: records.iter().map(|record| record.shard + 1).max().unwrap_or(0),
            known: records.iter().map(|record| record.key).collect(),
            shard_size: shard_size.max(1),
            pending: BTreeMap::new(),
        })
    }

    /// Whether the sample that was made from this is there, or added.
    pub fn contains(&self, key: Fingerprint) -> bool {
        self.known.contains(&key)
    }

    /// What all samples were made from that are there, or added.
    pub fn keys(&self) -> HashSet<Fingerprint> {
        self.known.clone()
    }

    /// Adds a sample of latents and embeddings, unless it is there. `pixels` are the sizes of its pixels: `[H, W]` or
    /// `[F, H, W]`.
    ///
    /// # Errors
    /// When it is not encoded, or a shard can't be written.
    pub fn add(&mut self, key: Fingerprint, name: &str, caption: &str, pixels: &[usize], sample: Sample) -> Result<()> {
        let content = sample.fingerprint()?;
        let (Media::Latents(latents), Text::Embeddings(text)) = (sample.media, sample.text) else {
            return Err(Error::batch(name, "latents and embeddings", "pixels or a caption"));
        };
        if !self.known.insert(key) {
            return Ok(());
        }
        let size = |from_end: usize| pixels.iter().rev().nth(from_end).map_or(0, |size| *size as u32);
        let record = Record { key, content, shard: 0, row: 0, frames: size(2), height: size(1), width: size(0) };
        let mut tensors = BTreeMap::from([(LATENTS.to_owned(), latents)]);
        tensors.extend(text.tensors.into_iter().map(|(name, tensor)| (format!("{TEXT}{name}"), tensor)));
        tensors.extend(sample.tensors.into_iter().map(|(name, tensor)| (format!("{OTHER}{name}"), tensor)));
        let like = |(name, tensor): (&String, &Tensor)| format!("{name} {} {:?} ", tensor.dtype(), tensor.dims());
        let layout: String = tensors.iter().map(like).collect();
        let group = self.pending.entry(layout.clone()).or_default();
        group.push(Pending { record, strings: [caption.to_owned(), name.to_owned()], tensors });
        if group.len() >= self.shard_size {
            let group = self.pending.remove(&layout).unwrap_or_default();
            self.flush(group)?;
        }
        Ok(())
    }

    /// Writes all that is pending.
    ///
    /// # Errors
    /// When a shard can't be written.
    pub fn finish(mut self) -> Result<()> {
        for group in std::mem::take(&mut self.pending).into_values() {
            self.flush(group)?;
        }
        Ok(())
    }

    /// A shard, and then its records.
    fn flush(&mut self, group: Vec<Pending>) -> Result<()> {
        let names = group.first().into_iter().flat_map(|sample| sample.tensors.keys());
        let stacked = names.map(|name| {
            let rows: Vec<&Tensor> = group.iter().filter_map(|sample| sample.tensors.get(name)).collect();
            Ok((name.clone(), Tensor::stack(&rows, 0)?))
        });
        let mut tensors = stacked.collect::<Result<Vec<_>>>()?;
        for (which, name) in STRINGS.into_iter().enumerate() {
            let mut bytes = Vec::new();
            let mut ends = Vec::new();
            for sample in &group {
                bytes.extend(sample.strings[which].bytes());
                ends.push(bytes.len() as u32);
            }
            // Four bytes to a number: the engine has no smaller ones.
            bytes.resize(bytes.len().next_multiple_of(4).max(4), 0);
            let cpu = Device::cpu();
            tensors.push((name.to_owned(), Tensor::from_bytes(&bytes, &[bytes.len() / 4], DType::U32, &cpu)?));
            let count = ends.len();
            tensors.push((format!("{name}.ends"), Tensor::from_vec(ends, &[count], &cpu)?));
        }
        let shard = self.next_shard;
        save(shard_path(&self.folder, shard), &tensors, &BTreeMap::new())?;
        self.next_shard += 1;
        let record = |(row, sample): (usize, &Pending)| Record { shard, row: row as u32, ..sample.record };
        let records: Vec<u8> = group.iter().enumerate().map(record).flat_map(Record::to_bytes).collect();
        let path = self.folder.join(INDEX);
        let written = self.index.write_all(&records).and_then(|()| self.index.sync_data());
        written.map_err(|error| open(&path, error))
    }
}
