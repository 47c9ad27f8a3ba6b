//! Every golden case, a line each: `cargo test --release -p flowtape-tests goldens`.
#![allow(clippy::unwrap_used)] // a test

use std::io::Write;
use std::path::{Path, PathBuf};

use flowtape_engine::gradcheck::rerun_on_instruction_sets;
use flowtape_tests::{goldens, suite};

/// Those that this project made with the real diffusers.
fn own_goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("own_goldens")
}

#[test]
fn every_instruction_set_meets_them() {
    rerun_on_instruction_sets("every_instruction_set_meets_them").unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn goldens_are_met() {
    // Straight to the terminal: the harness swallows what a passing test prints.
    let mut out = std::io::stdout().lock();
    suite::report(&[&goldens(), &own_goldens()], |line| {
        let _ = writeln!(out, "{line}");
    })
    .unwrap();
}

/// A folder of goldens that disappears would take its cases along without a word.
#[test]
fn every_subject_has_goldens() {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens");
    assert_eq!(suite::without_goldens(&[&kept, &own_goldens()]).unwrap(), [""; 0]);
}
