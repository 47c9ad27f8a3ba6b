//! Checkpoints in the safetensors format: files read from mapped memory and written whole or not at all, or bytes in memory.

mod sharded;

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use half::bf16;
use memmap2::Mmap;
use safetensors::View;
use safetensors::tensor::{Metadata, SafeTensorError, TensorInfo, serialize, serialize_to_file};

pub use sharded::{Rows, Shards, save_sharded};

use crate::files::{mistaken_for, write_whole};
use crate::float8::{E4M3, E5M2, to_e4m3};
use crate::{DType, Device, Error, Result, Tensor, printable};

/// How ComfyUI's scaled weights of eight bits are told, and the end of the name of a scale.
const SCALED: &str = "scaled_fp8";
const SCALE: &str = ".scale_weight";

/// What is read from.
enum Bytes {
    File(Mmap),
    Memory(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::File(map) => map,
            Self::Memory(bytes) => bytes,
        }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

/// An open file, or one in memory: its tensors are read when asked for.
#[derive(Debug)]
pub struct SafeTensors {
    path: PathBuf,
    bytes: Bytes,
    /// Where the data starts.
    start: usize,
    metadata: Metadata,
}

fn format_error(path: &Path, what: impl ToString) -> Error {
    Error::Format { path: path.into(), what: what.to_string() }
}

impl SafeTensors {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// When it can't be read or is not a whole safetensors file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let io = |source| Error::Io { path: path.into(), source };
        let file = File::open(path).map_err(io)?;
        if file.metadata().map_err(io)?.is_dir() {
            return Err(format_error(path, "a folder, not a safetensors file"));
        }
        // SAFETY: files are replaced by renaming, never written in place; whoever truncates one while it is read
        // gets a bus error, as with every mapped file.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Self::of(path, Bytes::File(map))
    }

    /// The content of a file, wherever it comes from; errors call it `name`.
    ///
    /// # Errors
    /// When it is not that of a whole safetensors file.
    pub fn from_bytes(name: impl AsRef<Path>, bytes: Vec<u8>) -> Result<Self> {
        Self::of(name.as_ref(), Bytes::Memory(bytes))
    }

    fn of(path: &Path, bytes: Bytes) -> Result<Self> {
        let broken = |e: SafeTensorError| match mistaken_for(&bytes) {
            Some(what) => format_error(path, what),
            None => format_error(path, format!("not a whole safetensors file: {e}")),
        };
        // Checks that offsets are in order, without gaps, and end with the file.
        let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).map_err(broken)?;
        Ok(Self { path: path.into(), bytes, start: header + 8, metadata })
    }

    /// The file's path, or what bytes in memory are called.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, sorted; without those that only say how floats of eight bits are scaled.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.metadata.offset_keys();
        names.retain(|name| !self.is_about_scales(name));
        names.sort_unstable();
        names
    }

    /// Whether a tensor belongs to ComfyUI's scaled weights of eight bits: a mark, or the scale of a weight or of its input.
    fn is_about_scales(&self, name: &str) -> bool {
        let of = |end: &str| name.strip_suffix(end).is_some_and(|layer| self.is_float8(&format!("{layer}.weight")));
        of(SCALE) || of(".scale_input") || name == SCALED || name.ends_with(&format!(".{SCALED}"))
    }

    fn is_float8(&self, name: &str) -> bool {
        use safetensors::Dtype::{F8_E4M3, F8_E5M2};
        self.metadata.info(name).is_some_and(|info| matches!(info.dtype, F8_E4M3 | F8_E5M2))
    }

    /// What the elements of a weight of eight bits are multiplied with, where its file says so.
    fn scale(&self, name: &str, device: &Device) -> Result<Option<Tensor>> {
        let scale = name.strip_suffix(".weight").map(|layer| format!("{layer}{SCALE}"));
        match scale.filter(|scale| self.is_float8(name) && self.metadata.info(scale).is_some()) {
            Some(scale) => self.get(&scale, device, Some(DType::F32)).map(Some),
            None => Ok(None),
        }
    }

    /// The free text of the header.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.metadata.metadata().clone().unwrap_or_default().into_iter().collect()
    }

    /// The dims of a tensor, if there is one of that name.
    pub fn dims(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|i| &i.shape[..])
    }

    /// The dtype of a tensor as the file names it, such as `BF16`.
    pub fn dtype_name(&self, name: &str) -> Option<String> {
        self.metadata.info(name).map(|i| i.dtype.to_string())
    }

    /// Bytes of a tensor.
    pub fn bytes(&self, name: &str) -> Option<usize> {
        self.metadata.info(name).map(|i| i.data_offsets.1 - i.data_offsets.0)
    }

    /// A tensor, converted to `dtype` if one is given. Integers and booleans become u32; floats of eight bits become bf16, which
    /// holds all of them, or f32 where the file has a scale for them.
    ///
    /// # Errors
    /// When there is none of that name, its dtype is not one of ours, or an integer is outside u32.
    pub fn get(&self, name: &str, device: &Device, dtype: Option<DType>) -> Result<Tensor> {
        let (info, bytes) = self.stored(name)?;
        let tensor = self.read(name, info.dtype, &info.shape, bytes, device)?;
        let tensor = match self.scale(name, device)? {
            Some(scale) => tensor.to_dtype(DType::F32)?.mul(&scale)?,
            None => tensor,
        };
        dtype.map_or(Ok(tensor.clone()), |d| tensor.to_dtype(d))
    }

    /// A row of a tensor's first axis, without that axis; the rest of the file is not read.
    ///
    /// # Errors
    /// When there is none of that name or number, or its dtype is not one of ours.
    pub fn row(&self, name: &str, row: usize, device: &Device) -> Result<Tensor> {
        let (info, bytes) = self.stored(name)?;
        let Some((rows, dims)) = info.shape.split_first().filter(|(rows, _)| row < **rows) else {
            let what = format!("{}: no row {row} of {:?}", printable(name), info.shape);
            return Err(format_error(&self.path, what));
        };
        let width = bytes.len() / rows;
        self.read(name, info.dtype, dims, &bytes[row * width..][..width], device)
    }

    /// What the header says of a tensor, and its bytes.
    fn stored(&self, name: &str) -> Result<(&TensorInfo, &[u8])> {
        let Some(info) = self.metadata.info(name) else {
            return Err(format_error(&self.path, format!("no tensor {}", printable(name))));
        };
        let (from, to) = info.data_offsets;
        Ok((info, &self.bytes[self.start + from..self.start + to]))
    }

    fn read(
        &self,
        name: &str,
        stored: safetensors::Dtype,
        dims: &[usize],
        bytes: &[u8],
        device: &Device,
    ) -> Result<Tensor> {
        use safetensors::Dtype as D;
        let shown = printable(name);
        let integers = |values: &mut dyn Iterator<Item = i64>| -> Result<Tensor> {
            let whole = values.map(u32::try_from).collect::<Result<Vec<u32>, _>>();
            let whole = whole.map_err(|_| format_error(&self.path, format!("{shown}: integers outside 0..2^32")))?;
            Tensor::from_vec(whole, dims, device)
        };
        let eighths = |values: &[f32; 256]| {
            let wide = bytes.iter().map(|code| bf16::from_f32(values[usize::from(*code)])).collect::<Vec<_>>();
            Tensor::from_vec(wide, dims, device)
        };
        let plain = |dtype| Tensor::from_bytes(bytes, dims, dtype, device);
        match stored {
            D::F32 => plain(DType::F32),
            D::F64 => plain(DType::F64),
            D::F16 => plain(DType::F16),
            D::BF16 => plain(DType::BF16),
            D::U32 => plain(DType::U32),
            D::F8_E4M3 => eighths(&E4M3),
            D::F8_E5M2 => eighths(&E5M2),
            D::BOOL | D::U8 => integers(&mut bytes.iter().map(|&b| i64::from(b))),
            D::I32 => integers(&mut bytes.as_chunks().0.iter().map(|&b| i64::from(i32::from_le_bytes(b)))),
            D::I64 => integers(&mut bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b))),
            other => Err(format_error(&self.path, format!("{shown}: dtype {other:?} is not supported"))),
        }
    }
}

/// A tensor on its way into a file: it leaves its device when its turn comes, so one at a time is in memory twice.
struct Outgoing<'a> {
    tensor: &'a Tensor,
    /// Whether it becomes e4m3.
    float8: bool,
    failed: Rc<RefCell<Option<Error>>>,
}

impl Outgoing<'_> {
    fn bytes(&self) -> Result<Vec<u8>> {
        if !self.float8 {
            return self.tensor.to_bytes();
        }
        let values = self.tensor.to_dtype(DType::F32)?.to_vec::<f32>()?;
        Ok(values.into_iter().map(to_e4m3).collect())
    }
}

impl View for Outgoing<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        match self.tensor.dtype() {
            _ if self.float8 => safetensors::Dtype::F8_E4M3,
            DType::F32 => safetensors::Dtype::F32,
            DType::BF16 => safetensors::Dtype::BF16,
            DType::F16 => safetensors::Dtype::F16,
            DType::F64 => safetensors::Dtype::F64,
            DType::U32 => safetensors::Dtype::U32,
        }
    }

    fn shape(&self) -> &[usize] {
        self.tensor.dims()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.bytes().unwrap_or_else(|error| {
            self.failed.replace(Some(error));
            vec![0; self.data_len()]
        }))
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * if self.float8 { 1 } else { self.tensor.dtype().size() }
    }
}

/// Writes tensors and free text. The file appears whole, in place of an older one, or not at all.
///
/// # Errors
/// When the folder can't be written.
pub fn save(path: impl AsRef<Path>, tensors: &[(String, Tensor)], text: &BTreeMap<String, String>) -> Result<()> {
    write(path.as_ref(), tensors, text, false)
}

/// The same with all matrices (tensors of two axes or more) as floats of eight bits, e4m3: each element becomes the nearest
/// one, as in PyTorch's cast to `float8_e4m3fn`, but for those beyond 448, which become that.
///
/// # Errors
/// When the folder can't be written.
pub fn save_float8(
    path: impl AsRef<Path>,
    tensors: &[(String, Tensor)],
    text: &BTreeMap<String, String>,
) -> Result<()> {
    write(path.as_ref(), tensors, text, true)
}

fn write(path: &Path, tensors: &[(String, Tensor)], text: &BTreeMap<String, String>, float8: bool) -> Result<()> {
    write_whole(path, |partial| {
        serialised(path, tensors, text, float8, |views, text| serialize_to_file(views, text, partial))
    })
}

/// The content of the file that [`save`] would write.
///
/// # Errors
/// When the device fails.
pub fn to_bytes(tensors: &[(String, Tensor)], text: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    serialised(Path::new("memory"), tensors, text, false, |views, text| serialize(views, text))
}

/// What `write` makes of the tensors, which leave their device while it runs.
fn serialised<'a, R>(
    path: &Path,
    tensors: &'a [(String, Tensor)],
    text: &BTreeMap<String, String>,
    float8: bool,
    write: impl FnOnce(Vec<(&'a str, Outgoing<'a>)>, Option<HashMap<String, String>>) -> Result<R, SafeTensorError>,
) -> Result<R> {
    let failed = Rc::default();
    let view = |(name, tensor): &'a (String, Tensor)| {
        let float8 = float8 && tensor.dims().len() > 1 && tensor.dtype() != DType::U32;
        (name.as_str(), Outgoing { tensor, float8, failed: Rc::clone(&failed) })
    };
    let text = (!text.is_empty()).then(|| text.clone().into_iter().collect());
    let written = write(tensors.iter().map(view).collect(), text).map_err(|e| match e {
        SafeTensorError::IoError(source) => Error::Io { path: path.into(), source },
        other => format_error(path, other),
    })?;
    failed.take().map_or(Ok(written), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_read_back() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let cpu = Device::cpu();
        let a = Tensor::from_vec(vec![1f32, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3], &cpu)?;
        let b = Tensor::from_vec(vec![7u32], &[1], &cpu)?;
        let text = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let all = [("a".into(), a.t()?), ("b".into(), b), ("c".into(), a.to_dtype(DType::BF16)?)];
        save(&path, &all, &text)?;
        let file = SafeTensors::open(&path)?;
        assert_eq!(file.names(), ["a", "b", "c"]);
        assert_eq!(file.dims("a"), Some(&[3usize, 2][..]));
        assert_eq!(file.metadata(), text);
        assert_eq!(file.get("a", &cpu, None)?.to_vec::<f32>()?, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        assert_eq!(file.get("b", &cpu, None)?.to_vec::<u32>()?, [7]);
        let c = file.get("c", &cpu, Some(DType::F64))?;
        assert_eq!((c.dtype(), c.to_vec::<f64>()?[5]), (DType::F64, 6.0));
        assert!(file.get("d", &cpu, None).unwrap_err().to_string().contains("no tensor d"));
        let row = file.row("c", 1, &cpu)?;
        assert_eq!((row.dims(), row.dtype(), row.to_vec::<f32>()?), (&[3][..], DType::BF16, vec![4.0, 5.0, 6.0]));
        assert!(file.row("c", 2, &cpu).unwrap_err().to_string().contains("no row 2 of [2, 3]"));
        // In memory it is the same.
        let bytes = to_bytes(&all, &text)?;
        assert!(bytes == std::fs::read(&path).unwrap());
        let held = SafeTensors::from_bytes("held", bytes.clone())?;
        assert_eq!((held.names(), held.metadata()), (file.names(), text));
        assert_eq!(held.get("a", &cpu, None)?.to_vec::<f32>()?, file.get("a", &cpu, None)?.to_vec::<f32>()?);
        let short = SafeTensors::from_bytes("held", bytes[..bytes.len() - 1].to_vec()).unwrap_err().to_string();
        assert!(short.contains("held") && short.contains("not a whole safetensors file"), "{short}");
        Ok(())
    }

    #[test]
    fn floats_of_eight_bits_are_read_with_their_scales_and_written() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let cpu = Device::cpu();
        let weight = Tensor::from_vec(vec![1f32, 1.06, -500.0, 0.0015], &[2, 2], &cpu)?;
        let bias = Tensor::from_vec(vec![1.06f32], &[1], &cpu)?;
        let scale = Tensor::from_vec(vec![0.5f32], &[], &cpu)?;
        let named =
            |layer: &str| [(format!("{layer}.weight"), weight.clone()), (format!("{layer}.bias"), bias.clone())];
        let mut all = [named("a"), named("b")].concat();
        all.push(("b.scale_weight".into(), scale.clone()));
        all.push((SCALED.into(), Tensor::zeros(&[0], DType::F32, &cpu)?));
        save_float8(&path, &all, &BTreeMap::new())?;
        let file = SafeTensors::open(&path)?;
        assert_eq!(file.names(), ["a.bias", "a.weight", "b.bias", "b.weight"]);
        assert_eq!((file.dtype_name("a.weight").as_deref(), file.bytes("a.weight")), (Some("F8_E4M3"), Some(4)));
        let a = file.get("a.weight", &cpu, None)?;
        assert_eq!((a.dtype(), a.to_vec::<f32>()?), (DType::BF16, vec![1.0, 1.0, -448.0, 0.001_953_125]));
        assert_eq!(file.get("b.weight", &cpu, Some(DType::F32))?.to_vec::<f32>()?[..3], [0.5, 0.5, -224.0]);
        assert_eq!(file.get("a.bias", &cpu, None)?.to_vec::<f32>()?, [1.06]);
        Ok(())
    }

    #[test]
    fn a_broken_file_is_an_error_that_names_it() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        save(&path, &[("a".into(), Tensor::ones(&[100], DType::F32, &Device::cpu())?)], &BTreeMap::new())?;
        let whole = std::fs::read(&path).unwrap();
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
        for (broken, what) in [
            (&whole[..whole.len() - 4], "not a whole safetensors file"),
            (&whole[..20], "not a whole safetensors file"),
            (b"not a checkpoint", "not a whole safetensors file"),
            (&[][..], "empty"),
            (pointer, "git lfs pull"),
            (b"<!DOCTYPE html><html></html>", "web page"),
        ] {
            std::fs::write(&path, broken).unwrap();
            let message = SafeTensors::open(&path).unwrap_err().to_string();
            assert!(message.contains("a.safetensors") && message.contains(what), "{message}");
        }
        assert!(SafeTensors::open(folder.path()).unwrap_err().to_string().contains("a folder"));
        assert!(matches!(SafeTensors::open(folder.path().join("none")), Err(Error::Io { .. })));
        let nowhere = folder.path().join("no/such/folder.safetensors");
        assert!(save(&nowhere, &[], &BTreeMap::new()).is_err());
        Ok(())
    }
}
