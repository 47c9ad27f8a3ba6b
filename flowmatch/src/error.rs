//! The error type of the pipeline.

/// What went wrong: always what was expected, and what came.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation of the engine failed.
    #[error(transparent)]
    Engine(#[from] flowtape_engine::Error),
    /// A value of the configuration.
    #[error("{key}: expected {expected}, got {got}")]
    Config {
        /// The key, as in a recipe.
        key: &'static str,
        /// What it takes.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// A section with keys or values that do not fit: everything that is wrong with it.
    #[error("{key}: {}", problems.join("; "))]
    Section {
        /// The section, as in a recipe.
        key: &'static str,
        /// A sentence each, which begins with the key.
        problems: Vec<String>,
    },
    /// A batch that a step cannot use.
    #[error("batch: expected {expected}, got {got}")]
    Batch {
        /// What must be in it.
        expected: String,
        /// What was in it.
        got: String,
    },
    /// Something that an adapter cannot handle.
    #[error("{adapter} adapter: expected {expected}, got {got}")]
    Adapter {
        /// The adapter's name.
        adapter: String,
        /// What it takes.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// An entry of [`crate::ModelInputs`] that a model needs and does not find.
    #[error("model input `{name}`: expected {expected}, got {got}")]
    Input {
        /// The entry.
        name: String,
        /// What the model takes.
        expected: &'static str,
        /// What is there.
        got: String,
    },
    /// Recorded draws that do not fit what was asked for.
    #[error("recorded draws: expected {expected}, got {got}")]
    Draws {
        /// What the step asked for.
        expected: String,
        /// What the record holds next.
        got: String,
    },
    /// The loss is NaN or above 100.
    #[error("Loss exploded: {loss} at step {step}; lower the learning rate or look at the data")]
    LossExploded {
        /// The loss.
        loss: f64,
        /// The global step.
        step: u64,
    },
    /// An error of a model or adapter from another crate.
    #[error("{model}: {source}")]
    Model {
        /// Which model.
        model: String,
        /// Its error; part of the text above, so no `source()` of its own.
        r#source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The pipeline's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A configuration error from anything that prints.
    pub fn config(key: &'static str, expected: impl ToString, got: impl std::fmt::Debug) -> Self {
        Self::Config { key, expected: expected.to_string(), got: format!("{got:?}") }
    }

    /// A batch error from anything that prints.
    pub fn batch(expected: impl ToString, got: impl ToString) -> Self {
        Self::Batch { expected: expected.to_string(), got: got.to_string() }
    }

    /// An adapter's error from anything that prints.
    pub fn adapter(adapter: impl ToString, expected: impl ToString, got: impl ToString) -> Self {
        Self::Adapter { adapter: adapter.to_string(), expected: expected.to_string(), got: got.to_string() }
    }
}
