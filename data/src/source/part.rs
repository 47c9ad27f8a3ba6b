//! Some of another source's samples.

use std::ops::Range;
use std::sync::Arc;

use flowtape_engine::Philox;

use super::{Sample, SampleHeader, Source};
use crate::{Fingerprint, Result};

/// The samples of a range of another source: those that are trained on, or those that are held out.
#[derive(Clone)]
pub struct Part {
    source: Arc<dyn Source>,
    range: Range<usize>,
}

impl Part {
    /// Of the samples with these numbers; what lies beyond the source's end is left out.
    pub fn new(source: Arc<dyn Source>, range: Range<usize>) -> Self {
        let end = range.end.min(source.len());
        Self { range: range.start.min(end)..end, source }
    }
}

impl Source for Part {
    fn len(&self) -> usize {
        self.range.len()
    }

    fn header(&self, index: usize) -> Result<SampleHeader> {
        self.source.header(self.range.start + index)
    }

    fn read(&self, index: usize, random: &mut Philox) -> Result<Sample> {
        self.source.read(self.range.start + index, random)
    }

    fn name(&self, index: usize) -> String {
        self.source.name(self.range.start + index)
    }

    fn fingerprint(&self) -> Fingerprint {
        let Range { start, end } = self.range;
        self.source.fingerprint().and(&(start as u64).to_le_bytes()).and(&(end as u64).to_le_bytes())
    }
}
