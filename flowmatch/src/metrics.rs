//! The scalars of a step.

use std::collections::BTreeMap;

use flowtape_engine::Tensor;
use serde::Serialize;

use crate::Result;

/// One metric.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(untagged)]
pub enum Metric {
    /// A number.
    Number(f64),
    /// A name.
    Text(String),
}

/// Metrics by name. Empty when they were not collected.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Metrics(BTreeMap<String, Metric>);

impl Metrics {
    /// Sets a number.
    pub fn number(&mut self, name: &str, value: f64) {
        self.0.insert(name.to_owned(), Metric::Number(value));
    }

    /// Sets a name.
    pub fn text(&mut self, name: &str, value: impl ToString) {
        self.0.insert(name.to_owned(), Metric::Text(value.to_string()));
    }

    /// A metric.
    pub fn get(&self, name: &str) -> Option<&Metric> {
        self.0.get(name)
    }

    /// A number, where the metric is one.
    pub fn get_number(&self, name: &str) -> Option<f64> {
        match self.get(name) {
            Some(Metric::Number(value)) => Some(*value),
            _ => None,
        }
    }

    /// All metrics, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Metric)> {
        self.0.iter().map(|(name, metric)| (name.as_str(), metric))
    }

    /// Whether nothing was collected.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Least, greatest and mean of some values, and their standard deviation (with `n - 1`; 0 for one value).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Range {
    /// The least value.
    pub min: f64,
    /// The greatest.
    pub max: f64,
    /// The mean.
    pub mean: f64,
    /// The standard deviation.
    pub std: f64,
}

impl Range {
    /// Of values on the host.
    pub fn of(values: &[f32]) -> Self {
        let n = values.len() as f64;
        let wide = || values.iter().map(|v| f64::from(*v));
        let mean = wide().sum::<f64>() / n;
        let squares: f64 = wide().map(|v| (v - mean) * (v - mean)).sum();
        Self {
            min: wide().fold(f64::INFINITY, f64::min),
            max: wide().fold(f64::NEG_INFINITY, f64::max),
            mean,
            std: (squares / (n - 1.0).max(1.0)).sqrt(),
        }
    }

    /// Of a tensor's values. Waits for the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn of_tensor(tensor: &Tensor) -> Result<Self> {
        Ok(Self::of(&tensor.to_vec::<f32>()?))
    }
}
