//! The threads that share an operation: rayon's, kept awake between operations by a loop of our own.
//!
//! An operation of a training step takes microseconds. Handing a part of it to a sleeping thread costs tens of them, and
//! to a searching thread of rayon several; here it is a few stores to shared memory.
//!
//! A helper that finds nothing to do for [`STAY`] goes back to rayon, where it sleeps and costs nothing; the next operation
//! calls it again.
//!
//! A thread outside of any pool has a team of its own from its first operation on, with helpers of rayon's global pool: so an
//! embedding program that knows nothing of pools gets all cores. Inside a pool a team is made by [`awake`].

use std::cell::{Cell, OnceCell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use rayon::prelude::*;

use crate::Device;
use crate::platform::{Instant, cores};

/// Set in [`Team::state`] while tasks may be taken.
const OPEN: u64 = 1 << 31;
/// Added to [`Team::state`] for each operation.
const GENERATION: u64 = 1 << 32;
/// Looks for work between two visits of rayon's own queue: about a microsecond.
const LOOKS: u32 = 64;
/// Visits after which an idle thread lets others have its core.
const PATIENCE: u32 = 256;
/// How long a helper waits for the next operation before it goes to sleep. Between the operations of a step, and between
/// steps, it is far less; a machine that waits for data or for another device has its cores back soon.
const STAY: Duration = Duration::from_millis(20);
/// The same for helpers that nobody asked for: enough from one operation to the next, and no burden for a program that does other things.
const STAY_UNASKED: Duration = Duration::from_millis(2);

/// Tasks of one operation.
#[derive(Clone, Copy)]
struct Job {
    work: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

/// One thread that starts operations and helpers that wait for them.
struct Team {
    /// The team itself, for the helpers that it calls.
    own: Weak<Team>,
    /// The place in the pool of the thread that starts operations, if it is one of the pool's.
    caller: Option<usize>,
    /// Threads that may work at once. More waiting threads than cores would be in the way of the working ones.
    most: usize,
    /// How long a helper waits without work.
    stay: Duration,
    /// Whether a helper went to sleep, or none was called yet: the next operation calls all that are away.
    incomplete: AtomicBool,
    /// Which of the pool's threads are here.
    here: Vec<AtomicBool>,
    /// How often a helper came, and how often one went to sleep.
    came: AtomicUsize,
    slept: AtomicUsize,
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

/// Who helps with the operations that a thread starts.
#[derive(Clone, Copy)]
enum Help {
    /// Its first operation decides.
    Undecided,
    /// Nobody: its operations run on it alone.
    None,
    /// Whoever of rayon's pool is free.
    Pool,
    /// A team, which lives as long as this stands here.
    Team(*const Team),
}

thread_local! {
    static HELP: Cell<Help> = const { Cell::new(Help::Undecided) };
    /// The team of a thread outside of any pool.
    static OWN: OnceCell<Own> = const { OnceCell::new() };
}

/// Lets the helpers of a thread's own team go when the thread ends.
struct Own(Arc<Team>);

impl Drop for Own {
    fn drop(&mut self) {
        // Operations of other destructors find nobody.
        HELP.set(Help::None);
        self.0.done.store(true, Ordering::Release);
    }
}

impl Help {
    /// What a thread has that did not ask for anything.
    fn decide() -> Self {
        if rayon::current_thread_index().is_some() {
            return Self::Pool;
        }
        if cores() == 1 || threads() == 1 {
            return Self::None;
        }
        let team = OWN.try_with(|own| Arc::as_ptr(&own.get_or_init(|| Own(Team::new(None, STAY_UNASKED))).0));
        team.map_or(Self::None, Self::Team)
    }

    /// Puts it in the place of what the thread has now, until the guard goes, also when work panics.
    fn until_drop(self) -> Back {
        Back(HELP.replace(self))
    }
}

/// Gives a thread back what helped it before.
struct Back(Help);

impl Drop for Back {
    fn drop(&mut self) {
        HELP.set(self.0);
    }
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
    fn new(caller: Option<usize>, stay: Duration) -> Arc<Self> {
        Arc::new_cyclic(|own| Self {
            own: own.clone(),
            caller,
            most: cores().min(threads()),
            stay,
            incomplete: AtomicBool::new(true),
            here: (0..threads()).map(|_| AtomicBool::new(false)).collect(),
            came: AtomicUsize::new(0),
            slept: AtomicUsize::new(0),
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panicked: AtomicBool::new(false),
            done: AtomicBool::new(false),
        })
    }

    /// Calls the helpers that are away.
    fn call(&self) {
        let Some(team) = self.own.upgrade() else { return };
        rayon::spawn_broadcast(move |context| {
            let helper = context.index();
            let helpers_before = helper - usize::from(team.caller.is_some_and(|caller| helper > caller));
            if Some(helper) != team.caller && helpers_before + 1 < team.most {
                team.serve(helper);
            }
        });
        // The pool's thread that calls is called too. A page's never looks into its queue otherwise, where a call would stay each time.
        rayon::yield_local();
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
        if self.incomplete.load(Ordering::Relaxed) && self.incomplete.swap(false, Ordering::Relaxed) {
            self.call();
        }
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

    /// What a helper does until the team is done, or until it has waited for nothing too long.
    fn serve(&self, helper: usize) {
        // A helper that looks into rayon's queue may find there that it is called again.
        if self.here[helper].swap(true, Ordering::Relaxed) {
            return;
        }
        self.came.fetch_add(1, Ordering::Relaxed);
        let (mut seen, mut idle) = (0, 0);
        let mut waits_since = None;
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
                waits_since = None;
                continue;
            }
            idle += 1;
            if idle > PATIENCE {
                if waits_since.get_or_insert_with(Instant::now).elapsed() >= self.stay {
                    break;
                }
                std::thread::yield_now();
            }
        }
        self.here[helper].store(false, Ordering::Relaxed);
        self.slept.fetch_add(1, Ordering::Relaxed);
        self.incomplete.store(true, Ordering::Relaxed);
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
    if let Help::Undecided = HELP.get() {
        HELP.set(Help::decide());
    }
    match HELP.get() {
        Help::Undecided | Help::None => (0..tasks).for_each(work),
        Help::Pool => (0..tasks).into_par_iter().with_max_len(1).for_each(work),
        Help::Team(team) => {
            // Meanwhile it is away: an operation inside a task must not start another.
            let _back = Help::Pool.until_drop();
            // SAFETY: it lives as long as it stands in `HELP`: `awake` and the thread's end take it out before it goes.
            unsafe { &*team }.run(tasks, &work);
        }
    }
}

/// The results of `work` on `0..tasks`, in order.
pub(super) fn collect<R: Send + Sync>(tasks: usize, work: impl Fn(usize) -> R + Sync + Send) -> Vec<R> {
    let results: Vec<OnceLock<R>> = (0..tasks).map(|_| OnceLock::new()).collect();
    spread(tasks, |task| {
        let _ = results[task].set(work(task));
    });
    results.into_iter().filter_map(OnceLock::into_inner).collect()
}

/// The threads to make when `asked` are asked for: no more than there are cores, since others would only be in their way,
/// and all of them for 0.
pub fn usable_threads(asked: usize) -> usize {
    if asked == 0 { cores() } else { asked.min(cores()) }
}

/// Runs `work`, whose tensors are on `device`. Where that is the CPU, the pool's other threads wait for parts of its
/// operations.
///
/// An idle thread of rayon soon sleeps, and waking it costs more than most operations of a training step take: without
/// this, a second thread of a pool is worth little. Call it inside a pool of your own, around many operations: a whole step, or a
/// run. Outside of any pool it changes nothing: there a thread's operations are helped anyway. Helpers sleep all the same when no
/// operation comes for some milliseconds.
pub fn awake<R>(device: &Device, work: impl FnOnce() -> R) -> R {
    if device.backend().is_host() { wait_for(STAY, work) } else { work() }
}

/// Runs `work` on this thread alone: nobody is called to help with its operations. For threads of which there are many, such as
/// those that read ahead.
pub fn alone<R>(work: impl FnOnce() -> R) -> R {
    let _back = Help::None.until_drop();
    work()
}

/// The same as [`awake`] on the CPU, with helpers that stay for a time.
fn wait_for<R>(stay: Duration, work: impl FnOnce() -> R) -> R {
    let Some(caller) = rayon::current_thread_index() else { return work() };
    if threads() == 1 || cores() == 1 {
        return work();
    }
    /// Lets the helpers go when the team before is the thread's again, also when the work panics.
    struct Release(Arc<Team>, #[expect(dead_code)] Back);
    impl Drop for Release {
        fn drop(&mut self) {
            self.0.done.store(true, Ordering::Release);
        }
    }
    let team = Team::new(Some(caller), stay);
    let _release = Release(team.clone(), Help::Team(Arc::as_ptr(&team)).until_drop());
    work()
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
                wait_for(STAY, || {
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
            wait_for(STAY, || {
                spread(4, |i| {
                    spread(5, |j| {
                        sum.fetch_add((i * j) as u64, Ordering::Relaxed);
                    });
                });
                let inner: u64 = wait_for(STAY, || (0..1000u64).into_par_iter().sum());
                assert_eq!(inner, 499_500);
                spread(2, |i| {
                    sum.fetch_add(i as u64, Ordering::Relaxed);
                });
            });
        });
        assert_eq!(sum.into_inner(), 61);
        assert_eq!(wait_for(STAY, || 3), 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        pool(2).install(|| {
            wait_for(STAY, || {
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

    /// Waits, without an end in sight of a healthy machine.
    fn until(what: &str, holds: impl Fn() -> bool) {
        let started = Instant::now();
        while !holds() {
            assert!(started.elapsed() < Duration::from_secs(300), "{what}");
            std::thread::yield_now();
        }
    }

    fn team<'a>() -> &'a Team {
        let Help::Team(team) = HELP.get() else { panic!("no team") };
        // SAFETY: the tests ask for it inside `wait_for`, or on a thread whose own it is, where it lives.
        unsafe { &*team }
    }

    /// One after the other, on this thread alone or not.
    fn threads_of(tasks: usize) -> std::collections::HashSet<std::thread::ThreadId> {
        let seen = std::sync::Mutex::new(std::collections::HashSet::new());
        spread(tasks, |_| {
            seen.lock().unwrap().insert(std::thread::current().id());
        });
        seen.into_inner().unwrap()
    }

    #[test]
    fn a_thread_that_knows_nothing_of_pools_is_helped_until_it_ends() {
        // As many help as the global pool has threads, which `RAYON_NUM_THREADS` says.
        if cores() == 1 || threads() == 1 {
            return;
        }
        let kept = std::thread::spawn(|| {
            spread(8, |_| {});
            until("a helper comes", || team().came.load(Ordering::Relaxed) > 0);
            let me = std::thread::current().id();
            until("a helper takes a task", || threads_of(64).iter().any(|thread| *thread != me));
            // Of threads that are many, each is alone.
            assert_eq!(alone(|| threads_of(64)), std::collections::HashSet::from([me]));
            let inner = AtomicU64::new(0);
            let add = |i| {
                inner.fetch_add(i as u64, Ordering::Relaxed);
            };
            spread(3, |_| spread(3, add));
            assert_eq!(inner.into_inner(), 9);
            team().own.clone()
        })
        .join()
        .unwrap();
        until("the helpers go with their caller", || kept.strong_count() == 0);
    }

    #[test]
    fn no_call_stays_in_the_queue_of_a_thread_that_never_goes_back_to_its_pool() {
        if cores() == 1 {
            return;
        }
        std::thread::spawn(|| {
            let _pool = rayon::ThreadPoolBuilder::new().num_threads(2).use_current_thread().build().unwrap();
            let team = wait_for(STAY, || {
                spread(8, |_| {});
                team().own.clone()
            });
            until("what calls the helpers goes with them", || team.strong_count() == 0);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn helpers_without_work_sleep_and_the_next_operation_calls_them() {
        if cores() == 1 {
            return;
        }
        pool(2).install(|| {
            wait_for(Duration::ZERO, || {
                for round in 1..=3 {
                    let count = AtomicUsize::new(0);
                    spread(8, |_| {
                        count.fetch_add(1, Ordering::Relaxed);
                    });
                    assert_eq!(count.into_inner(), 8);
                    until("the helper sleeps", || team().incomplete.load(Ordering::Relaxed));
                    let counts = [&team().came, &team().slept].map(|n| n.load(Ordering::Relaxed));
                    assert_eq!(counts, [round; 2]);
                }
            });
        });
    }

    #[test]
    fn helpers_stay_from_one_operation_to_the_next() {
        if cores() == 1 {
            return;
        }
        pool(2).install(|| {
            wait_for(Duration::from_secs(3600), || {
                assert_eq!(team().came.load(Ordering::Relaxed), 0);
                spread(8, |_| {});
                until("the helper comes", || team().came.load(Ordering::Relaxed) == 1);
                for _ in 0..1000 {
                    spread(8, |_| {});
                }
                let counts = [&team().came, &team().slept].map(|n| n.load(Ordering::Relaxed));
                assert_eq!(counts, [1, 0]);
            });
        });
    }

    #[test]
    fn only_work_of_the_cpu_has_helpers() {
        pool(2).install(|| {
            let has_team = |device: &Device| awake(device, || matches!(HELP.get(), Help::Team(_)));
            assert!(!has_team(&crate::meta::Meta::default().device()));
            assert_eq!(has_team(&Device::cpu()), cores() > 1);
        });
    }

    #[test]
    fn there_are_no_more_threads_than_cores() {
        assert_eq!(usable_threads(0), cores());
        assert_eq!(usable_threads(1), 1);
        assert_eq!(usable_threads(usize::MAX), cores());
    }
}
