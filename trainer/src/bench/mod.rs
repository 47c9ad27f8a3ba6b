//! Benchmarks on the machine at hand: `flowtape bench`.

mod clock;
mod ops;
mod step;
mod work;

pub use ops::{OpMeasurement, OpsOptions, ops};
pub use step::{Measurement, Options, Precision, step};
pub use work::{Batch, Work};
