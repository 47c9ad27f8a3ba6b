//! The binary, used as a stranger would: real input, wrong input, interruptions.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::io::BufRead;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use serde_json::Value;

use common::{RECIPE, RECIPES, SMALL, failure, flowtape, stdout, train};

mod common;

fn weights(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("checkpoints/LATEST/diffusion_pytorch_model.safetensors")).unwrap()
}

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

/// What a run wrote for each of its steps.
fn metrics(run: &Path, key: &str) -> Vec<String> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()[key].to_string()).collect()
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

#[test]
fn inspect_counts_presets_configurations_folders_files_and_runs() {
    let json =
        |target: &str| -> Value { serde_json::from_str(&stdout(&flowtape(&["inspect", target, "--json"]))).unwrap() };
    let preset = json("flux.1-dev");
    assert_eq!((preset["parameters"].as_u64(), preset["tensors"].as_u64()), (Some(11_901_408_320), Some(1160)));
    assert_eq!(preset["bytes"]["bf16"].as_u64(), Some(2 * 11_901_408_320));
    assert!(stdout(&flowtape(&["inspect", "flux.1-dev"])).contains("11,901,408,320 in 1160 tensors"));

    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/goldens/flux_step");
    let folder = json(golden);
    assert_eq!(folder["class"], "FluxTransformer2DModel");
    assert_eq!(folder["bytes"]["f32"].as_u64().unwrap(), 4 * folder["parameters"].as_u64().unwrap());
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        let found = json(&format!("{golden}/{file}"));
        assert_eq!((&found["parameters"], &found["tensors"]), (&folder["parameters"], &folder["tensors"]), "{file}");
    }

    let scratch = tempfile::tempdir().unwrap();
    // What is stored is counted, not what the configuration promises.
    let other = scratch.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::copy(format!("{golden}/config.json"), other.join("config.json")).unwrap();
    let counts = |found: &Value| (found["parameters"].as_u64().unwrap(), found["notes"][0].to_string());
    let file = |name: &str| other.join(name);
    let (described, note) = counts(&json(other.to_str().unwrap()));
    assert!(
        described == folder["parameters"].as_u64().unwrap() && note.contains("counted is what config.json describes")
    );
    std::fs::write(file("diffusion_pytorch_model.bin"), "PK").unwrap();
    assert!(counts(&json(other.to_str().unwrap())).1.contains("there are diffusion_pytorch_model.bin"));
    std::fs::remove_file(file("diffusion_pytorch_model.bin")).unwrap();
    let stored = |path: &Path| empty_tensors(path, (0..3).map(|i| format!("transformer_blocks.{i}.x")));
    stored(&file("diffusion_pytorch_model.fp16.safetensors"));
    let found = json(other.to_str().unwrap());
    assert_eq!((found["tensors"].as_u64(), found["class"].as_str()), (Some(3), Some("FluxTransformer2DModel")));
    assert!(counts(&found).1.contains("diffusion_pytorch_model.fp16.safetensors"), "{found}");
    stored(&file("diffusion_pytorch_model.safetensors"));
    let shown = stdout(&flowtape(&["inspect", other.to_str().unwrap()]));
    assert!(shown.contains("0 in 3 tensors") && shown.contains("config.json describes"), "{shown}");

    let run = scratch.path().join("run");
    stdout(&train(&run, &[]));
    assert!(json(run.to_str().unwrap())["parameters"].as_u64().unwrap() > 1000);

    assert!(failure(&flowtape(&["inspect", "flux.1"])).contains("flux.1-dev"));
    let broken = scratch.path().join("config.json");
    std::fs::write(&broken, r#"{"_class_name": "FluxTransformer2DModel", "num_layers": "three"}"#).unwrap();
    assert!(failure(&flowtape(&["inspect", broken.to_str().unwrap()])).contains("num_layers"));
    std::fs::write(&broken, r#"{"_class_name": "FluxTransformer2DModel", "num_layer": 3}"#).unwrap();
    let unknown = flowtape(&["inspect", broken.to_str().unwrap()]);
    stdout(&unknown);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("`num_layer` is unknown"), "{unknown:?}");
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
    assert!(failure(&at_home(&["train", "digts"])).contains("digits, digits_lora"));
    assert!(failure(&at_home(&["recipes", "digts"])).contains("digits, digits_lora"));
}

#[test]
fn the_binary_says_its_name_and_version() {
    assert_eq!(stdout(&flowtape(&["--version"])), concat!("flowtape ", env!("CARGO_PKG_VERSION"), "\n"));
}

/// A run that ends by a signal alone.
#[cfg(unix)]
fn endless(run: &Path, more: &str) -> std::process::Child {
    endless_by(Command::new(env!("CARGO_BIN_EXE_flowtape")), run, more)
}

/// The same by a command that starts the binary.
#[cfg(unix)]
fn endless_by(mut command: Command, run: &Path, more: &str) -> std::process::Child {
    let run_dir = format!("run_dir={}", run.display());
    let long = ["step_scheduler.max_steps=1000000", "sampling.every_steps=0", more, &run_dir];
    command.args(["train", RECIPE]).args(SMALL.iter().chain(&long).flat_map(|s| ["--set", s]));
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[cfg(unix)]
fn send(signal: &str, child: &std::process::Child) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

#[cfg(unix)]
#[test]
fn a_signal_ends_a_run_with_a_checkpoint_and_an_exit_code_of_its_own() {
    for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-USR1", 138)] {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let child = endless(&run, "seed=1");
        while !run.join("checkpoints/LATEST/state.json").exists() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        send(signal, &child);
        let output = child.wait_with_output().unwrap();
        let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{out}{error}");
        assert!(error.contains("stopping after this step; press again to quit now"), "{error}");
        assert!(out.contains("go on with: flowtape train --resume"), "{out}");
        let state: Value =
            serde_json::from_slice(&std::fs::read(run.join("checkpoints/LATEST/state.json")).unwrap()).unwrap();
        assert_eq!(state["step"].as_u64(), Some(metrics(&run, "step").len() as u64));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_behind_nohup_outlives_its_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let mut nohup = Command::new("nohup");
    nohup.arg(env!("CARGO_BIN_EXE_flowtape"));
    let child = endless_by(nohup, &run, "seed=1");
    let saved = || {
        let text = std::fs::read(run.join("checkpoints/LATEST/state.json")).ok()?;
        serde_json::from_slice::<Value>(&text).ok()?["step"].as_u64()
    };
    let wait_for = |step: u64| {
        while saved().is_none_or(|s| s < step) {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    };
    wait_for(2);
    send("-HUP", &child);
    let later = saved().unwrap_or(2) + 20;
    wait_for(later);
    send("-TERM", &child);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(143));
}

#[cfg(unix)]
#[test]
fn a_second_signal_ends_a_run_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    // A step of a million parts.
    let mut child = endless(&run, "step_scheduler.global_batch_size=8000000");
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
    let mut wait_for = |text: &str| while !lines.next().unwrap().unwrap().contains(text) {};
    wait_for("parameters");
    send("-INT", &child);
    wait_for("press again");
    send("-INT", &child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!run.join("checkpoints").exists());
}

/// Moments are of this test's choice, and a third of them within a save.
#[cfg(unix)]
#[test]
fn a_run_that_is_killed_anywhere_comes_to_the_same_weights() {
    const KILLS: usize = 30;
    let folder = tempfile::tempdir().unwrap();
    let [whole, killed] = ["whole", "killed"].map(|n| folder.path().join(n));
    let settings = [
        "step_scheduler.max_steps=120",
        "step_scheduler.ckpt_every_steps=1",
        "step_scheduler.global_batch_size=16",
        "sampling.every_steps=0",
        "ema.decay=0.9",
        "report=null",
    ];
    let settings: Vec<&str> = settings.into_iter().flat_map(|s| ["--set", s]).collect();
    stdout(&train(&whole, &settings));
    let saved = |name: &str| {
        let names = std::fs::read_dir(killed.join("checkpoints")).into_iter().flatten().flatten();
        names.filter(|entry| entry.file_name().to_string_lossy().ends_with(name)).count() > 0
    };
    let begin = || {
        let run_dir = format!("run_dir={}", killed.display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_flowtape"));
        if saved("LATEST") {
            command.args(["train", "--resume", killed.to_str().unwrap()]);
        } else {
            command
                .args(["train", RECIPE, "--set", &run_dir])
                .args(SMALL.iter().flat_map(|s| ["--set", s]))
                .args(&settings);
        }
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut random = 1u64;
    let (mut kills, mut while_saving) = (0, 0);
    while kills < KILLS {
        let mut child = begin();
        // From a first step on, or at once in a few cases.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let steps = || std::fs::metadata(killed.join("metrics.jsonl")).map_or(0, |file| file.len());
        let before = steps();
        let running = |child: &mut std::process::Child| child.try_wait().unwrap().is_none();
        while kills % 10 != 9 && steps() <= before && running(&mut child) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_micros(random >> 33 & 0x7fff));
        while kills % 3 == 0 && !saved(".partial") && running(&mut child) {
            std::hint::spin_loop();
        }
        if !running(&mut child) {
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        while_saving += usize::from(saved(".partial"));
        kills += 1;
    }
    let last = begin().wait_with_output().unwrap();
    assert!(last.status.success(), "{}", String::from_utf8_lossy(&last.stderr));
    assert!(kills == KILLS && while_saving >= 3, "{kills} kills, {while_saving} of them while it saved");
    assert!(weights(&whole) == weights(&killed), "after {kills} kills the weights are others");
    for file in ["optimizer.safetensors", "ema/diffusion_pytorch_model.safetensors"] {
        let read = |run: &Path| std::fs::read(run.join("checkpoints/LATEST").join(file)).unwrap();
        assert!(read(&whole) == read(&killed), "{file}");
    }
    assert_eq!(metrics(&whole, "train_loss"), metrics(&killed, "train_loss"));
    assert!(!saved(".partial"));
}

#[test]
fn devices_are_listed_and_a_wrong_one_is_told() {
    let listed = stdout(&flowtape(&["devices"]));
    assert!(listed.starts_with("cpu") && listed.contains("threads") && listed.contains("wgpu"), "{listed}");
    let folder = tempfile::tempdir().unwrap();
    let wrong = failure(&train(folder.path(), &["--device", "gpu"]));
    assert!(wrong.contains("expected cpu") && wrong.contains("flowtape devices"), "{wrong}");
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

/// Weights, checkpoints, pictures and folders: all have the rights that the umask leaves.
#[cfg(unix)]
#[test]
fn everything_that_is_written_follows_the_umask() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let mut arguments =
        vec!["train".to_owned(), RECIPE.to_owned(), "--set".into(), format!("run_dir={}", run.display())];
    SMALL.iter().for_each(|setting| arguments.extend(["--set".to_owned(), (*setting).to_owned()]));
    let mut shell = Command::new("sh");
    shell.args(["-c", "umask 026; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_flowtape")]).args(arguments);
    stdout(&shell.output().unwrap());
    let mut folders = vec![run];
    let mut seen = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, if path.is_dir() { 0o751 } else { 0o640 }, "{} {mode:o}", path.display());
            seen += 1;
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    assert!(seen > 8, "{seen} files");
}

/// A safetensors file of empty tensors of these names.
fn empty_tensors(path: &Path, names: impl Iterator<Item = String>) {
    let entry = |name| format!("{}:{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}", Value::String(name));
    let header = format!("{{{}}}", names.map(entry).collect::<Vec<_>>().join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.into_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn weights_of_every_kind_are_inspected() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let inspect = || flowtape(&["inspect", path.to_str().unwrap()]);
    // Names from a stranger do not reach the terminal raw.
    empty_tensors(&path, ["a\u{1b}[2J.weight", "b.weight"].into_iter().map(String::from));
    let shown = stdout(&inspect());
    assert!(shown.contains("a\\u{1b}[2J") && !shown.contains('\u{1b}'), "{shown}");
    // What wraps a model names all its keys.
    empty_tensors(&path, ["_orig_mod.a.weight", "_orig_mod.b.weight"].into_iter().map(String::from));
    let output = inspect();
    let (shown, said) = (stdout(&output), String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(shown.contains("\na ") && !shown.contains("_orig_mod") && said.contains("`_orig_mod.`"), "{shown}{said}");
    // As many tensors as a header may have, in layers and side by side; a scan of all for each would take minutes.
    let names = (0..100_000).flat_map(|i| [format!("blocks.{i}.weight"), format!("t{i}.weight")]);
    empty_tensors(&path, names);
    let started = std::time::Instant::now();
    let shown = stdout(&inspect());
    assert!(shown.contains("in 200000 tensors") && shown.contains("100000"), "{}", &shown[..400]);
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
    // Neither a file nor a preset is one thing; what can't be looked at is another, and its reason is said once.
    assert!(failure(&flowtape(&["inspect", "flux.9"])).contains("neither a file or folder nor one of the presets"));
    #[cfg(unix)]
    {
        let link = folder.path().join("loop");
        std::os::unix::fs::symlink(&link, &link).unwrap();
        let message = failure(&flowtape(&["inspect", link.to_str().unwrap()]));
        assert!(message.matches("os error").count() == 1 && message.contains("loop: "), "{message}");
    }
}

/// The texts of a PNG by keyword, its sides, and how many frames it has.
fn png_of(path: &Path) -> (std::collections::BTreeMap<String, String>, [u32; 2], u32) {
    let reader = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(path).unwrap())).read_info().unwrap();
    let info = reader.info();
    let texts = info.utf8_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.get_text().unwrap())).collect();
    (texts, [info.width, info.height], info.animation_control().map_or(1, |control| control.num_frames))
}

#[test]
fn a_pipeline_is_sampled_and_its_files_say_how() {
    let folder = tempfile::tempdir().unwrap();
    let goldens = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/goldens");
    let (flux, wan) = (format!("{goldens}/pipe_flux/pipeline"), format!("{goldens}/pipe_wan/pipeline"));
    let out = |name: &str| folder.path().join(name).display().to_string();
    let common =
        ["--prompt", "a red fox", "--steps", "2", "--dtype", "f32", "--max-sequence-length", "16", "--seed", "5"];
    let sample = |from: &str, more: &[&str], name: &str| {
        flowtape(&[&["sample", from, "--out", &out(name)], &common[..], more].concat())
    };
    // Two pictures, each with the numbers that made it; one alone is the same as the first of two.
    let more = ["--size", "64x48", "--sampler", "heun", "--shift", "2", "--negative", "blurry", "--true-cfg", "1.5"];
    let written = stdout(&sample(&flux, &[&more[..], &["--n", "2", "--guidance", "4"]].concat(), "fox.png"));
    assert_eq!(written.lines().collect::<Vec<_>>(), [out("fox_0.png"), out("fox_1.png")]);
    let (texts, sides, frames) = png_of(Path::new(&out("fox_1.png")));
    assert_eq!((sides, frames), ([64, 48], 1));
    let weights = Path::new(&flux).join("transformer/diffusion_pytorch_model.safetensors");
    let expected = Command::new("sha256sum").arg(&weights).output().unwrap();
    let hash = String::from_utf8_lossy(&expected.stdout).split_whitespace().next().unwrap().to_owned();
    for (keyword, text) in [
        ("prompt", "a red fox"),
        ("negative_prompt", "blurry"),
        ("seed", "5"),
        ("picture", "1"),
        ("sampler", "heun"),
        ("steps", "2"),
        ("shift", "2"),
        ("guidance_scale", "4"),
        ("true_cfg_scale", "1.5"),
        ("weights", &format!("{hash}  diffusion_pytorch_model.safetensors")),
    ] {
        assert_eq!(texts.get(keyword).map(String::as_str), Some(text), "{keyword}");
    }
    stdout(&sample(&flux, &[&more[..], &["--guidance", "4"]].concat(), "one.png"));
    let pixels = |name: &str| {
        let file = std::io::BufReader::new(std::fs::File::open(out(name)).unwrap());
        let mut reader = png::Decoder::new(file).read_info().unwrap();
        let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut rgb).unwrap();
        rgb
    };
    assert!(pixels("one.png") == pixels("fox_0.png") && pixels("one.png") != pixels("fox_1.png"));
    // A film, as its scheduler samples it.
    stdout(&sample(&wan, &["--size", "48x32", "--frames", "5"], "film.png"));
    let (texts, sides, frames) = png_of(Path::new(&out("film.png")));
    assert_eq!((sides, frames, &*texts["sampler"], &*texts["shift"]), ([48, 32], 5, "unipc", "3"));

    // A film with sound, led in all ways; and a picture that is edited.
    let ltx2 = format!("{goldens}/pipe_ltx2/pipeline");
    let more =
        ["--size", "64x32", "--frames", "9", "--stg", "1", "--stg-blocks", "1", "--modality", "2", "--rescale", "0.7"];
    let written = stdout(&sample(&ltx2, &more, "loud.png"));
    assert_eq!(written.lines().collect::<Vec<_>>(), [out("loud.png"), out("loud.wav")]);
    assert!(std::fs::read(out("loud.wav")).unwrap().starts_with(b"RIFF"));
    let edit = format!("{goldens}/pipe_qwen_image_edit");
    let picture = format!("{edit}/context0.png");
    let more = ["--image", &picture, "--size", "64x48", "--negative", " "];
    stdout(&sample(&format!("{edit}/pipeline"), &more, "edited.png"));
    assert_eq!(png_of(Path::new(&out("edited.png"))).1, [64, 48]);

    // NeMo's YAML, with another folder's weights in place of the pipeline's.
    let yaml = folder.path().join("generate.yaml");
    let text = format!(
        "model:\n  pretrained_model_name_or_path: {wan}\n  checkpoint: {wan}/transformer\n  lora_weights: null\n\
         inference:\n  num_inference_steps: 2\n  guidance_scale: 5.0\n  height: 32\n  width: 48\n  dtype: float32\n  max_samples: 1\n  \
         prompts: [a fox, a dog]\n  pipeline_kwargs: {{num_frames: 5, negative_prompt: blurry, max_sequence_length: 16}}\n\
         output:\n  output_dir: {}\n  fps: 8\nvae: {{enable_tiling: true, enable_slicing: true}}\nseed: 42\n",
        out("generated")
    );
    std::fs::write(&yaml, text).unwrap();
    let yaml = yaml.display().to_string();
    let written = stdout(&flowtape(&["sample", "-c", &yaml, "--set", "inference.num_inference_steps=1"]));
    assert_eq!(written.trim(), out("generated/sample_000.png"));
    let (texts, sides, frames) = png_of(Path::new(written.trim()));
    assert_eq!((sides, frames, &*texts["steps"], &*texts["seed"]), ([48, 32], 5, "1", "42"));
    let message = failure(&flowtape(&["sample", "-c", &yaml, "--set", "inference.heigth=64"]));
    assert!(message.contains("heigth") && message.contains("height"), "{message}");

    // Wrong input is named, and nothing is written.
    let message = failure(&sample(&format!("{edit}/pipeline"), &["--size", "64x48"], "wrong.png"));
    assert!(message.contains("at least one picture to edit"), "{message}");
    for (more, part) in [
        (&["--image", &picture, "--size", "64x48"][..], "leave the pictures out"),
        (&["--size", "60x48"], "multiples of 16 pixels"),
        (&["--size", "60"], "such as 1024x768"),
        (&["--sampler", "ddim"], "euler, heun, dpm++2m, unipc"),
        (&["--lora", "/no/such/adapter.safetensors", "--size", "64x48"], "/no/such/adapter.safetensors"),
        (&["--raw", "--size", "64x48"], "--raw"),
    ] {
        let message = failure(&sample(&flux, more, "wrong.png"));
        assert!(message.contains(part), "{message}");
    }
    let broken = folder.path().join("broken");
    std::fs::create_dir(&broken).unwrap();
    std::fs::copy(format!("{flux}/model_index.json"), broken.join("model_index.json")).unwrap();
    let message = failure(&sample(&broken.display().to_string(), &["--size", "64x48"], "wrong.png"));
    assert!(message.contains("broken") && message.contains("it is not there"), "{message}");
    assert!(!Path::new(&out("wrong.png")).exists());
}
