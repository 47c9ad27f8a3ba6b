//! Training data, from where it lies to a batch on the device.
//!
//! | module | what it holds |
//! |---|---|
//! | [`source`] | [`Source`]: samples by number; [`MemorySource`] |
//! | [`sampler`] | [`Sampler`]: which samples a batch holds, a function of the [`Cursor`] alone; [`EpochSampler`] |
//! | [`loader`] | [`Loader`]: reads ahead on threads and hands batches over in the sampler's order |
//! | [`media`] | pictures and captions as they lie in folders; sizes as NeMo's |
//! | [`encode`] | [`LatentCodec`] and [`TextEncoder`]: what turns pixels and captions into what a model is trained on |
//! | [`collate`] | [`Collator`]: samples to a [`flowtape_flowmatch::Batch`] |
//!
//! A sampler plans, a loader reads, a collator encodes. All random numbers follow from a seed and a sample's place in the
//! sequence, so a run that goes on at a cursor sees what an uninterrupted one would have seen, with any number of threads.

pub mod collate;
pub mod encode;
mod error;
mod fingerprint;
pub mod loader;
pub mod media;
pub mod sampler;
pub mod source;

pub use collate::Collator;
pub use encode::{LatentCodec, PixelCodec, TextEmbeddings, TextEncoder};
pub use error::{Error, Result};
pub use fingerprint::Fingerprint;
pub use loader::{Loaded, Loader, LoaderOptions};
pub use sampler::{BatchPlan, Cursor, EpochSampler, Pick, Rank, Sampler};
pub use source::{Media, MemorySource, Part, Sample, SampleHeader, Source, Text};
