//! Several ranks that train together: what they exchange, and how.
//!
//! | engine | where |
//! |---|---|
//! | [`Solo`] | one rank alone: nothing is exchanged |
//! | [`Threads`] | ranks that are threads of this process, for tests and for plans |
//!
//! Those that reach other processes live where their libraries do. All ranks begin the same collectives in the same order.

mod collective;
mod recorded;
mod solo;
mod threads;

use std::fmt::Debug;
use std::sync::Arc;

pub use self::collective::{Collective, Kind};
pub use self::recorded::{all_gather, all_to_all};
pub use self::solo::{Planned, Solo};
pub use self::threads::{Threads, sum_in_order};
use crate::{DType, Device, Error, Result, Tensor};

/// The ranks of a run, or some of them, as one of them sees them.
///
/// An engine is given [`Collective`]s, whose operands were checked. Sums are those of rank 0, plus those of rank 1, and so on, as one
/// rank adds up micro-batches: in f32 (f64 for f64), rounded once. An engine that adds in another order says so in
/// [`Comm::is_ordered`].
///
/// After an error all further calls fail, on all ranks: a run ends then and goes on from its last checkpoint.
pub trait Comm: Debug + Send + Sync {
    /// Which one this is, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn world_size(&self) -> usize;

    /// Where operands lie: the rank's device, or the host's where the engine works there.
    fn device(&self) -> Device;

    /// Whether sums are added in the order of the ranks, so that N ranks give the bits of N micro-batches on one.
    fn is_ordered(&self) -> bool {
        true
    }

    /// Begins a collective. The operands' memory is the engine's until [`Work::wait`]: what is enqueued on the device before this
    /// call has written the source by then, and nothing writes or reads the target.
    ///
    /// # Errors
    /// When the ranks do not agree on what to do, or one of them has failed.
    fn start(&self, collective: Collective) -> Result<Box<dyn Work>>;

    /// Waits until all ranks are here, on the host.
    ///
    /// # Errors
    /// When one of them has failed.
    fn barrier(&self) -> Result<()>;

    /// Gives up: whoever waits, on whichever rank, gets an error that names this rank and the cause. Only the first cause counts.
    fn abort(&self, cause: &str);

    /// What went wrong meanwhile, on this rank or another, where no call waited for it.
    ///
    /// # Errors
    /// With the rank and the cause, as soon as the engine knows.
    fn check(&self) -> Result<()>;

    /// The ranks whose color is this one's, in the order of their ranks here. All ranks call it together, and say the same of each
    /// rank.
    ///
    /// # Errors
    /// When one of them has failed.
    fn split(&self, color_of: &dyn Fn(usize) -> usize) -> Result<Arc<dyn Comm>>;
}

/// A collective under way. Dropping it does not stop it.
pub trait Work: Debug + Send {
    /// What is enqueued on the operands' device from now on comes after the collective; the host waits where the device is its own.
    ///
    /// # Errors
    /// When a rank has failed.
    fn wait(self: Box<Self>) -> Result<()>;
}

/// What was done when it was begun.
#[derive(Debug)]
pub struct Done;

impl Work for Done {
    fn wait(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

impl dyn Comm + '_ {
    /// Whether there is no other rank.
    pub fn is_alone(&self) -> bool {
        self.world_size() == 1
    }

    /// Begins a collective and waits for it.
    fn run(&self, collective: Collective) -> Result<()> {
        self.start(collective)?.wait()
    }

    /// Writes the tensor of rank `root` over those of all others.
    ///
    /// # Errors
    /// When the tensors are not alike, or a rank has failed.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<()> {
        self.run(Collective::broadcast(self, tensor, root)?)
    }

    /// Writes the sum of the tensors of all ranks over that of rank `root`.
    ///
    /// # Errors
    /// When the tensors are not alike floats, or a rank has failed.
    pub fn reduce(&self, tensor: &Tensor, root: usize) -> Result<()> {
        self.run(Collective::reduce(self, tensor, root)?)
    }

    /// Writes the sum of the tensors of all ranks over each of them.
    ///
    /// # Errors
    /// When the tensors are not alike floats, or a rank has failed.
    pub fn all_reduce(&self, tensor: &Tensor) -> Result<()> {
        self.run(Collective::all_reduce(self, tensor)?)
    }

    /// Writes the sum of this rank's part of all sources to `target`; see [`Collective::reduce_scatter`].
    ///
    /// # Errors
    /// When the operands do not fit, or a rank has failed.
    pub fn reduce_scatter(&self, source: &Tensor, target: &Tensor) -> Result<()> {
        self.run(Collective::reduce_scatter(self, source, target)?)
    }

    /// Writes the sources of all ranks one after the other to `target`; see [`Collective::all_gather`].
    ///
    /// # Errors
    /// When the operands do not fit, or a rank has failed.
    pub fn all_gather(&self, source: &Tensor, target: &Tensor) -> Result<()> {
        self.run(Collective::all_gather(self, source, target)?)
    }

    /// Writes this rank's part of each source to `target`; see [`Collective::all_to_all`].
    ///
    /// # Errors
    /// When the operands do not fit, or a rank has failed.
    pub fn all_to_all(&self, source: &Tensor, target: &Tensor) -> Result<()> {
        self.run(Collective::all_to_all(self, source, target)?)
    }

    /// Bytes of rank `root`, on all ranks: what the others give is not looked at.
    ///
    /// # Errors
    /// When a rank has failed.
    pub fn share(&self, bytes: &[u8], root: usize) -> Result<Vec<u8>> {
        if self.is_alone() {
            return Ok(bytes.to_vec());
        }
        let device = self.device();
        let halves = |n: usize| [n as u32, (n as u64 >> 32) as u32];
        let length = Tensor::from_slice(&halves(bytes.len()), &[2], &device)?;
        self.broadcast(&length, root)?;
        let [low, high] = length.to_vec::<u32>()?[..] else { return Ok(Vec::new()) };
        let length = usize::try_from(u64::from(low) | u64::from(high) << 32).unwrap_or(usize::MAX);
        let words = length.div_ceil(4);
        let mut own = if self.rank() == root { bytes.to_vec() } else { Vec::new() };
        let size = words.checked_mul(4).ok_or_else(|| Error::argument("share", "bytes that fit memory", length))?;
        own.resize(size, 0);
        let words = Tensor::from_bytes(&own, &[words], DType::U32, &device)?;
        self.broadcast(&words, root)?;
        let mut bytes = words.to_bytes()?;
        bytes.truncate(length);
        Ok(bytes)
    }

    /// A flag that is set on any rank, on all of them.
    ///
    /// # Errors
    /// When a rank has failed.
    pub fn any(&self, flag: bool) -> Result<bool> {
        if self.is_alone() {
            return Ok(flag);
        }
        let sum = Tensor::from_slice(&[f32::from(u8::from(flag))], &[1], &self.device())?;
        self.all_reduce(&sum)?;
        Ok(sum.item()? > 0.0)
    }
}
