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
    /// A prompt with words that the table does not hold.
    #[error("prompt {prompt:?}: unknown word {word:?}; known: {known}")]
    Prompt {
        /// The whole prompt.
        prompt: String,
        /// The first unknown word.
        word: String,
        /// All known ones.
        known: String,
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
    /// The pipeline or a model failed.
    #[error(transparent)]
    Pipeline(#[from] flowtape_flowmatch::Error),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] flowtape_engine::Error),
}

/// The trainer's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Names the file of an input or output error.
pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { path, source }
}
