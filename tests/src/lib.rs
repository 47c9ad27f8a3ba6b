//! The goldens' cases, driven by their files, and what the integration tests share.

mod adapters;
pub mod comm;
#[cfg(feature = "trainer")]
mod data;
#[cfg(feature = "whole")]
pub mod devices;
#[cfg(feature = "trainer")]
mod editing;
#[cfg(feature = "trainer")]
pub mod fuzz;
mod golden;
pub mod lora;
#[cfg(feature = "trainer")]
mod media;
mod ops;
mod optim;
mod pipeline_math;
#[cfg(feature = "trainer")]
mod pipelines;
#[cfg(feature = "trainer")]
mod prompts;
#[cfg(feature = "trainer")]
mod recipe;
pub mod sampling;
pub mod step;
pub mod suite;
mod text;
mod vae;
mod vision;

use std::path::PathBuf;

/// What became of one compared quantity, or of several under one name.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Which.
    pub case: String,
    /// What was compared, or why nothing was, or why it failed.
    pub detail: String,
    verdict: Verdict,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Verdict {
    /// The worst deviation, and the greatest allowed.
    Measured {
        worst: f64,
        bound: f64,
    },
    Skipped,
    NotBuilt,
}

impl Outcome {
    /// A comparison: it holds if its worst deviation is no more than `bound`.
    pub fn measured(case: impl Into<String>, worst: f64, bound: f64, detail: impl Into<String>) -> Self {
        Self { case: case.into(), detail: detail.into(), verdict: Verdict::Measured { worst, bound } }
    }

    /// What can't be compared, and why: neither passed nor failed.
    pub fn skipped(case: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { case: case.into(), detail: reason.into(), verdict: Verdict::Skipped }
    }

    /// A case whose subject is not built yet.
    pub fn not_built(case: impl Into<String>) -> Self {
        Self { case: case.into(), detail: String::new(), verdict: Verdict::NotBuilt }
    }

    /// Whether something was compared, and holds.
    pub fn passed(&self) -> bool {
        matches!(self.verdict, Verdict::Measured { worst, bound } if worst <= bound)
    }

    /// Whether something was compared, and does not hold.
    pub fn failed(&self) -> bool {
        matches!(self.verdict, Verdict::Measured { .. }) && !self.passed()
    }

    /// Whether it was left out for a reason.
    pub fn is_skipped(&self) -> bool {
        self.verdict == Verdict::Skipped
    }

    /// Whether its subject is not built yet.
    pub fn is_not_built(&self) -> bool {
        self.verdict == Verdict::NotBuilt
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { case, detail, verdict } = self;
        let line = match verdict {
            Verdict::Skipped => format!("skipped   {case:<64} {detail}"),
            Verdict::NotBuilt => format!("not built {case}"),
            Verdict::Measured { worst, bound } => {
                let verdict = if self.passed() { "ok" } else { "FAILED" };
                format!("{verdict:<9} {case:<64} worst {worst:.1e}  bound {bound:.1e}  {detail}")
            }
        };
        f.write_str(line.trim_end())
    }
}

/// The folder of the recipes: `FLOWTAPE_RECIPES`, or the project's own.
pub fn recipes() -> PathBuf {
    std::env::var_os("FLOWTAPE_RECIPES")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../recipes"), PathBuf::from)
}

/// The folder of the goldens: `FLOWTAPE_GOLDENS`, or the project's own.
pub fn goldens() -> PathBuf {
    std::env::var_os("FLOWTAPE_GOLDENS")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("goldens"), PathBuf::from)
}
