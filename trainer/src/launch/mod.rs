//! Several processes that train together: who they are, and how they find each other.
//!
//! | file | what it does |
//! |---|---|
//! | `environment.rs` | which rank this process is, by the names that torchrun, Slurm and MPI's starters set |
//! | `join.rs` | makes a process one of the ranks: NCCL on NVIDIA GPUs, MPI on CPUs |
//! | `lifeline.rs` | tells each rank when another one ends or no longer answers |
//! | `rendezvous.rs` | hands what rank 0 has to all others, and names who does not come |
//! | `mpi.rs` | ranks of an MPI job, with the feature `mpi` |
//! | `processes.rs` | starts a process for each rank on this machine (`--nproc`) |

mod environment;
mod join;
mod lifeline;
#[cfg(feature = "mpi")]
mod mpi;
mod processes;
mod rendezvous;

#[cfg(feature = "mpi")]
pub use self::mpi::Mpi;
pub use environment::{Address, Launcher, World};
pub use join::{Joined, join};
pub use lifeline::Lifeline;
pub use processes::{Outcome, Processes};
pub use rendezvous::rendezvous;
