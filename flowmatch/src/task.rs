//! What a batch holds and what the model is asked to do with it.

use std::fmt;

use crate::{Draws, Result};

/// What the latents of a batch are.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum DataType {
    /// `[B, C, H, W]`.
    Image,
    /// `[B, C, F, H, W]`. What a batch is when it does not say.
    #[default]
    Video,
    /// Anything else that an adapter may know.
    Other(String),
}

impl DataType {
    /// The name in batches and metrics: `image`, `video`, or the other's own.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Image => "image",
            Self::Video => "video",
            Self::Other(name) => name,
        }
    }
}

impl From<&str> for DataType {
    fn from(name: &str) -> Self {
        match name {
            "image" => Self::Image,
            "video" => Self::Video,
            other => Self::Other(other.to_owned()),
        }
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a model generates from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TaskType {
    /// From text alone (images too).
    #[default]
    T2V,
    /// From text and a first frame.
    I2V,
}

impl TaskType {
    /// The name in metrics: `t2v` or `i2v`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::T2V => "t2v",
            Self::I2V => "i2v",
        }
    }
}

impl fmt::Display for TaskType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The task of a whole batch: for videos, i2v when one draw lies below `i2v_prob`. Nothing is drawn for other data.
///
/// # Errors
/// When the draws run out.
pub fn determine_task_type(data_type: &DataType, i2v_prob: f64, draws: &mut dyn Draws) -> Result<TaskType> {
    Ok(match data_type {
        DataType::Video if draws.decision()? < i2v_prob => TaskType::I2V,
        _ => TaskType::T2V,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Recorded, RecordedDraws};

    #[test]
    fn videos_draw_once_and_images_never() {
        let decide = |data: &DataType, prob: f64| {
            let mut draws = RecordedDraws::new([Recorded::Decision(0.3)]);
            let task = determine_task_type(data, prob, &mut draws).unwrap();
            (task, draws.remaining())
        };
        assert_eq!(decide(&DataType::Video, 0.31), (TaskType::I2V, 0));
        assert_eq!(decide(&DataType::Video, 0.3), (TaskType::T2V, 0));
        for other in [DataType::Image, DataType::from("audio")] {
            assert_eq!(decide(&other, 1.0), (TaskType::T2V, 1));
        }
    }
}
