//! Collectives of NCCL, on emulated GPUs and a stand-in for its library: every call, its errors, and what ends those that wait.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // the helpers of tests may panic

use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use flowtape_engine::comm::Comm;
use flowtape_engine::{DType, Error, Tensor};
use flowtape_gpu::cuda::Cuda;
use flowtape_gpu::cuda::nccl::{self, Nccl};
use flowtape_trainer::Recipe;
use flowtape_trainer::train::{train, train_among};
use libloading::Library;

/// The stand-in, compiled once, and as many GPUs as any test has ranks.
struct Fake {
    library: Library,
    _folder: tempfile::TempDir,
}

impl Fake {
    /// Makes the next collective answer with a code, or fail later with another.
    fn fails(&self, call: i32, later: i32) {
        // SAFETY: the function has this signature in nccl.c.
        unsafe { self.library.get::<unsafe extern "C" fn(i32, i32)>(b"fake_fails\0").unwrap()(call, later) }
    }

    /// How many communicators were destroyed and given up.
    fn ended(&self) -> [i32; 2] {
        // SAFETY: the functions have this signature in nccl.c.
        [&b"fake_destroyed\0"[..], b"fake_aborted\0"]
            .map(|name| unsafe { self.library.get::<unsafe extern "C" fn() -> i32>(name).unwrap()() })
    }
}

/// The stand-in; a test has it alone.
fn alone(test: impl FnOnce(&Fake)) {
    static FAKE: OnceLock<Mutex<Fake>> = OnceLock::new();
    let fake = FAKE.get_or_init(|| {
        assert!(flowtape_cuda_emulator::install());
        flowtape_cuda_emulator::set(|settings| settings.devices = 8);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libnccl.so.2");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/nccl.c");
        let options = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-pthread", source, "-o"];
        assert!(Command::new("cc").args(options).arg(&path).status().expect("a C compiler, cc").success());
        assert!(nccl::use_library(&path));
        // SAFETY: the library was just made from nccl.c.
        Mutex::new(Fake { library: unsafe { Library::new(&path) }.unwrap(), _folder: folder })
    });
    test(&fake.lock().unwrap_or_else(PoisonError::into_inner));
}

/// Runs `work` as each of so many ranks, each with a GPU of its own.
fn as_ranks<T: Send>(world: usize, work: impl Fn(Arc<Nccl>) -> Result<T, Error> + Sync) -> Vec<Result<T, Error>> {
    let (id, work) = (nccl::unique_id().unwrap(), &work);
    let as_rank = |rank: usize| work(Nccl::join(&Cuda::open(rank as u32)?, id, rank, world)?);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..world).map(|rank| scope.spawn(move || as_rank(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn every_collective_is_its_definition() {
    alone(|fake| {
        for world in [1, 2, 3, 4, 8] {
            let [destroyed, aborted] = fake.ended();
            as_ranks(world, |comm| flowtape_tests::comm::check(&*comm)).into_iter().for_each(|done| done.unwrap());
            // The whole and two parts of each rank; the one that watches may have been the last to let go.
            let wanted = [destroyed + 3 * world as i32, aborted];
            let end = Instant::now() + Duration::from_secs(10);
            while fake.ended() != wanted && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(10));
            }
            assert_eq!(fake.ended(), wanted);
        }
    });
}

#[test]
fn what_nccl_refuses_is_said_and_ends_all() {
    alone(|fake| {
        for code in [1, 2, 3, 4, 5, 6] {
            let failed = as_ranks(2, |comm| {
                let x = Tensor::full(&[4], 1.0, DType::F32, &comm.device())?;
                if comm.rank() == 1 {
                    fake.fails(code, 0);
                    let comm: &dyn Comm = &*comm;
                    return comm.all_reduce(&x);
                }
                // Comes when the other one has failed, which NCCL tells nobody: somebody else does.
                std::thread::sleep(Duration::from_millis(100));
                comm.fail(1, "is gone");
                let comm: &dyn Comm = &*comm;
                comm.all_reduce(&x)
            });
            let text = failed[1].as_ref().unwrap_err().to_string();
            assert!(text.contains(&format!("NCCL error {code}")) && text.contains("the fake says so"), "{text}");
            let text = failed[0].as_ref().unwrap_err().to_string();
            assert!(text.contains("rank 1") && text.contains("is gone"), "{text}");
        }
    });
}

#[test]
fn whoever_waits_ends_when_one_gives_up() {
    alone(|fake| {
        let [_, aborted] = fake.ended();
        let started = Instant::now();
        let failed = as_ranks(3, |comm| {
            let x = Tensor::full(&[4], 1.0, DType::F32, &comm.device())?;
            if comm.rank() == 2 {
                std::thread::sleep(Duration::from_millis(50));
                comm.abort("the disk is full");
                return comm.check();
            }
            let comm: &dyn Comm = &*comm;
            comm.all_reduce(&x)
        });
        let text = failed[2].as_ref().unwrap_err().to_string();
        assert!(text.contains("rank 2") && text.contains("the disk is full"), "{text}");
        for failed in &failed[..2] {
            let text = failed.as_ref().unwrap_err().to_string();
            assert!(text.contains("NCCL error 6"), "{text}");
        }
        assert!(fake.ended()[1] >= aborted + 3 && started.elapsed() < Duration::from_secs(10));
    });
}

#[test]
fn what_fails_behind_a_call_is_seen() {
    alone(|fake| {
        let failed = as_ranks(1, |comm| {
            fake.fails(0, 3);
            let x = Tensor::full(&[4], 1.0, DType::F32, &comm.device())?;
            {
                let comm: &dyn Comm = &*comm;
                comm.all_reduce(&x)?;
            }
            // The one that watches finds it, too; it is told once.
            let first = comm.check().unwrap_err().to_string();
            assert!(first.contains("internal error (NCCL error 3)"), "{first}");
            assert_eq!(comm.barrier().unwrap_err().to_string(), first);
            comm.check()
        });
        assert!(failed[0].is_err());
    });
}

/// A run of two ranks on GPUs, from the recipe to the checkpoint, beside one on the CPU with as many micro-batches.
#[test]
fn ranks_on_gpus_train_as_one_on_the_cpu() {
    alone(|_| {
        let folder = tempfile::tempdir().unwrap();
        let recipe = |run: &str| {
            let settings = [
                "model.num_layers=1",
                "model.num_single_layers=1",
                "model.attention_head_dim=8",
                "model.axes_dims_rope=[4, 2, 2]",
                "step_scheduler={local_batch_size: 2, global_batch_size: 4, max_steps: 2, ckpt_every_steps: 0}",
                "sampling.every_steps=0",
                "sampling.num_inference_steps=1",
                "report=null",
            ];
            let run_dir = format!("run_dir={}", folder.path().join(run).display());
            let settings = settings.iter().map(|s| (*s).to_owned()).chain([run_dir]);
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/digits.yaml");
            Recipe::load(&path, &settings.collect::<Vec<_>>()).unwrap()
        };
        let never = AtomicBool::new(false);
        let one = train(&recipe("one"), Vec::new(), &never).unwrap();
        let recipe = recipe("two");
        let two = as_ranks(2, |comm| {
            let comm: Arc<dyn Comm> = comm;
            Ok(train_among(&comm, &comm.device(), &recipe, Vec::new(), &never).unwrap())
        });
        for rank in two {
            let rank = rank.unwrap();
            assert_eq!(rank.steps, one.steps);
            assert!((rank.final_loss - one.final_loss).abs() < 1e-4, "{} and {}", rank.final_loss, one.final_loss);
        }
    });
}
