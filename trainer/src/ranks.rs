//! Several ranks of one run.

use std::path::{Path, PathBuf};

use flowtape_engine::comm::Comm;
use flowtape_engine::{DType, Later, Tensor};

use crate::error::with_reasons;
use crate::recipe::Sharing;
use crate::{Error, Result};

/// Whether this is the rank that writes and talks.
pub(crate) fn is_first(comm: &dyn Comm) -> bool {
    comm.rank() == 0
}

/// Runs the work of one rank; where it fails, all others hear of it and stop.
pub(crate) fn together<R>(comm: &dyn Comm, work: impl FnOnce() -> Result<R>) -> Result<R> {
    let done = work();
    if let Err(error) = &done {
        comm.abort(&with_reasons(error));
    }
    done
}

/// Runs something on the first rank, and then on all others: what it makes and keeps is made once.
pub(crate) fn in_turn<R>(comm: &dyn Comm, mut work: impl FnMut() -> Result<R>) -> Result<R> {
    let first = if is_first(comm) { Some(work()?) } else { None };
    comm.barrier()?;
    first.map_or_else(work, Ok)
}

/// A text that the first rank makes, on all ranks.
pub(crate) fn shared_text(comm: &dyn Comm, text: &str) -> Result<String> {
    let bytes = comm.share(text.as_bytes(), 0)?;
    String::from_utf8(bytes)
        .map_err(|e| Error::Run { path: "ranks".into(), what: format!("the first rank's text: {e}") })
}

/// A path that the first rank has, on all ranks.
pub(crate) fn shared_path(comm: &dyn Comm, path: &Path) -> Result<PathBuf> {
    // Names of files need not be texts.
    #[cfg(unix)]
    {
        use std::os::unix::ffi::{OsStrExt, OsStringExt};
        let bytes = comm.share(path.as_os_str().as_bytes(), 0)?;
        Ok(std::ffi::OsString::from_vec(bytes).into())
    }
    #[cfg(not(unix))]
    shared_text(comm, &path.to_string_lossy()).map(PathBuf::from)
}

/// What a micro-batch came to on all ranks, on its way to the host.
pub(crate) struct Told {
    /// `[ranks, 2 + 2 P]`: a rank's share of the loss, whether it was asked to stop, and its samples' losses and noise levels, P of
    /// each. Of one rank alone it is the share and the losses.
    values: Later,
    ranks: usize,
    /// The noise levels where one rank is alone.
    own: Option<Vec<f32>>,
}

/// The same of one rank, on the host.
#[derive(Clone)]
pub(crate) struct ToldByRank {
    /// Its share of the step's loss.
    pub share: f64,
    /// Whether it was asked to stop.
    pub stop: bool,
    /// Noise levels and losses of its samples.
    pub samples: Vec<(f32, f64)>,
}

impl Told {
    /// Of this rank: a share of the step's loss, and the losses of its samples (one axis) with their noise levels. `most` is the number
    /// of samples that no rank has more of.
    pub fn gather(
        comm: &dyn Comm,
        sharing: &Sharing,
        share: &Tensor,
        losses: &Tensor,
        sigmas: &[f32],
        most: usize,
        stop: bool,
    ) -> Result<Self> {
        let (mut share, device) = (share.detach().reshape(&[1])?, share.device());
        if comm.is_alone() {
            // In one tensor, so that they are read together.
            let values = Tensor::cat(&[&share, losses], 0)?.read_later()?;
            return Ok(Self { values, ranks: 1, own: Some(sigmas.to_vec()) });
        }
        let stop = Tensor::full(&[1], f64::from(u8::from(stop)), share.dtype(), device)?;
        let most = most.max(sigmas.len());
        // There is no such noise level: a place without a sample.
        let mut padded = vec![f32::NAN; most];
        padded[..sigmas.len()].copy_from_slice(sigmas);
        let losses = losses.pad(0, 0, most - losses.numel())?;
        // What ranks that share tokens came to together one of them says.
        if sharing.tokens.as_ref().is_some_and(|ranks| ranks.rank() > 0) {
            share = Tensor::zeros(&[1], share.dtype(), device)?;
            padded.fill(f32::NAN);
        }
        let sigmas = Tensor::from_slice(&padded, &[most], device)?.to_dtype(share.dtype())?;
        let mine = Tensor::cat(&[&share, &stop, &losses, &sigmas], 0)?.to_dtype(DType::F32)?;
        let all = Tensor::zeros(&[comm.world_size(), mine.numel()], DType::F32, device)?;
        comm.all_gather(&mine, &all)?;
        Ok(Self { values: all.read_later()?, ranks: comm.world_size(), own: None })
    }

    /// Waits for it: rank by rank.
    pub fn wait(self) -> Result<Vec<ToldByRank>> {
        let values = self.values.wait::<f64>()?;
        let row = |row: &[f64]| {
            let (share, rest) = row.split_first().map_or((f64::NAN, row), |(share, rest)| (*share, rest));
            if let Some(sigmas) = &self.own {
                let samples = sigmas.iter().copied().zip(rest.iter().copied()).collect();
                return ToldByRank { share, stop: false, samples };
            }
            let (stop, rest) = rest.split_first().map_or((false, rest), |(stop, rest)| (*stop > 0.0, rest));
            let (losses, sigmas) = rest.split_at(rest.len() / 2);
            let all = sigmas.iter().map(|sigma| *sigma as f32).zip(losses.iter().copied());
            ToldByRank { share, stop, samples: all.filter(|(sigma, _)| !sigma.is_nan()).collect() }
        };
        Ok(values.chunks(values.len().div_ceil(self.ranks).max(1)).map(row).collect())
    }
}
