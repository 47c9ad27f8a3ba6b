//! Every golden case, a line each: `cargo test --release -p flowtape-tests goldens`.

use std::io::Write;

use flowtape_engine::gradcheck::rerun_on_instruction_sets;
use flowtape_tests::{Outcome, adapters, goldens, ops, optim, pipeline_math, sampling, step};

#[test]
fn every_instruction_set_meets_them() {
    rerun_on_instruction_sets("every_instruction_set_meets_them").unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn goldens_are_met() {
    let root = goldens();
    let suites = [ops::cases, pipeline_math::cases, adapters::cases, step::cases, optim::cases, sampling::cases];
    let outcomes: Vec<Outcome> = suites.iter().flat_map(|cases| cases(&root)).collect();
    // Straight to the terminal: the harness swallows what a passing test prints.
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "goldens in {}", root.display());
    for outcome in &outcomes {
        let _ = writeln!(out, "{outcome}");
    }
    let skipped = outcomes.iter().filter(|o| o.is_skipped()).count();
    let failed: Vec<&Outcome> = outcomes.iter().filter(|o| !o.is_skipped() && !o.passed()).collect();
    let passed = outcomes.len() - skipped - failed.len();
    let _ = writeln!(out, "{passed} passed, {} failed, {skipped} skipped", failed.len());
    assert!(failed.is_empty() && passed > 0, "{} golden cases failed", failed.len());
}
