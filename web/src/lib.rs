//! The digits, trained where WebAssembly runs: what the page's worker calls (`assets/worker.js`).
//!
//! It is the trainer itself, on the recipe of `flowtape train digits`, on the CPU or on the browser's GPU (`gpu.rs`). On the CPU it has one
//! thread, or those of several workers that share the memory of a module that is built for it. Everything stays in the page.

#[cfg(all(target_arch = "wasm32", not(target_feature = "atomics")))]
mod gpu;

use std::sync::atomic::AtomicBool;

use flowtape_engine::Device;
use flowtape_engine::cpu::awake;
use flowtape_engine::platform::{lend_thread, share_lent_threads};
use flowtape_trainer::builtin::digits::CAPTIONS;
use flowtape_trainer::generate::Request;
use flowtape_trainer::recipe::SamplingConfig;
use flowtape_trainer::{Recipe, Trainer};
use wasm_bindgen::prelude::wasm_bindgen;

/// Lends the calling worker to the one that trains, and does not return.
#[wasm_bindgen]
pub fn lend() {
    lend_thread();
}

/// Trains on `threads` threads from now on: the calling one and workers that are lent, for which it waits.
///
/// # Errors
/// When it was called before.
#[wasm_bindgen]
pub fn share(threads: usize) -> Result<(), String> {
    share_lent_threads(threads.saturating_sub(1)).map_err(text)
}

/// The recipe. A page has no threads that read ahead.
const RECIPE: &str = include_str!("../../recipes/digits.yaml");
const SETTINGS: [&str; 1] = ["data.num_workers=0"];

/// A step's numbers.
#[wasm_bindgen]
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Step {
    /// Optimiser steps done.
    pub step: f64,
    /// The loss.
    pub loss: f64,
    /// The learning rate.
    pub lr: f64,
    /// Seconds that it took.
    pub seconds: f64,
}

/// A model that learns to write digits.
#[wasm_bindgen]
pub struct Digits {
    trainer: Trainer,
}

/// Errors go to the page as their text.
fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[wasm_bindgen]
impl Digits {
    /// A new model; `settings` override keys of the recipe, such as `seed=2`.
    ///
    /// # Errors
    /// When a setting does not fit.
    #[wasm_bindgen(constructor)]
    pub fn new(settings: Vec<String>) -> Result<Self, String> {
        Self::on(&Device::cpu(), settings)
    }

    /// Steps that the recipe has.
    #[wasm_bindgen(getter)]
    pub fn steps(&self) -> f64 {
        self.trainer.recipe().step_scheduler.max_steps as f64
    }

    /// Numbers that are trained.
    #[wasm_bindgen(getter)]
    pub fn parameters(&self) -> f64 {
        self.trainer.model().params().numel() as f64
    }

    /// One step.
    ///
    /// # Errors
    /// When the loss is no number any more.
    pub fn step(&mut self) -> Result<Step, String> {
        let record = awake(&Device::cpu(), || self.trainer.step()).map_err(text)?;
        Ok(Step { step: record.step as f64, loss: record.loss, lr: record.lr, seconds: record.step_time })
    }

    /// `rows` pictures of each digit, from 0 to 9, row after row: 8 x 8 numbers each, from -1 (black) to 1 (white). The same seed gives the
    /// same noise to begin with.
    ///
    /// # Errors
    /// When a number is outside its range.
    pub fn samples(
        &mut self,
        rows: usize,
        guidance: f64,
        inference_steps: usize,
        seed: u32,
    ) -> Result<Vec<f32>, String> {
        let sampling = SamplingConfig {
            num_inference_steps: Some(inference_steps),
            guidance_scale: Some(guidance),
            ..self.trainer.recipe().sampling.clone()
        };
        self.trainer.set_sampling(sampling).map_err(text)?;
        let prompts: Vec<&str> = CAPTIONS.iter().copied().cycle().take(rows * CAPTIONS.len()).collect();
        let request = Request { prompts: &prompts, first_frames: None, seed: seed.into() };
        let samples = awake(&Device::cpu(), || self.trainer.generate(&request, &AtomicBool::new(false))).map_err(text)?;
        Ok(samples.map(|samples| samples.pixels).unwrap_or_default())
    }

    /// The weights as a safetensors file, which diffusers and `flowtape sample` open beside the model's `config.json`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn weights(&self) -> Result<Vec<u8>, String> {
        self.trainer.weights_to_bytes().map_err(text)
    }

    /// Goes on with weights of this model.
    ///
    /// # Errors
    /// When the bytes are no safetensors file, or that of another model.
    pub fn load_weights(&mut self, bytes: Vec<u8>) -> Result<(), String> {
        self.trainer.load_weights_from_bytes(bytes).map_err(text)
    }

    /// All that training goes on from, here or on another device.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn checkpoint(&self) -> Result<Vec<u8>, String> {
        self.trainer.to_bytes().map_err(text)
    }

    /// Goes on from a checkpoint of this model.
    ///
    /// # Errors
    /// When the bytes are none, or that of another model.
    pub fn restore(&mut self, checkpoint: Vec<u8>) -> Result<(), String> {
        self.trainer.load_from_bytes(checkpoint).map_err(text)
    }
}

impl Digits {
    fn on(device: &Device, settings: Vec<String>) -> Result<Self, String> {
        let settings: Vec<String> = SETTINGS.map(String::from).into_iter().chain(settings).collect();
        let recipe = Recipe::from_yaml("digits.yaml".as_ref(), RECIPE.as_bytes(), &settings).map_err(text)?;
        Ok(Self { trainer: Trainer::on(device, &recipe).map_err(text)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_trains_samples_and_keeps_its_weights() {
        let settings = ["model.num_layers=1", "model.num_single_layers=0", "step_scheduler.local_batch_size=8"];
        let new = || Digits::new(settings.map(String::from).to_vec()).unwrap();
        let mut digits = new();
        assert_eq!(digits.step().unwrap().step, 1.0);
        assert!(digits.steps() == 1000.0 && digits.parameters() > 1e4);
        let samples = digits.samples(2, 2.0, 2, 1).unwrap();
        assert_eq!(samples.len(), 20 * 64);
        let mut other = new();
        assert_ne!(other.samples(2, 2.0, 2, 1).unwrap(), samples);
        other.load_weights(digits.weights().unwrap()).unwrap();
        assert_eq!(other.samples(2, 2.0, 2, 1).unwrap(), samples);
        other.restore(digits.checkpoint().unwrap()).unwrap();
        assert_eq!(other.step().unwrap().loss, digits.step().unwrap().loss);
        assert!(other.load_weights(vec![0; 3]).unwrap_err().contains("not a whole safetensors file"));
        assert!(other.samples(1, -1.0, 2, 1).unwrap_err().contains("guidance_scale"));
        assert!(Digits::new(vec!["sed=2".into()]).err().unwrap().contains("seed"));
    }
}
