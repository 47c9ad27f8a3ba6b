//! Captions to embeddings, without a text encoder: each known word has a fixed random vector.

use std::collections::BTreeMap;

use flowtape_engine::{Device, Philox, Tensor};
use flowtape_flowmatch::Batch;

use crate::{Error, Result};

/// Any seed would do; it is part of what a model has learnt, so it never changes.
const SEED: u64 = 0x0074_6162_6c65;

/// A table of words.
#[derive(Clone, Debug)]
pub struct TokenTable {
    vectors: BTreeMap<String, Vec<f32>>,
    dim: usize,
}

impl TokenTable {
    /// Vectors of `dim` standard normal numbers for all words of `captions`.
    pub fn new<'a>(captions: impl IntoIterator<Item = &'a str>, dim: usize) -> Self {
        let mut vectors = BTreeMap::new();
        for word in captions.into_iter().flat_map(str::split_whitespace) {
            let stream = word.bytes().fold(0u64, |h, b| h.wrapping_mul(257).wrapping_add(b.into()));
            let mut vector = vec![0.0; dim];
            Philox::new(SEED).fork(stream).fill_normal(&mut vector);
            vectors.insert(word.to_owned(), vector);
        }
        Self { vectors, dim }
    }

    /// Adds the embeddings of one caption per sample, all of one number of words: `text_embeddings` `[B, T, dim]` and
    /// `pooled_prompt_embeds` `[B, dim]`, the sum of the words over the root of their number.
    ///
    /// # Errors
    /// When a caption has an unknown word, no word, or another number of words than the first.
    pub fn embed(&self, batch: Batch, captions: &[&str], device: &Device) -> Result<Batch> {
        let words = captions.first().map_or(0, |c| c.split_whitespace().count());
        let (mut tokens, mut pooled) = (Vec::<f32>::new(), Vec::<f32>::new());
        for caption in captions {
            let mut sum = vec![0f32; self.dim];
            let mut count = 0;
            for word in caption.split_whitespace() {
                let vector = self.vectors.get(word).ok_or_else(|| self.unknown(caption, word))?;
                tokens.extend(vector);
                sum.iter_mut().zip(vector).for_each(|(s, v)| *s += v);
                count += 1;
            }
            if count != words || count == 0 {
                return Err(self.unknown(caption, ""));
            }
            pooled.extend(sum.into_iter().map(|s| s / (words as f32).sqrt()));
        }
        let tokens = Tensor::from_vec(tokens, &[captions.len(), words, self.dim], device)?;
        let pooled = Tensor::from_vec(pooled, &[captions.len(), self.dim], device)?;
        Ok(batch.with("text_embeddings", tokens).with("pooled_prompt_embeds", pooled))
    }

    fn unknown(&self, prompt: &str, word: &str) -> Error {
        let known = self.vectors.keys().map(String::as_str).collect::<Vec<_>>().join(" ");
        Error::Prompt { prompt: prompt.into(), word: word.into(), known }
    }
}

/// The batch with its caption dropped, as guidance dropout drops it in training: zeros.
///
/// # Errors
/// When the batch has no caption.
pub fn without_caption(batch: &Batch) -> Result<Batch> {
    let mut out = batch.clone();
    for key in ["text_embeddings", "pooled_prompt_embeds"] {
        let like = batch.require(key)?;
        out = out.with(key, Tensor::zeros(like.dims(), like.dtype(), like.device())?);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_become_vectors_and_unknown_words_are_named() -> Result<()> {
        let table = TokenTable::new(["a one", "a two"], 4);
        let cpu = Device::cpu();
        let latents = || Tensor::zeros(&[2, 1, 2, 2], flowtape_engine::DType::F32, &cpu);
        let batch = table.embed(Batch::new(latents()?, "image".into()), &["a one", "a two"], &cpu)?;
        let tokens = batch.require("text_embeddings")?;
        assert_eq!(tokens.dims(), [2, 2, 4]);
        let values = tokens.to_vec::<f32>()?;
        assert!(values[..4] == values[8..12] && values[4..8] != values[12..16]);
        assert_eq!(without_caption(&batch)?.require("pooled_prompt_embeds")?.to_vec::<f32>()?, [0.0; 8]);
        for wrong in [["a ten", "a two"], ["a", "a two"], ["", ""]] {
            let error = table.embed(Batch::new(latents()?, "image".into()), &wrong, &cpu).unwrap_err().to_string();
            assert!(error.contains("known: a one two"), "{error}");
        }
        Ok(())
    }
}
