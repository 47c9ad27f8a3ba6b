//! Dropout inside adapters, whose forward is given no random numbers.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::{Philox, Result, Tensor, ops};

/// Where dropout acts, relative to the adapter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum DropoutPosition {
    /// On what the adapter reads.
    Pre,
    /// On what it adds.
    #[default]
    Post,
}

/// What drops elements in training: off unless masks are given.
#[derive(Clone, Debug)]
pub struct Dropout {
    /// The share of elements that are zeroed.
    pub probability: f64,
    /// Where.
    pub position: DropoutPosition,
    /// What the masks are drawn from.
    pub masks: DropoutMasks,
}

/// The random numbers of all masks of a model, set for each pass through it. Clones are the same source. A mask is a
/// function of the generator and of the layer's path, so that a block that runs again in backward draws the same one.
#[derive(Clone, Debug, Default)]
pub struct DropoutMasks(Arc<Mutex<Option<Philox>>>);

impl DropoutMasks {
    /// Nothing is dropped from here on, or what the generator's forks draw.
    pub fn set(&self, random: Option<Philox>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = random;
    }

    fn of(&self, stream: u64) -> Option<Philox> {
        let random = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        random.as_ref().map(|random| random.fork(stream))
    }
}

impl Dropout {
    /// `x` with elements dropped if this is the position and training gave masks; `stream` is the layer's own.
    pub(super) fn at(&self, position: DropoutPosition, x: Tensor, stream: u64) -> Result<Tensor> {
        match self.masks.of(stream).filter(|_| self.position == position) {
            Some(mut random) => ops::dropout(&x, self.probability, &mut random),
            None => Ok(x),
        }
    }
}
