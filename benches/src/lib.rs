//! Benchmarks on the machine at hand: `flowtape bench`.
//!
//! | module | what it holds |
//! |---|---|
//! | [`work`] | [`Work`]: the training steps of `docs/BENCHMARKS.md` as recipes with random data |
//! | [`step`](mod@step) | a training step: [`Trainer::step`](flowtape_trainer::Trainer::step), measured from outside |
//! | [`ops`](mod@ops) | the operations one by one, against what the machine can do at best |
//! | [`data`](mod@data) | whether reading keeps up with the steps, and what a large index takes |
//! | [`encoders`](mod@encoders) | autoencoders of published shapes |
//! | [`scaling`](mod@scaling) | how a step's time and memory grow |

mod clock;
pub mod data;
pub mod encoders;
pub mod ops;
pub mod scaling;
pub mod step;
pub mod work;

pub use encoders::{EncoderMeasurement, EncoderOptions, encoders};
pub use ops::{OpMeasurement, OpsOptions, ops};
pub use scaling::{Point, memory, plot, scaling, table};
pub use step::{Measurement, Options, step};
pub use work::Work;

use flowtape_trainer::{Error, Result};
