//! What watches a run, and changes nothing of it.

mod environment;
mod learning;
#[cfg(feature = "charts")]
mod loss_curve;
mod metrics;
mod notices;
mod page;
mod tensorboard;
mod validation;

pub use environment::Environment;
pub use learning::Learning;
#[cfg(feature = "charts")]
pub use loss_curve::LossCurve;
pub use metrics::Metrics;
pub use notices::Notices;
pub use page::Page;
pub use tensorboard::TensorBoard;
pub use validation::Validations;
