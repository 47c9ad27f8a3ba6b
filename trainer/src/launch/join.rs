//! A process becomes one of the ranks of a run.

#[cfg(feature = "mpi")]
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use flowtape_engine::comm::{Collective, Comm, Work};
use flowtape_engine::{Device, Result as EngineResult};

#[cfg(feature = "mpi")]
use super::Address;
use super::{Launcher, Lifeline, World, rendezvous};
use crate::{Error, Result};

/// How long ranks wait for each other at the start: compute nodes of one job may begin minutes apart.
const START: Duration = Duration::from_secs(300);

/// One of the ranks, with its device.
#[derive(Clone, Debug)]
pub struct Joined {
    /// The ranks.
    pub comm: Arc<dyn Comm>,
    /// Where this one trains.
    pub device: Device,
}

/// Joins the ranks of a run on a device that a recipe names: `cuda`, where each rank takes the GPU of its number on its machine, by
/// NCCL; or `cpu`, by MPI, where this program has that. Once in a process.
///
/// # Errors
/// When the ranks do not come together, the device is not there, or has no library of collectives.
pub fn join(world: &World, device: &str) -> Result<Joined> {
    let kind = device.split_once(':').map_or(device, |(kind, _)| kind);
    match kind {
        "cuda" if kind != device && world.local_size > 1 => Err(Error::Launch(format!(
            "device is {device}, but {} ranks are on this machine: say cuda, and each takes the GPU of its own number",
            world.local_size
        ))),
        "cuda" => on_gpus(world, device),
        "cpu" => on_cpus(world),
        _ => Err(Error::Launch(format!(
            "device is {device}: several ranks train on NVIDIA GPUs (cuda) or on CPUs (cpu); start one process alone"
        ))),
    }
}

fn on_gpus(world: &World, device: &str) -> Result<Joined> {
    let ordinal = device.split_once(':').and_then(|(_, number)| number.parse().ok()).unwrap_or(world.local_rank);
    let id = if world.rank == 0 { flowtape_gpu::ranks_id()? } else { Vec::new() };
    let (id, line) = rendezvous(world, &id, START)?;
    let (comm, fail) = flowtape_gpu::join_ranks(ordinal, &id, world.rank, world.size)?;
    watched(comm, line, fail)
}

/// Ranks that hear over their lines what their library does not tell them.
fn watched(comm: Arc<dyn Comm>, line: Lifeline, fail: impl Fn(usize, &str) + Send + Sync + 'static) -> Result<Joined> {
    line.watch(fail).map_err(|e| Error::Launch(format!("threads: {e}")))?;
    let device = comm.device();
    Ok(Joined { comm: Arc::new(Watched { comm, line }), device })
}

#[cfg(feature = "mpi")]
fn on_cpus(world: &World) -> Result<Joined> {
    if world.launcher == Launcher::Torchrun {
        return Err(Error::Launch("ranks on CPUs are an MPI job: start them by mpirun or srun".into()));
    }
    let comm = super::Mpi::join()?;
    if comm.world_size() != world.size {
        return Err(Error::Launch(format!(
            "MPI counts {} ranks, {:?} {}: start them by the mpirun of the library that this program was built with, or by \
             srun --mpi=pmix",
            comm.world_size(),
            world.launcher,
            world.size
        )));
    }
    // Rank 0 says where it is by MPI itself.
    let all: &dyn Comm = &*comm;
    let own = if world.rank == 0 { own_address(world)?.to_string() } else { String::new() };
    let said = String::from_utf8(all.share(own.as_bytes(), 0)?).unwrap_or_default();
    let Some((host, port)) = said.rsplit_once(':') else { return Err(Error::Launch(format!("no address: {said:?}"))) };
    let master = Some(Address { host: host.into(), port: port.parse().unwrap_or_default() });
    let (_, line) = rendezvous(&World { master, ..world.clone() }, &[], START)?;
    let failing = Arc::downgrade(&comm);
    watched(comm, line, move |rank, cause| {
        if let Some(comm) = failing.upgrade() {
            comm.fail(rank, cause);
        }
    })
}

/// Where the others reach this process: a port that is free now.
#[cfg(feature = "mpi")]
fn own_address(world: &World) -> Result<Address> {
    let no_port = |e| Error::Launch(format!("no free port for the ranks to meet at: {e}"));
    let port = TcpListener::bind(("0.0.0.0", 0)).and_then(|listener| listener.local_addr()).map_err(no_port)?.port();
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let host = if world.local_size == world.size { "127.0.0.1".into() } else { name };
    Ok(Address { host, port })
}

#[cfg(not(feature = "mpi"))]
fn on_cpus(world: &World) -> Result<Joined> {
    let start = match world.launcher {
        Launcher::Torchrun => "mpirun or srun starts them then, instead of torchrun",
        Launcher::Slurm | Launcher::OpenMpi | Launcher::Mpich => "the same command works then",
    };
    Err(Error::Launch(format!(
        "ranks on CPUs talk by MPI, which this program was built without: build it with `--features mpi`; {start}. On one \
         machine, `flowtape train --nproc {}` needs neither",
        world.size
    )))
}

/// Ranks whose lines tell of failures that their library does not see.
#[derive(Debug)]
struct Watched {
    comm: Arc<dyn Comm>,
    line: Lifeline,
}

impl Comm for Watched {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn world_size(&self) -> usize {
        self.comm.world_size()
    }

    fn device(&self) -> Device {
        self.comm.device()
    }

    fn is_ordered(&self) -> bool {
        self.comm.is_ordered()
    }

    fn start(&self, collective: Collective) -> EngineResult<Box<dyn Work>> {
        self.comm.start(collective)
    }

    fn barrier(&self) -> EngineResult<()> {
        self.comm.barrier()
    }

    fn abort(&self, cause: &str) {
        self.line.fail(cause);
        self.comm.abort(cause);
    }

    fn check(&self) -> EngineResult<()> {
        self.comm.check()
    }

    fn split(&self, color_of: &dyn Fn(usize) -> usize) -> EngineResult<Arc<dyn Comm>> {
        self.comm.split(color_of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::Address;

    #[test]
    fn what_can_not_train_together_says_what_can() {
        let message = |launcher, device: &str| {
            let master = Some(Address { host: "127.0.0.1".into(), port: 1 });
            let world = World { launcher, rank: 1, size: 2, local_rank: 1, local_size: 2, master };
            join(&world, device).unwrap_err().to_string()
        };
        assert!(message(Launcher::Torchrun, "cuda:1").contains("say cuda"));
        assert!(message(Launcher::Torchrun, "wgpu").contains("start one process alone"));
        let error = message(Launcher::Torchrun, "cpu");
        assert!(error.contains("mpirun"), "{error}");
    }
}
