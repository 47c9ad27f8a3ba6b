//! Flowtape's trainer: from a recipe to a run folder.
//!
//! | module | what it holds |
//! |---|---|
//! | [`recipe`] | [`Recipe`]: what a YAML file says, with overrides and helpful errors |
//! | [`digits`] | the embedded handwritten digits and their captions |
//! | [`text`] | [`text::TokenTable`]: captions to embeddings, without a text encoder |
//! | [`train`] | the loop: [`train::train`], and [`train::resume`] |
//! | [`generate`] | images from prompts |
//! | [`report`] | how good generated digits are, by their real neighbours |
//! | [`run`] | the run folder: metrics, checkpoints that survive an interruption |
//! | [`bench`] | `flowtape bench`: what steps and kernels take |
//! | [`picture`] | sample grids (PNG) and the loss curve (SVG) |

pub mod bench;
pub mod digits;
mod error;
pub mod generate;
pub mod picture;
pub mod recipe;
pub mod report;
pub mod run;
pub mod text;
pub mod train;

pub use error::{Error, Result};
pub use recipe::Recipe;
