//! The error type of data.

/// What went wrong, with which sample, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A sample that can't be read.
    #[error("{sample} can't be read; mend it, or take it out of the data")]
    Sample {
        /// What the source calls it: a file, or a number.
        sample: String,
        /// The source's reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Samples that don't fit together, or not into what was asked for.
    #[error("{what}: expected {expected}, got {got}")]
    Batch {
        /// What does not fit.
        what: String,
        /// What would.
        expected: String,
        /// What came.
        got: String,
    },
    /// A caption that a text encoder does not take.
    #[error("caption {caption:?}: {what}")]
    Caption {
        /// The whole caption.
        caption: String,
        /// What is wrong and what would do.
        what: String,
    },
    /// A source that can't be opened.
    #[error("{name}: {what}")]
    Open {
        /// Which.
        name: String,
        /// What is wrong with it.
        what: String,
    },
    /// A thread could not be started.
    #[error("starting a thread that reads data; ask for fewer num_workers")]
    Thread(#[source] std::io::Error),
    /// A model or a pipeline's folder does not fit.
    #[error(transparent)]
    Model(#[from] flowtape_models::Error),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] flowtape_engine::Error),
}

impl Error {
    /// Something that does not fit.
    pub fn batch(what: impl Into<String>, expected: impl ToString, got: impl ToString) -> Self {
        Self::Batch { what: what.into(), expected: expected.to_string(), got: got.to_string() }
    }
}

/// The result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
