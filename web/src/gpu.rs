//! The same on the browser's GPU, by WebGPU: the wgpu backend as it is, whose waits suspend WebAssembly (JSPI). So these calls give
//! promises, and none may be made before the last one has kept its own.
#![expect(deprecated, reason = "so wasm-bindgen marks JSPI, which may still change")]

use flowtape_engine::Device;
use wasm_bindgen::prelude::wasm_bindgen;

use crate::{Digits, Step, text};

/// The GPU that the browser gives. Kernels that were compiled for one model serve the next.
#[wasm_bindgen]
pub struct Gpu {
    device: Device,
}

/// [`Digits`] on a GPU.
#[wasm_bindgen]
pub struct GpuDigits {
    digits: Digits,
}

#[wasm_bindgen]
impl Gpu {
    /// Opens it.
    ///
    /// # Errors
    /// When there is none, or it can't be used.
    #[wasm_bindgen(jspi)]
    pub fn open() -> Result<Self, String> {
        Ok(Self { device: flowtape_gpu::device("wgpu").map_err(text)? })
    }
}

#[wasm_bindgen]
impl GpuDigits {
    /// [`Digits::new`] on a GPU.
    ///
    /// # Errors
    /// Those of [`Digits::new`], and when the GPU fails, as in all that follows.
    #[wasm_bindgen(jspi)]
    pub fn open(gpu: &Gpu, settings: Vec<String>) -> Result<Self, String> {
        Ok(Self { digits: Digits::on(&gpu.device, settings)? })
    }

    /// [`Digits::steps`].
    #[wasm_bindgen(getter)]
    pub fn steps(&self) -> f64 {
        self.digits.steps()
    }

    /// [`Digits::parameters`].
    #[wasm_bindgen(getter)]
    pub fn parameters(&self) -> f64 {
        self.digits.parameters()
    }

    /// [`Digits::step`].
    ///
    /// # Errors
    /// Those of [`Digits::step`].
    #[wasm_bindgen(jspi)]
    pub fn step(&mut self) -> Result<Step, String> {
        self.digits.step()
    }

    /// [`Digits::samples`].
    ///
    /// # Errors
    /// Those of [`Digits::samples`].
    #[wasm_bindgen(jspi)]
    pub fn samples(
        &mut self,
        rows: usize,
        guidance: f64,
        inference_steps: usize,
        seed: u32,
    ) -> Result<Vec<f32>, String> {
        self.digits.samples(rows, guidance, inference_steps, seed)
    }

    /// [`Digits::weights`].
    ///
    /// # Errors
    /// Those of [`Digits::weights`].
    #[wasm_bindgen(jspi)]
    pub fn weights(&self) -> Result<Vec<u8>, String> {
        self.digits.weights()
    }

    /// [`Digits::load_weights`].
    ///
    /// # Errors
    /// Those of [`Digits::load_weights`].
    #[wasm_bindgen(jspi)]
    pub fn load_weights(&mut self, bytes: Vec<u8>) -> Result<(), String> {
        self.digits.load_weights(bytes)
    }

    /// [`Digits::checkpoint`].
    ///
    /// # Errors
    /// Those of [`Digits::checkpoint`].
    #[wasm_bindgen(jspi)]
    pub fn checkpoint(&self) -> Result<Vec<u8>, String> {
        self.digits.checkpoint()
    }

    /// [`Digits::restore`].
    ///
    /// # Errors
    /// Those of [`Digits::restore`].
    #[wasm_bindgen(jspi)]
    pub fn restore(&mut self, checkpoint: Vec<u8>) -> Result<(), String> {
        self.digits.restore(checkpoint)
    }
}
