//! Samples that a program holds in memory.

use flowtape_engine::Philox;

use super::{Sample, SampleHeader, Source, Text};
use crate::{Error, Fingerprint, Result};

/// Samples in host memory, as an embedding program has them.
///
/// ```
/// use flowtape_data::{Media, MemorySource, Sample, Source, Text};
/// use flowtape_engine::{DType, Device, Tensor};
///
/// # fn main() -> flowtape_data::Result<()> {
/// let latents = Tensor::zeros(&[4, 8, 8], DType::F32, &Device::cpu())?;
/// let source = MemorySource::new(vec![Sample::new(Media::Latents(latents), Text::Caption("a cat".into()))])?;
/// assert_eq!(source.header(0)?.dims, [4, 8, 8]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct MemorySource {
    samples: Vec<Sample>,
    fingerprint: Fingerprint,
}

impl MemorySource {
    /// A source of these samples.
    ///
    /// # Errors
    /// When a tensor can't be read.
    pub fn new(samples: Vec<Sample>) -> Result<Self> {
        let mut fingerprint = Fingerprint::of(b"memory");
        for sample in &samples {
            fingerprint = fingerprint.and(&sample.fingerprint()?.bits().to_le_bytes());
        }
        Ok(Self { samples, fingerprint })
    }

    fn sample(&self, index: usize) -> Result<&Sample> {
        let len = self.samples.len();
        self.samples.get(index).ok_or_else(|| Error::batch("sample", format!("a number below {len}"), index))
    }
}

impl Source for MemorySource {
    fn len(&self) -> usize {
        self.samples.len()
    }

    fn header(&self, index: usize) -> Result<SampleHeader> {
        Ok(SampleHeader { dims: self.sample(index)?.media.tensor().dims().to_vec() })
    }

    fn read(&self, index: usize, _: &mut Philox) -> Result<Sample> {
        self.sample(index).cloned()
    }

    fn caption(&self, index: usize) -> Result<Option<String>> {
        Ok(match &self.sample(index)?.text {
            Text::Caption(caption) => Some(caption.clone()),
            Text::Embeddings(_) => None,
        })
    }

    fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}
