//! Flowtape's engine: tensors, a tape, ops with their gradients, and the CPU backend.
//!
//! ```
//! use flowtape_engine::{Device, Tape, Tensor};
//! # fn main() -> flowtape_engine::Result<()> {
//! let tape = Tape::new();
//! let x = tape.leaf(&Tensor::from_vec(vec![1.0f32, 2.0, 3.0], &[3], &Device::cpu())?);
//! let loss = x.square()?.sum_all()?;
//! assert_eq!(tape.backward(&loss)?.of(&x).unwrap().to_vec::<f32>()?, [2.0, 4.0, 6.0]);
//! # Ok(())
//! # }
//! ```

pub mod backend;
mod checkpoint;
pub mod comm;
pub mod cpu;
mod dtype;
mod error;
pub mod expr;
pub mod files;
mod float8;
pub mod gradcheck;
pub mod hash;
pub mod meta;
pub mod nn;
pub mod non_finite;
pub mod ops;
pub mod optim;
mod places;
pub mod platform;
pub mod pool;
pub mod profile;
pub mod quant;
pub mod random;
pub mod safetensors;
mod saved;
pub mod shape;
pub mod space;
pub mod tape;
mod tensor;

pub use backend::Device;
pub use checkpoint::checkpoint;
pub use dtype::{DType, Element};
pub use error::{Error, Result, printable};
pub use random::Philox;
pub use tape::{GradientSink, Gradients, Tape, VarId};
pub use tensor::{Later, Tensor};
