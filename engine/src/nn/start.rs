//! What a parameter begins as.

use std::sync::Arc;

use crate::safetensors::Shards;
use crate::{DType, Device, Error, Philox, Result, Tensor, hash};

/// How a parameter starts.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Uniform in `[-bound, bound)`.
    Uniform {
        /// The bound.
        bound: f64,
    },
    /// Normal around zero.
    Normal {
        /// The standard deviation.
        std: f64,
    },
}

/// Where a parameter's first value comes from: a file that is read, or else a rule and the model's generator.
#[derive(Clone, Debug)]
pub(super) struct Start {
    pub file: Option<Arc<Shards>>,
    pub init: Init,
    pub random: Philox,
}

impl Start {
    /// Checks that what the file has of that path, if anything, is of a dtype that is read.
    pub fn check(&self, path: &str) -> Result<()> {
        match &self.file {
            Some(file) if file.dims(path).is_some() => file.check(path),
            _ => Ok(()),
        }
    }

    /// The value of the parameter of that path; of what does not fit to the file, its sizes alone.
    pub fn value(&self, path: &str, dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        match &self.file {
            Some(file) if file.dims(path) != Some(dims) => {
                Tensor::zeros(&[], dtype, device).map(|one| one.shape_only(dims))
            }
            _ if !device.backend().has_data() => Tensor::empty(dims, dtype, device),
            Some(file) => file.get(path, device, Some(dtype)),
            None => self.made(path, dims, dtype, device),
        }
    }

    fn made(&self, path: &str, dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let mut random = self.random.fork(hash::of(path.as_bytes()));
        match self.init {
            Init::Zeros => Tensor::zeros(dims, dtype, device),
            Init::Ones => Tensor::ones(dims, dtype, device),
            Init::Uniform { bound } => {
                let unit = random.uniform(dims, device)?;
                unit.mul_scalar(2.0 * bound)?.add_scalar(-bound)?.to_dtype(dtype)
            }
            Init::Normal { std } => random.normal(dims, device)?.mul_scalar(std)?.to_dtype(dtype),
        }
    }
}

/// An error with the name of the parameter that memory ran out for.
pub(super) fn named(path: &str, error: Error) -> Error {
    match error {
        Error::OutOfMemory { device, bytes, reason } => {
            Error::OutOfMemory { device, bytes, reason: format!("parameter {path}: {reason}") }
        }
        other => other,
    }
}
