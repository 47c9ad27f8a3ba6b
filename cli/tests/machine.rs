//! What the binary says of the machine, of runs, and of itself.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::process::Command;

use serde_json::Value;

use common::{failure, flowtape, stdout, train};

mod common;

/// The lines of a command, each one JSON.
fn lines(arguments: &[&str]) -> Vec<Value> {
    stdout(&flowtape(arguments)).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn the_binary_says_its_name_and_version() {
    assert_eq!(stdout(&flowtape(&["--version"])), concat!("flowtape ", env!("CARGO_PKG_VERSION"), "\n"));
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
fn the_machine_is_looked_at_and_a_folder_that_cannot_be_written_is_bad() {
    let found = &lines(&["doctor", "--json"])[0];
    let of = |what: &str| found.as_array().unwrap().iter().find(|finding| finding["what"] == what).unwrap();
    for (what, words) in
        [("processor", "threads"), ("memory", "GB"), ("product", "right"), ("disk", "free"), ("folder", "locks")]
    {
        assert!(of(what)["found"].as_str().unwrap().contains(words), "{found}");
    }
    assert_eq!(of("product")["health"], "good");
    let table = stdout(&flowtape(&["doctor"]));
    assert!(table.lines().any(|line| line.starts_with("ok    product")), "{table}");
    // There is no such folder for any user, root too.
    #[cfg(target_os = "linux")]
    {
        let refused =
            Command::new(env!("CARGO_BIN_EXE_flowtape")).arg("doctor").current_dir("/proc/self").output().unwrap();
        let text = String::from_utf8_lossy(&refused.stdout).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{text}");
        assert!(text.contains("BAD   folder") && text.contains("can't be written") && text.contains("-> "), "{text}");
    }
}

#[test]
fn devices_are_listed_for_programs() {
    let devices = &lines(&["devices", "--json"])[0];
    assert!(devices[0]["name"] == "cpu" && devices[0]["unusable"].is_null(), "{devices}");
}

/// Another tool's reading of what is handed to shells and to `man`.
#[test]
fn completions_and_manual_pages_are_whole() {
    let script = stdout(&flowtape(&["completions", "bash"]));
    let check = r#"source /dev/stdin; COMP_WORDS=(flowtape tra); COMP_CWORD=1; _flowtape flowtape tra flowtape; echo "${COMPREPLY[@]}""#;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flowtape.bash");
    std::fs::write(&file, script).unwrap();
    let bash =
        Command::new("bash").args(["-c", &check.replace("/dev/stdin", file.to_str().unwrap())]).output().unwrap();
    assert_eq!(stdout(&bash).trim(), "train");
    for shell in ["zsh", "fish", "powershell", "elvish"] {
        assert!(stdout(&flowtape(&["completions", shell])).contains("preprocess"), "{shell}");
    }
    let pages = folder.path().join("man1");
    stdout(&flowtape(&["man", "--out", pages.to_str().unwrap()]));
    let page = std::fs::read_to_string(pages.join("flowtape-train.1")).unwrap();
    assert!(page.contains(".SH OPTIONS") && page.contains("accept\\-changes"), "{page}");
    let first = std::fs::read_to_string(pages.join("flowtape.1")).unwrap();
    assert!(first.contains("Exit codes") && first.contains("143 by SIGTERM"), "{first}");
}

#[test]
fn quiet_tells_errors_alone() {
    let folder = tempfile::tempdir().unwrap();
    let trained = train(&folder.path().join("run"), &["--quiet"]);
    assert!(stdout(&trained).contains("final loss"));
    assert_eq!(String::from_utf8_lossy(&trained.stderr), "");
    let wrong = failure(&flowtape(&["-q", "train", "nothing.yaml"]));
    assert!(wrong.starts_with("error: ") && wrong.contains("nothing.yaml"), "{wrong}");
    // What is written is never coloured, whatever it is written to.
    let noted = train(&folder.path().join("other"), &[]);
    assert!(!noted.stdout.contains(&0x1b) && !noted.stderr.contains(&0x1b));
    assert!(!noted.stderr.is_empty());
}

#[test]
fn runs_are_listed_with_what_became_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let list = || lines(&["runs", folder.path().to_str().unwrap(), "--json"]);
    assert!(list().is_empty());
    let none = flowtape(&["runs", folder.path().to_str().unwrap()]);
    assert!(stdout(&none).is_empty() && String::from_utf8_lossy(&none.stderr).contains("no runs"));
    // Not a run, and not in the list.
    std::fs::create_dir(folder.path().join("other")).unwrap();
    let [short, long] = ["digits-2", "digits-10"].map(|name| folder.path().join(name));
    for run in [&short, &long] {
        stdout(&train(run, &[]));
    }
    let found = list();
    let names: Vec<&str> = found.iter().map(|run| run["path"].as_str().unwrap().rsplit('/').next().unwrap()).collect();
    assert_eq!(names, ["digits-2", "digits-10"], "in the order of numbers");
    for run in &found {
        assert_eq!((&run["status"], &run["step"], &run["steps"]), (&"finished".into(), &6.into(), &6.into()), "{run}");
        assert!(run["picture"].as_str().unwrap().ends_with("samples/step_000006.png"), "{run}");
        let report = std::fs::read(std::path::Path::new(run["path"].as_str().unwrap()).join("report.json")).unwrap();
        let report: Value = serde_json::from_slice(&report).unwrap();
        let gap = run["loss"].as_f64().unwrap() - report["final_loss"].as_f64().unwrap();
        assert!(gap.abs() < 1e-12, "{run}");
    }
    let table = stdout(&flowtape(&["runs", folder.path().to_str().unwrap()]));
    assert!(table.contains("finished") && table.contains("6/6"), "{table}");
    assert_eq!(lines(&["runs", short.to_str().unwrap(), "--json"]).len(), 1);
}

#[cfg(unix)]
#[test]
fn a_run_under_way_one_that_was_stopped_and_one_that_was_killed_are_told_apart() {
    use std::io::BufRead;
    let folder = tempfile::tempdir().unwrap();
    let status = || {
        let found = lines(&["runs", folder.path().to_str().unwrap(), "--json"]);
        found.iter().map(|run| run["status"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    for (number, (signal, after)) in [("-TERM", "stopped"), ("-KILL", "crashed")].into_iter().enumerate() {
        let run_dir = format!("run_dir={}", folder.path().join(format!("run-{number}")).display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_flowtape"));
        let long = ["step_scheduler.max_steps=1000000", "sampling.every_steps=0", &run_dir];
        command.args(["train", common::RECIPE]).args(common::SMALL.iter().chain(&long).flat_map(|s| ["--set", s]));
        let mut child =
            command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn().unwrap();
        let mut told = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
        assert!(told.any(|line| line.unwrap().starts_with("step ")));
        assert_eq!(status()[number], "training");
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        // What it still says must be read, or it waits.
        told.for_each(drop);
        child.wait().unwrap();
        assert_eq!(status()[number], after);
    }
    let table = stdout(&flowtape(&["runs", folder.path().to_str().unwrap()]));
    assert!(
        table.contains("was stopped; it goes on from step") && table.contains("flowtape train --resume"),
        "{table}"
    );
    assert!(table.contains("run-1 ended without being asked to"), "{table}");
}
