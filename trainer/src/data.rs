//! What a run trains on.

use std::sync::Arc;

use flowtape_data::{
    BucketOptions, BucketSampler, Collator, Cursor, EpochSampler, LatentCodec, Loader, LoaderOptions, Part, PixelCodec,
    Rank, Resolution, Sampler, Source, TextEncoder,
};
use flowtape_engine::Philox;

use crate::recipe::DataConfig;
use crate::{Error, Result};

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

    /// The same without the last `held_out` samples, and those.
    pub(crate) fn split(self, held_out: usize) -> Result<(Self, Arc<dyn Source>)> {
        let len = self.source.len();
        if held_out > 0 && held_out >= len {
            let what = format!("validation.num_samples: expected fewer than the {len} samples, got {held_out}");
            return Err(Error::Run { path: "data".into(), what });
        }
        let part = |range| -> Arc<dyn Source> { Arc::new(Part::new(self.source.clone(), range)) };
        let (trained, held) = (part(0..len - held_out), part(len - held_out..len));
        let source = if held_out > 0 { trained } else { self.source.clone() };
        Ok((Self { source, ..self }, held))
    }

    /// Which samples batches of `size` hold in a run with this seed. Where samples are of several sizes, a batch is of one.
    ///
    /// # Errors
    /// When a header can't be read.
    pub(crate) fn sampler(&self, config: &DataConfig, size: usize, seed: u64) -> Result<Arc<dyn Sampler>> {
        let (seed, drop_last) = (config.shuffle.then_some(data_seed(seed)), config.drop_last);
        let buckets = BucketSampler::buckets_of(&*self.source)?;
        let [width, height] = config.base_resolution;
        let base_resolution = config.dynamic_batch_size.then_some(Resolution { width, height });
        if buckets.len() > 1 || base_resolution.is_some() {
            let options = BucketOptions { batch_size: size, base_resolution, seed, drop_last };
            return Ok(Arc::new(BucketSampler::new(buckets, options)));
        }
        Ok(Arc::new(EpochSampler::new(self.source.len(), size, seed, drop_last)))
    }

    /// What reads a sampler's batches from a cursor on.
    pub(crate) fn loader(
        &self,
        config: &DataConfig,
        sampler: Arc<dyn Sampler>,
        seed: u64,
        at: Cursor,
    ) -> Result<Loader> {
        let options =
            LoaderOptions { num_workers: config.num_workers, skip_bad: config.skip_bad, ..LoaderOptions::default() };
        Ok(Loader::new(self.source.clone(), sampler, Rank::ALONE, data_seed(seed), at, options)?)
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
