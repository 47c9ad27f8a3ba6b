//! What a run trains on.

use std::sync::Arc;

use flowtape_data::{
    BucketOptions, BucketSampler, Collator, Cursor, EpochSampler, LatentCodec, Loader, LoaderOptions, PixelCodec, Rank,
    Resolution, Sampler, Source, TextEncoder,
};
use flowtape_engine::Philox;

use crate::Result;
use crate::recipe::DataConfig;

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

    /// Sizes of the first sample: `[C, H, W]` or `[C, F, H, W]`.
    ///
    /// # Errors
    /// When there is none.
    pub fn sample_dims(&self) -> Result<Vec<usize>> {
        Ok(self.source.header(0)?.dims)
    }

    /// What reads batches of `size` samples for a run with this seed, from a cursor on. Where samples are of several sizes, a
    /// batch is of one.
    pub(crate) fn loader(&self, config: &DataConfig, size: usize, seed: u64, at: Cursor) -> Result<Loader> {
        let seed = data_seed(seed);
        let order = config.shuffle.then_some(seed);
        let buckets = BucketSampler::buckets_of(&*self.source)?;
        let [width, height] = config.base_resolution;
        let base_resolution = config.dynamic_batch_size.then_some(Resolution { width, height });
        let sampler: Arc<dyn Sampler> = if buckets.len() > 1 || base_resolution.is_some() {
            let options = BucketOptions { batch_size: size, base_resolution, seed: order, drop_last: config.drop_last };
            Arc::new(BucketSampler::new(buckets, options))
        } else {
            Arc::new(EpochSampler::new(self.source.len(), size, order, config.drop_last))
        };
        let options =
            LoaderOptions { num_workers: config.num_workers, skip_bad: config.skip_bad, ..LoaderOptions::default() };
        Ok(Loader::new(self.source.clone(), sampler, Rank::ALONE, seed, at, options)?)
    }

    /// What makes batches of a run with this seed.
    pub(crate) fn collator(&self, config: &DataConfig, seed: u64) -> Collator {
        let (codec, text) = (self.codec.clone(), self.text.clone());
        Collator { codec, text, caption_dropout_prob: config.caption_dropout_prob, seed: data_seed(seed) }
    }
}

/// The seed of everything about a run's data.
fn data_seed(seed: u64) -> u64 {
    Philox::new(seed).fork(DATA).state().0
}
