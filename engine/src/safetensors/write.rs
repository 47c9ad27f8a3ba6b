//! Tensors written in the safetensors format: to files that are whole or absent, or to memory.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, SafeTensorError, TensorInfo};

use super::format_error;
use crate::files::write_whole;
use crate::float8::to_e4m3;
use crate::{DType, Error, Result, Tensor};

/// How matrices are written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Matrices {
    AsTheyAre,
    /// As e4m3.
    Float8,
}

/// Writes tensors and free text. The file appears whole, in place of an older one, or not at all.
///
/// # Errors
/// When the folder can't be written.
pub fn save(path: impl AsRef<Path>, tensors: &[(String, Tensor)], text: &BTreeMap<String, String>) -> Result<()> {
    save_as(path.as_ref(), tensors, text, Matrices::AsTheyAre)
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
    save_as(path.as_ref(), tensors, text, Matrices::Float8)
}

/// What [`save`] would write, in memory.
///
/// # Errors
/// When two tensors have one name, or a device fails.
pub fn to_bytes(tensors: &[(String, Tensor)], text: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    write(&mut bytes, Path::new("safetensors in memory"), tensors, text, Matrices::AsTheyAre)?;
    Ok(bytes)
}

fn save_as(
    path: &Path,
    tensors: &[(String, Tensor)],
    text: &BTreeMap<String, String>,
    matrices: Matrices,
) -> Result<()> {
    let io = |source| Error::Io { path: path.into(), source };
    write_whole(path, |partial| {
        let mut out = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(partial).map_err(io)?);
        write(&mut out, path, tensors, text, matrices)?;
        out.flush().map_err(io)
    })
}

impl Matrices {
    fn dtype(self, tensor: &Tensor) -> Dtype {
        match tensor.dtype() {
            DType::U32 => Dtype::U32,
            _ if self == Self::Float8 && tensor.rank() > 1 => Dtype::F8_E4M3,
            DType::F32 => Dtype::F32,
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            DType::F64 => Dtype::F64,
        }
    }
}

/// The header, then one tensor after the other: each leaves its device when its turn comes, so one at a time is in memory twice.
fn write(
    out: &mut impl Write,
    path: &Path,
    tensors: &[(String, Tensor)],
    text: &BTreeMap<String, String>,
    matrices: Matrices,
) -> Result<()> {
    let mut all: Vec<_> = tensors.iter().map(|(name, tensor)| (name, tensor, matrices.dtype(tensor))).collect();
    // Wide elements first, so that all are aligned.
    all.sort_by(|(a, _, left), (b, _, right)| right.cmp(left).then(a.cmp(b)));
    let mut end = 0;
    let infos = all.iter().map(|(name, tensor, dtype)| {
        let start = end;
        end += tensor.numel() * dtype.bitsize() / 8;
        let info = TensorInfo { dtype: *dtype, shape: tensor.dims().to_vec(), data_offsets: (start, end) };
        ((*name).clone(), info)
    });
    let text = (!text.is_empty()).then(|| text.clone().into_iter().collect());
    let wrong = |e: SafeTensorError| format_error(path, e);
    let metadata = Metadata::new(text, infos.collect()).map_err(wrong)?;
    let mut header = serde_json::to_vec(&metadata).map_err(|e| format_error(path, e))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let io = |source| Error::Io { path: path.into(), source };
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    out.write_all(&header).map_err(io)?;
    for (_, tensor, dtype) in all {
        let bytes = match dtype {
            Dtype::F8_E4M3 => {
                let values = tensor.to_dtype(DType::F32)?.to_vec::<f32>()?;
                values.into_iter().map(to_e4m3).collect()
            }
            _ => tensor.to_bytes()?,
        };
        out.write_all(&bytes).map_err(io)?;
    }
    Ok(())
}
