//! Ranks that are threads of one process.

use std::fmt::Display;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::collective::{copy, flat, part};
use super::{Collective, Comm, Done, Kind, Work};
use crate::expr::Function;
use crate::ops::pointwise::run_pointwise;
use crate::{Device, Error, Result, Tensor};

/// One of several ranks that are threads of this process. Each does a share of every sum, in the order of the ranks.
///
/// Ranks whose devices have no data exchange nothing, but what they do is compared all the same.
#[derive(Debug)]
pub struct Threads {
    seat: Arc<Seat>,
    /// Which meeting place.
    group: usize,
    rank: usize,
    /// The ranks of all of the group, among all.
    members: Vec<usize>,
    device: Device,
}

/// What a rank brings to a meeting.
#[derive(Clone, Debug)]
enum Post {
    Collective(Collective),
    Barrier,
    /// Of all ranks.
    Colors(Vec<usize>),
    /// Where a group is to meet, as its first rank says.
    Place(Option<usize>),
}

impl Post {
    fn agrees(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Collective(a), Self::Collective(b)) => a.agrees(b),
            (Self::Colors(a), Self::Colors(b)) => a == b,
            (Self::Barrier, Self::Barrier) | (Self::Place(_), Self::Place(_)) => true,
            _ => false,
        }
    }

    fn shown(&self) -> String {
        match self {
            Self::Collective(collective) => collective.shown(),
            Self::Barrier | Self::Place(_) => "a barrier".into(),
            Self::Colors(colors) => format!("a split into {colors:?}"),
        }
    }
}

/// Where the ranks of a group meet.
#[derive(Debug)]
struct Meeting {
    posts: Vec<Option<Post>>,
    /// Meetings that were held, and what was brought to the last one.
    held: u64,
    brought: Arc<[Post]>,
}

impl Meeting {
    fn of(ranks: usize) -> Self {
        Self { posts: vec![None; ranks], held: 0, brought: Arc::new([]) }
    }
}

#[derive(Debug)]
struct State {
    meetings: Vec<Meeting>,
    /// The ranks that are gone.
    left: Vec<bool>,
    /// The first rank that gave up, and why.
    failed: Option<(usize, String)>,
}

#[derive(Debug)]
struct Hub {
    state: Mutex<State>,
    changed: Condvar,
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A rank's place in the hub, given up when its last handle is dropped.
#[derive(Debug)]
struct Seat {
    hub: Arc<Hub>,
    rank: usize,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.hub.lock().left[self.rank] = true;
        self.hub.changed.notify_all();
    }
}

impl Threads {
    /// As many ranks as there are devices; those with data are on one.
    pub fn on(devices: &[Device]) -> Vec<Arc<dyn Comm>> {
        let world = devices.len();
        let state = State { meetings: vec![Meeting::of(world)], left: vec![false; world], failed: None };
        let hub = Arc::new(Hub { state: Mutex::new(state), changed: Condvar::new() });
        let of = |(rank, device): (usize, &Device)| -> Arc<dyn Comm> {
            let seat = Arc::new(Seat { hub: hub.clone(), rank });
            Arc::new(Self { seat, group: 0, rank, members: (0..world).collect(), device: device.clone() })
        };
        devices.iter().enumerate().map(of).collect()
    }

    /// Runs `work` as each of so many ranks, on threads of their own, and gives what they came to. One that fails stops all.
    ///
    /// # Panics
    /// Where a rank does, and where no thread can be started ([`HAS_THREADS`](crate::platform::HAS_THREADS)).
    pub fn run<T: Send, E: Display + Send>(
        world_size: usize,
        device: &Device,
        work: impl Fn(Arc<dyn Comm>) -> Result<T, E> + Sync,
    ) -> Vec<Result<T, E>> {
        let work = &work;
        let as_rank = |comm: Arc<dyn Comm>| {
            let done = work(comm.clone());
            if let Err(error) = &done {
                comm.abort(&error.to_string());
            }
            done
        };
        std::thread::scope(|scope| {
            let comms = Self::on(&vec![device.clone(); world_size]);
            let threads: Vec<_> = comms.into_iter().map(|comm| scope.spawn(move || as_rank(comm))).collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined.map(|done| done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        })
    }

    /// Brings something and waits for what all others bring.
    fn meet(&self, post: Post) -> Result<Arc<[Post]>> {
        let hub = &self.seat.hub;
        let mut state = hub.lock();
        if let Some(failed) = &state.failed {
            return Err(failure(failed));
        }
        let meeting = &mut state.meetings[self.group];
        let held = meeting.held;
        meeting.posts[self.rank] = Some(post);
        if meeting.posts.iter().all(Option::is_some) {
            meeting.brought = meeting.posts.iter_mut().filter_map(Option::take).collect();
            meeting.held += 1;
            hub.changed.notify_all();
            return Ok(meeting.brought.clone());
        }
        loop {
            let meeting = &state.meetings[self.group];
            if meeting.held != held {
                return Ok(meeting.brought.clone());
            }
            let missing = |(rank, post): (usize, &Option<Post>)| post.is_none().then_some(self.members[rank]);
            let gone = meeting.posts.iter().enumerate().filter_map(missing).find(|rank| state.left[*rank]);
            if let (Some(rank), None) = (gone, &state.failed) {
                state.failed = Some((rank, "ended while the others wait for it".into()));
                hub.changed.notify_all();
            }
            if let Some(failed) = &state.failed {
                return Err(failure(failed));
            }
            state = hub.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Meets, and sees that all want the same.
    fn agree(&self, post: Post) -> Result<Arc<[Post]>> {
        let all = self.meet(post)?;
        if let Some(rank) = all.iter().position(|other| !other.agrees(&all[0])) {
            let (wanted, first) = (all[rank].shown(), all[0].shown());
            let cause = format!("does {wanted} where rank {} does {first}", self.members[0]);
            self.fail(self.members[rank], cause.clone());
            return Err(Error::Rank { rank: self.members[rank], what: cause });
        }
        Ok(all)
    }

    fn fail(&self, rank: usize, cause: String) {
        self.seat.hub.lock().failed.get_or_insert((rank, cause));
        self.seat.hub.changed.notify_all();
    }

    /// This rank's share of a collective.
    fn share(&self, all: &[Post]) -> Result<()> {
        let collective = |post: &Post| match post {
            Post::Collective(collective) => Some(collective.clone()),
            _ => None,
        };
        let all: Vec<Collective> = all.iter().filter_map(collective).collect();
        let (world, rank) = (all.len(), self.rank);
        let Some(own) = all.get(rank).filter(|own| own.target().device().backend().has_data()) else { return Ok(()) };
        let flat_target = flat(own.target());
        match own.kind() {
            Kind::Broadcast { root } => copy(&flat(all[root].source()), &flat_target),
            Kind::Reduce { .. } | Kind::AllReduce => {
                // Each rank sums a range of elements that no other one touches, and hands the sums to all, or leaves them at the root.
                let n = flat_target.numel();
                let (start, end) = (rank * n / world, (rank + 1) * n / world);
                let range = |of: &Collective| of.target().run_of(start, &[end - start]);
                let ranges: Vec<Tensor> = all.iter().map(range).collect();
                if let Kind::Reduce { root } = own.kind() {
                    return sum_in_order(&ranges, &ranges[root]);
                }
                sum_in_order(&ranges, &ranges[rank])?;
                ranges.iter().try_for_each(|other| copy(&ranges[rank], other))
            }
            Kind::ReduceScatter => {
                let parts: Vec<Tensor> = all.iter().map(|other| part(other.source(), rank, world)).collect();
                sum_in_order(&parts, &flat_target)
            }
            Kind::AllGather => {
                let source = flat(own.source());
                all.iter().try_for_each(|other| copy(&source, &part(other.target(), rank, world)))
            }
            Kind::AllToAll => {
                let pairs = all.iter().enumerate();
                pairs.into_iter().try_for_each(|(from, other)| {
                    copy(&part(other.source(), rank, world), &part(own.target(), from, world))
                })
            }
        }
    }
}

fn failure((rank, what): &(usize, String)) -> Error {
    Error::Rank { rank: *rank, what: what.clone() }
}

/// `target = parts[0] + parts[1] + ...` in this order, in f32 (f64 for f64). The target may be exactly one of the parts.
///
/// # Errors
/// When the tensors are not alike floats of one device, or it fails.
pub fn sum_in_order(parts: &[Tensor], target: &Tensor) -> Result<()> {
    let function = Function::of(parts.len(), 0, |parts, _| {
        let mut rest = parts.iter().copied();
        rest.next().map(|first| rest.fold(first, |sum, part| sum + part)).into_iter().collect()
    });
    run_pointwise(&function, &parts.iter().collect::<Vec<_>>(), &[], &[target])
}

impl Comm for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.members.len()
    }

    fn device(&self) -> Device {
        self.device.clone()
    }

    fn start(&self, collective: Collective) -> Result<Box<dyn Work>> {
        let all = self.agree(Post::Collective(collective))?;
        if let Err(error) = self.share(&all) {
            self.abort(&error.to_string());
            return Err(error);
        }
        // What a rank reads of another stays until all are through, and no longer.
        drop(all);
        self.meet(Post::Barrier)?;
        Ok(Box::new(Done))
    }

    fn barrier(&self) -> Result<()> {
        self.agree(Post::Barrier).map(|_| ())
    }

    fn abort(&self, cause: &str) {
        self.fail(self.members[self.rank], cause.into());
    }

    fn check(&self) -> Result<()> {
        match &self.seat.hub.lock().failed {
            Some(failed) => Err(failure(failed)),
            None => Ok(()),
        }
    }

    fn split(&self, color_of: &dyn Fn(usize) -> usize) -> Result<Arc<dyn Comm>> {
        let colors: Vec<usize> = (0..self.world_size()).map(color_of).collect();
        self.agree(Post::Colors(colors.clone()))?;
        let alike = |rank: &usize| colors[*rank] == colors[self.rank];
        let ranks: Vec<usize> = (0..self.world_size()).filter(alike).collect();
        let before = (0..self.rank).filter(alike).count();
        // The first of them makes the place where they meet.
        let place = (before == 0).then(|| {
            let mut state = self.seat.hub.lock();
            state.meetings.push(Meeting::of(ranks.len()));
            state.meetings.len() - 1
        });
        let places = self.meet(Post::Place(place))?;
        let Post::Place(Some(group)) = places[ranks[0]] else {
            return Err(Error::argument("split", "a place to meet", &places[ranks[0]]));
        };
        let members = ranks.into_iter().map(|rank| self.members[rank]).collect();
        Ok(Arc::new(Self { seat: self.seat.clone(), group, rank: before, members, device: self.device.clone() }))
    }
}
