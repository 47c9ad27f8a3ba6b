//! Keeps rayon's threads from falling asleep between operations.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Lets the helpers go, also when the work panics.
struct Release(Arc<AtomicBool>);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Runs `work` while the pool's other threads keep looking for something to do.
///
/// An idle thread of rayon soon sleeps, and waking it costs more than most operations of a training step take: without
/// this, a second thread is worth little. Call it inside the pool, around many operations: a whole step, or a run.
pub fn awake<R>(work: impl FnOnce() -> R) -> R {
    let Some(caller) = rayon::current_thread_index() else { return work() };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if rayon::current_num_threads() == 1 || cores == 1 {
        return work();
    }
    let done = Arc::new(AtomicBool::new(false));
    let _release = Release(done.clone());
    rayon::spawn_broadcast(move |context| {
        // More searching threads than cores would be in the way of the working ones.
        if context.index() == caller || context.index() > cores {
            return;
        }
        while !done.load(Ordering::Acquire) {
            if rayon::yield_now() != Some(rayon::Yield::Executed) {
                std::hint::spin_loop();
            }
        }
    });
    work()
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::awake;

    #[test]
    fn work_inside_is_shared_and_the_pool_is_free_after() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for _ in 0..50 {
            let sum: u64 = pool.install(|| awake(|| (0..1000u64).into_par_iter().sum()));
            assert_eq!(sum, 499_500);
        }
        let nested = pool.install(|| awake(|| awake(|| rayon::join(|| 1, || 2))));
        assert_eq!((nested, awake(|| 3)), ((1, 2), 3));
    }
}
