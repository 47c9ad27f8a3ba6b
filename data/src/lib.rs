//! Training data, from where it lies to a batch on the device.
//!
//! | module | what it holds |
//! |---|---|
//! | [`bucket`] | [`Buckets`]: resolutions that samples are brought to, and how |
//! | [`source`] | [`Source`]: samples by number; [`MemorySource`], [`NemoCache`], [`LooseFiles`]; [`Chain`] and [`Part`] of others |
//! | [`cache`] | samples that were encoded once: [`CacheWriter`], [`CacheSource`] |
//! | [`torch`] | files that `torch.save` wrote, read without running anything |
//! | [`sampler`] | [`Sampler`]: which samples a batch holds, a function of the [`Cursor`] alone; [`EpochSampler`] |
//! | [`bucket_sampler`] | [`BucketSampler`]: batches of one resolution |
//! | [`loader`] | [`Loader`]: reads ahead on threads and hands batches over in the sampler's order |
//! | [`media`] | pictures and captions as they lie in folders; sizes as NeMo's |
//! | [`encode`] | [`LatentCodec`] and [`TextEncoder`]: what turns pixels and captions into what a model is trained on |
//! | [`preprocess`] | [`preprocess::Preprocess`]: a folder of pictures to a cache |
//! | [`collate`] | [`Collator`]: samples to a [`flowtape_flowmatch::Batch`] |
//!
//! A sampler plans, a loader reads, a collator encodes. All random numbers follow from a seed and a sample's place in the
//! sequence, so a run that goes on at a cursor sees what an uninterrupted one would have seen, with any number of threads.

pub mod bucket;
pub mod bucket_sampler;
pub mod cache;
pub mod collate;
pub mod encode;
mod error;
mod fingerprint;
pub mod loader;
pub mod media;
pub mod preprocess;
pub mod sampler;
pub mod source;
pub mod torch;

pub use bucket::{Buckets, Crop, Resolution};
pub use bucket_sampler::{Bucket, BucketOptions, BucketSampler};
pub use cache::{CacheHeader, CacheSource, CacheWriter};
pub use collate::Collator;
pub use encode::{LatentCodec, PipelineText, PixelCodec, SoundCodec, TextEmbeddings, TextEncoder, VaeCodec};
pub use error::{Error, Result};
pub use fingerprint::Fingerprint;
pub use loader::{Loaded, Loader, LoaderOptions};
pub use sampler::{BatchPlan, Cursor, EpochSampler, Pick, Rank, Sampler};
pub use source::{Chain, LooseFiles, Media, MemorySource, NemoCache, Part, Sample, SampleHeader, Source, Text};
