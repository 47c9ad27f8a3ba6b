//! Data: whether reading keeps up with the steps, and what a large index takes.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flowtape_data::cache::CacheHeader;
use flowtape_data::{
    BucketOptions, BucketSampler, CacheSource, CacheWriter, Cursor, Fingerprint, Rank, Result as DataResult, Sample,
    SampleHeader, Sampler, Source,
};
use flowtape_engine::{Device, Philox};
use flowtape_trainer::recipe::Dtype;
use flowtape_trainer::{Error, Trainer};
use serde::Serialize;

use crate::step::{median, process};
use crate::{Result, Work};

/// What a slow source costs.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Loading {
    /// Samples of a batch.
    pub batch: usize,
    /// Threads that read.
    pub num_workers: usize,
    /// Seconds that reading a sample takes.
    pub s_sample: f64,
    /// Seconds of a step on samples in memory, the median.
    pub s_step: f64,
    /// Seconds of a step where each sample takes so long, the median.
    pub s_step_slow: f64,
    /// The same where the step reads them itself: what the threads save.
    pub s_step_waiting: f64,
}

/// A source each of whose samples takes some time, as a disk or a network does.
struct Slow {
    source: Arc<dyn Source>,
    pause: Duration,
}

impl Source for Slow {
    fn len(&self) -> usize {
        self.source.len()
    }

    fn header(&self, index: usize) -> DataResult<SampleHeader> {
        self.source.header(index)
    }

    fn read(&self, index: usize, random: &mut Philox) -> DataResult<Sample> {
        std::thread::sleep(self.pause);
        self.source.read(index, random)
    }

    fn fingerprint(&self) -> Fingerprint {
        self.source.fingerprint()
    }
}

/// Trains on samples in memory, and on such that take `pause` each to read, in turns.
///
/// # Errors
/// When memory runs out.
pub fn loading(work: &Work, device: &Device, pause: Duration, steps: usize) -> Result<Loading> {
    let recipe = work.recipe(Dtype::F32, true, None)?;
    let trainer = |pause: Duration, num_workers: usize| -> Result<Trainer> {
        let mut recipe = recipe.clone();
        recipe.data.num_workers = num_workers;
        let mut data = work.data()?;
        data.source = Arc::new(Slow { source: data.source, pause });
        let mut trainer = Trainer::with_data(device, &recipe, data)?;
        // The first steps find cold caches, and threads that have not begun.
        for _ in 0..2 {
            trainer.step()?;
        }
        Ok(trainer)
    };
    let num_workers = flowtape_data::LoaderOptions::default().num_workers;
    let mut trainers = [trainer(Duration::ZERO, num_workers)?, trainer(pause, num_workers)?, trainer(pause, 0)?];
    let mut seconds = [(); 3].map(|()| Vec::new());
    for _ in 0..steps.max(1) {
        for (trainer, seconds) in trainers.iter_mut().zip(&mut seconds) {
            // A turn of two, so that what was read during the others' turns is used up.
            trainer.step()?;
            let start = Instant::now();
            trainer.step()?;
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let [s_step, s_step_slow, s_step_waiting] = seconds.map(median);
    Ok(Loading { batch: work.batch, num_workers, s_sample: pause.as_secs_f64(), s_step, s_step_slow, s_step_waiting })
}

/// What an index takes.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Index {
    /// Samples in it.
    pub samples: usize,
    /// Seconds to open it.
    pub s_open: f64,
    /// Seconds to group its samples by size and to shuffle the first epoch.
    pub s_shuffle: f64,
    /// Seconds of a batch's plan far into an epoch.
    pub s_plan: f64,
    /// The most memory that the process ever held, in MiB.
    pub peak_rss_mb: u64,
}

/// Sides of the samples in [`index`], in pixels.
const SIDES: [[u32; 2]; 4] = [[512, 512], [448, 576], [576, 448], [384, 640]];

/// Writes the index of a cache of so many samples into a folder, opens it, and plans batches.
///
/// # Errors
/// When the folder can't be written.
pub fn index(folder: &Path, samples: usize) -> Result<Index> {
    write_index(folder, samples)?;
    let start = Instant::now();
    let source = CacheSource::open(folder)?;
    let s_open = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let options = BucketOptions { seed: Some(1), ..BucketOptions::of_size(16) };
    let sampler = BucketSampler::new(BucketSampler::buckets_of(&source)?, options);
    let nothing = || Error::Run { path: folder.into(), what: "no batch".into() };
    sampler.plan(Cursor::default(), Rank::ALONE).ok_or_else(nothing)?;
    let s_shuffle = start.elapsed().as_secs_f64();
    let start = Instant::now();
    sampler.plan(Cursor { epoch: 3, batch: samples as u64 / 32 }, Rank::ALONE).ok_or_else(nothing)?;
    let s_plan = start.elapsed().as_secs_f64();
    Ok(Index { samples, s_open, s_shuffle, s_plan, peak_rss_mb: process::peak_memory() >> 20 })
}

/// Records as `docs/CACHE.md` describes them; the shards that they speak of are not read.
fn write_index(folder: &Path, samples: usize) -> Result<()> {
    CacheWriter::open(folder, &CacheHeader::new("bench", Fingerprint::of(b"bench")), 256)?.finish()?;
    let path = folder.join("index.bin");
    let io = |source| Error::from(flowtape_engine::Error::Io { path: path.clone(), source });
    let mut file = std::io::BufWriter::new(std::fs::File::create(&path).map_err(io)?);
    for number in 0..samples {
        let mut record = [0; 64];
        record[..8].copy_from_slice(&Fingerprint::of(&number.to_le_bytes()).bits().to_le_bytes());
        let [height, width] = SIDES[number % SIDES.len()];
        let numbers = [(number / 256) as u32, (number % 256) as u32, 0, height, width];
        for (place, number) in record[8..28].chunks_exact_mut(4).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        file.write_all(&record).map_err(io)?;
    }
    file.flush().map_err(io)
}
