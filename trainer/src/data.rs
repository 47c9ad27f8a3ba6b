//! What a run trains on.

use std::sync::Arc;

use flowtape_data::{
    BucketOptions, BucketSampler, Collator, Cursor, EpochSampler, LatentCodec, Loader, LoaderOptions, MemorySource,
    Part, PixelCodec, Rank, Resolution, Sampler, Source, TextEncoder,
};
use flowtape_engine::Philox;

use crate::Result;
use crate::builtin::WordTable;
use crate::recipe::DataConfig;
use crate::validation::ValidationConfig;

/// The stream of a run's data, a fork of its seed.
const DATA: u64 = 1;

/// Samples, and what encodes them.
#[derive(Clone)]
pub struct Data {
    /// The samples.
    pub source: Arc<dyn Source>,
    /// Pixels to latents and back.
    pub codec: Arc<dyn LatentCodec>,
    /// Captions to embeddings.
    pub text: Arc<dyn TextEncoder>,
}

impl Data {
    /// Samples whose pixels are the latents.
    pub fn of_pixels(source: Arc<dyn Source>, text: impl TextEncoder + 'static) -> Self {
        Self { source, codec: Arc::new(PixelCodec), text: Arc::new(text) }
    }

    /// No samples: for a trainer that is given each batch ([`Trainer::step_on`](crate::Trainer::step_on)).
    ///
    /// # Errors
    /// Never, as it stands.
    pub fn none() -> Result<Self> {
        Ok(Self::of_pixels(Arc::new(MemorySource::new(Vec::new())?), WordTable::new(&[], 0)))
    }

    /// Sizes of the first sample: `[C, H, W]` or `[C, F, H, W]`.
    ///
    /// # Errors
    /// When there is none.
    pub fn sample_dims(&self) -> Result<Vec<usize>> {
        Ok(self.source.header(0)?.dims)
    }

    /// What is trained on, each sample as often as an epoch has it, and what is held out.
    ///
    /// # Errors
    /// When nothing would be left on either side, or a list names what is not there.
    pub fn split(self, validation: Option<&ValidationConfig>) -> Result<(Self, Arc<dyn Source>)> {
        let held = validation.map_or(Ok(Vec::new()), |config| config.held_out(&*self.source))?;
        let all = 0..self.source.len();
        let trained = all.clone().filter(|index| held.binary_search(index).is_err());
        let trained: Vec<usize> =
            trained.flat_map(|index| std::iter::repeat_n(index, self.source.repeats(index))).collect();
        let part = |indices| -> Arc<dyn Source> { Arc::new(Part::new(self.source.clone(), indices)) };
        let source = if trained.iter().copied().eq(all) { self.source.clone() } else { part(trained) };
        let held = part(held);
        Ok((Self { source, ..self }, held))
    }

    /// Which samples batches of `size` hold in a run with this seed. Where samples are of several sizes, a batch is of one.
    ///
    /// # Errors
    /// When a header can't be read.
    pub(crate) fn sampler(&self, config: &DataConfig, size: usize, seed: u64) -> Result<Arc<dyn Sampler>> {
        let options = bucket_options(config, size, seed);
        let buckets = BucketSampler::buckets_of(&*self.source)?;
        if buckets.len() > 1 || options.base_resolution.is_some() {
            return Ok(Arc::new(BucketSampler::new(buckets, options)));
        }
        Ok(Arc::new(EpochSampler::new(self.source.len(), size, options.seed, options.drop_last)))
    }

    /// What reads a rank's batches of a sampler from a cursor on.
    pub(crate) fn loader(
        &self,
        config: &DataConfig,
        sampler: Arc<dyn Sampler>,
        rank: Rank,
        seed: u64,
        at: Cursor,
    ) -> Result<Loader> {
        let options =
            LoaderOptions { num_workers: config.num_workers, skip_bad: config.skip_bad, ..LoaderOptions::default() };
        Ok(Loader::new(self.source.clone(), sampler, rank, data_seed(seed), at, options)?)
    }

    /// What makes batches of a run with this seed.
    pub(crate) fn collator(&self, config: &DataConfig, seed: u64) -> Collator {
        let (codec, text) = (self.codec.clone(), self.text.clone());
        Collator { codec, text, caption_dropout_prob: config.caption_dropout_prob, seed: data_seed(seed) }
    }
}

/// How batches of `size` are made of samples of several sizes.
pub(crate) fn bucket_options(config: &DataConfig, size: usize, seed: u64) -> BucketOptions {
    let [width, height] = config.base_resolution;
    BucketOptions {
        batch_size: size,
        base_resolution: config.dynamic_batch_size.then_some(Resolution { width, height }),
        seed: config.shuffle.then_some(data_seed(seed)),
        drop_last: config.drop_last,
    }
}

/// The seed of everything about a run's data.
fn data_seed(seed: u64) -> u64 {
    Philox::new(seed).fork(DATA).state().0
}
