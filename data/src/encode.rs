//! What turns pixels and captions into what a model is trained on.

use std::collections::BTreeMap;

use flowtape_engine::{Device, Tensor};
use flowtape_flowmatch::Batch;

use crate::Result;

/// Pixels to latents and back: an autoencoder, or nothing at all.
pub trait LatentCodec: Send + Sync {
    /// Latents of pixels `[B, C, H, W]` or `[B, C, F, H, W]` from -1 to 1, on their device.
    ///
    /// # Errors
    /// When the sizes do not fit, or memory runs out.
    fn encode(&self, pixels: &Tensor) -> Result<Tensor>;

    /// Pixels of latents, about -1 to 1.
    ///
    /// # Errors
    /// When the sizes do not fit, or memory runs out.
    fn decode(&self, latents: &Tensor) -> Result<Tensor>;

    /// Sizes of the latents of pixels of these sizes, with or without the axis of samples.
    fn latent_dims(&self, pixels: &[usize]) -> Vec<usize>;
}

/// Latents that are the pixels.
#[derive(Clone, Copy, Debug, Default)]
pub struct PixelCodec;

impl LatentCodec for PixelCodec {
    fn encode(&self, pixels: &Tensor) -> Result<Tensor> {
        Ok(pixels.clone())
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(latents.clone())
    }

    fn latent_dims(&self, pixels: &[usize]) -> Vec<usize> {
        pixels.to_vec()
    }
}

/// What models see of captions: tensors by the names that adapters read, such as `text_embeddings` `[B, T, D]`,
/// `text_mask` `[B, T]` and `pooled_prompt_embeds` `[B, D]`.
#[derive(Clone, Debug, Default)]
pub struct TextEmbeddings {
    /// By name.
    pub tensors: BTreeMap<String, Tensor>,
}

impl TextEmbeddings {
    /// With one more tensor.
    #[must_use]
    pub fn with(mut self, name: &str, tensor: Tensor) -> Self {
        self.tensors.insert(name.to_owned(), tensor);
        self
    }

    /// The batch with these tensors.
    pub fn into_batch(self, mut batch: Batch) -> Batch {
        batch.tensors.extend(self.tensors);
        batch
    }
}

/// Captions to embeddings.
pub trait TextEncoder: Send + Sync {
    /// Embeddings of one caption per sample, on `device`; `None` is a dropped caption, for classifier-free guidance.
    ///
    /// # Errors
    /// When it does not take a caption: the error says what it takes.
    fn encode(&self, captions: &[Option<&str>], device: &Device) -> Result<TextEmbeddings>;
}
