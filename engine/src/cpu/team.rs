//! The threads that share an operation: rayon's, kept awake between operations by a loop of our own.
//!
//! An operation of a training step takes microseconds. Handing a part of it to a sleeping thread costs tens of them, and
//! to a searching thread of rayon several; here it is a few stores to shared memory.

use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;

/// Set in [`Team::state`] while tasks may be taken.
const OPEN: u64 = 1 << 31;
/// Added to [`Team::state`] for each operation.
const GENERATION: u64 = 1 << 32;
/// Looks for work between two visits of rayon's own queue: about a microsecond.
const LOOKS: u32 = 64;
/// Visits after which an idle thread lets others have its core.
const PATIENCE: u32 = 256;

/// Tasks of one operation.
#[derive(Clone, Copy)]
struct Job {
    work: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

/// One thread that starts operations and helpers that wait for them.
struct Team {
    /// A generation, whether it is open, and the number of helpers inside.
    state: AtomicU64,
    /// The next task.
    next: AtomicUsize,
    /// Written by the starting thread alone, while the state is closed and no helper is inside.
    job: UnsafeCell<Option<Job>>,
    panicked: AtomicBool,
    done: AtomicBool,
}

// SAFETY: `job` is written when nobody reads it, see its comment; its closure is `Sync`.
unsafe impl Send for Team {}
// SAFETY: as above.
unsafe impl Sync for Team {}

thread_local! {
    /// The team that this thread starts operations of.
    static TEAM: Cell<*const Team> = const { Cell::new(std::ptr::null()) };
}

/// Closes an operation and waits for its helpers, also when a task panics.
struct Close<'a>(&'a Team);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        while !self.0.state.load(Ordering::Acquire).is_multiple_of(GENERATION) {
            std::hint::spin_loop();
        }
    }
}

impl Team {
    fn new() -> Self {
        Self {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panicked: AtomicBool::new(false),
            done: AtomicBool::new(false),
        }
    }

    /// Takes tasks until none is left.
    fn work(&self, job: Job) {
        // SAFETY: the closure outlives the operation, which ends when all threads have left it.
        let work = unsafe { &*job.work };
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= job.tasks {
                return;
            }
            work(task);
        }
    }

    /// Runs an operation with whoever comes to help. Only the thread that made the team calls it.
    fn run(&self, tasks: usize, work: &(dyn Fn(usize) + Sync)) {
        // SAFETY: a pointer without its lifetime; it is used inside this function's call alone.
        let work = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync)>(work) };
        let job = Job { work, tasks };
        // SAFETY: the state is closed and nobody is inside.
        unsafe { *self.job.get() = Some(job) };
        self.panicked.store(false, Ordering::Relaxed);
        self.next.store(0, Ordering::Relaxed);
        let generation = self.state.load(Ordering::Relaxed) & !(GENERATION - 1);
        self.state.store(generation.wrapping_add(GENERATION) | OPEN, Ordering::Release);
        let close = Close(self);
        self.work(job);
        drop(close);
        assert!(!self.panicked.load(Ordering::Relaxed), "a task of an operation panicked");
    }

    /// Helps with an operation that this helper has not seen yet. Returns whether there was one.
    fn help(&self, seen: &mut u64) -> bool {
        let state = self.state.load(Ordering::Acquire);
        let generation = state & !(GENERATION - 1);
        if state & OPEN == 0 || generation == *seen {
            return false;
        }
        *seen = generation;
        // The generation is part of the comparison: success means that this very operation is still open.
        if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            *seen = 0;
            return false;
        }
        // SAFETY: not written while a helper is inside.
        let job = unsafe { *self.job.get() };
        let worked = catch_unwind(AssertUnwindSafe(|| job.into_iter().for_each(|job| self.work(job))));
        if worked.is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
        self.state.fetch_sub(1, Ordering::Release);
        true
    }

    /// What a helper does until the team is done.
    fn serve(&self) {
        let (mut seen, mut idle) = (0, 0);
        while !self.done.load(Ordering::Acquire) {
            let found = (0..LOOKS).any(|_| {
                let found = self.help(&mut seen);
                if !found {
                    std::hint::spin_loop();
                }
                found
            });
            if found || rayon::yield_now() == Some(rayon::Yield::Executed) {
                idle = 0;
                continue;
            }
            idle += 1;
            if idle > PATIENCE {
                std::thread::yield_now();
            }
        }
    }
}

/// Number of threads that may share an operation.
pub(super) fn threads() -> usize {
    rayon::current_num_threads()
}

/// Runs `work` on `0..tasks`, on all threads. Which thread gets which task is open.
pub(super) fn spread(tasks: usize, work: impl Fn(usize) + Sync + Send) {
    if tasks <= 1 || threads() == 1 {
        return (0..tasks).for_each(work);
    }
    let team = TEAM.replace(std::ptr::null());
    if team.is_null() {
        return (0..tasks).into_par_iter().with_max_len(1).for_each(work);
    }
    // Put back also when a task panics. Meanwhile it is away: an operation inside a task must not start another.
    struct Back(*const Team);
    impl Drop for Back {
        fn drop(&mut self) {
            TEAM.set(self.0);
        }
    }
    let _back = Back(team);
    // SAFETY: `awake` sets the pointer for as long as the team lives.
    unsafe { &*team }.run(tasks, &work);
}

/// The results of `work` on `0..tasks`, in order.
pub(super) fn collect<R: Send + Sync>(tasks: usize, work: impl Fn(usize) -> R + Sync + Send) -> Vec<R> {
    let results: Vec<OnceLock<R>> = (0..tasks).map(|_| OnceLock::new()).collect();
    spread(tasks, |task| {
        let _ = results[task].set(work(task));
    });
    results.into_iter().filter_map(OnceLock::into_inner).collect()
}

/// Runs `work` while the pool's other threads wait for parts of its operations.
///
/// An idle thread of rayon soon sleeps, and waking it costs more than most operations of a training step take: without
/// this, a second thread is worth little. Call it inside the pool, around many operations: a whole step, or a run.
pub fn awake<R>(work: impl FnOnce() -> R) -> R {
    let Some(caller) = rayon::current_thread_index() else { return work() };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if threads() == 1 || cores == 1 {
        return work();
    }
    /// Lets the helpers go and the team before be the thread's again, also when the work panics.
    struct Release(Arc<Team>, *const Team);
    impl Drop for Release {
        fn drop(&mut self) {
            self.0.done.store(true, Ordering::Release);
            TEAM.set(self.1);
        }
    }
    let team = Arc::new(Team::new());
    let release = Release(team.clone(), TEAM.replace(Arc::as_ptr(&team)));
    rayon::spawn_broadcast(move |context| {
        // More waiting threads than cores would be in the way of the working ones.
        let helpers_before = context.index() - usize::from(context.index() > caller);
        if context.index() != caller && helpers_before + 1 < cores {
            team.serve();
        }
    });
    let result = work();
    drop(release);
    result
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, AtomicUsize};

    use super::*;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn each_task_runs_once_whatever_the_threads() {
        for threads in [1, 2, 5] {
            pool(threads).install(|| {
                awake(|| {
                    for tasks in (0..300).map(|i| i % 23) {
                        let seen: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                        spread(tasks, |i| {
                            seen[i].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(seen.iter().all(|s| s.load(Ordering::Relaxed) == 1));
                    }
                });
            });
        }
    }

    #[test]
    fn operations_inside_tasks_and_rayon_work_too() {
        let sum = AtomicU64::new(0);
        pool(3).install(|| {
            awake(|| {
                spread(4, |i| {
                    spread(5, |j| {
                        sum.fetch_add((i * j) as u64, Ordering::Relaxed);
                    });
                });
                let inner: u64 = awake(|| (0..1000u64).into_par_iter().sum());
                assert_eq!(inner, 499_500);
                spread(2, |i| {
                    sum.fetch_add(i as u64, Ordering::Relaxed);
                });
            });
        });
        assert_eq!(sum.into_inner(), 61);
        assert_eq!(awake(|| 3), 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        pool(2).install(|| {
            awake(|| {
                for _ in 0..20 {
                    let result = std::panic::catch_unwind(|| spread(8, |i| assert!(i != 5)));
                    assert!(result.is_err());
                }
                let count = AtomicUsize::new(0);
                spread(8, |_| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(count.into_inner(), 8);
            });
        });
    }
}
