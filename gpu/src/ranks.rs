//! Ranks with a GPU each.

use std::sync::Arc;

use flowtape_engine::comm::Comm;
use flowtape_engine::{Error, Result};

/// Tells a rank that another one failed: which, and why.
pub type Fail = Box<dyn Fn(usize, &str) + Send + Sync>;

#[cfg(not(feature = "cuda"))]
fn without<T>() -> Result<T> {
    let reason = "this program was built without CUDA".into();
    Err(Error::Unavailable { device: "cuda".into(), reason })
}

/// What names the ranks of a run: made by rank 0, handed to all others, who give it to [`join_ranks`].
///
/// # Errors
/// When NCCL is not there.
#[cfg(feature = "cuda")]
pub fn ranks_id() -> Result<Vec<u8>> {
    crate::cuda::nccl::unique_id().map(|id| id.to_vec())
}

/// Joins the ranks of this name on the NVIDIA GPU of this number, or the only one where there is one alone (each process may be shown
/// its own). Waits for all others. [`Comm::device`] is the GPU.
///
/// # Errors
/// When there is no such GPU, NCCL is not there, or the ranks don't come together.
#[cfg(feature = "cuda")]
pub fn join_ranks(ordinal: usize, id: &[u8], rank: usize, world_size: usize) -> Result<(Arc<dyn Comm>, Fail)> {
    use crate::cuda::nccl::{ID, Nccl};
    use crate::cuda::{Cuda, reports};
    let id: [u8; ID] = id.try_into().map_err(|_| Error::argument("join", format!("an id of {ID} bytes"), id.len()))?;
    let ordinal = if reports().len() == 1 { 0 } else { ordinal };
    let ordinal = u32::try_from(ordinal).map_err(|_| Error::argument("join", "a GPU's number", ordinal))?;
    let nccl = Nccl::join(&Cuda::open(ordinal)?, id, rank, world_size)?;
    let seen = Arc::downgrade(&nccl);
    let fail = move |rank: usize, cause: &str| {
        if let Some(nccl) = seen.upgrade() {
            nccl.fail(rank, cause);
        }
    };
    Ok((nccl, Box::new(fail)))
}

/// Without CUDA there is no library of collectives.
///
/// # Errors
/// Always.
#[cfg(not(feature = "cuda"))]
pub fn ranks_id() -> Result<Vec<u8>> {
    without()
}

/// Without CUDA there is no library of collectives.
///
/// # Errors
/// Always.
#[cfg(not(feature = "cuda"))]
pub fn join_ranks(_: usize, _: &[u8], _: usize, _: usize) -> Result<(Arc<dyn Comm>, Fail)> {
    without()
}
