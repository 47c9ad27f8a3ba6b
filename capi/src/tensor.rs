//! Tensors, batches and bytes that a caller hands over.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_void};

use flowtape_data::collate::data_type;
use flowtape_engine::{DType, Device, Tensor};
use flowtape_flowmatch::Batch;

use crate::call::{Failure, array, reference, text};

/// What a tensor's elements are, in the machine's order of bytes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlowtapeDtype {
    /// 32-bit floats.
    F32 = 0,
    /// The upper half of 32-bit floats.
    BF16 = 1,
    /// 16-bit floats.
    F16 = 2,
    /// 64-bit floats.
    F64 = 3,
    /// 32-bit unsigned integers.
    U32 = 4,
}

const DTYPES: [(FlowtapeDtype, DType); 5] = [
    (FlowtapeDtype::F32, DType::F32),
    (FlowtapeDtype::BF16, DType::BF16),
    (FlowtapeDtype::F16, DType::F16),
    (FlowtapeDtype::F64, DType::F64),
    (FlowtapeDtype::U32, DType::U32),
];

/// A tensor of the caller's, row-major and without gaps. It is copied; nothing is kept of it after a call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FlowtapeTensor {
    /// `latents` (`[B, C, H, W]` or `[B, C, F, H, W]`), or what the model's adapter reads, such as `text_embeddings`; of a list of
    /// tensors one is `name.0`, the next `name.1`.
    pub name: *const c_char,
    /// The elements; they need no alignment.
    pub data: *const c_void,
    /// A `FlowtapeDtype`.
    pub dtype: u32,
    /// Sizes.
    pub dims: *const usize,
    /// How many sizes.
    pub rank: usize,
}

/// Bytes that the library made. They are freed by `flowtape_bytes_free`, not by `free`.
#[repr(C)]
#[derive(Debug)]
pub struct FlowtapeBytes {
    /// The first one.
    pub data: *mut u8,
    /// How many.
    pub len: usize,
}

impl From<Vec<u8>> for FlowtapeBytes {
    fn from(bytes: Vec<u8>) -> Self {
        let bytes = bytes.into_boxed_slice();
        let len = bytes.len();
        Self { data: Box::into_raw(bytes).cast(), len }
    }
}

/// Frees bytes that the library made; null is none.
///
/// # Safety
/// They are as the library gave them, and were not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flowtape_bytes_free(bytes: FlowtapeBytes) {
    if !bytes.data.is_null() {
        // SAFETY: made by `FlowtapeBytes::from` with this length, as the caller promises.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(bytes.data, bytes.len)) });
    }
}

/// Elements in the machine's order of bytes as the engine stores them, which is little-endian.
fn little_endian(mut bytes: Vec<u8>, size: usize) -> Vec<u8> {
    if cfg!(target_endian = "big") {
        bytes.chunks_exact_mut(size).for_each(<[u8]>::reverse);
    }
    bytes
}

impl FlowtapeTensor {
    /// The engine's copy, and its name.
    ///
    /// # Safety
    /// Its pointers are null or point to what they say.
    unsafe fn copy(&self) -> Result<(String, Tensor), Failure> {
        // SAFETY: the caller's.
        let name = unsafe { text(self.name, "name of a tensor")? }.to_owned();
        // SAFETY: the caller's.
        let dims = unsafe { array(self.dims, self.rank, &format!("{name}: dims"))? };
        let Some((_, dtype)) = DTYPES.iter().find(|(code, _)| *code as u32 == self.dtype) else {
            let known: Vec<String> = DTYPES.iter().map(|(code, dtype)| format!("{} ({dtype})", *code as u32)).collect();
            return Err(Failure::Error(format!("{name}: dtype: expected {}, got {}", known.join(", "), self.dtype)));
        };
        let bytes = dims.iter().try_fold(dtype.size(), |bytes, dim| bytes.checked_mul(*dim));
        let bytes = bytes.ok_or_else(|| Failure::Error(format!("{name}: {dims:?} is more than the address space")))?;
        // SAFETY: the caller's.
        let bytes = unsafe { array(self.data.cast::<u8>(), bytes, &format!("{name}: data"))? };
        let bytes = little_endian(bytes.to_vec(), dtype.size());
        Ok((name, Tensor::from_bytes(&bytes, dims, *dtype, &Device::cpu())?))
    }
}

/// The batch that some tensors make.
///
/// # Safety
/// The pointer is null or points to `count` tensors, whose pointers are null or point to what they say.
pub(crate) unsafe fn batch(tensors: *const FlowtapeTensor, count: usize, what: &str) -> Result<Batch, Failure> {
    let (mut named, mut lists) = (BTreeMap::new(), BTreeMap::<String, BTreeMap<usize, Tensor>>::new());
    // SAFETY: the caller's.
    for tensor in unsafe { array(tensors, count, what)? } {
        // SAFETY: the caller's.
        let (name, tensor) = unsafe { reference(tensor, what)?.copy()? };
        let of_list = name.rsplit_once('.').and_then(|(list, number)| Some((list.to_owned(), number.parse().ok()?)));
        let twice = match of_list {
            Some((list, number)) => lists.entry(list).or_default().insert(number, tensor),
            None => named.insert(name.clone(), tensor),
        };
        if twice.is_some() {
            return Err(Failure::Error(format!("{what}: {name} is there twice")));
        }
    }
    let Some(latents) = named.remove("latents") else {
        let names = named.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        return Err(Failure::Error(format!("{what}: expected a tensor `latents`, got [{names}]")));
    };
    let data_type = data_type(latents.dims())?;
    let batch =
        named.into_iter().fold(Batch::new(latents, data_type), |batch, (name, tensor)| batch.with(&name, tensor));
    Ok(lists.into_iter().fold(batch, |batch, (list, tensors)| batch.with_list(&list, tensors.into_values().collect())))
}
