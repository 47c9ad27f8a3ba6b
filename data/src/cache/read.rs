//! Reading a cache.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use flowtape_engine::safetensors::SafeTensors;
use flowtape_engine::{Device, Philox};

use super::{CacheHeader, HEADER, LATENTS, OTHER, Record, STRINGS, TEXT, open, shard_path};
use crate::{Error, Fingerprint, Media, Result, Sample, SampleHeader, Source, Text, TextEmbeddings};

/// The samples of a cache, or some of them in an order of one's own. Files are mapped when a sample of theirs is asked for.
#[derive(Clone, Debug)]
pub struct CacheSource {
    folder: PathBuf,
    header: CacheHeader,
    records: Vec<Record>,
    shards: Arc<Mutex<HashMap<u32, Arc<SafeTensors>>>>,
}

impl CacheSource {
    /// Opens a folder; its samples are in the order in which they were written.
    ///
    /// # Errors
    /// When it is no cache, or of another version.
    pub fn open(folder: &Path) -> Result<Self> {
        let missing = || open(folder, format!("no cache: it has no {HEADER}; make one with `flowtape preprocess`"));
        let header = CacheHeader::read(folder)?.ok_or_else(missing)?;
        Ok(Self { folder: folder.into(), header, records: Record::read_all(folder)?, shards: Arc::default() })
    }

    /// What encoded its samples.
    pub fn encoder(&self) -> &CacheHeader {
        &self.header
    }

    /// The samples that were made from these, in their order.
    ///
    /// # Errors
    /// When some are not there.
    pub fn select(self, keys: &[Fingerprint]) -> Result<Self> {
        let places: HashMap<Fingerprint, Record> = self.records.iter().map(|record| (record.key, *record)).collect();
        let records: Vec<Record> = keys.iter().filter_map(|key| places.get(key).copied()).collect();
        match keys.len() - records.len() {
            0 => Ok(Self { records, ..self }),
            lacking => {
                let what =
                    format!("{lacking} of {} samples are not in it: run `flowtape preprocess` again", keys.len());
                Err(open(&self.folder, what))
            }
        }
    }

    fn record(&self, index: usize) -> Result<Record> {
        let found = self.records.get(index).copied();
        found.ok_or_else(|| Error::batch("sample", format!("a number below {}", self.records.len()), index))
    }

    fn shard(&self, number: u32) -> Result<Arc<SafeTensors>> {
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shard) = shards.get(&number) {
            return Ok(shard.clone());
        }
        let shard = Arc::new(SafeTensors::open(shard_path(&self.folder, number))?);
        shards.insert(number, shard.clone());
        Ok(shard)
    }

    /// A caption or name.
    fn string(&self, which: usize, index: usize) -> Result<String> {
        let record = self.record(index)?;
        let (shard, name, cpu) = (self.shard(record.shard)?, STRINGS[which], Device::cpu());
        let ends = shard.get(&format!("{name}.ends"), &cpu, None)?.to_vec::<u32>()?;
        let bytes = shard.get(name, &cpu, None)?.to_bytes()?;
        let row = record.row as usize;
        let start = row.checked_sub(1).map_or(Some(0), |before| ends.get(before).map(|end| *end as usize));
        let range = start.zip(ends.get(row)).and_then(|(start, end)| bytes.get(start..*end as usize));
        let text = range.and_then(|bytes| String::from_utf8(bytes.to_vec()).ok());
        text.ok_or_else(|| open(shard.path(), format!("no {name} in row {row}: encode the data again")))
    }
}

impl Source for CacheSource {
    fn len(&self) -> usize {
        self.records.len()
    }

    fn header(&self, index: usize) -> Result<SampleHeader> {
        let record = self.record(index)?;
        let frames = Some(record.frames as usize).filter(|frames| *frames > 0);
        let sides = [record.height as usize, record.width as usize];
        Ok(SampleHeader { dims: [3].into_iter().chain(frames).chain(sides).collect() })
    }

    fn read(&self, index: usize, _: &mut Philox) -> Result<Sample> {
        let record = self.record(index)?;
        let shard = self.shard(record.shard)?;
        let row = |name: &str| shard.row(name, record.row as usize, &Device::cpu());
        let mut text = TextEmbeddings::default();
        let mut others = Vec::new();
        for name in shard.names() {
            if let Some(inner) = name.strip_prefix(TEXT) {
                text = text.with(inner, row(&name)?);
            } else if let Some(inner) = name.strip_prefix(OTHER) {
                others.push((inner.to_owned(), row(&name)?));
            }
        }
        let mut sample = Sample::new(Media::Latents(row(LATENTS)?), Text::Embeddings(text));
        sample.tensors.extend(others);
        Ok(sample)
    }

    fn name(&self, index: usize) -> String {
        let place =
            self.record(index).map(|r| format!("row {} of {}", r.row, shard_path(&self.folder, r.shard).display()));
        let place = place.unwrap_or_else(|_| format!("sample {index}"));
        self.string(1, index).map_or(place.clone(), |name| format!("{name} ({place})"))
    }

    fn file(&self, index: usize) -> Result<Option<String>> {
        self.string(1, index).map(Some)
    }

    fn caption(&self, index: usize) -> Result<Option<String>> {
        self.string(0, index).map(Some)
    }

    fn key(&self, index: usize) -> Result<Fingerprint> {
        Ok(self.record(index)?.key)
    }

    fn verify(&self, index: usize) -> Result<()> {
        let stored = self.record(index)?.content;
        if stored == Record::UNHASHED || stored == self.read(index, &mut Philox::new(0))?.fingerprint()? {
            return Ok(());
        }
        let what = "is another than was written (its hash differs): encode the data again";
        Err(open(&self.folder, format!("{} {what}", self.name(index))))
    }

    fn fingerprint(&self) -> Fingerprint {
        let start = Fingerprint::of(b"cache").and(&self.header.fingerprint.bits().to_le_bytes());
        self.records.iter().fold(start, |all, record| all.and(&record.key.bits().to_le_bytes()))
    }
}
