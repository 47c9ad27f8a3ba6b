//! What a `tokenizer.json` describes.

use tokenizers::{PostProcessor, Tokenizer, TruncationDirection};

#[derive(Debug)]
pub(super) struct Pieces(Box<Tokenizer>);

impl Pieces {
    pub fn read(described: &[u8]) -> Result<Self, String> {
        let tokenizer = Tokenizer::from_bytes(described);
        let mut tokenizer = tokenizer.map_err(|error| format!("its tokenizer does not load: {error}"))?;
        // A file keeps how it was last asked to cut and pad, which says nothing of the next text.
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?.with_padding(None);
        Ok(Self(Box::new(tokenizer)))
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, String> {
        Ok(self.0.encode(text, special).map_err(|error| error.to_string())?.get_ids().to_vec())
    }

    /// At most `length`, with the special ones.
    pub fn encode_cut(&self, text: &str, length: usize) -> Result<Vec<u32>, String> {
        let cut = || -> tokenizers::Result<Vec<u32>> {
            let mut encoded = self.0.encode(text, false)?;
            let special = self.0.get_post_processor().map_or(0, |p| p.added_tokens(false));
            encoded.truncate(length.saturating_sub(special), 0, TruncationDirection::Right);
            Ok(self.0.post_process(encoded, None, true)?.get_ids().to_vec())
        };
        cut().map_err(|error| error.to_string())
    }

    pub fn decode(&self, ids: &[u32]) -> Result<String, String> {
        self.0.decode(ids, true).map_err(|error| error.to_string())
    }
}
