//! Codes of a checkpoint on the disk, so that it is quantised once.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::{Deserialize, Serialize};

use super::{Format, QTensor};
use crate::platform::{SystemTime, UNIX_EPOCH};
use crate::safetensors::{SafeTensors, Shards};
use crate::{DType, Device, Error, Result, Tensor};

/// Under what a file's header has [`About`], as JSON.
const ABOUT: &str = "codes";
/// Changes when codes are made in another way.
const VERSION: u32 = 1;

/// A folder's file of the codes of one checkpoint in one format: they are taken from there, or kept there as they are made.
///
/// The file is a safetensors file of the matrices' words, whose header says what they were made of (the checkpoint's files with their
/// sizes, times and headers) and has a CRC-32C of each. It appears whole or not at all, one matrix after the other is written while the
/// model is loaded, and a file that is damaged or of a checkpoint that changed is not used: a warning says so.
#[derive(Debug)]
pub struct CodeStore {
    folder: PathBuf,
    /// The checkpoint's name and its state; nothing where its files can't be looked at.
    source: Option<(String, String)>,
    /// Bytes that a header takes at most.
    header: usize,
    opened: OnceLock<Opened>,
}

/// What a file of codes says of itself.
#[derive(Debug, Default, Serialize, Deserialize)]
struct About {
    /// What it was made of.
    source: String,
    /// The checksum of each matrix.
    crc32c: BTreeMap<String, u32>,
}

#[derive(Debug)]
struct Opened {
    path: PathBuf,
    found: Option<(SafeTensors, About)>,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    /// All is found so far.
    Reading,
    Writing(Writer),
    /// The file that was found lacks something: it goes, so that the next one is whole.
    Damaged,
    /// Nothing is kept.
    Off,
}

/// A file that is written. It goes with this unless it was finished.
#[derive(Debug)]
struct Writer {
    partial: PathBuf,
    out: BufWriter<File>,
    header: usize,
    end: usize,
    infos: Vec<(String, TensorInfo)>,
    about: About,
}

impl CodeStore {
    /// For the codes of a checkpoint's weights, in a folder that need not be there yet.
    pub fn new(folder: &Path, weights: &Shards) -> Self {
        let source = state_of(weights).inspect_err(|error| {
            tracing::warn!("quantised weights are not kept: {error}");
        });
        let names: usize = weights.names().map(|name| 2 * name.len() + 256).sum();
        let source = source.ok();
        let header = source.as_ref().map_or(0, |(_, state)| 2 * state.len()) + names + 4096;
        Self { folder: folder.into(), source, header: header.next_multiple_of(8), opened: OnceLock::new() }
    }

    /// The codes of a matrix that is computed with in a dtype, on a device: those that are kept, or what `dense` gives, quantised.
    ///
    /// # Errors
    /// Those of `dense` and of quantising it, and of the device.
    pub fn get(
        &self,
        name: &str,
        (format, dtype): (Format, DType),
        dims: [usize; 2],
        device: &Device,
        dense: impl FnOnce() -> Result<Tensor>,
    ) -> Result<QTensor> {
        let quantised = |device: &Device| QTensor::quantise(&dense()?, format, device);
        let Some((source, state)) = &self.source else { return quantised(device) };
        let opened = self.opened.get_or_init(|| self.open(source, state, format, dtype));
        let name = format!("{name}.{format:?}.{dtype}").to_lowercase();
        if let Some(words) = opened.read(&name, QTensor::words_of(format, dims), device)? {
            return QTensor::from_words(format, dims, &words);
        }
        let made = quantised(&Device::cpu())?;
        opened.write(&name, &made.words().to_bytes()?);
        QTensor::from_words(format, dims, &made.words().to_device(device)?)
    }

    fn open(&self, source: &str, state: &str, format: Format, dtype: DType) -> Opened {
        let path = self.folder.join(format!("{source}-{format:?}-{dtype}.safetensors").to_lowercase());
        let found = path.exists().then(|| SafeTensors::open(&path)).and_then(|file| match file {
            Ok(file) => {
                let about = file.metadata().get(ABOUT).and_then(|text| serde_json::from_str::<About>(text).ok());
                let about = about.filter(|about| about.source == state);
                if about.is_none() {
                    tracing::warn!("{}: the checkpoint has changed, so it is quantised anew", path.display());
                }
                about.map(|about| (file, about))
            }
            Err(error) => {
                tracing::warn!("{error}: the checkpoint is quantised anew");
                None
            }
        });
        let state = match &found {
            Some(_) => State::Reading,
            None => off_if_wrong(Writer::new(&path, self.header, state).map(State::Writing)),
        };
        Opened { path, found, state: Mutex::new(state) }
    }

    /// Keeps what was made: all matrices are through.
    pub fn finish(&self) {
        let Some(opened) = self.opened.get() else { return };
        let mut state = opened.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = match std::mem::replace(&mut *state, State::Off) {
            State::Writing(writer) => off_if_wrong(writer.finish(&opened.path).map(|()| State::Off)),
            State::Damaged => {
                let gone = std::fs::remove_file(&opened.path);
                off_if_wrong(gone.map(|()| State::Off).map_err(|source| io(&opened.path, source)))
            }
            other => other,
        };
    }
}

/// A disk that is full or read only costs time the next time, and is no error.
fn off_if_wrong(state: Result<State>) -> State {
    state.unwrap_or_else(|error| {
        tracing::warn!("quantised weights are not kept: {error}");
        State::Off
    })
}

fn io(path: &Path, source: std::io::Error) -> Error {
    Error::Io { path: path.into(), source }
}

impl Opened {
    fn read(&self, name: &str, words: usize, device: &Device) -> Result<Option<Tensor>> {
        let Some((file, about)) = &self.found else { return Ok(None) };
        let crc = about.crc32c.get(name);
        match file.raw(name) {
            Some(bytes) if crc == Some(&crc32c::crc32c(bytes)) && bytes.len() == 4 * words => {
                Tensor::from_bytes(bytes, &[words], DType::U32, device).map(Some)
            }
            _ => {
                tracing::warn!("{}: {name} is damaged or missing, so it is quantised anew", self.path.display());
                *self.state.lock().unwrap_or_else(PoisonError::into_inner) = State::Damaged;
                Ok(None)
            }
        }
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Writing(writer) = &mut *state
            && let Err(error) = writer.add(name, bytes)
        {
            *state = off_if_wrong(Err(error));
        }
    }
}

impl Writer {
    fn new(path: &Path, header: usize, source: &str) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(|source| io(folder, source))?;
        // Another process may do the same: the last one's stays.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        let partial = path.with_extension(format!("{now}.partial"));
        let file = File::create(&partial).map_err(|source| io(&partial, source))?;
        let out = BufWriter::with_capacity(1 << 20, file);
        let about = About { source: source.to_owned(), ..About::default() };
        let mut writer = Self { partial, out, header, end: 0, infos: Vec::new(), about };
        writer.seek(8 + header as u64)?;
        Ok(writer)
    }

    fn seek(&mut self, to: u64) -> Result<()> {
        self.out.seek(SeekFrom::Start(to)).map(drop).map_err(|source| io(&self.partial, source))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|source| io(&self.partial, source))
    }

    fn add(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.put(bytes)?;
        let data_offsets = (self.end, self.end + bytes.len());
        self.end = data_offsets.1;
        self.about.crc32c.insert(name.to_owned(), crc32c::crc32c(bytes));
        self.infos
            .push((name.to_owned(), TensorInfo { dtype: Dtype::U32, shape: vec![bytes.len() / 4], data_offsets }));
        Ok(())
    }

    fn finish(mut self, path: &Path) -> Result<()> {
        let wrong = |what: String| Error::Format { path: path.into(), what };
        let infos = std::mem::take(&mut self.infos);
        let about = serde_json::to_string(&self.about).map_err(|e| wrong(e.to_string()))?;
        let metadata = Metadata::new(Some([(ABOUT.to_owned(), about)].into_iter().collect()), infos)
            .map_err(|e| wrong(e.to_string()))?;
        let mut header = serde_json::to_vec(&metadata).map_err(|e| wrong(e.to_string()))?;
        if header.len() > self.header {
            return Err(wrong(format!("a header of {} bytes where {} were left for it", header.len(), self.header)));
        }
        header.resize(self.header, b' ');
        self.seek(0)?;
        self.put(&(self.header as u64).to_le_bytes())?;
        self.put(&header)?;
        self.out.flush().and_then(|()| self.out.get_ref().sync_all()).map_err(|source| io(&self.partial, source))?;
        std::fs::rename(&self.partial, path).map_err(|source| io(path, source))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Where it was finished it has another name by now.
        let _ = std::fs::remove_file(&self.partial);
    }
}

/// A name of a checkpoint, and what it is made of: its files' sizes, times and headers. No tensor is read.
fn state_of(weights: &Shards) -> Result<(String, String)> {
    let path = std::fs::canonicalize(weights.path()).map_err(|source| io(weights.path(), source))?;
    let mut state = format!("{VERSION}");
    for file in weights.files() {
        let about = std::fs::metadata(file.path()).map_err(|source| io(file.path(), source))?;
        let modified = about.modified().map_err(|source| io(file.path(), source))?;
        let nanoseconds = modified.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        state += &format!(" {}.{nanoseconds}.{:08x}", about.len(), crc32c::crc32c(file.header()));
    }
    let of_path = crc32c::crc32c(path.as_os_str().as_encoded_bytes());
    let model = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let model: String = model.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).collect();
    Ok((format!("{model}-{of_path:08x}"), state))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::Philox;
    use crate::nn::{Linear, ParamBuilder, Params, Placement};
    use crate::quant::FORMATS;
    use crate::safetensors::save;

    const LAYERS: [(&str, [usize; 2]); 3] = [("a", [40, 96]), ("b", [7, 130]), ("c", [64, 64])];

    /// A checkpoint of linear layers with biases.
    fn write(path: &Path, seed: u64) {
        let mut random = Philox::new(seed);
        let mut tensors = Vec::new();
        for (name, [outputs, inputs]) in LAYERS {
            for (part, dims) in [("weight", &[outputs, inputs][..]), ("bias", &[outputs][..])] {
                tensors.push((format!("{name}.{part}"), random.normal(dims, &Device::cpu()).unwrap()));
            }
        }
        save(path, &tensors, &Default::default()).unwrap();
    }

    /// The words of the layers, read with or without a folder for codes.
    fn load(path: &Path, format: Format, folder: Option<&Path>) -> Result<Vec<Vec<u32>>> {
        let weights = Arc::new(Shards::from(SafeTensors::open(path)?));
        let plan = Placement::frozen(DType::BF16).quantised(Some(format));
        let builder = ParamBuilder::with_plan(0, plan, &Device::cpu());
        let builder = match folder {
            Some(folder) => builder.keeping_codes(folder).reading(weights),
            None => builder.reading(weights),
        };
        for (name, [outputs, inputs]) in LAYERS {
            Linear::new(&builder.sub(name), inputs, outputs, true)?;
        }
        builder.finish_codes();
        let words = |params: &Params, name: &str| {
            params.get(&format!("{name}.weight")).unwrap().codes().unwrap().words().to_vec::<u32>().unwrap()
        };
        Ok(LAYERS.iter().map(|(name, _)| words(&builder.params(), name)).collect())
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    fn set_modified(path: &Path, to: std::time::SystemTime) {
        File::options().append(true).open(path).unwrap().set_modified(to).unwrap();
    }

    #[test]
    fn codes_that_are_kept_are_those_that_would_be_made() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let (path, codes) = (folder.path().join("model.safetensors"), folder.path().join("codes"));
        for format in FORMATS {
            write(&path, 1);
            let expected = load(&path, format, None)?;
            assert_eq!(load(&path, format, Some(&codes))?, expected, "{format:?}: made");
            let [kept] = &files(&codes)[..] else { panic!("{:?}", files(&codes)) };
            let whole = std::fs::read(kept).unwrap();

            // No tensor of the checkpoint is read again: others in their place change nothing.
            let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
            let mut garbage = std::fs::read(&path).unwrap();
            let data = garbage.len() - 4096;
            garbage[data..].fill(0x11);
            std::fs::write(&path, &garbage).unwrap();
            set_modified(&path, modified);
            assert_eq!(load(&path, format, Some(&codes))?, expected, "{format:?}: found");

            // Where it is damaged they are made anew: cut off, or with another bit.
            write(&path, 1);
            set_modified(&path, modified);
            std::fs::write(kept, &whole[..whole.len() - 5]).unwrap();
            assert_eq!(load(&path, format, Some(&codes))?, expected, "{format:?}: cut off");
            assert_eq!(std::fs::read(kept).unwrap(), whole);
            let mut other = whole.clone();
            *other.last_mut().unwrap() ^= 4;
            std::fs::write(kept, &other).unwrap();
            assert_eq!(load(&path, format, Some(&codes))?, expected, "{format:?}: another bit");
            assert!(files(&codes).is_empty(), "what is damaged goes");
            assert_eq!(load(&path, format, Some(&codes))?, expected);
            assert_eq!(std::fs::read(kept).unwrap(), whole);

            // Another checkpoint of that name has other codes, and takes its place.
            write(&path, 2);
            set_modified(&path, modified + std::time::Duration::from_secs(1));
            let others = load(&path, format, None)?;
            assert!(others != expected && load(&path, format, Some(&codes))? == others, "{format:?}: stale");
            assert_eq!(files(&codes), std::slice::from_ref(kept));
            std::fs::remove_file(kept).unwrap();
        }
        Ok(())
    }

    #[test]
    fn what_was_begun_is_gone_and_a_folder_that_cant_be_written_is_no_error() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        write(&path, 1);
        let codes = folder.path().join("codes");
        let store = CodeStore::new(&codes, &Shards::from(SafeTensors::open(&path)?));
        let matrix = || Tensor::ones(&[4, 4], DType::F32, &Device::cpu());
        store.get("a", (Format::Int8, DType::F32), [4, 4], &Device::cpu(), matrix)?;
        assert_eq!(files(&codes).len(), 1);
        drop(store);
        assert!(files(&codes).is_empty());
        // A file stands where the folder should.
        let expected = load(&path, Format::Nf4, None)?;
        assert_eq!(load(&path, Format::Nf4, Some(&path))?, expected);
        Ok(())
    }
}
