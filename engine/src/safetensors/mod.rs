//! Checkpoints in the safetensors format: read from mapped memory, written whole or not at all.

mod sharded;
mod snapshot;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::tensor::{Metadata, SafeTensorError, TensorInfo};

pub use sharded::{Rows, Shards, index_shards, save_shard, save_sharded};
pub use snapshot::Snapshot;
pub use write::{save, save_float8, to_bytes};

use crate::files::mistaken_for;
use crate::float8::{E4M3, E5M2};
use crate::platform::FileBytes;
use crate::{DType, Device, Error, Result, Tensor, printable};

/// How ComfyUI's scaled weights of eight bits are told, and the end of the name of a scale.
const SCALED: &str = "scaled_fp8";
const SCALE: &str = ".scale_weight";

/// An open file, or the bytes of one: its tensors are read when asked for.
#[derive(Debug)]
pub struct SafeTensors {
    path: PathBuf,
    bytes: FileBytes,
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
        if path.is_dir() {
            return Err(format_error(path, "a folder, not a safetensors file"));
        }
        Self::new(path, FileBytes::open(path).map_err(|source| Error::Io { path: path.into(), source })?)
    }

    /// Reads the header of a file that is in memory. Errors call it `name`, in place of a path.
    ///
    /// # Errors
    /// When it is not a whole safetensors file.
    pub fn from_bytes(name: impl AsRef<Path>, bytes: Vec<u8>) -> Result<Self> {
        Self::new(name.as_ref(), bytes.into())
    }

    fn new(path: &Path, bytes: FileBytes) -> Result<Self> {
        let broken = |e: SafeTensorError| match mistaken_for(&bytes) {
            Some(what) => format_error(path, what),
            None => format_error(path, format!("not a whole safetensors file: {e}")),
        };
        // Checks that offsets are in order, without gaps, and end with the file.
        let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).map_err(broken)?;
        Ok(Self { path: path.into(), bytes, start: header + 8, metadata })
    }

    /// The file's path, or the name that stands for it.
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

    /// Checks that a tensor is there and of a dtype that is read, without reading it.
    ///
    /// # Errors
    /// When it is not.
    pub fn check(&self, name: &str) -> Result<()> {
        self.read(name, self.stored(name)?.0.dtype, &[0], &[], &Device::cpu()).map(|_| ())
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

    /// The header, as it stands in the file.
    pub(crate) fn header(&self) -> &[u8] {
        &self.bytes[..self.start]
    }

    /// The bytes of a tensor, if there is one of that name.
    pub(crate) fn raw(&self, name: &str) -> Option<&[u8]> {
        self.stored(name).ok().map(|(_, bytes)| bytes)
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
        Ok(())
    }

    /// The bytes are those of the format's own crate, in memory as in a file, whatever the machine's order of bytes.
    #[test]
    fn what_is_written_is_what_the_format_says() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let cpu = Device::cpu();
        let wide = Tensor::from_vec(vec![1f32, -2.5, 3e-9], &[3], &cpu)?;
        let tensors = [
            ("b.narrow".to_owned(), wide.to_dtype(DType::BF16)?),
            ("b".to_owned(), wide.reshape(&[3, 1])?),
            ("a.index".to_owned(), Tensor::from_vec(vec![1u32, 0x0102_0304], &[2], &cpu)?),
            ("a.long".to_owned(), wide.to_dtype(DType::F64)?),
        ];
        let text = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let expected = {
            let le = |words: &[&[u8]]| words.concat();
            let data = [
                le(&[&[0x80, 0x3f], &[0x20, 0xc0], &[0x4e, 0x31]]),
                le(&[&1f32.to_le_bytes(), &(-2.5f32).to_le_bytes(), &3e-9f32.to_le_bytes()]),
                le(&[&[1, 0, 0, 0], &[4, 3, 2, 1]]),
                le(&[&1f64.to_le_bytes(), &(-2.5f64).to_le_bytes(), &f64::from(3e-9f32).to_le_bytes()]),
            ];
            use safetensors::Dtype as D;
            let shapes = [vec![3], vec![3, 1], vec![2], vec![3]];
            let views = [D::BF16, D::F32, D::U32, D::F64].into_iter().zip(shapes).zip(&data);
            let views =
                views.map(|((dtype, shape), data)| safetensors::tensor::TensorView::new(dtype, shape, data).unwrap());
            let named = tensors.iter().map(|(name, _)| name).zip(views);
            safetensors::serialize(named, Some(text.clone().into_iter().collect())).unwrap()
        };
        let written = to_bytes(&tensors, &text)?;
        assert_eq!(written, expected);
        let path = folder.path().join("a.safetensors");
        save(&path, &tensors, &text)?;
        assert_eq!(std::fs::read(&path).unwrap(), expected);
        let read = SafeTensors::from_bytes("memory", written)?;
        assert_eq!((read.get("b.narrow", &cpu, None)?.to_vec::<f32>()?[1], read.path()), (-2.5, Path::new("memory")));
        assert_eq!(read.get("a.index", &cpu, None)?.to_vec::<u32>()?, [1, 0x0102_0304]);
        assert_eq!(read.get("a.long", &cpu, None)?.to_vec::<f64>()?[2], f64::from(3e-9f32));
        let broken = SafeTensors::from_bytes("memory", expected[..40].to_vec()).unwrap_err().to_string();
        assert!(broken.contains("memory") && broken.contains("not a whole safetensors file"), "{broken}");
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
