//! One batch of training data.

use std::collections::BTreeMap;

use flowtape_engine::Tensor;

use crate::{DataType, Error, Result};

/// Clean latents, what they are, and whatever else the model's adapter reads.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Clean latents, float: `[B, C, H, W]` for images, `[B, C, F, H, W]` for videos.
    pub latents: Tensor,
    /// What the latents are.
    pub data_type: DataType,
    /// By name: `text_embeddings` `[B, T, D]`, `pooled_prompt_embeds` `[B, D]`, `text_mask` `[B, T]`, `loss_mask`, …
    pub tensors: BTreeMap<String, Tensor>,
    /// Ordered lists of tensors by name, such as `context_latents` of image editing.
    pub lists: BTreeMap<String, Vec<Tensor>>,
}

impl Batch {
    /// A batch of `latents` with nothing else in it yet.
    pub fn new(latents: Tensor, data_type: DataType) -> Self {
        Self { latents, data_type, tensors: BTreeMap::new(), lists: BTreeMap::new() }
    }

    /// From a map as a data loader gives it: `video_latents`, or else `image_latents`, become the latents.
    /// Without `data_type` the batch is a video, as in the reference.
    ///
    /// # Errors
    /// When neither key is there.
    pub fn from_tensors(mut tensors: BTreeMap<String, Tensor>, data_type: Option<DataType>) -> Result<Self> {
        let latents = tensors.remove("video_latents").or_else(|| tensors.get("image_latents").cloned());
        let Some(latents) = latents else {
            let keys: Vec<&str> = tensors.keys().map(String::as_str).collect();
            return Err(Error::batch(
                "either 'video_latents' or 'image_latents'",
                format!("the keys [{}]", keys.join(", ")),
            ));
        };
        tensors.remove("image_latents");
        Ok(Self { latents, data_type: data_type.unwrap_or_default(), tensors, lists: BTreeMap::new() })
    }

    /// The batch with one more tensor.
    #[must_use]
    pub fn with(mut self, name: &str, tensor: Tensor) -> Self {
        self.tensors.insert(name.to_owned(), tensor);
        self
    }

    /// The batch with one more list of tensors.
    #[must_use]
    pub fn with_list(mut self, name: &str, tensors: Vec<Tensor>) -> Self {
        self.lists.insert(name.to_owned(), tensors);
        self
    }

    /// Number of samples.
    ///
    /// # Errors
    /// When the latents have no axis.
    pub fn size(&self) -> Result<usize> {
        Ok(self.latents.dim(0)?)
    }

    /// A tensor that may be missing.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// A tensor that must be there.
    ///
    /// # Errors
    /// When it is not: the error names it and lists what is there.
    pub fn require(&self, name: &str) -> Result<&Tensor> {
        self.get(name).ok_or_else(|| {
            let keys: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
            Error::batch(format!("'{name}'"), format!("the keys [{}]", keys.join(", ")))
        })
    }

    /// A list of tensors; empty when it is missing.
    pub fn list(&self, name: &str) -> &[Tensor] {
        self.lists.get(name).map_or(&[], Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::{DType, Device};

    use super::*;

    #[test]
    fn video_latents_win_and_one_of_both_is_needed() {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::cpu()).unwrap();
        let image = ("image_latents".to_owned(), zeros(&[1, 2, 3, 3]));
        let video = ("video_latents".to_owned(), zeros(&[1, 2, 4, 3, 3]));
        let text = ("text_embeddings".to_owned(), zeros(&[1, 5, 6]));
        let both = Batch::from_tensors(BTreeMap::from([image.clone(), video, text.clone()]), None).unwrap();
        assert_eq!((both.latents.rank(), both.data_type.as_str(), both.tensors.len()), (5, "video", 1));
        let one = Batch::from_tensors(BTreeMap::from([image, text.clone()]), Some(DataType::Image)).unwrap();
        assert_eq!((one.latents.rank(), one.size().unwrap()), (4, 1));
        let error = Batch::from_tensors(BTreeMap::from([text]), None).unwrap_err().to_string();
        let named = ["video_latents", "image_latents", "text_embeddings"].iter().all(|k| error.contains(k));
        assert!(named, "{error}");
        let error = one.require("audio_latents").unwrap_err().to_string();
        assert!(error.contains("audio_latents") && error.contains("text_embeddings"), "{error}");
    }
}
