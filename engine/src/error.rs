//! The one error type of the engine.

use std::borrow::Cow;
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
    /// A device that is not there, or that nothing can run on.
    #[error("can't use {device}: {reason}")]
    Unavailable {
        /// What `--device` calls it.
        device: String,
        /// What is in the way, and what to do.
        reason: String,
    },
    /// Tensors on different devices.
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
    /// A rank of a run with several gave up, or all do not agree on what to do.
    #[error("rank {rank}: {what}; all ranks stop, and go on from the last checkpoint")]
    Rank {
        /// Which, from 0.
        rank: usize,
        /// Why.
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
    #[error("no gradient for {}; freeze them or name them as allowed", counted("trainable parameters", names))]
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
    /// A pattern of modules that matches nothing, or less than it seems to mean.
    #[error("{key}: expected patterns of linear layers, got {got}")]
    Modules {
        /// The recipe's key.
        key: &'static str,
        /// The pattern, what it matches, and what is near.
        got: String,
    },
    /// A checkpoint whose keys do not fit the model.
    #[error(
        "{path}: keys do not fit the model ({}, {}, {}){}",
        counted("missing", missing),
        counted("unexpected", unexpected),
        counted("of another shape", mismatched),
        prefix_advice(missing, unexpected)
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
        /// The system's reason. It is part of the text above, so it is no `source()`, which reports print once more; the raw
        /// identifier says so to thiserror.
        r#source: std::io::Error,
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

/// Names that people are shown at most; a checkpoint may have thousands.
const SHOWN: usize = 5;

/// A text without control characters, which could reach a terminal: they are escaped.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return text.into();
    }
    let escaped = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escaped).collect::<String>().into()
}

/// How many names there are, and the first of them.
fn counted(what: &str, names: &[String]) -> String {
    let shown: Vec<_> = names.iter().take(SHOWN).map(|name| printable(name)).collect();
    let rest = if names.len() > SHOWN { ", …" } else { "" };
    format!("{} {what}: [{}{rest}]", names.len(), shown.join(", "))
}

/// What to do where a file's names are the model's behind a common prefix.
fn prefix_advice(missing: &[String], unexpected: &[String]) -> String {
    let Some((first, others)) = unexpected.split_first().filter(|(_, others)| !others.is_empty()) else {
        return String::new();
    };
    let common = others
        .iter()
        .fold(first.len(), |n, name| n.min(first.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count()));
    let ends = first.as_bytes()[..common].iter().enumerate().filter(|(_, byte)| **byte == b'.').map(|(at, _)| at + 1);
    let is_prefix = |at: &usize| missing.iter().any(|name| *name == first[*at..]);
    match ends.into_iter().find(is_prefix) {
        Some(at) => format!("; the file's keys begin with `{}`: save them without that", printable(&first[..at])),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_of_keys_are_a_count_and_the_first_ones() {
        let names = |prefix: &str| (0..4000).map(|i| format!("{prefix}blocks.{i}.weight")).collect::<Vec<_>>();
        let keys = |missing, unexpected| {
            Error::Keys { path: "a.safetensors".into(), missing, unexpected, mismatched: Vec::new() }.to_string()
        };
        let other = keys(names(""), names("other."));
        assert!(other.contains("4000 missing: [blocks.0.weight, ") && other.contains("…]"), "{other}");
        assert!(other.ends_with("; the file's keys begin with `other.`: save them without that"), "{other}");
        assert!(other.len() < 600, "{other}");
        let foreign = keys(names("a."), names("b."));
        assert!(foreign.contains("4000 unexpected: [b.blocks.0") && !foreign.contains("begins with"), "{foreign}");
        let few = keys(vec!["a".into()], vec!["x\u{1b}[2Jy".into()]);
        assert!(few.contains("1 missing: [a], 1 unexpected: [x\\u{1b}[2Jy], 0 of another shape: []"), "{few}");
    }
}
