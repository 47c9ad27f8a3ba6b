//! Files that `torch.save` wrote: an archive with a pickle and the memory of tensors. Nothing in them is run.

mod pickle;

use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::path::Path;

use flowtape_engine::{DType, Device, Tensor};
use zip::{CompressionMethod, ZipArchive};

use crate::{Error, Result};
use pickle::{Machine, TensorSpec, Value};

/// What is in a file: a dictionary of tensors and texts; what is neither is passed over.
#[derive(Debug, Default)]
pub struct TorchFile {
    /// On the host. Integers and booleans are u32.
    pub tensors: BTreeMap<String, Tensor>,
    /// Strings.
    pub texts: BTreeMap<String, String>,
}

impl TorchFile {
    /// Reads a file whole.
    ///
    /// # Errors
    /// When it can't be read, is none that `torch.save` wrote of a dictionary, or asks for more than tensors, containers,
    /// numbers and texts.
    pub fn open(path: &Path) -> Result<Self> {
        let open = |what: String| Error::Open { name: path.display().to_string(), what };
        let bytes = std::fs::read(path).map_err(|e| open(e.to_string()))?;
        Self::parse(&bytes).map_err(open)
    }

    /// The same of a file's bytes.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut archive = Archive::open(bytes)?;
        let pickle = archive.read("data.pkl")?;
        if archive.read("byteorder").is_ok_and(|order| order != b"little") {
            return Err("numbers are stored with the high byte first: save the file on another machine".into());
        }
        let mut machine = Machine::default();
        let Value::Dict(top) = machine.run(&pickle)? else {
            return Err("expected a dictionary of tensors".into());
        };
        let mut file = Self::default();
        let mut storages = BTreeMap::new();
        for (key, value) in machine.entries(top) {
            let Value::Text(name) = key else { continue };
            match value {
                Value::Tensor(number) => {
                    let spec = machine.tensor(number)?;
                    let storage = match storages.get(&spec.storage.key) {
                        Some(storage) => storage,
                        None => {
                            let bytes = archive.read(&format!("data/{}", spec.storage.key))?;
                            storages.entry(spec.storage.key.clone()).or_insert(bytes)
                        }
                    };
                    let tensor = tensor(spec, storage).map_err(|what| format!("{name}: {what}"))?;
                    file.tensors.insert(name.to_string(), tensor);
                }
                Value::Text(text) => {
                    file.texts.insert(name.to_string(), text.to_string());
                }
                _ => {}
            }
        }
        Ok(file)
    }
}

/// A ZIP archive all of whose names begin with one folder.
struct Archive<'a> {
    zip: ZipArchive<Cursor<&'a [u8]>>,
    root: String,
    size: u64,
}

impl<'a> Archive<'a> {
    fn open(bytes: &'a [u8]) -> Result<Self, String> {
        if bytes.is_empty() {
            return Err("an empty file".into());
        }
        let zip = ZipArchive::new(Cursor::new(bytes));
        let zip = zip.map_err(|e| format!("not an archive that torch.save wrote: {e}"))?;
        let pickle = zip.file_names().find_map(|name| Some(name.ok()?.strip_suffix("data.pkl")?.to_owned()));
        let root = pickle.ok_or("not an archive that torch.save wrote: no data.pkl")?;
        Ok(Self { zip, root, size: bytes.len() as u64 })
    }

    /// A file of the archive. torch packs nothing, so none is larger than the archive.
    fn read(&mut self, name: &str) -> Result<Vec<u8>, String> {
        let name = format!("{}{name}", self.root);
        let mut file = self.zip.by_name(&name).map_err(|e| format!("{name}: {e}"))?;
        if file.compression() != CompressionMethod::Stored || file.size() > self.size {
            return Err(format!("{name}: packed, which torch.save does not do"));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|e| format!("{name}: {e}"))?;
        Ok(bytes)
    }
}

/// A tensor of its storage's bytes.
fn tensor(spec: &TensorSpec, storage: &[u8]) -> Result<Tensor, String> {
    let width = spec.storage.kind.width();
    let wrong = || {
        format!(
            "{:?} with strides {:?} from {} leave the {} elements",
            spec.dims,
            spec.strides,
            spec.offset,
            storage.len() / width
        )
    };
    let count = spec.dims.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim)).ok_or_else(wrong)?;
    let reach =
        spec.dims.iter().zip(&spec.strides).try_fold(spec.offset, |reach, (dim, stride)| {
            reach.checked_add(dim.saturating_sub(1).checked_mul(*stride)?)
        });
    // A view that repeats elements could be of any size.
    if count > 0 && (reach.is_none_or(|last| last >= storage.len() / width) || count > storage.len() / width) {
        return Err(wrong());
    }
    let mut bytes = Vec::with_capacity(count * width);
    let mut place = vec![0usize; spec.dims.len()];
    for _ in 0..count {
        let at = spec.offset + place.iter().zip(&spec.strides).map(|(i, stride)| i * stride).sum::<usize>();
        bytes.extend(&storage[at * width..][..width]);
        for axis in (0..place.len()).rev() {
            place[axis] += 1;
            if place[axis] < spec.dims[axis] {
                break;
            }
            place[axis] = 0;
        }
    }
    let cpu = Device::cpu();
    let integers = |values: &mut dyn Iterator<Item = i64>| -> Result<Tensor, String> {
        let whole: Result<Vec<u32>, _> = values.map(u32::try_from).collect();
        let whole = whole.map_err(|_| "integers outside 0..2^32".to_owned())?;
        Tensor::from_vec(whole, &spec.dims, &cpu).map_err(|e| e.to_string())
    };
    let plain = |dtype: DType| Tensor::from_bytes(&bytes, &spec.dims, dtype, &cpu).map_err(|e| e.to_string());
    use pickle::StorageKind as K;
    match spec.storage.kind {
        K::F32 => plain(DType::F32),
        K::F64 => plain(DType::F64),
        K::F16 => plain(DType::F16),
        K::Bf16 => plain(DType::BF16),
        K::I64 => integers(&mut bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b))),
        K::I32 => integers(&mut bytes.as_chunks().0.iter().map(|b| i64::from(i32::from_le_bytes(*b)))),
        K::U8 => integers(&mut bytes.iter().map(|b| i64::from(*b))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_such_file_is_told() {
        for (bytes, part) in [(&b""[..], "empty"), (b"PK\x03\x04 cut short", "torch.save"), (b"{}", "torch.save")] {
            let error = TorchFile::parse(bytes).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn views_of_storages_are_read_and_those_that_leave_them_refused() {
        let storage: Vec<u8> = (0..6u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
        let spec = |dims: &[usize], strides: &[usize], offset| TensorSpec {
            storage: pickle::Storage { kind: pickle::StorageKind::F32, key: "0".into() },
            offset,
            dims: dims.into(),
            strides: strides.into(),
        };
        let turned = tensor(&spec(&[3, 2], &[1, 3], 0), &storage).unwrap();
        assert_eq!(turned.to_vec::<f32>().unwrap(), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        for (dims, strides, offset) in
            [(&[7][..], &[1][..], 0), (&[1], &[1], 6), (&[1 << 40, 1 << 40], &[0, 0], 0), (&[100], &[0], 0)]
        {
            assert!(tensor(&spec(dims, strides, offset), &storage).unwrap_err().contains("leave the 6"), "{dims:?}");
        }
    }
}
