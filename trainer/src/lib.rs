//! Flowtape's trainer: from a recipe to a run folder.
//!
//! | module | what it holds |
//! |---|---|
//! | [`recipe`] | [`Recipe`]: what a YAML file says, with overrides and helpful errors |
//! | [`data`] | [`data::Data`]: samples and what encodes them |
//! | [`trainer`] | [`Trainer`]: one optimiser step after the other |
//! | [`state`] | [`state::TrainState`]: what a checkpoint holds beside the weights |
//! | [`train`] | a whole run: [`train::train`], [`train::resume`], and the [`train::Session`] that hooks see |
//! | [`hooks`] | [`hooks::Event`] and [`hooks::Hook`]; checkpoints and sample grids |
//! | [`observe`] | hooks that only watch: metrics, the loss curve, whether anything is learned |
//! | [`page`] | what a run came to as a page for a browser |
//! | [`builtin`] | the embedded digits, still and moving, their captions, and how good generated ones are |
//! | [`validation`] | losses on held-out samples, with noise that stays |
//! | `memory` | weights and whole checkpoints in memory: [`Trainer::to_bytes`] and its kin |
//! | [`generate`], [`trained`] | images and videos from prompts, while training and after |
//! | [`compose`] | pictures and films of a diffusers pipeline, with what made them |
//! | [`generation`] | NeMo's YAML of generating with a pipeline |
//! | [`run`] | the run folder: one process's at a time, all files whole or absent |
//! | [`runs`] | the runs of a folder, and what became of each |
//! | [`checkpoints`] | a run's checkpoints: hashed, found again whole after a crash |
//! | [`replay`] | steps that were not finite, kept to be run again |
//! | [`changes`] | what is other when a run goes on |
//! | [`peft`] | adapters beside frozen layers |
//! | [`weights`] | checkpoints and adapters merged, converted, extracted |
//! | [`check`], [`plan`] | what a recipe would take, before anything is made: memory by phase, FLOPs, disk space |
//! | [`start`] | what a model starts from: a checkpoint wherever it lies, or a configuration |
//! | [`inspect`] | what a preset, a configuration, weights or a run are made of |
//! | [`picture`] | sample grids (PNG) |
//!
//! A program takes what it needs of it by feature; without any it computes on the CPU:
//!
//! | feature | what it adds |
//! |---|---|
//! | `wgpu`, `cuda` | the backends of `flowtape-gpu`, where a recipe's `device` asks for one |
//! | `charts` | the loss curve of a run folder as `loss.svg` |
//! | `pictures` | data of pictures and captions as they are, and sampling with a pipeline; without it, caches of them |
//!
//! A program that trains on NVIDIA GPUs depends on `flowtape-gpu` with the feature `cuda` beside this crate, and puts
//! `find_cuda_helper = { path = ".../gpu/find_cuda_helper" }` under its `[patch.crates-io]`; the driver is looked for when it runs.

pub mod builtin;
pub mod changes;
pub mod check;
pub mod checkpoints;
pub mod compose;
pub mod data;
mod error;
mod forward;
pub mod generate;
pub mod generation;
mod gradients;
pub mod hooks;
pub mod inspect;
pub mod launch;
mod memory;
pub mod observe;
pub mod page;
pub mod peft;
pub mod picture;
pub mod plan;
mod platform;
mod precision;
mod ranks;
pub mod recipe;
mod record;
pub mod replay;
pub mod run;
pub mod runs;
pub mod start;
pub mod state;
mod swap;
mod timing;
pub mod train;
pub mod trained;
pub mod trainer;
pub mod validation;
pub mod weights;

pub use error::{Error, Result};
pub use recipe::Recipe;
pub use record::{BySigma, LeftOut, Memory, StepRecord};
pub use timing::StepTimes;
pub use trained::Trained;
pub use trainer::Trainer;
