//! The binary, used as a stranger would: real input, wrong input.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use serde_json::Value;

use common::{RECIPE, RECIPES, SMALL, endless, failure, flowtape, metrics, stdout, train, weights};

mod common;

#[test]
fn a_run_leaves_everything_and_can_be_sampled() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let out = stdout(&train(&run, &["--json"]));
    let json: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    for key in ["accuracy", "distance_ratio", "train_seconds", "total_seconds", "final_loss"] {
        assert!(json[key].as_f64().is_some_and(f64::is_finite), "{key} in {json}");
    }
    assert_eq!((json["steps"].as_u64(), json["run_dir"].as_str()), (Some(6), run.to_str()));
    let files = [
        "recipe.yaml",
        "loss.svg",
        "report.json",
        "samples/step_000003.png",
        "samples/step_000006.png",
        "checkpoints/LATEST/config.json",
        "checkpoints/LATEST/optimizer.safetensors",
        "checkpoints/LATEST/state.json",
    ];
    files.iter().for_each(|f| assert!(run.join(f).exists(), "{f} is missing"));
    let mut kept: Vec<_> = std::fs::read_dir(run.join("checkpoints"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    kept.sort();
    assert_eq!(kept, ["LATEST", "step_000004", "step_000006"]);
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let steps: Vec<u64> =
        metrics.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);

    // There is nothing left to do: the same figures at once, and no picture is made again.
    let grid = run.join("samples/step_000006.png");
    std::fs::remove_file(&grid).unwrap();
    let again = stdout(&flowtape(&["train", "--resume", run.to_str().unwrap(), "--json"]));
    assert_eq!((serde_json::from_str::<Value>(&again).unwrap(), grid.exists()), (json, false));

    let run = run.to_str().unwrap();
    let picture = |name: &str, seed: &str| {
        let path = folder.path().join(name);
        let out = path.to_str().unwrap();
        stdout(&flowtape(&[
            "sample",
            run,
            "--prompt",
            "a handwritten seven",
            "--n",
            "5",
            "--seed",
            seed,
            "--out",
            out,
        ]));
        std::fs::read(path).unwrap()
    };
    let first = picture("a.png", "1");
    assert!(first.starts_with(b"\x89PNG") && first == picture("v1.5.PNG", "1") && first != picture("c.png", "2"));

    // Wrong input: each message says what to do.
    let sample = |arguments: &[&str]| failure(&flowtape(&[&["sample"], arguments].concat()));
    assert!(sample(&[run, "--prompt", "a handwritten ten"]).contains("unknown word \"ten\""));
    assert!(sample(&[run, "--prompt", ""]).contains("known:"));
    for (option, wrong) in
        [("--seed", "-1"), ("--n", "0"), ("--n", "18446744073709551615"), ("--steps", "18446744073709551615")]
    {
        let message = sample(&[run, "--prompt", "a handwritten six", option, wrong]);
        assert!(message.contains(option) && message.contains("a whole number from"), "{message}");
    }
    for wrong in ["nan", "inf", "0", "-1", "1e300"] {
        let message = sample(&[run, "--prompt", "a handwritten six", &format!("--guidance={wrong}")]);
        assert!(message.contains("expected a number above 0"), "{message}");
    }
    // The name that is asked for is the name that is written, and what can't be written is told before the work.
    for (out, part) in [("model_v1.5", ".png"), ("s.jpg", ".png"), ("sub/", "a folder"), ("no/dir/s.png", "no folder")]
    {
        let message = sample(&["/no/such/run", "--prompt", "a handwritten six", "--out", out]);
        assert!(message.contains(part) && message.contains(out.trim_end_matches('/')), "{message}");
    }
    assert!(sample(&["/no/such/run", "--prompt", "a handwritten six"]).contains("not a run folder"));
    let again = failure(&train(Path::new(run), &[]));
    assert!(again.contains("holds a run already") && again.contains("--resume"), "{again}");
}

/// Paths are bytes: none is rewritten.
#[cfg(target_os = "linux")]
#[test]
fn a_name_that_is_no_text_is_a_name_as_any_other() {
    use std::os::unix::ffi::OsStringExt;
    let folder = tempfile::tempdir().unwrap();
    let odd = folder.path().join(std::ffi::OsString::from_vec(b"caf\xe9 1".to_vec()));
    stdout(&train(&folder.path().join("run"), &["--set", "step_scheduler.max_steps=1"]));
    std::fs::rename(folder.path().join("run"), &odd).unwrap();
    let odd_with = |arguments: &[&str], last: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_flowtape")).args(arguments).arg(&odd).args(last).output().unwrap()
    };
    let json = stdout(&odd_with(&["train", "--resume"], &["--set", "step_scheduler.max_steps=2", "--json"]));
    assert!(json.contains("caf\u{fffd} 1"), "{json}");
    stdout(&odd_with(&["train", "--resume"], &["--json"]));
    assert!(stdout(&odd_with(&["inspect"], &[])).contains("FluxTransformer2DModel"));
    let out = odd.join(std::ffi::OsString::from_vec(b"\xff.png".to_vec()));
    let mut sample = Command::new(env!("CARGO_BIN_EXE_flowtape"));
    sample.arg("sample").arg(&odd).args(["--prompt", "a handwritten one", "--n", "1", "--out"]).arg(&out);
    stdout(&sample.output().unwrap());
    assert!(std::fs::read(out).unwrap().starts_with(b"\x89PNG"));
}

#[test]
fn an_interrupted_run_goes_on_to_the_same_bits() {
    for dtype in ["dtype=f32", "dtype=mixed", "dtype=mixed_f16"] {
        let folder = tempfile::tempdir().unwrap();
        let [whole, parts] = ["whole", "parts"].map(|n| folder.path().join(n));
        stdout(&train(&whole, &["--set", dtype]));
        stdout(&train(&parts, &["--set", dtype]));
        // As if the second had been killed while it saved its last checkpoint, and a line had been cut in half.
        std::fs::remove_file(parts.join("report.json")).unwrap();
        std::fs::File::options()
            .write(true)
            .open(parts.join("checkpoints/step_000006/optimizer.safetensors"))
            .unwrap()
            .set_len(99)
            .unwrap();
        let path = parts.join("metrics.jsonl");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 20]).unwrap();
        let resumed = flowtape(&["train", "--resume", parts.to_str().unwrap()]);
        stdout(&resumed);
        // Warnings are shown without being asked for.
        let warned = String::from_utf8_lossy(&resumed.stderr).into_owned();
        assert!(
            warned.contains("step_000006/optimizer.safetensors") && warned.contains("the checkpoint before it"),
            "{warned}"
        );
        assert!(weights(&whole) == weights(&parts), "the resumed run has other weights ({dtype})");
        let losses = metrics(&parts, "train_loss");
        assert_eq!((losses.len(), losses), (6, metrics(&whole, "train_loss")));
    }
}

#[test]
fn a_run_is_made_longer_and_other_changes_are_asked_about() {
    let folder = tempfile::tempdir().unwrap();
    let [whole, parts] = ["whole", "in parts"].map(|n| folder.path().join(n));
    // The schedule of the shorter run goes on in the longer one.
    let schedule = ["--set", "lr_scheduler.lr_decay_steps=4", "--set", "lr_scheduler.lr_warmup_steps=0"];
    stdout(&train(&whole, &schedule));
    stdout(&train(&parts, &["--set", "step_scheduler.max_steps=4"]));
    let recipe = |run: &Path| std::fs::read_to_string(run.join("recipe.yaml")).unwrap();
    let resume = |set: &[&str]| {
        let set = set.iter().flat_map(|s| ["--set", s]);
        flowtape(&["train", "--resume", parts.to_str().unwrap()].into_iter().chain(set).collect::<Vec<_>>())
    };
    let before = recipe(&parts);
    let refused = failure(&resume(&["step_scheduler.max_steps=6", "optimizer.lr=0.5", "seed=7"]));
    for part in ["checkpoint of step 4", "optimizer.lr is 0.5 instead of 0.001", "seed is 7", "--accept-changes"] {
        assert!(refused.contains(part), "{part} in {refused}");
    }
    assert!(failure(&resume(&["step_scheduler.max_steps=3"])).contains("4 steps are done already"));
    assert_eq!(recipe(&parts), before);
    stdout(&resume(&["step_scheduler.max_steps=6", "sampling.every_steps=1"]));
    assert!(weights(&whole) == weights(&parts) && recipe(&parts).contains("max_steps: 6"));
    let more = ["step_scheduler.max_steps=7", "data.shuffle=false"].iter().flat_map(|s| ["--set", s]);
    let run = parts.to_str().unwrap();
    let changed = flowtape(&["train", "--resume", run, "--accept-changes"].into_iter().chain(more).collect::<Vec<_>>());
    assert!(
        stdout(&changed).contains(&format!("--resume '{run}'"))
            || stdout(&changed).contains(&format!("sample '{run}'"))
    );
    assert!(String::from_utf8_lossy(&changed.stderr).contains("data.shuffle is false instead of true"));
}

#[test]
fn a_folder_belongs_to_one_run_and_a_run_to_one_process() {
    let folder = tempfile::tempdir().unwrap();
    // What fits nothing makes nothing.
    let run = folder.path().join("run");
    let text = std::fs::read_to_string(RECIPE).unwrap();
    assert!(text.contains("data:"), "{text}");
    failure(&train(&run, &["--set", "model.axes_dims_rope=[2, 2, 2]"]));
    assert!(!run.exists());
    // A folder of other things stays as it is.
    let other = folder.path().join("photos");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("samples"), "mine").unwrap();
    let refused = failure(&train(&other, &[]));
    assert!(refused.contains("photos: is no run folder, and not empty (it holds samples)"), "{refused}");
    assert_eq!(std::fs::read_dir(&other).unwrap().count(), 1);
    // One that ended before its first checkpoint may be begun again.
    let stuck = failure(&train(&run, &["--set", "optimizer.lr=1.0e+30", "--set", "step_scheduler.ckpt_every_steps=0"]));
    assert!(stuck.contains("no checkpoint yet") && run.join("recipe.yaml").exists(), "{stuck}");
    let advice = failure(&flowtape(&["train", "--resume", run.to_str().unwrap()]));
    assert!(advice.contains("begin again with `flowtape train"), "{advice}");
    stdout(&train(&run, &[]));
    assert_eq!(metrics(&run, "step").len(), 6);
    // What was trained is not.
    assert!(failure(&train(&run, &[])).contains("holds a run already"));
}

#[cfg(unix)]
#[test]
fn two_processes_do_not_write_into_one_run() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let mut child = endless(&run, "seed=1");
    while !run.join("checkpoints/LATEST/state.json").exists() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let resume = ["train", "--resume", run.to_str().unwrap(), "--set", "step_scheduler.max_steps=8"];
    let refused = failure(&flowtape(&resume));
    assert!(refused.contains(&format!("process {} trains in this folder", child.id())), "{refused}");
    // Who reads is not kept out.
    stdout(&flowtape(&["inspect", run.to_str().unwrap()]));
    // However it ends, the lock ends with it.
    child.kill().unwrap();
    child.wait().unwrap();
    let step = || -> u64 { metrics(&run, "step").iter().map(|s| s.parse().unwrap()).max().unwrap() };
    let more = format!("step_scheduler.max_steps={}", step() + 2);
    stdout(&flowtape(&["train", "--resume", run.to_str().unwrap(), "--set", &more]));
    // Of many that begin at once, each has a folder of its own.
    let begin = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flowtape"));
        command.args(["train", RECIPE]).args(SMALL.iter().flat_map(|s| ["--set", s])).current_dir(folder.path());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let all: Vec<_> = (0..4).map(|_| begin()).collect();
    all.into_iter().for_each(|child| drop(stdout(&child.wait_with_output().unwrap())));
    (1..=4).for_each(|i| assert!(folder.path().join(format!("runs/digits-{i}/report.json")).exists()));
}

#[test]
fn updates_on_the_way_of_the_backward_pass_give_the_same_bits() {
    for dtype in ["dtype=f32", "dtype=bf16", "dtype=mixed"] {
        let folder = tempfile::tempdir().unwrap();
        let [at_once, last] = ["at_once", "last"].map(|n| folder.path().join(n));
        stdout(&train(&at_once, &["--set", dtype, "--set", "clip_grad_norm=null"]));
        // A limit that is never reached: all gradients are kept for their norm, and multiplied with 1.
        stdout(&train(&last, &["--set", dtype, "--set", "clip_grad_norm.max_norm=1e30"]));
        assert!(weights(&at_once) == weights(&last), "{dtype}");
        let state = |run: &Path| std::fs::read(run.join("checkpoints/LATEST/optimizer.safetensors")).unwrap();
        assert!(state(&at_once) == state(&last), "{dtype}");
        for key in ["train_loss", "grad_norm"] {
            assert_eq!(metrics(&at_once, key), metrics(&last, key), "{dtype}");
        }
    }
}

#[test]
fn mixed_training_comes_out_close_to_f32_and_saves_f32() {
    let folder = tempfile::tempdir().unwrap();
    let run = |dtype: &str| {
        let run = folder.path().join(dtype);
        let dtype = format!("dtype={dtype}");
        let more =
            ["--set", "step_scheduler.max_steps=60", "--set", "step_scheduler.local_batch_size=16", "--set", &dtype];
        stdout(&train(&run, &more));
        let losses: Vec<f64> = metrics(&run, "train_loss").iter().map(|l| l.parse().unwrap()).collect();
        (weights(&run), losses)
    };
    let (wide, losses) = run("f32");
    for dtype in ["mixed", "mixed_f16"] {
        let (mixed, close) = run(dtype);
        assert_eq!(wide.len(), mixed.len(), "the trained weights are saved in f32");
        assert!(losses.iter().zip(&close).all(|(a, b)| (a / b - 1.0).abs() < 0.03), "{dtype}: {losses:?}\n{close:?}");
        // It did learn something.
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        assert!(mean(&close[50..]) < 0.9 * mean(&close[..10]), "{dtype}: {close:?}");
    }
}

#[test]
fn an_overflow_skips_its_step_is_counted_and_training_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let run = |steps: &str| {
        let run = folder.path().join(steps);
        // Every good step makes the scale so large that the next one overflows, and an overflow takes that back.
        let settings = [
            "dtype=mixed_f16",
            "loss_scale.init_scale=1024",
            "loss_scale.growth_interval=1",
            "loss_scale.growth_factor=1099511627776.0",
            "loss_scale.backoff_factor=9.094947017729282e-13",
            "lr_scheduler.lr_decay_steps=6",
            &format!("step_scheduler.max_steps={steps}"),
        ];
        let settings: Vec<&str> = settings.into_iter().flat_map(|s| ["--set", s]).collect();
        let out = stdout(&train(&run, &[&["--json"], &settings[..]].concat()));
        let json: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
        (json["skipped_steps"].as_u64(), weights(&run), run)
    };
    let (three, four, five) = (run("3"), run("4"), run("5"));
    assert_eq!((three.0, four.0, five.0), (Some(1), Some(2), Some(2)));
    assert!(three.1 == four.1 && four.1 != five.1, "a skipped step changed the weights, or a good one did not");
    assert_eq!(metrics(&five.2, "skipped_steps"), ["0", "1", "1", "2", "2"]);
    let skipped = |norm: &String| norm == "null";
    assert_eq!(
        metrics(&five.2, "grad_norm").iter().map(skipped).collect::<Vec<_>>(),
        [false, true, false, true, false]
    );
}

#[test]
fn a_run_that_diverges_names_the_step_and_the_last_good_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, every: &str| {
        let every = format!("step_scheduler.ckpt_every_steps={every}");
        failure(&train(&folder.path().join(name), &["--set", "optimizer.lr=1.0e+30", "--set", &every]))
    };
    let message = run("saved", "1");
    assert!(message.contains("step 2: ") && message.contains("checkpoint is that of step 1"), "{message}");
    let message = run("unsaved", "0");
    assert!(message.contains("step 2: ") && message.contains("no checkpoint yet"), "{message}");
    // The step is kept, and comes to the same when it is run again.
    let bundle = folder.path().join("saved/replay/step_000002");
    assert!(run("again", "0").contains("flowtape replay "), "{message}");
    let replayed = flowtape(&["replay", bundle.to_str().unwrap(), "--json"]);
    let finding: Value = serde_json::from_str(&stdout(&replayed)).unwrap();
    assert_eq!((&finding["step"], finding["op"].is_string()), (&Value::from(2), true), "{finding}");
    assert!(!String::from_utf8_lossy(&replayed.stderr).contains("when it was written"), "{finding}");
    assert!(stdout(&flowtape(&["replay", bundle.to_str().unwrap()])).starts_with("step 2: "));
}

/// A limit on the size of files stands for a disk that is full.
#[cfg(unix)]
#[test]
fn a_full_disk_is_told_and_the_last_checkpoint_stays() {
    let folder = tempfile::tempdir().unwrap();
    let parts = folder.path().join("parts");
    stdout(&train(&parts, &["--set", "step_scheduler.max_steps=4"]));
    let before = weights(&parts);
    // The clock jumped meanwhile: the newest checkpoint seems to be the oldest.
    for (step, seconds) in [(2, 4_000_000_000), (4, 1)] {
        let path = parts.join(format!("checkpoints/step_00000{step}/state.json"));
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        std::fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
    }
    // 16 kB are enough for everything but weights.
    let limited = format!(
        "trap '' XFSZ; ulimit -f 32; exec {} train --resume {} --set step_scheduler.max_steps=6",
        env!("CARGO_BIN_EXE_flowtape"),
        parts.display()
    );
    let message = failure(&Command::new("sh").args(["-c", &limited]).output().unwrap());
    assert!(message.contains("diffusion_pytorch_model.safetensors") && message.contains("File too large"), "{message}");
    assert!(weights(&parts) == before, "the last checkpoint changed");
    let left: Vec<_> = std::fs::read_dir(parts.join("checkpoints")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.len() >= 3, "{left:?}");
    stdout(&flowtape(&["train", "--resume", parts.to_str().unwrap(), "--set", "step_scheduler.max_steps=6"]));
    // The learning rate's schedule was that of four steps.
    assert_eq!(metrics(&parts, "step").len(), 6);
    assert!(
        !std::fs::read_dir(parts.join("checkpoints"))
            .unwrap()
            .any(|e| { e.unwrap().file_name().to_string_lossy().ends_with(".partial") })
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_cannot_be_written_is_told_before_anything_is_trained() {
    for run in ["/proc/flowtape", "/dev/null/flowtape"] {
        let message = failure(&train(Path::new(run), &[]));
        // That the disk has no room for it is told of a system's own folder.
        assert!(message.contains(run) || message.contains("choose another run_dir"), "{message}");
        assert!(!message.contains("step 1"), "{message}");
    }
}

/// Whatever is asked for; `trainer/tests/threads.rs` has more threads than this machine may have cores.
#[test]
fn threads_are_as_many_as_cores_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let run = |threads: &str| {
        let run = folder.path().join(threads);
        let output = train(&run, &["--threads", threads]);
        stdout(&output);
        (weights(&run), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (one, silent) = run("1");
    assert!(!silent.contains("--threads"), "{silent}");
    for (asked, note) in [("0", "--threads 0: all"), ("20000", "--threads 20000: this machine has")] {
        let (weights, said) = run(asked);
        assert!(said.contains(note), "{said}");
        assert!(weights == one, "{asked} threads");
    }
}

#[test]
fn wrong_recipes_are_errors_that_say_what_and_where() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recipe.yaml");
    let text = std::fs::read_to_string(RECIPE).unwrap();
    let cases = [
        (text.replace("  max_steps:", "  max_step:"), "did you mean `max_steps`"),
        (text.replace("lr: 1.0e-3", "lr: fast"), ":32:7: optimizer.lr: expected a number above 0"),
        (text.replace("num_layers: 2", "num_layers: two"), "num_layers"),
        (text.replace("FluxTransformer2DModel", "FluxTransformer"), "FluxTransformer2DModel, "),
        (text.replace("[8, 12, 12]", "[8, 12, 13]"), "axes_dims_rope"),
        (text.replace("adapter_type: flux", "adapter_type: flex"), "simple, wan_i2v, wan_ti2v, flux"),
        (text.replace("text_dim: 32", "text_dim: 16"), "data.text_dim (16) must equal model.joint_attention_dim (32)"),
        ("name: [".into(), "recipe.yaml"),
    ];
    for (text, part) in cases {
        std::fs::write(&path, text).unwrap();
        let run_dir = format!("run_dir={}", folder.path().join("run").display());
        let message = failure(&flowtape(&["train", path.to_str().unwrap(), "--set", &run_dir]));
        assert!(message.contains(part), "expected {part:?} in: {message}");
        let _ = std::fs::remove_dir_all(folder.path().join("run"));
    }
    assert!(failure(&flowtape(&["train", "no/such.yaml"])).contains("no/such.yaml"));
    assert!(failure(&flowtape(&["train", RECIPE, "--set", "optimizer.lr"])).contains("key=value"));
    let nemo = failure(&flowtape(&["train", RECIPE, "--optimizer.lr=fast", "--seed.x", "1"]));
    assert!(nemo.contains("--set optimizer.lr=fast: optimizer.lr: ") && nemo.contains("--set seed.x=1: "), "{nemo}");
    assert!(failure(&flowtape(&["train", "--resume", "no/such"])).contains("not a run folder"));
    assert!(failure(&flowtape(&["trian"])).contains("train"));
}

#[test]
fn a_recipe_is_checked_without_a_trace() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let run_dir = format!("run_dir={}", run.display());
    let check = |more: &[&str]| flowtape(&[&["check", RECIPE, "--set", &run_dir], more].concat());
    let shown = stdout(&check(&[]));
    assert!(["weights", "peak", "1 x 8 x 8", "1000 steps"].iter().all(|part| shown.contains(part)), "{shown}");
    let json: Value = serde_json::from_str(&stdout(&check(&["--deep", "--json"]))).unwrap();
    assert!(json["step"]["peak"].as_u64().is_some_and(|peak| peak > 1 << 20), "{json}");
    // More than there is: what would fit, and nothing is made by training either.
    let huge = ["--set", "model.num_layers=64", "--set", "model.num_attention_heads=512"];
    let output = check(&huge);
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!output.status.success(), "{shown}");
    assert!(shown.contains("does not fit") && shown.contains("--set dtype=bf16"), "{shown}");
    let refused = failure(&flowtape(&[&["train", RECIPE, "--set", &run_dir], &huge[..]].concat()));
    assert!(refused.contains("does not fit"), "{refused}");
    assert!(!run.exists());
}

#[test]
fn the_schema_of_recipes_is_printed() {
    let schema: Value = serde_json::from_str(&stdout(&flowtape(&["schema"]))).unwrap();
    assert!(schema["properties"]["step_scheduler"]["properties"]["max_steps"]["description"].is_string());
}

/// The binary with its output going to files, or to pipes whose reader is gone.
fn flowtape_into(arguments: &[&str], stdout: impl Into<Stdio>, stderr: impl Into<Stdio>) -> ExitStatus {
    Command::new(env!("CARGO_BIN_EXE_flowtape")).args(arguments).stdout(stdout).stderr(stderr).status().unwrap()
}

#[test]
fn lost_output_is_never_worth_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let broken = || std::io::pipe().unwrap().1;
    let full = || std::fs::File::create("/dev/full").unwrap();
    let train = |name: &str, stdout: Stdio, stderr: Stdio| {
        let run = folder.path().join(name);
        let run_dir = format!("run_dir={}", run.display());
        let mut arguments = vec!["train", RECIPE, "--set", &run_dir];
        arguments.extend(SMALL.iter().flat_map(|s| ["--set", s]));
        assert!(flowtape_into(&arguments, stdout, stderr).success(), "{name}");
        assert!(run.join("checkpoints/LATEST/state.json").exists() && run.join("report.json").exists(), "{name}");
    };
    train("broken", broken().into(), broken().into());
    if cfg!(target_os = "linux") {
        train("full", full().into(), full().into());
        // What only prints says that nobody got it, unless the reader had enough.
        assert!(!flowtape_into(&["inspect", "flux.1-dev"], full(), Stdio::null()).success());
    }
    assert!(flowtape_into(&["inspect", "flux.1-dev"], broken(), broken()).success());
    assert!(!flowtape_into(&["inspect", "flux.1"], broken(), broken()).success());
}

#[test]
fn an_installed_binary_has_recipes_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let at_home = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_flowtape")).args(arguments).current_dir(folder.path()).output().unwrap()
    };
    let listed = stdout(&at_home(&["recipes"]));
    assert!(listed.contains("digits  ") && listed.contains("moving_digits_wan  "), "{listed}");
    assert_eq!(stdout(&at_home(&["recipes", "digits"])), std::fs::read_to_string(RECIPE).unwrap());
    let small: Vec<&str> = SMALL.iter().flat_map(|s| ["--set", s]).collect();
    stdout(&at_home(&[&["train", "digits"], &small[..]].concat()));
    assert!(folder.path().join("runs/digits-1/report.json").exists());
    assert!(failure(&at_home(&["train", "digts"])).contains("did you mean `digits`?"));
    assert!(failure(&at_home(&["train", "runs"])).contains("runs: a folder, not a recipe"));
    assert!(failure(&at_home(&["recipes", "digts"])).contains("did you mean `digits`?"));
}

#[test]
fn a_run_trains_and_samples_on_wgpu() {
    if stdout(&flowtape(&["devices"])).lines().any(|l| l.starts_with("wgpu ")) {
        let required = std::env::var("FLOWTAPE_REQUIRE").is_ok_and(|r| r.split(',').any(|r| r == "wgpu"));
        assert!(!required, "FLOWTAPE_REQUIRE=wgpu, and no adapter");
        println!("skipped: no wgpu adapter");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [cpu, gpu] = ["cpu", "gpu"].map(|n| folder.path().join(n));
    stdout(&train(&cpu, &["--set", "step_scheduler.max_steps=2"]));
    stdout(&train(&gpu, &["--set", "step_scheduler.max_steps=2", "--device", "wgpu"]));
    let losses = |run: &Path| -> Vec<f64> { metrics(run, "train_loss").iter().map(|l| l.parse().unwrap()).collect() };
    for (a, b) in losses(&gpu).iter().zip(losses(&cpu)) {
        assert!((a - b).abs() < 1e-3 * b, "{a} instead of {b}");
    }
    let out = folder.path().join("seven.png");
    let arguments = ["sample", gpu.to_str().unwrap(), "--prompt", "a handwritten seven", "--n", "1", "--steps", "2"];
    stdout(&flowtape(&[&arguments[..], &["--out", out.to_str().unwrap()]].concat()));
    assert!(std::fs::read(out).unwrap().starts_with(b"\x89PNG"));
    assert!(std::fs::read_to_string(gpu.join("recipe.yaml")).unwrap().contains("device: wgpu"));
}

#[test]
fn video_recipes_leave_moving_pictures_and_go_on_from_a_frame() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["wan", "hunyuan"] {
        let run = folder.path().join(name);
        let (run_dir, recipe) = (format!("run_dir={}", run.display()), format!("{RECIPES}/moving_digits_{name}.yaml"));
        let small = [
            "model.num_layers=1",
            "data.video={frames: 4, height: 10, width: 12}",
            "step_scheduler.local_batch_size=4",
            "step_scheduler.max_steps=3",
            "sampling.every_steps=2",
            "sampling.num_inference_steps=2",
            "report.samples_per_class=1",
            "init=adaln_zero",
            "performance.activation_checkpointing=true",
        ];
        let mut arguments = vec!["train", &recipe, "--json", "--set", &run_dir];
        small.iter().for_each(|s| arguments.extend(["--set", s]));
        let out = stdout(&flowtape(&arguments));
        let json: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
        assert!(json["background_error"].as_f64().is_some_and(f64::is_finite), "{json}");
        let kinds: &[&str] = if name == "hunyuan" { &["", "_frames", "_i2v", "_i2v_frames"] } else { &["", "_frames"] };
        for kind in kinds {
            let png = std::fs::read(run.join(format!("samples/step_000003{kind}.png"))).unwrap();
            let animated = png.windows(4).any(|chunk| chunk == b"acTL");
            assert_eq!(animated, !kind.ends_with("_frames"), "{name}{kind}");
        }
        let first = json["image_to_video"]["first_frame"]["error"].as_f64();
        assert_eq!(first.is_some(), name == "hunyuan", "{json}");
    }
    let sample = |name: &str, more: &[&str]| {
        let (run, out) = (folder.path().join(name), folder.path().join(format!("{name}.png")));
        let prompt = ["--prompt", "a handwritten two", "--n", "2", "--steps", "2"];
        let paths = ["sample", run.to_str().unwrap(), "--out", out.to_str().unwrap()];
        flowtape(&[&paths[..], &prompt, more].concat())
    };
    let there = |name: &str| folder.path().join(name).exists();
    stdout(&sample("wan", &[]));
    assert!(there("wan.png") && there("wan_frames.png"));
    // What was written is a frame that videos go on from, pixel by pixel.
    let frame = folder.path().join("wan_first.png");
    let picture = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&frame).unwrap())).read_info().unwrap();
    assert_eq!((picture.info().width, picture.info().height), (12, 10));
    let from = ["--first-frame", frame.to_str().unwrap()];
    stdout(&sample("hunyuan", &from));
    assert!(there("hunyuan.png") && there("hunyuan_frames.png"));
    assert!(failure(&sample("wan", &from)).contains("hunyuan"));
}

#[test]
fn a_step_is_measured_with_the_fields_of_its_peer() {
    let out = stdout(&flowtape(&["bench", "step", "--config", "digits", "--steps", "1", "--warmup", "0", "--json"]));
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((json["params"].as_u64(), json["dtype"].as_str()), (Some(1_790_596), Some("f32")));
    for key in ["s_step", "s_min", "s_fwd", "s_bwd", "s_opt", "gflops", "peak_rss_mb", "loss_first", "loss_last"] {
        assert!(json[key].as_f64().is_some_and(|v| v > 0.0), "{key} in {json}");
    }
    let out = stdout(&flowtape(&["bench", "step", "--config", "digits", "--steps", "1", "--warmup", "0", "--profile"]));
    assert!(out.contains("matmul NT 1152x128x512 f32") && out.contains("attention 64x4x18x32 f32"), "{out}");
    assert!(failure(&flowtape(&["bench", "step", "--config", "xxl"])).contains("digits"));
    for (nothing, part) in [("--steps", "at least 1"), ("--batch", "local_batch_size")] {
        let refused = failure(&flowtape(&["bench", "step", "--config", "digits", nothing, "0"]));
        assert!(refused.contains(part), "{refused}");
    }
    let out = stdout(&flowtape(&["bench", "ops", "--only", "modulate", "--seconds", "0.001", "--json"]));
    let lines: Vec<Value> = out.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(lines.len() == 8 && lines.iter().all(|l| l["fraction"].as_f64().is_some_and(|f| f > 0.0)), "{out}");
}
