//! The error type of the trainer.

use std::path::PathBuf;

/// What went wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A recipe that can't be used.
    #[error("{path}: {what}")]
    Recipe {
        /// The file, or the run's copy of it.
        path: PathBuf,
        /// What is wrong, with line and column where they are known.
        what: String,
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
        /// The system's reason.
        source: std::io::Error,
    },
    /// A picture could not be made.
    #[error("{path}: {what}")]
    Picture {
        /// The file.
        path: PathBuf,
        /// The encoder's reason.
        what: String,
    },
    /// A sample can't be read, or data does not fit.
    #[error(transparent)]
    Data(flowtape_data::Error),
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

/// Names the file of an input or output error.
pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { path, source }
}
