//! Captions to embeddings, without a text encoder: each known word has a fixed random vector.

use std::collections::BTreeMap;

use flowtape_data::{Error, Result, TextEmbeddings, TextEncoder};
use flowtape_engine::{DType, Device, Philox, Tensor};

/// Any seed would do; it is part of what a model has learnt, so it never changes.
const SEED: u64 = 0x0074_6162_6c65;

/// A table of words. Capitals do not count.
#[derive(Clone, Debug)]
pub struct WordTable {
    vectors: BTreeMap<String, Vec<f32>>,
    dim: usize,
    /// Words of every caption.
    words: usize,
    /// One that is known, as an example.
    example: String,
}

impl WordTable {
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
        Self { vectors, dim, words, example: captions.first().map_or(String::new(), |c| (*c).to_owned()) }
    }

    /// An error about a caption, which says what would do.
    fn refused(&self, caption: &str, what: &str) -> Error {
        let known = self.vectors.keys().map(String::as_str).collect::<Vec<_>>().join(" ");
        let what = format!("{what}; expected {} words, such as {:?}; known: {known}", self.words, self.example);
        Error::Caption { caption: caption.into(), what }
    }
}

/// `text_embeddings` and `text_embeddings_2` `[B, T, dim]` (models with two text encoders see the same twice) with their masks
/// `text_mask` and `text_mask_2` `[B, T]`, all one, and `pooled_prompt_embeds` `[B, dim]`, the sum of the words over the root
/// of their number. Those of a dropped caption are zero.
impl TextEncoder for WordTable {
    fn encode(&self, captions: &[Option<&str>], device: &Device) -> Result<TextEmbeddings> {
        let words = self.words;
        let (mut tokens, mut pooled) = (Vec::<f32>::new(), Vec::<f32>::new());
        for caption in captions {
            let start = tokens.len();
            for word in caption.iter().flat_map(|c| c.split_whitespace()) {
                let unknown = || self.refused(caption.unwrap_or_default(), &format!("unknown word {word:?}"));
                tokens.extend(self.vectors.get(&word.to_lowercase()).ok_or_else(unknown)?);
            }
            match caption {
                None => tokens.resize(start + words * self.dim, 0.0),
                Some(caption) if tokens.len() != start + words * self.dim => {
                    let got = caption.split_whitespace().count();
                    return Err(self.refused(caption, &format!("it has {got} words")));
                }
                Some(_) => {}
            }
            let sum = |i: usize| tokens[start..].iter().skip(i).step_by(self.dim).sum::<f32>();
            pooled.extend((0..self.dim).map(|i| sum(i) / (words as f32).sqrt()));
        }
        let tokens = Tensor::from_vec(tokens, &[captions.len(), words, self.dim], device)?;
        let mask = Tensor::ones(&[captions.len(), words], DType::F32, device)?;
        Ok(TextEmbeddings::default()
            .with("text_embeddings", tokens.clone())
            .with("text_mask", mask.clone())
            .with("text_embeddings_2", tokens)
            .with("text_mask_2", mask)
            .with("pooled_prompt_embeds", Tensor::from_vec(pooled, &[captions.len(), self.dim], device)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_become_vectors_and_unknown_words_are_named() -> Result<()> {
        let table = WordTable::new(&["a one", "a two"], 4);
        let encoded = |captions: &[Option<&str>]| table.encode(captions, &Device::cpu());
        let values = |captions: &[Option<&str>], name: &str| -> Result<Vec<f32>> {
            Ok(encoded(captions)?.tensors[name].to_vec::<f32>()?)
        };
        assert_eq!(encoded(&[Some("a one"), Some("a two")])?.tensors["text_embeddings"].dims(), [2, 2, 4]);
        let known = values(&[Some("a one"), Some("a two")], "text_embeddings")?;
        assert!(known[..4] == known[8..12] && known[4..8] != known[12..16]);
        assert_eq!(values(&[Some("A One"), Some("a TWO")], "text_embeddings")?, known);
        let dropped = values(&[None, Some("a two")], "text_embeddings")?;
        assert!(dropped[..8] == [0.0; 8] && dropped[8..] == known[8..]);
        // All of a dropped caption's tensors are zero, but for the masks.
        for name in ["text_embeddings_2", "pooled_prompt_embeds"] {
            assert!(values(&[None], name)?.iter().all(|v| *v == 0.0), "{name}");
        }
        for (wrong, part) in
            [("a ten", "unknown word \"ten\""), ("a", "1 words"), ("", "0 words"), ("a a one", "3 words")]
        {
            let error = encoded(&[Some(wrong)]).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("such as \"a one\"; known: a one two"), "{error}");
        }
        Ok(())
    }
}
