//! Ranks that are processes of an MPI job and train on CPUs. One thread makes all calls of the library, in the order in which the
//! collectives were begun, beside the work of the others.
//!
//! MPI moves bytes alone: each rank sums its share itself, in the order of the ranks, so the bits do not depend on the library.

use std::fmt::{Debug, Formatter, Result as FmtResult};
use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use flowtape_engine::comm::{Collective, Comm, Kind, Work, sum_in_order};
use flowtape_engine::{Device, Error as EngineError, Result as EngineResult, Tensor, hash};
use mpi::Threading;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Root};

use crate::{Error, Result};

/// Bytes that a rank sends at a time: counts of MPI are of 32 bits, and buffers stay small.
const PIECE: usize = 1 << 24;
/// How often those that wait look whether a rank failed.
const LOOK: Duration = Duration::from_millis(100);
/// How long a process may take to end by itself when it has failed, before MPI ends all.
const GRACE: Duration = Duration::from_secs(20);

/// A rank of an MPI job, or of a part of it.
pub struct Mpi {
    port: Arc<Port>,
    group: usize,
    rank: usize,
    /// The ranks of all of the group, among all.
    members: Vec<usize>,
}

/// The way to the thread that calls MPI.
struct Port {
    /// None when the last rank of this process goes.
    jobs: Mutex<Option<Sender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    failed: OnceLock<(usize, String)>,
}

/// What that thread is to do.
struct Job {
    group: usize,
    what: What,
    done: Sender<EngineResult<usize>>,
}

enum What {
    Collective(Box<Collective>),
    Barrier,
    /// Makes a group of the ranks with this color.
    Split(usize),
}

impl Mpi {
    /// Joins the job that this process was started in, by `mpirun`, `mpiexec` or `srun`. Once in a process.
    ///
    /// # Errors
    /// When the library was used before, or can't be used by threads.
    pub fn join() -> Result<Arc<Self>> {
        let (jobs, queue) = channel();
        let (tell, told) = channel();
        let serve = move || serve(&queue, &tell);
        let failed = |what: String| Error::Launch(format!("MPI: {what}"));
        let thread = std::thread::Builder::new().name("mpi".into()).spawn(serve).map_err(|e| failed(e.to_string()))?;
        let ended = |_| failed("its thread ended".into());
        let (rank, size) = told.recv().map_err(ended)?.map_err(failed)?;
        let port =
            Arc::new(Port { jobs: Mutex::new(Some(jobs)), thread: Mutex::new(Some(thread)), failed: OnceLock::new() });
        Ok(Arc::new(Self { port, group: 0, rank, members: (0..size).collect() }))
    }

    /// Gives up because another rank failed, as somebody else than MPI found: whoever waits gets an error that names it.
    pub fn fail(&self, rank: usize, cause: &str) {
        if self.port.failed.set((rank, cause.into())).is_err() {
            return;
        }
        let end = || {
            std::thread::sleep(GRACE);
            SimpleCommunicator::world().abort(1)
        };
        // Without a thread the starter does it.
        let _ = std::thread::Builder::new().name("mpi abort".into()).spawn(end);
    }

    fn ask(&self, what: What) -> EngineResult<Asked> {
        self.check()?;
        let (done, wait) = channel();
        let jobs = self.port.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let job = Job { group: self.group, what, done };
        jobs.as_ref().and_then(|jobs| jobs.send(job).ok()).ok_or_else(|| self.ended())?;
        Ok(Asked { wait, port: self.port.clone(), rank: self.own() })
    }

    /// This rank among all.
    fn own(&self) -> usize {
        self.members[self.rank]
    }

    fn ended(&self) -> EngineError {
        EngineError::Rank { rank: self.own(), what: "the thread that calls MPI ended".into() }
    }
}

impl Port {
    /// What failed, of all ranks.
    fn check(&self) -> EngineResult<()> {
        match self.failed.get() {
            Some((rank, what)) => Err(EngineError::Rank { rank: *rank, what: what.clone() }),
            None => Ok(()),
        }
    }
}

impl Debug for Port {
    fn fmt(&self, f: &mut Formatter<'_>) -> FmtResult {
        write!(f, "MPI, failed: {:?}", self.failed.get())
    }
}

/// A process that ends in order has left the job before.
impl Drop for Port {
    fn drop(&mut self) {
        self.jobs.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // Where something failed, others may never come to leave it.
        if let Some(thread) = thread.filter(|_| self.failed.get().is_none()) {
            let _ = thread.join();
        }
    }
}

impl Debug for Mpi {
    fn fmt(&self, f: &mut Formatter<'_>) -> FmtResult {
        write!(f, "Mpi(rank {} of {})", self.rank, self.members.len())
    }
}

/// A job under way.
#[derive(Debug)]
struct Asked {
    wait: Receiver<EngineResult<usize>>,
    port: Arc<Port>,
    rank: usize,
}

impl Asked {
    fn finish(&self) -> EngineResult<usize> {
        let ended = || EngineError::Rank { rank: self.rank, what: "the thread that calls MPI ended".into() };
        loop {
            // A call of MPI that waits for a rank which is gone never ends.
            match self.wait.recv_timeout(LOOK) {
                Ok(done) => return done,
                Err(RecvTimeoutError::Timeout) => self.port.check()?,
                Err(RecvTimeoutError::Disconnected) => return Err(ended()),
            }
        }
    }
}

impl Work for Asked {
    fn wait(self: Box<Self>) -> EngineResult<()> {
        self.finish().map(|_| ())
    }
}

impl Comm for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.members.len()
    }

    fn device(&self) -> Device {
        Device::cpu()
    }

    fn start(&self, collective: Collective) -> EngineResult<Box<dyn Work>> {
        Ok(Box::new(self.ask(What::Collective(Box::new(collective)))?))
    }

    fn barrier(&self) -> EngineResult<()> {
        self.ask(What::Barrier)?.finish().map(|_| ())
    }

    /// This process is expected to end soon, which its starter answers by ending the others. Where it does not, MPI ends all.
    fn abort(&self, cause: &str) {
        self.fail(self.own(), cause);
    }

    fn check(&self) -> EngineResult<()> {
        self.port.check()
    }

    fn split(&self, color_of: &dyn Fn(usize) -> usize) -> EngineResult<Arc<dyn Comm>> {
        let own = color_of(self.rank);
        let group = self.ask(What::Split(own))?.finish()?;
        let alike: Vec<usize> = (0..self.members.len()).filter(|rank| color_of(*rank) == own).collect();
        let rank = alike.iter().position(|rank| *rank == self.rank).unwrap_or_default();
        let members = alike.into_iter().map(|rank| self.members[rank]).collect();
        Ok(Arc::new(Self { port: self.port.clone(), group, rank, members }))
    }
}

/// The thread that calls MPI: tells which rank it is, then does one job after the other.
fn serve(queue: &Receiver<Job>, tell: &Sender<Result<(usize, usize), String>>) {
    // From other threads MPI is only told to end all.
    let started = mpi::initialize_with_threading(Threading::Multiple);
    let Some((_universe, Threading::Multiple)) = started else {
        let what = "was begun before, or is a build without threads: use one with MPI_THREAD_MULTIPLE";
        let _ = tell.send(Err(what.into()));
        return;
    };
    let world = SimpleCommunicator::world();
    let _ = tell.send(Ok((world.rank() as usize, world.size() as usize)));
    let mut groups = vec![world];
    let mut failed = false;
    while let Ok(Job { group, what, done }) = queue.recv() {
        let result = match what {
            What::Barrier => {
                groups[group].barrier();
                Ok(0)
            }
            What::Split(color) => {
                let color = mpi::topology::Color::with_value(color as i32);
                let made = groups[group].split_by_color(color);
                groups.extend(made);
                Ok(groups.len() - 1)
            }
            What::Collective(collective) => Exchange { of: &groups[group], collective: &collective }.run().map(|()| 0),
        };
        failed |= result.is_err();
        // Who does not wait has given up.
        let _ = done.send(result);
    }
    if failed {
        // Others wait for what this rank will not do: the library is not left in order.
        std::mem::forget(_universe);
    }
}

/// A collective among the ranks of a communicator.
struct Exchange<'a> {
    of: &'a SimpleCommunicator,
    collective: &'a Collective,
}

impl Exchange<'_> {
    fn run(&self) -> EngineResult<()> {
        self.agree()?;
        let (source, target) = (flat(self.collective.source())?, flat(self.collective.target())?);
        let world = self.world();
        match self.collective.kind() {
            Kind::Broadcast { root } => {
                let root = self.of.process_at_rank(root as i32);
                self.pieces(source.numel(), |at| {
                    let mut bytes = bytes_of(&source, at.clone())?;
                    root.broadcast_into(&mut bytes[..]);
                    self.put(&target, at, &bytes)
                })
            }
            kind @ (Kind::Reduce { .. } | Kind::AllReduce) => self.pieces(source.numel(), |at| {
                let mut bytes = bytes_of(&source, at.clone())?;
                let used = bytes.len();
                let share = at.len().div_ceil(world) * source.dtype().size();
                bytes.resize(share * world, 0);
                let own = self.sum(&self.all_to_all(&bytes))?;
                let sums = match kind {
                    Kind::Reduce { root } => self.gather(&own, root),
                    _ => Some(self.all_gather(&own)),
                };
                sums.map_or(Ok(()), |sums| self.put(&target, at, &sums[..used]))
            }),
            Kind::ReduceScatter => self.pieces(target.numel(), |at| {
                let parts = self.all_to_all(&self.of_all_parts(&source, &at)?);
                self.put(&target, at, &self.sum(&parts)?)
            }),
            Kind::AllGather => self.pieces(source.numel(), |at| {
                let all = self.all_gather(&bytes_of(&source, at.clone())?);
                self.put_in_all_parts(&target, &at, &all)
            }),
            Kind::AllToAll => self.pieces(source.numel() / world, |at| {
                let all = self.all_to_all(&self.of_all_parts(&source, &at)?);
                self.put_in_all_parts(&target, &at, &all)
            }),
        }
    }

    fn world(&self) -> usize {
        self.of.size() as usize
    }

    /// Sees that all ranks begin the same: MPI takes no notice, or ends all.
    fn agree(&self) -> EngineResult<()> {
        let shown = self.collective.shown();
        // What the hash stands for follows only where they differ.
        let hash = hash::of(shown.as_bytes());
        let mut all = vec![0u64; self.world()];
        self.of.all_gather_into(&hash, &mut all[..]);
        match all.iter().position(|other| *other != all[0]) {
            None => Ok(()),
            Some(rank) => {
                let what = format!("begins another collective than rank 0; this rank begins {shown}");
                Err(EngineError::Rank { rank, what })
            }
        }
    }

    /// Runs over `n` elements of each rank in pieces.
    fn pieces(&self, n: usize, each: impl FnMut(Range<usize>) -> EngineResult<()>) -> EngineResult<()> {
        let step = (PIECE / self.collective.source().dtype().size() / self.world()).max(1);
        (0..n).step_by(step).map(|start| start..(start + step).min(n)).try_for_each(each)
    }

    /// Elements `at` of each rank's part.
    fn of_all_parts(&self, source: &Tensor, at: &Range<usize>) -> EngineResult<Vec<u8>> {
        let n = source.numel() / self.world();
        let mut all = Vec::new();
        for rank in 0..self.world() {
            all.extend(bytes_of(source, rank * n + at.start..rank * n + at.end)?);
        }
        Ok(all)
    }

    fn put_in_all_parts(&self, target: &Tensor, at: &Range<usize>, all: &[u8]) -> EngineResult<()> {
        let n = target.numel() / self.world();
        let of_one = at.len() * target.dtype().size();
        (0..self.world()).try_for_each(|rank| {
            self.put(target, rank * n + at.start..rank * n + at.end, &all[rank * of_one..][..of_one])
        })
    }

    fn put(&self, target: &Tensor, at: Range<usize>, bytes: &[u8]) -> EngineResult<()> {
        let from = Tensor::from_bytes(bytes, &[at.len()], target.dtype(), &Device::cpu())?;
        target.narrow(0, at.start, at.len())?.copy_from(&from)
    }

    /// Part `r` of what rank `r` gets, and in its place what it has for this rank.
    fn all_to_all(&self, bytes: &[u8]) -> Vec<u8> {
        let mut all = vec![0u8; bytes.len()];
        self.of.all_to_all_into(bytes, &mut all[..]);
        all
    }

    /// On the root what all ranks have.
    fn gather(&self, bytes: &[u8], root: usize) -> Option<Vec<u8>> {
        let process = self.of.process_at_rank(root as i32);
        if self.of.rank() as usize != root {
            process.gather_into(bytes);
            return None;
        }
        let mut all = vec![0u8; bytes.len() * self.world()];
        process.gather_into_root(bytes, &mut all[..]);
        Some(all)
    }

    fn all_gather(&self, bytes: &[u8]) -> Vec<u8> {
        let mut all = vec![0u8; bytes.len() * self.world()];
        self.of.all_gather_into(bytes, &mut all[..]);
        all
    }

    /// The sum of what all ranks have for this one.
    fn sum(&self, parts: &[u8]) -> EngineResult<Vec<u8>> {
        let (world, dtype) = (self.world(), self.collective.source().dtype());
        let n = parts.len() / world / dtype.size();
        let parts = Tensor::from_bytes(parts, &[world, n], dtype, &Device::cpu())?;
        let parts = (0..world).map(|rank| parts.narrow(0, rank, 1)?.reshape(&[n])).collect::<EngineResult<Vec<_>>>()?;
        sum_in_order(&parts, &parts[0])?;
        parts[0].to_bytes()
    }
}

/// The same elements in one axis.
fn flat(tensor: &Tensor) -> EngineResult<Tensor> {
    tensor.reshape(&[tensor.numel()])
}

fn bytes_of(tensor: &Tensor, at: Range<usize>) -> EngineResult<Vec<u8>> {
    tensor.narrow(0, at.start, at.len())?.to_bytes()
}
