//! Benchmarks on the machine at hand: `flowtape bench`.

mod clock;
mod ops;
mod scaling;
mod step;
mod work;

pub use ops::{OpMeasurement, OpsOptions, ops};
pub use scaling::{Point, memory, plot, scaling, table};
pub use step::{Measurement, Options, step};
pub use work::{Batch, Work};
