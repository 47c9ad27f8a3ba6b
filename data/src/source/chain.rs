//! Several sources one after the other.

use std::sync::Arc;

use flowtape_engine::Philox;

use super::{Sample, SampleHeader, Source};
use crate::{Error, Fingerprint, Result};

/// The samples of several sources, those of each so many times in an epoch.
#[derive(Clone)]
pub struct Chain {
    parts: Vec<(Arc<dyn Source>, usize)>,
    /// The number of samples up to each part's end.
    ends: Vec<usize>,
}

impl Chain {
    /// Of sources and how often an epoch has each one's samples.
    pub fn new(parts: Vec<(Arc<dyn Source>, usize)>) -> Self {
        let mut end = 0;
        let ends = parts.iter().map(|(source, _)| {
            end += source.len();
            end
        });
        Self { ends: ends.collect(), parts }
    }

    /// The source of a sample and its number there, and how often an epoch has it.
    fn at(&self, index: usize) -> Result<(&dyn Source, usize, usize)> {
        let part = self.ends.partition_point(|end| *end <= index);
        let found = self.parts.get(part);
        let found = found.ok_or_else(|| Error::batch("sample", format!("a number below {}", self.len()), index))?;
        let start = part.checked_sub(1).map_or(0, |before| self.ends[before]);
        Ok((&*found.0, index - start, found.1))
    }
}

impl Source for Chain {
    fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    fn header(&self, index: usize) -> Result<SampleHeader> {
        let (source, index, _) = self.at(index)?;
        source.header(index)
    }

    fn read(&self, index: usize, random: &mut Philox) -> Result<Sample> {
        let (source, index, _) = self.at(index)?;
        source.read(index, random)
    }

    fn name(&self, index: usize) -> String {
        self.at(index).map_or_else(|_| format!("sample {index}"), |(source, index, _)| source.name(index))
    }

    fn file(&self, index: usize) -> Result<Option<String>> {
        let (source, index, _) = self.at(index)?;
        source.file(index)
    }

    fn caption(&self, index: usize) -> Result<Option<String>> {
        let (source, index, _) = self.at(index)?;
        source.caption(index)
    }

    fn key(&self, index: usize) -> Result<Fingerprint> {
        let (source, index, _) = self.at(index)?;
        source.key(index)
    }

    fn verify(&self, index: usize) -> Result<()> {
        let (source, index, _) = self.at(index)?;
        source.verify(index)
    }

    fn repeats(&self, index: usize) -> usize {
        self.at(index).map_or(1, |(source, index, times)| times * source.repeats(index))
    }

    fn fingerprint(&self) -> Fingerprint {
        self.parts.iter().fold(Fingerprint::of(b"chain"), |all, (source, times)| {
            all.and(&source.fingerprint().bits().to_le_bytes()).and(&(*times as u64).to_le_bytes())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Media, MemorySource, Part, Text};
    use flowtape_engine::{Device, Tensor};

    fn numbers(range: std::ops::Range<u32>) -> Arc<dyn Source> {
        let sample = |n: u32| {
            let pixels = Tensor::from_vec(vec![n as f32], &[1, 1, 1], &Device::cpu()).unwrap();
            Sample::new(Media::Pixels(pixels), Text::Caption(n.to_string()))
        };
        Arc::new(MemorySource::new(range.map(sample).collect()).unwrap())
    }

    #[test]
    fn each_sample_is_found_in_its_part() {
        let empty = numbers(0..0);
        let chain = Chain::new(vec![(numbers(0..3), 2), (empty, 9), (numbers(3..5), 1)]);
        assert_eq!(chain.len(), 5);
        for i in 0..5 {
            assert_eq!(chain.caption(i).unwrap(), Some(i.to_string()));
            let read = chain.read(i, &mut Philox::new(0)).unwrap();
            assert_eq!(read.media.tensor().to_vec::<f32>().unwrap(), [i as f32]);
        }
        assert_eq!((0..5).map(|i| chain.repeats(i)).collect::<Vec<_>>(), [2, 2, 2, 1, 1]);
        assert!(chain.read(5, &mut Philox::new(0)).unwrap_err().to_string().contains("below 5"));
        let other = Chain::new(vec![(numbers(0..3), 1), (numbers(3..5), 1)]);
        assert!(chain.fingerprint() != other.fingerprint());
    }

    #[test]
    fn a_samples_key_is_its_content_wherever_it_stands() {
        let (a, b) = (numbers(0..3), numbers(2..4));
        assert_eq!(a.key(2).unwrap(), b.key(0).unwrap());
        assert!(a.key(0).unwrap() != a.key(1).unwrap());
        let part = Part::new(a, vec![2, 0, 2]);
        assert_eq!((part.len(), part.key(0).unwrap()), (3, b.key(0).unwrap()));
    }
}
