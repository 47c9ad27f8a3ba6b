//! Which ranks of a run this process is: alone, one of several that a launcher started, or what starts them.

use std::ffi::OsString;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use flowtape_engine::Device;
use flowtape_engine::comm::{Comm, Solo, Threads};
use flowtape_trainer::launch::{Joined, Processes, World, join};
use rayon::ThreadPoolBuilder;

use crate::signals::Stop;
use crate::terminal::be_quiet;

/// One rank's place: the ranks, and its device by the recipe's name for it.
pub struct Place<'a> {
    /// All ranks.
    pub comm: Arc<dyn Comm>,
    /// Opens the device.
    pub open: &'a (dyn Fn(&str) -> flowtape_trainer::Result<Device> + Sync),
}

impl Place<'_> {
    /// Whether this is the rank that tells and writes.
    pub fn is_first(&self) -> bool {
        self.comm.rank() == 0
    }

    /// Has the first rank do something that the others wait for; whether it was stopped meanwhile is what all get.
    ///
    /// # Errors
    /// When it fails.
    pub fn first_does(&self, work: impl FnOnce() -> Result<bool>) -> Result<bool> {
        let done = if self.is_first() { work() } else { Ok(false) };
        if let Err(error) = &done {
            self.comm.abort(&format!("{error:#}"));
        }
        Ok(self.comm.any(done?)?)
    }
}

/// Trains as `work` does, as the rank or the ranks that this process is. `device` is the recipe's name of where to train, `nproc` the
/// number of ranks to be started here. None is the code of a run that was stopped.
///
/// # Errors
/// When the ranks do not come together, or one of them fails.
pub fn spread(
    nproc: Option<usize>,
    device: &str,
    stop: &Stop,
    work: &(dyn Fn(Place<'_>) -> Result<Option<ExitCode>> + Sync),
) -> Result<Option<ExitCode>> {
    let world = World::of_environment()?;
    let open = |name: &str| Ok(flowtape_gpu::device(name)?);
    match (nproc, world) {
        (Some(_), Some(world)) => bail!(
            "--nproc starts ranks on this machine, but this process is one already, of {} that {:?} started: leave one out",
            world.size,
            world.launcher
        ),
        (Some(size), None) if size > 1 && device == "cpu" => on_threads(size, work),
        (Some(size), None) if size > 1 => start(size, stop).map(Some),
        (_, Some(world)) if world.size > 1 => {
            if world.rank > 0 {
                be_quiet();
            }
            let Joined { comm, device } = join(&world, device)?;
            work(Place { comm, open: &move |_| Ok(device.clone()) })
        }
        _ => work(Place { comm: Arc::new(Solo), open: &open }),
    }
}

/// Ranks on the CPU need no other process: they are threads, with a share of the cores each.
fn on_threads(size: usize, work: &(dyn Fn(Place<'_>) -> Result<Option<ExitCode>> + Sync)) -> Result<Option<ExitCode>> {
    let threads = (rayon::current_num_threads() / size).max(1);
    let cpu = Device::cpu();
    let as_rank = |comm: Arc<dyn Comm>| -> Result<Option<ExitCode>> {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build()?;
        pool.install(|| work(Place { comm, open: &|_| Ok(Device::cpu()) }))
    };
    let mut done = Threads::run(size, &cpu, as_rank);
    // The others say which rank failed; that one says why.
    if let Some(at) = done.iter().position(|done| done.as_ref().is_err_and(is_own)) {
        return done.swap_remove(at).with_context(|| format!("rank {at}"));
    }
    done.swap_remove(0)
}

/// Whether an error is a rank's own, and not another's.
fn is_own(error: &anyhow::Error) -> bool {
    use flowtape_engine::Error::Rank;
    !error.chain().any(|cause| matches!(cause.downcast_ref(), Some(Rank { .. })))
}

/// Starts this command once more as each rank, and waits.
fn start(size: usize, stop: &Stop) -> Result<ExitCode> {
    let program = std::env::current_exe().context("this program's own path")?;
    let arguments = without_nproc(std::env::args_os().skip(1));
    // The ranks tell; a signal makes them save and end.
    be_quiet();
    stop.run_begins();
    let ranks = Processes::start(size, || {
        let mut command = Command::new(&program);
        command.args(&arguments);
        command
    })?;
    let outcome = ranks.wait(stop.asked())?;
    let code = outcome.status.code().and_then(|code| u8::try_from(code).ok());
    match outcome.failed {
        Some(failed) if !stop.asked().load(Ordering::Relaxed) => {
            bail!("rank {} ended with {}", failed.rank, failed.status)
        }
        _ => Ok(code.map_or(ExitCode::FAILURE, ExitCode::from)),
    }
}

/// Arguments but for `--nproc N` and `--nproc=N`.
fn without_nproc(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments = arguments;
    let mut kept = Vec::new();
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            Some("--nproc") => drop(arguments.next()),
            Some(text) if text.starts_with("--nproc=") => {}
            _ => kept.push(argument),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_given_the_same_command_without_their_number() {
        let given = ["train", "digits", "--nproc", "2", "--set", "a=1", "--nproc=4", "--json"].map(OsString::from);
        assert_eq!(without_nproc(given.into_iter()), ["train", "digits", "--set", "a=1", "--json"]);
    }
}
