//! Reading ahead.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use flowtape_engine::Philox;
use flowtape_engine::cpu::alone;
use flowtape_engine::platform::HAS_THREADS;

use crate::{BatchPlan, Cursor, Error, Pick, Rank, Result, Sample, Sampler, Source};

/// How a loader reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LoaderOptions {
    /// Threads that read; none, or where the platform has none: the caller's reads when it asks for a batch. What comes does not
    /// depend on it.
    pub num_workers: usize,
    /// Whole batches that are read ahead at least; more where the threads would have nothing to do.
    pub prefetch: usize,
    /// Whether a sample that can't be read is left out of its batch with a warning, instead of being an error.
    pub skip_bad: bool,
}

impl Default for LoaderOptions {
    fn default() -> Self {
        Self { num_workers: 2, prefetch: 2, skip_bad: false }
    }
}

/// A batch, read.
#[derive(Debug)]
pub struct Loaded {
    /// Which samples, and where the batch after it is.
    pub plan: BatchPlan,
    /// The samples, in the plan's order.
    pub samples: Vec<Sample>,
}

/// Reads a sampler's batches ahead on threads of its own, sample by sample, and hands them over in order. A source that is
/// slower than a step on one thread keeps up with several.
pub struct Loader {
    reader: Arc<Reader>,
    sampler: Arc<dyn Sampler>,
    rank: Rank,
    options: LoaderOptions,
    /// Where the first batch is that is not planned yet.
    at: Cursor,
    /// Samples that were left out.
    skipped: u64,
}

/// What the threads share.
struct Reader {
    source: Arc<dyn Source>,
    random: Philox,
    queue: Mutex<Queue>,
    /// There is something to read, or nothing any more.
    work: Condvar,
    /// The first batch is whole.
    ready: Condvar,
}

#[derive(Default)]
struct Queue {
    /// Samples to read: the batch's number, the place in it, which.
    jobs: VecDeque<(u64, usize, Pick)>,
    batches: VecDeque<Pending>,
    /// Number of the first batch of `batches`.
    first: u64,
    closed: bool,
}

/// A batch that is being read.
struct Pending {
    plan: BatchPlan,
    samples: Vec<Option<Result<Sample>>>,
    missing: usize,
}

impl Loader {
    /// A loader that begins at a cursor. What sources draw for a sample follows from `seed` and the sample's place.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn new(
        source: Arc<dyn Source>,
        sampler: Arc<dyn Sampler>,
        rank: Rank,
        seed: u64,
        at: Cursor,
        mut options: LoaderOptions,
    ) -> Result<Self> {
        if !HAS_THREADS {
            options.num_workers = 0;
        }
        let (work, ready) = (Condvar::new(), Condvar::new());
        let reader = Arc::new(Reader { source, random: Philox::new(seed), queue: Mutex::default(), work, ready });
        for _ in 0..options.num_workers {
            let reader = reader.clone();
            let thread = std::thread::Builder::new().name("data".into());
            thread.spawn(move || alone(|| reader.work())).map_err(Error::Thread)?;
        }
        Ok(Self { reader, sampler, rank, options, at, skipped: 0 })
    }

    /// The next batch; waits where it is not read yet.
    ///
    /// # Errors
    /// When a sample can't be read (the error names it) and none is to be left out, or there is no batch.
    #[expect(clippy::should_implement_trait)] // an iterator would end, and after an error this one goes on
    pub fn next(&mut self) -> Result<Loaded> {
        // A batch of which nothing can be read is passed over; that they all are like that is an error.
        for _ in 0..=self.reader.source.len() {
            let (mut plan, samples) = self.next_read()?;
            if !self.options.skip_bad {
                return Ok(Loaded { plan, samples: samples.into_iter().collect::<Result<_>>()? });
            }
            let (mut picks, mut kept) = (Vec::new(), Vec::new());
            for (pick, sample) in plan.picks.into_iter().zip(samples) {
                match sample {
                    Ok(sample) => {
                        picks.push(pick);
                        kept.push(sample);
                    }
                    Err(error) => {
                        self.skipped += 1;
                        let reason = std::error::Error::source(&error).map_or(String::new(), |e| format!(": {e}"));
                        tracing::warn!("{error}{reason}; left out, the {}. so far", self.skipped);
                    }
                }
            }
            plan.picks = picks;
            if !kept.is_empty() {
                return Ok(Loaded { plan, samples: kept });
            }
        }
        Err(self.nothing())
    }

    /// Samples that were left out so far because they can't be read.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// The next batch, whatever became of its samples.
    fn next_read(&mut self) -> Result<(BatchPlan, Vec<Result<Sample>>)> {
        if self.options.num_workers == 0 {
            let plan = self.plan()?;
            let samples = plan.picks.iter().map(|pick| self.reader.read(*pick)).collect();
            return Ok((plan, samples));
        }
        self.read_ahead()?;
        let mut queue = self.reader.queue();
        while queue.batches.front().is_some_and(|batch| batch.missing > 0) {
            queue = self.reader.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let batch = queue.batches.pop_front();
        queue.first += 1;
        drop(queue);
        let Some(Pending { plan, samples, .. }) = batch else { return Err(self.nothing()) };
        // The threads go on while this batch is used.
        self.read_ahead()?;
        Ok((plan, samples.into_iter().flatten().collect()))
    }

    /// Plans batches until enough are under way.
    fn read_ahead(&mut self) -> Result<()> {
        loop {
            let queue = self.reader.queue();
            // Twice as many samples as threads, so that none waits for the caller.
            let under_way: usize = queue.batches.iter().map(|batch| batch.plan.picks.len()).sum();
            if queue.batches.len() >= self.options.prefetch.max(1) && under_way >= 2 * self.options.num_workers {
                return Ok(());
            }
            drop(queue);
            // Not under the lock: a new epoch's order may take long.
            let plan = self.plan()?;
            let mut queue = self.reader.queue();
            let number = queue.first + queue.batches.len() as u64;
            queue.jobs.extend(plan.picks.iter().enumerate().map(|(i, pick)| (number, i, *pick)));
            let missing = plan.picks.len();
            queue.batches.push_back(Pending { plan, samples: (0..missing).map(|_| None).collect(), missing });
            self.reader.work.notify_all();
        }
    }

    fn plan(&mut self) -> Result<BatchPlan> {
        let plan = self.sampler.plan(self.at, self.rank).ok_or_else(|| self.nothing())?;
        self.at = plan.next;
        Ok(plan)
    }

    fn nothing(&self) -> Error {
        let len = self.reader.source.len();
        Error::batch("data", "enough samples for a batch (with drop_last a whole one)", format!("{len} samples"))
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // The threads end by themselves: one that hangs in a read must not keep a run from ending.
        let mut queue = self.reader.queue();
        queue.closed = true;
        queue.jobs.clear();
        self.reader.work.notify_all();
    }
}

impl Reader {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One sample; an error names it.
    fn read(&self, pick: Pick) -> Result<Sample> {
        let failed = |source| Error::Sample { sample: self.source.name(pick.index), source };
        let mut random = self.random.fork(SAMPLES).fork(pick.place);
        // A panic would leave the batch unfinished, and its reader waiting.
        let read = catch_unwind(AssertUnwindSafe(|| self.source.read(pick.index, &mut random)));
        read.map_err(|_| failed("its source panicked".into()))?.map_err(|error| failed(error.into()))
    }

    fn work(&self) {
        let mut queue = self.queue();
        while !queue.closed {
            let Some((number, slot, pick)) = queue.jobs.pop_front() else {
                queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(queue);
            let sample = self.read(pick);
            queue = self.queue();
            // A batch is there until all of it is read.
            let place = (number - queue.first) as usize;
            if let Some(batch) = queue.batches.get_mut(place) {
                batch.samples[slot] = Some(sample);
                batch.missing -= 1;
                if batch.missing == 0 && place == 0 {
                    self.ready.notify_all();
                }
            }
        }
    }
}

/// The stream of what sources draw: a fork of the seed, and of it one for each place.
const SAMPLES: u64 = 1;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use flowtape_engine::{DType, Device, Tensor};

    use super::*;
    use crate::{EpochSampler, Fingerprint, Media, SampleHeader, Text};

    /// A test that would wait for ever fails instead.
    const LONG: Duration = Duration::from_secs(60);

    /// Counts its readers; `hold` may keep one waiting.
    struct Counting {
        seen: Mutex<Seen>,
        changed: Condvar,
        hold: fn(usize, &Seen) -> bool,
    }

    #[derive(Default)]
    struct Seen {
        now: usize,
        /// Of those, the ones of odd numbers.
        odd: usize,
        most: usize,
        begun: usize,
        done: Vec<usize>,
    }

    impl Counting {
        fn new(hold: fn(usize, &Seen) -> bool) -> Arc<Self> {
            Arc::new(Self { seen: Mutex::default(), changed: Condvar::new(), hold })
        }

        /// Waits until it is so.
        fn until(&self, what: impl Fn(&Seen) -> bool) -> bool {
            let seen = self.seen.lock().unwrap();
            !self.changed.wait_timeout_while(seen, LONG, |seen| !what(seen)).unwrap().1.timed_out()
        }
    }

    impl Source for Counting {
        fn len(&self) -> usize {
            100
        }

        fn header(&self, _: usize) -> Result<SampleHeader> {
            Ok(SampleHeader { dims: vec![1, 1, 1] })
        }

        fn read(&self, index: usize, random: &mut Philox) -> Result<Sample> {
            let change = |change: &mut dyn FnMut(&mut Seen)| {
                change(&mut self.seen.lock().unwrap());
                self.changed.notify_all();
            };
            change(&mut |seen| {
                seen.now += 1;
                seen.odd += index % 2;
                seen.begun += 1;
                seen.most = seen.most.max(seen.now);
            });
            let free = self.until(|seen| !(self.hold)(index, seen));
            change(&mut |seen| {
                seen.now -= 1;
                seen.odd -= index % 2;
                seen.done.push(index);
            });
            match index {
                _ if !free => Err(Error::batch("read", "to be let go", "nothing")),
                98 => Err(Error::batch("file", "a picture", "a page")),
                99 => panic!("a bug of a source"),
                _ => {
                    let value = index as f32 + random.next_f64() as f32;
                    let pixels = Tensor::from_vec(vec![value], &[1, 1, 1], &Device::cpu())?;
                    Ok(Sample::new(Media::Pixels(pixels), Text::Caption(String::new())))
                }
            }
        }

        fn name(&self, index: usize) -> String {
            format!("{index}.png")
        }

        fn fingerprint(&self) -> Fingerprint {
            Fingerprint::of(b"counting")
        }
    }

    fn loader(source: &Arc<Counting>, sampler: EpochSampler, num_workers: usize) -> Loader {
        let options = LoaderOptions { num_workers, prefetch: 2, skip_bad: false };
        Loader::new(source.clone(), Arc::new(sampler), Rank::ALONE, 7, Cursor::default(), options).unwrap()
    }

    fn values(loaded: &Loaded) -> Vec<f64> {
        loaded.samples.iter().map(|s| s.media.tensor().to_dtype(DType::F64).unwrap().item().unwrap()).collect()
    }

    #[test]
    fn batches_come_in_order_and_do_not_depend_on_the_threads() {
        let wanted: Vec<Vec<f64>> = {
            let mut loader = loader(&Counting::new(|_, _| false), EpochSampler::new(98, 5, Some(3), false), 0);
            (0..30).map(|_| values(&loader.next().unwrap())).collect()
        };
        for threads in [1, 2, 7] {
            // A sample of an even number waits while an odd one is read; an odd one waits for nobody.
            let source = Counting::new(|index, seen| index % 2 == 0 && seen.odd > 0);
            let mut loader = loader(&source, EpochSampler::new(98, 5, Some(3), false), threads);
            let got: Vec<Vec<f64>> = (0..30).map(|_| values(&loader.next().unwrap())).collect();
            assert_eq!(got, wanted, "{threads} threads");
        }
    }

    #[test]
    fn several_threads_read_at_once() {
        // Nobody gets on before four are reading.
        let source = Counting::new(|_, seen| seen.most < 4);
        let mut loader = loader(&source, EpochSampler::new(90, 1, None, false), 4);
        assert_eq!(loader.next().unwrap().plan.picks[0].index, 0);
        assert_eq!(source.seen.lock().unwrap().most, 4);
    }

    #[test]
    fn reading_goes_on_while_a_batch_is_used_and_not_for_ever() {
        let source = Counting::new(|_, _| false);
        let mut loader = loader(&source, EpochSampler::new(90, 4, None, false), 2);
        for used in 1..=3 {
            loader.next().unwrap();
            // Two more batches are read without anybody asking, and no more: the threads have nothing to do.
            let wanted = 4 * (used + 2);
            assert!(source.until(|seen| seen.done.len() == wanted));
            assert!(loader.reader.queue().jobs.is_empty() && source.seen.lock().unwrap().begun == wanted);
        }
    }

    #[test]
    fn an_unreadable_sample_is_named_and_the_next_batch_comes() {
        for threads in [0, 3] {
            let mut loader = loader(&Counting::new(|_, _| false), EpochSampler::new(100, 2, None, false), threads);
            (0..49).for_each(|_| drop(loader.next().unwrap()));
            let error = loader.next().unwrap_err();
            assert!(error.to_string().contains("98.png"), "{error}");
            let reason = std::error::Error::source(&error).unwrap().to_string();
            assert!(reason.contains("a picture"), "{reason}");
            assert_eq!(loader.next().unwrap().plan.picks[0].index, 0);
        }
        let sampler = EpochSampler::new(100, 1, None, false);
        let mut at_the_bug = loader(&Counting::new(|_, _| false), sampler, 2);
        at_the_bug.at = Cursor { epoch: 0, batch: 99 };
        let error = at_the_bug.next().unwrap_err();
        assert!(error.to_string().contains("99.png"), "{error}");
    }

    #[test]
    fn unreadable_samples_are_left_out_and_counted_where_asked() {
        for threads in [0, 3] {
            let mut loader = loader(&Counting::new(|_, _| false), EpochSampler::new(100, 10, None, false), threads);
            loader.options.skip_bad = true;
            for batch in 0..30 {
                let loaded = loader.next().unwrap();
                let last = batch % 10 == 9;
                assert_eq!((loaded.samples.len(), loaded.plan.picks.len()), if last { (8, 8) } else { (10, 10) });
                assert!(loaded.plan.picks.iter().all(|pick| pick.index < 98));
            }
            assert_eq!(loader.skipped(), 6);
        }
        let mut none = loader(&Counting::new(|_, _| false), EpochSampler::new(100, 1, None, false), 0);
        (none.options.skip_bad, none.at) = (true, Cursor { epoch: 0, batch: 98 });
        assert_eq!(none.next().unwrap().plan.picks[0].index, 0);
    }

    #[test]
    fn too_little_data_is_told() {
        for threads in [0, 2] {
            let mut loader = loader(&Counting::new(|_, _| false), EpochSampler::new(3, 4, None, true), threads);
            let error = loader.next().unwrap_err().to_string();
            assert!(error.contains("drop_last") && error.contains("100 samples"), "{error}");
        }
    }
}
