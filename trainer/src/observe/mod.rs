//! What watches a run, and changes nothing of it.

mod learning;
mod loss_curve;
mod metrics;
mod validation;

pub use learning::Learning;
pub use loss_curve::LossCurve;
pub use metrics::Metrics;
pub use validation::Validations;
