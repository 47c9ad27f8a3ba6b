//! What watches a run, and changes nothing of it.

mod loss_curve;
mod metrics;

pub use loss_curve::LossCurve;
pub use metrics::Metrics;
