//! Some of another source's samples.

use std::sync::Arc;

use flowtape_engine::Philox;

use super::{Sample, SampleHeader, Source};
use crate::{Fingerprint, Result};

/// Chosen samples of another source, some perhaps more than once: those that are trained on, or those that are held out.
#[derive(Clone)]
pub struct Part {
    source: Arc<dyn Source>,
    indices: Arc<[usize]>,
}

impl Part {
    /// Of the samples with these numbers, in this order; what lies beyond the source's end is left out.
    pub fn new(source: Arc<dyn Source>, mut indices: Vec<usize>) -> Self {
        indices.retain(|index| *index < source.len());
        Self { indices: indices.into(), source }
    }

    /// The number in the other source; beyond its end for a sample that there is not.
    fn at(&self, index: usize) -> usize {
        self.indices.get(index).copied().unwrap_or(usize::MAX)
    }
}

impl Source for Part {
    fn len(&self) -> usize {
        self.indices.len()
    }

    fn header(&self, index: usize) -> Result<SampleHeader> {
        self.source.header(self.at(index))
    }

    fn read(&self, index: usize, random: &mut Philox) -> Result<Sample> {
        self.source.read(self.at(index), random)
    }

    fn name(&self, index: usize) -> String {
        self.source.name(self.at(index))
    }

    fn file(&self, index: usize) -> Result<Option<String>> {
        self.source.file(self.at(index))
    }

    fn caption(&self, index: usize) -> Result<Option<String>> {
        self.source.caption(self.at(index))
    }

    fn key(&self, index: usize) -> Result<Fingerprint> {
        self.source.key(self.at(index))
    }

    fn verify(&self, index: usize) -> Result<()> {
        self.source.verify(self.at(index))
    }

    fn fingerprint(&self) -> Fingerprint {
        let add = |all: Fingerprint, index: &usize| all.and(&(*index as u64).to_le_bytes());
        self.indices.iter().fold(self.source.fingerprint(), add)
    }
}
