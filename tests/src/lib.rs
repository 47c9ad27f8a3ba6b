//! The goldens' cases, driven by their files, and what the integration tests share.

pub mod adapters;
pub mod devices;
mod golden;
pub mod ops;
pub mod optim;
pub mod pipeline_math;
pub mod sampling;
pub mod step;

use std::path::PathBuf;

/// One compared quantity, or several under one name.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Which.
    pub case: String,
    /// The worst deviation.
    pub worst: f64,
    /// The greatest allowed.
    pub bound: f64,
    /// What was compared, or why it failed.
    pub detail: String,
}

impl Outcome {
    /// What can't be compared, and why: listed, and neither passed nor failed.
    pub fn skipped(case: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { case: case.into(), worst: f64::NAN, bound: f64::NAN, detail: reason.into() }
    }

    /// A subject that is not built yet.
    pub fn unbuilt(case: impl Into<String>) -> Self {
        Self::skipped(case, "not built yet")
    }

    /// Whether nothing was compared.
    pub fn is_skipped(&self) -> bool {
        self.bound.is_nan()
    }

    /// Whether it holds.
    pub fn passed(&self) -> bool {
        self.worst <= self.bound
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { case, worst, bound, detail } = self;
        if self.is_skipped() {
            return write!(f, "skipped {case:<64} {detail}");
        }
        let verdict = if self.passed() { "ok     " } else { "FAILED " };
        write!(f, "{verdict} {case:<64} worst {worst:.1e}  bound {bound:.1e}  {detail}")
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
