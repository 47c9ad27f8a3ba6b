//! Where samples come from.

mod chain;
mod loose;
mod memory;
mod nemo;
mod part;

use std::collections::BTreeMap;

use flowtape_engine::{Philox, Tensor};

use crate::{Fingerprint, Result, TextEmbeddings};

pub use chain::Chain;
pub use loose::LooseFiles;
pub use memory::MemorySource;
pub use nemo::NemoCache;
pub use part::Part;

/// What a sample shows, in host memory.
#[derive(Clone, Debug)]
pub enum Media {
    /// Pixels `[C, H, W]` of an image or `[C, F, H, W]` of a video, float, from -1 to 1: a
    /// [`LatentCodec`](crate::LatentCodec) makes latents of them.
    Pixels(Tensor),
    /// Latents that were made before, of the same axes.
    Latents(Tensor),
}

impl Media {
    /// The numbers, whatever they are.
    pub fn tensor(&self) -> &Tensor {
        match self {
            Self::Pixels(tensor) | Self::Latents(tensor) => tensor,
        }
    }
}

/// What a sample is told by.
#[derive(Clone, Debug)]
pub enum Text {
    /// A caption: a [`TextEncoder`](crate::TextEncoder) makes embeddings of it.
    Caption(String),
    /// Embeddings that were made before, each without the axis of samples. Zeros stand for a dropped caption; its masks stay.
    Embeddings(TextEmbeddings),
}

/// One sample, read.
#[derive(Clone, Debug)]
pub struct Sample {
    /// What it shows.
    pub media: Media,
    /// What it is told by.
    pub text: Text,
    /// Whatever else an adapter reads, by name, in host memory, each without the axis of samples.
    pub tensors: BTreeMap<String, Tensor>,
}

impl Sample {
    /// A sample of media and text alone.
    pub fn new(media: Media, text: Text) -> Self {
        Self { media, text, tensors: BTreeMap::new() }
    }

    /// Of everything in it.
    ///
    /// # Errors
    /// When a tensor can't be read.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        let mut all = Fingerprint::of(b"sample");
        let embeddings = match &self.text {
            Text::Caption(caption) => {
                all = all.and(caption.as_bytes());
                None
            }
            Text::Embeddings(embeddings) => Some(embeddings.tensors.iter()),
        };
        for (name, tensor) in embeddings.into_iter().flatten().chain(&self.tensors) {
            all = all.and(name.as_bytes()).and(&tensor.to_bytes()?);
        }
        Ok(all.and(&self.media.tensor().to_bytes()?))
    }
}

/// What is known of a sample before it is read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SampleHeader {
    /// Sizes of its picture or video, `[C, H, W]` or `[C, F, H, W]` in pixels; those of its latents where nothing else is known.
    pub dims: Vec<usize>,
}

/// Samples by number. Several threads read at once.
pub trait Source: Send + Sync {
    /// How many there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What is known of a sample without reading it; cheap.
    ///
    /// # Errors
    /// When the sample's header is damaged.
    fn header(&self, index: usize) -> Result<SampleHeader>;

    /// Reads a sample. What varies from one reading to the next (a crop, a motion) comes from `random` alone: a stream of
    /// its own for each place in the sequence of a run.
    ///
    /// # Errors
    /// When it can't be read; the loader adds its name.
    fn read(&self, index: usize, random: &mut Philox) -> Result<Sample>;

    /// What a sample is called in errors, such as its file.
    fn name(&self, index: usize) -> String {
        format!("sample {index}")
    }

    /// The file that a sample was made of, where that is known: by it a list names the sample.
    ///
    /// # Errors
    /// When what says so is damaged.
    fn file(&self, index: usize) -> Result<Option<String>> {
        let _ = index;
        Ok(None)
    }

    /// What a sample is told by in words, where that is known; the words of one that is read may be in the sample alone.
    ///
    /// # Errors
    /// When what says so is damaged.
    fn caption(&self, index: usize) -> Result<Option<String>> {
        let _ = index;
        Ok(None)
    }

    /// Differs where two samples do, and stays where others are added: a split by content goes by it.
    ///
    /// # Errors
    /// When the sample can't be read.
    fn key(&self, index: usize) -> Result<Fingerprint> {
        self.read(index, &mut Philox::new(0))?.fingerprint()
    }

    /// Compares a sample with the hash that was stored with it, where one was.
    ///
    /// # Errors
    /// When it is another than was stored.
    fn verify(&self, index: usize) -> Result<()> {
        let _ = index;
        Ok(())
    }

    /// How often an epoch has a sample.
    fn repeats(&self, index: usize) -> usize {
        let _ = index;
        1
    }

    /// Differs where the samples do, so that a run that goes on notices other data.
    fn fingerprint(&self) -> Fingerprint;
}
