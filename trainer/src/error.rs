//! The error type of the trainer.

use std::path::{Path, PathBuf};

use crate::recipe::Problem;

/// What went wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A recipe that can't be used.
    #[error("{}", lines(path, problems))]
    Recipe {
        /// The file, or the run's copy of it.
        path: PathBuf,
        /// Everything that is wrong with it.
        problems: Vec<Problem>,
    },
    /// A run folder that can't be used.
    #[error("{path}: {what}")]
    Run {
        /// The folder.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// Reading or writing a file failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason; part of the text above, so no `source()` of its own.
        r#source: std::io::Error,
    },
    /// A picture could not be made.
    #[error("{path}: {what}")]
    Picture {
        /// The file.
        path: PathBuf,
        /// The encoder's reason.
        what: String,
    },
    /// The ranks of a run can't find each other, or are not what their launcher says.
    #[error("{0}")]
    Launch(String),
    /// A sample can't be read, or data does not fit.
    #[error(transparent)]
    Data(flowtape_data::Error),
    /// A step whose loss or gradients are not finite.
    #[error("step {step}: {what}; {}{}", last_good(*checkpoint), after(found.as_deref()))]
    Diverged {
        /// The step, from 1.
        step: u64,
        /// The step of the last checkpoint.
        checkpoint: Option<u64>,
        /// What is not finite.
        what: Box<Error>,
        /// What was found when the step was run again, and how to run it once more.
        found: Option<String>,
    },
    /// The pipeline or a model failed.
    #[error(transparent)]
    Pipeline(#[from] flowtape_flowmatch::Error),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] flowtape_engine::Error),
}

/// A device that fails is the engine's error, whoever used it.
impl From<flowtape_data::Error> for Error {
    fn from(error: flowtape_data::Error) -> Self {
        match error {
            flowtape_data::Error::Engine(error) => Self::Engine(error),
            other => Self::Data(other),
        }
    }
}

/// The trainer's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A line for each problem.
fn lines(path: &Path, problems: &[Problem]) -> String {
    problems.iter().map(|problem| problem.line(&path.display())).collect::<Vec<_>>().join("\n")
}

fn last_good(checkpoint: Option<u64>) -> String {
    match checkpoint {
        Some(step) => format!("the last good checkpoint is that of step {step}"),
        None => "there is no checkpoint yet".into(),
    }
}

fn after(found: Option<&str>) -> String {
    found.map_or(String::new(), |found| format!("; {found}"))
}

impl Error {
    /// The same, with the step where something was not finite, and the step of the last checkpoint (0 for none).
    pub(crate) fn at(self, step: u64, checkpoint: u64) -> Self {
        use flowtape_engine::Error::NonFinite;
        use flowtape_flowmatch::Error::{Engine, LossExploded};
        match self {
            Self::Engine(NonFinite { .. }) | Self::Pipeline(Engine(NonFinite { .. }) | LossExploded { .. }) => {
                let checkpoint = Some(checkpoint).filter(|c| *c > 0);
                Self::Diverged { step, checkpoint, what: Box::new(self), found: None }
            }
            other => other,
        }
    }
}

/// An error's text, and those of all that it follows from.
pub(crate) fn with_reasons(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Names the file of an input or output error.
pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { path, source }
}
