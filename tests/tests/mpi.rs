//! Collectives between processes of an MPI job.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use flowtape_engine::comm::Comm;
use flowtape_engine::{DType, Device, Tensor};
use flowtape_trainer::launch::{Mpi, World};

/// What a rank is to do, in its environment.
const ROLE: &str = "FLOWTAPE_TEST_RANK";

/// Runs this test again as each of so many ranks.
fn as_ranks(size: usize, test: &str, role: &str) -> Output {
    let mut mpirun = Command::new("mpirun");
    mpirun
        .args(["--allow-run-as-root", "--oversubscribe", "-n", &size.to_string()])
        .arg(std::env::current_exe().unwrap());
    mpirun.args(["--exact", test, "--nocapture"]).env(ROLE, role).output().unwrap()
}

#[test]
fn every_collective_is_its_definition() {
    if std::env::var(ROLE).is_ok() {
        let world = World::of_environment().unwrap().unwrap();
        let comm = Mpi::join().unwrap();
        assert_eq!((world.rank, world.size), (comm.rank(), comm.world_size()));
        return flowtape_tests::comm::check(&*comm).unwrap();
    }
    for size in [1, 2, 3, 4] {
        let done = as_ranks(size, "every_collective_is_its_definition", "all");
        assert!(done.status.success(), "{size} ranks: {}", String::from_utf8_lossy(&done.stderr));
        let passed = String::from_utf8_lossy(&done.stdout).matches("1 passed").count();
        assert_eq!(passed, size);
    }
}

/// Ranks that begin different collectives are named; one that ends takes the others with it.
#[test]
fn who_does_something_else_or_ends_stops_all() {
    if let Ok(role) = std::env::var(ROLE) {
        let comm = Mpi::join().unwrap();
        if role == "gone" && comm.rank() == 2 {
            std::process::exit(3);
        }
        let size = 4 + usize::from(comm.rank() == 1 && role == "other");
        let tensor = Tensor::zeros(&[size], DType::F32, &Device::cpu()).unwrap();
        let comm: &dyn Comm = &*comm;
        return comm.all_reduce(&tensor).unwrap();
    }
    let started = Instant::now();
    let other = as_ranks(3, "who_does_something_else_or_ends_stops_all", "other");
    let text = String::from_utf8_lossy(&other.stderr);
    assert!(!other.status.success() && text.contains("begins another collective than rank 0"), "{text}");
    let gone = as_ranks(4, "who_does_something_else_or_ends_stops_all", "gone");
    assert!(!gone.status.success() && started.elapsed() < Duration::from_secs(60));
}
