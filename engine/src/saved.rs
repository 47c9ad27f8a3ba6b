//! What an op's forward keeps for its backward.

use std::sync::OnceLock;

use crate::nn::Param;
use crate::{DType, Error, Result, Tensor};

/// The name of something that is kept for backward: a word, and a number where several have the same one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot(&'static str, usize);

impl From<&'static str> for Slot {
    fn from(name: &'static str) -> Self {
        Self(name, 0)
    }
}

impl From<(&'static str, usize)> for Slot {
    fn from((name, number): (&'static str, usize)) -> Self {
        Self(name, number)
    }
}

#[derive(Debug)]
enum Kept {
    /// With the version that its storage had.
    Tensor(Tensor, u64),
    /// With the version that its value had, and its value once backward needs it.
    Param(Param, u64, OnceLock<Tensor>),
    Shape(Vec<usize>, DType),
}

/// What an op's forward kept, by name: what one of them leaves out shifts no other.
#[derive(Debug, Default)]
pub struct Saved(Vec<(Slot, Kept)>);

impl Saved {
    /// Keeps a tensor: of a parameter's value the parameter alone.
    pub(crate) fn keep(&mut self, slot: Slot, tensor: &Tensor) {
        let param = tensor.param().and_then(|param| Some((param.clone(), param.version()?)));
        let kept = match param {
            Some((param, version)) => Kept::Param(param, version, OnceLock::new()),
            None => Kept::Tensor(tensor.detach(), tensor.storage().version()),
        };
        self.0.push((slot, kept));
    }

    /// Keeps dims and dtype of a tensor.
    pub(crate) fn keep_shape(&mut self, slot: Slot, tensor: &Tensor) {
        self.0.push((slot, Kept::Shape(tensor.dims().to_vec(), tensor.dtype())));
    }

    fn find(&self, slot: Slot) -> Option<&Kept> {
        self.0.iter().find_map(|(s, kept)| (*s == slot).then_some(kept))
    }

    fn missing(slot: Slot) -> Error {
        Error::argument("backward", format!("what forward keeps as {:?} {}", slot.0, slot.1), "nothing")
    }

    /// A tensor that forward kept.
    ///
    /// # Errors
    /// When it kept none of that name.
    pub fn get(&self, slot: impl Into<Slot>) -> Result<&Tensor> {
        let slot = slot.into();
        self.optional(slot).ok_or_else(|| Self::missing(slot))
    }

    /// A tensor that forward may have kept.
    pub fn optional(&self, slot: impl Into<Slot>) -> Option<&Tensor> {
        match self.find(slot.into()) {
            Some(Kept::Tensor(tensor, _)) => Some(tensor),
            Some(Kept::Param(_, _, value)) => value.get(),
            _ => None,
        }
    }

    /// Dims and dtype of what forward kept, whole or as a shape.
    ///
    /// # Errors
    /// When it kept neither.
    pub fn shape(&self, slot: impl Into<Slot>) -> Result<(&[usize], DType)> {
        let slot = slot.into();
        match self.find(slot) {
            Some(Kept::Tensor(tensor, _)) => Ok((tensor.dims(), tensor.dtype())),
            Some(Kept::Param(param, ..)) => Ok((param.dims(), param.dtype())),
            Some(Kept::Shape(dims, dtype)) => Ok((dims, *dtype)),
            None => Err(Self::missing(slot)),
        }
    }

    /// Fetches the values of parameters, and checks that nothing was written since it was kept.
    pub(crate) fn fetch(&self, op: &'static str) -> Result<()> {
        for (_, kept) in &self.0 {
            let same = match kept {
                Kept::Tensor(tensor, version) => tensor.storage().version() == *version,
                Kept::Param(param, version, cell) => {
                    let value = param.value()?.plain();
                    cell.get_or_init(|| value);
                    param.version() == Some(*version)
                }
                Kept::Shape(..) => true,
            };
            if !same {
                return Err(Error::Overwritten { op });
            }
        }
        Ok(())
    }
}
