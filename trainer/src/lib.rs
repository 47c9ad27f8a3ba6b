//! Flowtape's trainer: from a recipe to a run folder.
//!
//! | module | what it holds |
//! |---|---|
//! | [`recipe`] | [`Recipe`]: what a YAML file says, with overrides and helpful errors |
//! | [`digits`], [`moving`] | the embedded handwritten digits and their captions; videos of them |
//! | [`data`] | [`data::Data`]: what a run trains on, batch by batch |
//! | [`text`] | [`text::TokenTable`]: captions to embeddings, without a text encoder |
//! | [`train`] | the loop: [`train::train`], and [`train::resume`] |
//! | [`generate`] | images and videos from prompts |
//! | [`report`] | how good generated digits are, by their real neighbours |
//! | [`run`] | the run folder: metrics, checkpoints that survive an interruption |
//! | [`mod@bench`] | `flowtape bench`: what steps and kernels take |
//! | [`inspect`] | what a preset, a configuration, weights or a run are made of |
//! | [`picture`] | sample grids (PNG) and the loss curve (SVG) |

pub mod bench;
pub mod data;
pub mod digits;
mod error;
pub mod generate;
pub mod inspect;
pub mod moving;
pub mod picture;
pub mod recipe;
pub mod report;
pub mod run;
pub mod text;
pub mod train;

pub use error::{Error, Result};
pub use recipe::Recipe;
