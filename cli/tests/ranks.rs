//! Several ranks: threads of one process, and processes of an MPI job where the binary has that.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::path::Path;
use std::process::Command;

use common::{RECIPE, failure, flowtape, stdout, train};
use serde_json::Value;

mod common;

/// Eight samples a step, in as many micro-batches as there are ranks.
const SIZES: [(&str, &str); 2] =
    [("2", "step_scheduler.local_batch_size=4"), ("4", "step_scheduler.local_batch_size=2")];
const SHARED: [&str; 2] = ["--set", "step_scheduler.global_batch_size=8"];

/// The recipe with so many micro-batches, and more.
fn shared<'a>(micro_batch: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&SHARED, &["--set", micro_batch][..], more].concat()
}

/// The hashes of all that the newest checkpoint holds of the model and the optimiser.
fn hashes(run: &Path) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(run.join("checkpoints/LATEST/manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&text).unwrap();
    let files = manifest["files"].as_object().unwrap().iter();
    let hashes = files.filter(|(name, _)| name.ends_with(".safetensors"));
    hashes.map(|(name, content)| (name.clone(), content["sha256"].to_string())).collect()
}

#[test]
fn ranks_of_threads_come_to_the_bits_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str| folder.path().join(name);
    for (size, micro_batch) in SIZES {
        let alone = run(&format!("alone {size}"));
        stdout(&train(&alone, &shared(micro_batch, &[])));
        let said = stdout(&train(&run(size), &shared(micro_batch, &["--nproc", size])));
        assert_eq!(said.matches("final loss").count(), 1, "one rank tells: {said}");
        let alone = hashes(&alone);
        assert!(alone.len() >= 2 && hashes(&run(size)) == alone, "{size} ranks: {alone:?}");
    }
    // Two go on with what four began, and one with what these did.
    let began = run("4");
    let resume = |steps: &str, more: &[&str]| {
        let steps = format!("step_scheduler.max_steps={steps}");
        let resume = ["train", "--resume", began.to_str().unwrap(), "--set", &steps];
        stdout(&flowtape(&[&resume[..], more].concat()))
    };
    assert!(resume("8", &["--nproc", "2"]).contains("steps           8"));
    assert!(resume("10", &[]).contains("steps           10"));
}

#[test]
fn what_a_launcher_sets_in_part_is_said() {
    let half = Command::new(env!("CARGO_BIN_EXE_flowtape"))
        .args(["train", RECIPE])
        .envs([("RANK", "1"), ("WORLD_SIZE", "2")])
        .output()
        .unwrap();
    assert!(failure(&half).contains("but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"), "{}", failure(&half));
    let all = [
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "0"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29500"),
    ];
    let ranks = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flowtape"));
        command.args(["train", RECIPE]).args(more).envs(all).output().unwrap()
    };
    assert!(failure(&ranks(&["--nproc", "2"])).contains("leave one out"));
    assert!(failure(&ranks(&["--device", "cpu"])).contains("mpirun"));
    assert!(failure(&ranks(&["--device", "cuda:1"])).contains("each takes the GPU of its own number"));
    assert!(failure(&ranks(&["--device", "wgpu"])).contains("several ranks train on NVIDIA GPUs"));
    let none = Command::new(env!("CARGO_BIN_EXE_flowtape")).args(["train", RECIPE, "--nproc", "0"]).output().unwrap();
    assert!(failure(&none).contains("--nproc"), "{}", failure(&none));
}

/// As `common::train`, under mpirun.
#[cfg(feature = "mpi")]
fn mpirun(size: &str, run: &Path, more: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", size]);
    command.args([env!("CARGO_BIN_EXE_flowtape"), "train", RECIPE, "--threads", "1", "--set"]);
    command.arg(format!("run_dir={}", run.display()));
    command.args(common::SMALL.iter().flat_map(|s| ["--set", s])).args(more);
    command
}

#[cfg(feature = "mpi")]
#[test]
fn ranks_of_mpi_come_to_the_bits_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str| folder.path().join(name);
    for (size, micro_batch) in SIZES {
        let alone = run(&format!("alone {size}"));
        stdout(&train(&alone, &shared(micro_batch, &[])));
        let said = stdout(&mpirun(size, &run(size), &shared(micro_batch, &[])).output().unwrap());
        assert_eq!(said.matches("final loss").count(), 1, "one rank tells: {said}");
        assert_eq!(hashes(&run(size)), hashes(&alone), "{size} ranks");
    }
}

/// A rank that is killed or hangs ends all within a minute, and what was saved is good.
#[cfg(feature = "mpi")]
#[test]
fn a_rank_that_is_gone_ends_all_and_the_last_checkpoint_is_good() {
    use std::process::Stdio;
    use std::time::{Duration, Instant};
    let folder = tempfile::tempdir().unwrap();
    for (signal, said) in [("-KILL", "signal 9"), ("-STOP", "rank 2: does not answer since 30 s")] {
        let run = folder.path().join(signal);
        let long = ["--set", "step_scheduler.max_steps=100000", "--set", "sampling.every_steps=100000"];
        let mut job = mpirun("4", &run, &shared(SIZES[1].1, &long));
        let job = job.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let end = Instant::now() + Duration::from_secs(120);
        while !run.join("checkpoints/LATEST").exists() {
            assert!(Instant::now() < end, "no checkpoint came");
            std::thread::sleep(Duration::from_millis(50));
        }
        // Rank 2, by its environment.
        let is_rank = |process: &str| {
            let of = |what: &str| std::fs::read(format!("/proc/{process}/{what}")).unwrap_or_default();
            let has = |text: &[u8], part: &str| text.windows(part.len()).any(|w| w == part.as_bytes());
            has(&of("environ"), "OMPI_COMM_WORLD_RANK=2\0") && has(&of("cmdline"), run.to_str().unwrap())
        };
        let processes = std::fs::read_dir("/proc").unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let victim = processes.into_iter().find(|name| is_rank(name)).unwrap();
        let gone = Instant::now();
        assert!(Command::new("kill").args([signal, &victim]).status().unwrap().success());
        let ended = job.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(!ended.status.success() && gone.elapsed() < Duration::from_secs(60), "{:?}", gone.elapsed());
        assert!(text.contains("rank 2") && text.contains(said), "{text}");
        let newest = std::fs::canonicalize(run.join("checkpoints/LATEST")).unwrap();
        let saved: u64 = newest.file_name().unwrap().to_str().unwrap().strip_prefix("step_").unwrap().parse().unwrap();
        let steps = format!("step_scheduler.max_steps={}", saved + 2);
        stdout(&flowtape(&["train", "--resume", run.to_str().unwrap(), "--set", &steps]));
    }
}
