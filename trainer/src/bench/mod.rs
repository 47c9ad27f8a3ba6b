//! Benchmarks on the machine at hand: `flowtape bench`.

mod step;
mod work;

pub use step::{Measurement, Options, Precision, step};
pub use work::{Batch, Work};
