//! Captions to embeddings, without a text encoder: each known word has a fixed random vector.

use std::collections::BTreeMap;

use flowtape_engine::{DType, Philox, Tensor};
use flowtape_flowmatch::Batch;

use crate::{Error, Result};

/// Any seed would do; it is part of what a model has learnt, so it never changes.
const SEED: u64 = 0x0074_6162_6c65;

/// A table of words.
#[derive(Clone, Debug)]
pub struct TokenTable {
    vectors: BTreeMap<String, Vec<f32>>,
    dim: usize,
    /// Words of every caption.
    words: usize,
}

impl TokenTable {
    /// Vectors of `dim` standard normal numbers for all words of `captions`, which have one number of words.
    pub fn new(captions: &[&str], dim: usize) -> Self {
        let mut vectors = BTreeMap::new();
        let words = captions.first().map_or(0, |c| c.split_whitespace().count());
        for word in captions.iter().flat_map(|c| c.split_whitespace()) {
            let stream = word.bytes().fold(0u64, |h, b| h.wrapping_mul(257).wrapping_add(b.into()));
            let mut vector = vec![0.0; dim];
            Philox::new(SEED).fork(stream).fill_normal(&mut vector);
            vectors.insert(word.to_owned(), vector);
        }
        Self { vectors, dim, words }
    }

    /// Adds the embeddings of one caption per sample; those of a dropped caption (`None`) are zero. `text_embeddings` and `text_embeddings_2` `[B, T, dim]` (models with two text encoders see the same twice)
    /// with their masks `text_mask` and `text_mask_2` `[B, T]`, all one, and `pooled_prompt_embeds` `[B, dim]`, the sum of
    /// the words over the root of their number.
    ///
    /// # Errors
    /// When a caption has an unknown word, or another number of words than the known ones.
    pub fn embed(&self, batch: Batch, captions: &[Option<&str>]) -> Result<Batch> {
        let device = batch.latents.device().clone();
        let words = self.words;
        let (mut tokens, mut pooled) = (Vec::<f32>::new(), Vec::<f32>::new());
        for caption in captions {
            let start = tokens.len();
            for word in caption.iter().flat_map(|c| c.split_whitespace()) {
                tokens.extend(self.vectors.get(word).ok_or_else(|| self.unknown(caption.unwrap_or_default(), word))?);
            }
            match caption {
                None => tokens.resize(start + words * self.dim, 0.0),
                Some(caption) if tokens.len() != start + words * self.dim => {
                    return Err(self.unknown(caption, ""));
                }
                Some(_) => {}
            }
            let sum = |i: usize| tokens[start..].iter().skip(i).step_by(self.dim).sum::<f32>();
            pooled.extend((0..self.dim).map(|i| sum(i) / (words as f32).sqrt()));
        }
        let tokens = Tensor::from_vec(tokens, &[captions.len(), words, self.dim], &device)?;
        let mask = Tensor::ones(&[captions.len(), words], DType::F32, &device)?;
        Ok(batch
            .with("text_embeddings", tokens.clone())
            .with("text_mask", mask.clone())
            .with("text_embeddings_2", tokens)
            .with("text_mask_2", mask)
            .with("pooled_prompt_embeds", Tensor::from_vec(pooled, &[captions.len(), self.dim], &device)?))
    }

    fn unknown(&self, prompt: &str, word: &str) -> Error {
        let known = self.vectors.keys().map(String::as_str).collect::<Vec<_>>().join(" ");
        Error::Prompt { prompt: prompt.into(), word: word.into(), known }
    }
}

#[cfg(test)]
mod tests {
    use flowtape_engine::Device;

    use super::*;

    #[test]
    fn captions_become_vectors_and_unknown_words_are_named() -> Result<()> {
        let table = TokenTable::new(&["a one", "a two"], 4);
        let cpu = Device::cpu();
        let latents = || Tensor::zeros(&[2, 1, 2, 2], DType::F32, &cpu);
        let batch = |captions: &[Option<&str>]| table.embed(Batch::new(latents()?, "image".into()), captions);
        let known = batch(&[Some("a one"), Some("a two")])?;
        let tokens = known.require("text_embeddings")?;
        assert_eq!(tokens.dims(), [2, 2, 4]);
        let values = tokens.to_vec::<f32>()?;
        assert!(values[..4] == values[8..12] && values[4..8] != values[12..16]);
        let dropped = batch(&[None, Some("a two")])?.require("text_embeddings")?.to_vec::<f32>()?;
        assert!(dropped[..8] == [0.0; 8] && dropped[8..] == values[8..]);
        for wrong in [["a ten", "a two"], ["a", "a two"], ["", ""]] {
            let error = batch(&wrong.map(Some)).unwrap_err().to_string();
            assert!(error.contains("known: a one two"), "{error}");
        }
        Ok(())
    }
}
