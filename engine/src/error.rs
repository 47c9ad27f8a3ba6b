//! The one error type of the engine.

use std::path::PathBuf;

/// What went wrong, in which operation, what was expected and what came.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Shapes that do not fit an operation.
    #[error("{op}: expected shape {expected}, got {got}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// What it takes.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// A dtype that an operation does not take.
    #[error("{op}: expected dtype {expected}, got {got}")]
    DType {
        /// The operation.
        op: &'static str,
        /// What it takes.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// Tensors on different devices, or a device that is not there.
    #[error("{op}: expected device {expected}, got {got}")]
    Device {
        /// The operation.
        op: &'static str,
        /// What it takes.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// An operation would write what it still reads, or write one place several times.
    #[error("{op}: {what}; make a copy of one first")]
    Overlap {
        /// The operation.
        op: &'static str,
        /// Which operands.
        what: String,
    },
    /// A device has no memory left for a tensor.
    #[error(
        "{device}: out of memory for a tensor of {bytes} bytes ({reason}); make the batch or the pictures smaller, checkpoint blocks or train in \
         bf16"
    )]
    OutOfMemory {
        /// The device.
        device: String,
        /// What was asked for.
        bytes: usize,
        /// What the device says.
        reason: String,
    },
    /// A device stopped working: what it computed since may be wrong.
    #[error("{device}: {what}; go on from the last checkpoint")]
    DeviceFailed {
        /// The device.
        device: String,
        /// What it says.
        what: String,
    },
    /// Any other value outside its range.
    #[error("{op}: expected {expected}, got {got}")]
    Argument {
        /// The operation.
        op: &'static str,
        /// What it takes.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// A NaN or an infinity where a finite number is needed.
    #[error("{op}: {what} is not finite; lower the learning rate or look at the data")]
    NonFinite {
        /// The operation.
        op: &'static str,
        /// Which value.
        what: String,
    },
    /// An operation without a gradient was used in a recording.
    #[error("{op} has no gradient: detach its inputs or leave it out of the recording")]
    NoBackward {
        /// The operation.
        op: &'static str,
    },
    /// Something made from a parameter without a tape meets a tape: the parameter's gradient would be lost.
    #[error(
        "{op}: an input was made from a parameter and a tensor that was on no tape, so no gradient would reach the parameter; put that \
         tensor on the tape first (`Tape::attach`), or detach the input if it is a constant"
    )]
    Unrecorded {
        /// The operation.
        op: &'static str,
    },
    /// Trainable parameters that the loss does not reach.
    #[error(
        "no gradient for trainable parameters: {}; freeze them or name them as allowed",
        names.join(", ")
    )]
    MissingGradient {
        /// Their path names.
        names: Vec<String>,
    },
    /// A saved tensor was written over before backward read it.
    #[error("{op}: a tensor saved for backward was overwritten since")]
    Overwritten {
        /// The operation that saved it.
        op: &'static str,
    },
    /// A checkpoint whose keys do not fit the model.
    #[error(
        "{path}: keys do not fit the model (missing: [{}]; unexpected: [{}]; wrong shape: [{}])",
        missing.join(", "), unexpected.join(", "), mismatched.join(", ")
    )]
    Keys {
        /// The file.
        path: PathBuf,
        /// In the model but not in the file.
        missing: Vec<String>,
        /// In the file but not in the model.
        unexpected: Vec<String>,
        /// In both, with other shapes.
        mismatched: Vec<String>,
    },
    /// Reading or writing a file failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file that is not what it should be.
    #[error("{path}: {what}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

/// The engine's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A shape error from anything that prints.
    pub fn shape(op: &'static str, expected: impl ToString, got: impl std::fmt::Debug) -> Self {
        Self::Shape { op, expected: expected.to_string(), got: format!("{got:?}") }
    }

    /// An argument error from anything that prints.
    pub fn argument(op: &'static str, expected: impl ToString, got: impl std::fmt::Debug) -> Self {
        Self::Argument { op, expected: expected.to_string(), got: format!("{got:?}") }
    }
}
