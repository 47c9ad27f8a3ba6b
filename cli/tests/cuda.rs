//! The binary and NVIDIA's driver: what it says where there is none.
#![cfg(all(feature = "cuda", target_os = "linux"))]
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::process::{Command, Output};

const RECIPE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes/digits.yaml");

fn flowtape(environment: &[(&str, &str)], arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flowtape"));
    command.args(arguments).envs(environment.iter().copied()).output().unwrap()
}

/// The block of `flowtape devices` that begins with `cuda`.
fn listed(environment: &[(&str, &str)]) -> String {
    let output = flowtape(environment, &["devices"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let after = text.lines().skip_while(|l| !l.starts_with("cuda")).enumerate();
    let block = after.take_while(|(i, l)| *i == 0 || l.starts_with(' ') || l.starts_with("cuda"));
    block.map(|(_, l)| l).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_binary_starts_without_a_driver_and_says_what_is_in_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("libcuda.so.1");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../gpu/cuda_driver/tests/fake_cuda.c");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status().unwrap();
    assert!(built.success());
    let fake = ("FLOWTAPE_LIBCUDA", library.to_str().unwrap());
    let missing = ("FLOWTAPE_LIBCUDA", "/no/such/libcuda.so.1");

    type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);
    let cases: [Case; 6] = [
        (&[missing], &["not usable", "no NVIDIA driver", "/no/such/libcuda.so.1", "install one of CUDA 12.0 or newer"]),
        (&[fake, ("FAKE_CUDA_VERSION", "11080")], &["not usable", "CUDA 11.8", "12.0 (525) or newer"]),
        (&[fake, ("FAKE_CUDA_DEVICES", "0")], &["not usable", "no device", "CUDA_VISIBLE_DEVICES"]),
        (&[fake, ("FAKE_CUDA_INIT", "100")], &["not usable", "CUDA error 100", "nvidia-smi"]),
        (&[fake, ("FAKE_CUDA_MAJOR", "7")], &["Fake GPU 0", "7.0", "not usable", "8.0 (Ampere) is the least"]),
        (&[fake, ("FAKE_CUDA_DEVICES", "2")], &["cuda:0", "Fake GPU 1", "CUDA 13.0", "82944 MiB", "9.0", "132"]),
    ];
    for (environment, parts) in cases {
        let text = listed(environment);
        for part in parts {
            assert!(text.contains(part), "{part:?} in {text}");
        }
    }

    // Whatever asks for it is told the same, before anything is written.
    let run = folder.path().join("run");
    let run_dir = format!("run_dir={}", run.display());
    let commands: [&[&str]; 3] = [
        &["train", RECIPE, "--set", &run_dir, "--device", "cuda"],
        &["train", RECIPE, "--set", &run_dir, "--set", "device=cuda"],
        &["bench", "step", "--device", "cuda"],
    ];
    for arguments in commands {
        for (environment, part) in [
            (vec![missing], "no NVIDIA driver"),
            (vec![fake, ("FAKE_CUDA_DEVICES", "0")], "can't use cuda:0"),
            (vec![fake], "CUDA error 46"),
        ] {
            let output = flowtape(&environment, arguments);
            let message = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && !message.contains("panicked"), "{message}");
            assert!(message.contains(part), "{part:?} in {message}");
        }
    }
    let wrong = flowtape(&[fake], &["bench", "step", "--device", "cuda:one"]);
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("cuda:<number>"));
    assert!(!run.exists());
}
