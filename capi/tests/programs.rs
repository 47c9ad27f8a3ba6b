//! A program in C and a script in Python, built and run as their authors would.
#![allow(clippy::unwrap_used)] // a test

use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder where cargo puts the library for its own tests.
fn library_folder() -> PathBuf {
    let folder = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    assert!(folder.join("libflowtape_c.so").exists() || folder.join("libflowtape_c.dylib").exists(), "{folder:?}");
    folder
}

/// A recipe of a model that is small enough for a test, its configuration alone, and the folder where both lie.
fn files() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes/digits.yaml"));
    let settings = ["model.num_layers=1", "model.num_single_layers=0", "step_scheduler.local_batch_size=8"];
    let recipe = flowtape_trainer::Recipe::load(path, &settings.map(String::from)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (text, config) = (folder.path().join("recipe.yaml"), folder.path().join("config.json"));
    std::fs::write(&text, recipe.to_yaml()).unwrap();
    std::fs::write(&config, recipe.model.to_string()).unwrap();
    (folder, text, config)
}

fn run(command: &mut Command) -> String {
    let out = command.output().unwrap();
    let (text, error) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{command:?}: {text}{error}");
    text.into_owned()
}

#[cfg(unix)]
#[test]
fn a_program_in_c_trains_and_is_told_what_it_does_wrong() {
    let (folder, recipe, config) = files();
    let (library, here) = (library_folder(), Path::new(env!("CARGO_MANIFEST_DIR")));
    let program = folder.path().join("program");
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-o"]).arg(&program).arg(here.join("tests/program.c"));
    cc.arg("-I").arg(here.join("include")).arg("-L").arg(&library).args(["-lflowtape_c", "-lpthread"]);
    run(cc.arg(format!("-Wl,-rpath,{}", library.display())));
    assert_eq!(run(Command::new(&program).arg(recipe).arg(config).arg(folder.path())), "done\n");
}

#[cfg(unix)]
#[test]
fn a_script_in_python_trains_through_ctypes() {
    let (_folder, recipe, _) = files();
    let name = if cfg!(target_os = "macos") { "libflowtape_c.dylib" } else { "libflowtape_c.so" };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/script.py");
    assert_eq!(run(Command::new("python3").arg(script).arg(library_folder().join(name)).arg(recipe)), "done\n");
}
