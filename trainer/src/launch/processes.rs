//! A process for each rank on this machine: what `--nproc` starts.

use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{Address, Launcher, World};
use crate::platform::ask_to_end;
use crate::{Error, Result};

/// How long the others may take to end by themselves when one has failed: they hear of it, and say so.
const GRACE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(20);

/// The processes of all ranks, on this machine. Dropping it kills those that still run.
#[derive(Debug)]
pub struct Processes(Vec<Child>);

/// How they ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The first one that failed.
    pub failed: Option<Failed>,
    /// How rank 0 ended.
    pub status: ExitStatus,
}

/// One that failed.
#[derive(Clone, Debug)]
pub struct Failed {
    /// Which one.
    pub rank: usize,
    /// How it ended.
    pub status: ExitStatus,
}

impl Processes {
    /// Starts `size` processes, each made by `command` and with its rank in the environment.
    ///
    /// # Errors
    /// When one can't be started, or there is no free port for them to meet at.
    pub fn start(size: usize, command: impl Fn() -> Command) -> Result<Self> {
        let failed = |what: &str, e: std::io::Error| Error::Launch(format!("{what}: {e}"));
        let listener = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
        let port = listener.map_err(|e| failed("no free port for the ranks to meet at", e))?.port();
        let master = Address { host: "127.0.0.1".into(), port };
        let mut all = Self(Vec::new());
        for rank in 0..size {
            let world = World {
                launcher: Launcher::Torchrun,
                rank,
                size,
                local_rank: rank,
                local_size: size,
                master: Some(master.clone()),
            };
            let child = command().envs(world.variables()).spawn();
            all.0.push(child.map_err(|e| failed(&format!("rank {rank} can't be started"), e))?);
        }
        Ok(all)
    }

    /// Waits for all of them. When `stop` is set they are asked to save and end, once; when one fails, the others are given half a
    /// minute.
    ///
    /// # Errors
    /// When the system can't say how they are.
    pub fn wait(mut self, stop: &AtomicBool) -> Result<Outcome> {
        let mut ended: Vec<Option<ExitStatus>> = vec![None; self.0.len()];
        let (mut failed, mut asked) = (None::<(Failed, Instant)>, false);
        loop {
            for (rank, child) in self.0.iter_mut().enumerate() {
                if ended[rank].is_some() {
                    continue;
                }
                let status = child.try_wait().map_err(|e| Error::Launch(format!("rank {rank}: {e}")))?;
                if let Some(status) = status.filter(|status| !status.success() && failed.is_none()) {
                    failed = Some((Failed { rank, status }, Instant::now()));
                }
                ended[rank] = status;
            }
            if let Some(Some(status)) = ended.first().filter(|_| ended.iter().all(Option::is_some)) {
                return Ok(Outcome { failed: failed.map(|(failed, _)| failed), status: *status });
            }
            if stop.load(Ordering::Relaxed) && !asked {
                asked = true;
                self.0.iter().for_each(ask_to_end);
            }
            if failed.as_ref().is_some_and(|(_, since)| since.elapsed() > GRACE) {
                // Those that have ended can't be killed, which is no matter.
                self.0.iter_mut().for_each(|child| drop(child.kill()));
            }
            std::thread::sleep(LOOK);
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn shell(script: &str) -> impl Fn() -> Command {
        move || {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        }
    }

    #[test]
    fn each_is_told_its_rank() {
        let folder = tempfile::tempdir().unwrap();
        let script = format!(
            "echo $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE at $MASTER_ADDR > {}/$RANK",
            folder.path().display()
        );
        let outcome = Processes::start(3, shell(&script)).unwrap().wait(&AtomicBool::new(false)).unwrap();
        assert!(outcome.failed.is_none() && outcome.status.success());
        for rank in 0..3 {
            let said = std::fs::read_to_string(folder.path().join(rank.to_string())).unwrap();
            assert_eq!(said, format!("{rank} of 3, {rank} of 3 at 127.0.0.1\n"));
        }
    }

    #[test]
    fn the_first_that_fails_is_named_and_all_end_when_asked() {
        let outcome = Processes::start(3, shell("[ $RANK = 1 ] && exit 3; sleep 0.2")).unwrap();
        let failed = outcome.wait(&AtomicBool::new(false)).unwrap().failed.unwrap();
        assert_eq!((failed.rank, failed.status.code()), (1, Some(3)));
        let started = Instant::now();
        let all = Processes::start(2, shell("trap 'exit 7' TERM; while :; do sleep 0.05; done")).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let outcome = all.wait(&AtomicBool::new(true)).unwrap();
        assert_eq!(outcome.status.code(), Some(7));
        drop(Processes::start(2, shell("sleep 60")).unwrap());
        assert!(started.elapsed() < Duration::from_secs(30));
    }
}
