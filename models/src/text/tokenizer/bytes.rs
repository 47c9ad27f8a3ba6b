//! byT5's tokenizer: a token for each byte, and added ones.

use super::Config;

/// The numbers of `<pad>`, `</s>` and `<unk>` stand before the bytes.
const SPECIAL: [&str; 3] = ["<pad>", "</s>", "<unk>"];
const END: u32 = 1;

/// Tokens of byT5: a byte is its value and three.
#[derive(Debug)]
pub(super) struct ByteTokenizer {
    added: Vec<Added>,
}

#[derive(Debug)]
struct Added {
    text: String,
    id: u32,
    lstrip: bool,
    rstrip: bool,
    special: bool,
}

impl ByteTokenizer {
    /// With the tokens that the configuration adds.
    pub(super) fn new(config: &Config) -> Result<Self, String> {
        let mut added = Vec::new();
        for (id, token) in &config.added_tokens_decoder {
            let id = id.parse().map_err(|_| format!("added_tokens_decoder: expected numbers, got {id:?}"))?;
            added.push(Added {
                text: token.content.clone(),
                id,
                lstrip: token.lstrip,
                rstrip: token.rstrip,
                special: token.special,
            });
        }
        for (id, text) in SPECIAL.into_iter().enumerate() {
            if added.iter().all(|token| token.text != text) {
                added.push(Added { text: text.into(), id: id as u32, lstrip: true, rstrip: true, special: true });
            }
        }
        added.retain(|token| !token.text.is_empty());
        Ok(Self { added })
    }

    /// The number of an added token.
    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.added.iter().find(|added| added.text == token).map(|added| added.id)
    }

    /// The added token that begins first in a text, the longest of those that begin there, and where.
    fn next<'a>(&'a self, text: &str) -> Option<(usize, &'a Added)> {
        let found = self.added.iter().filter_map(|token| Some((text.find(&token.text)?, token)));
        found.min_by_key(|(at, token)| (*at, std::cmp::Reverse(token.text.len())))
    }

    /// The tokens of a text, with the end where `special` says so.
    pub(super) fn encode(&self, text: &str, special: bool) -> Vec<u32> {
        let bytes = |text: &str| text.bytes().map(|byte| u32::from(byte) + SPECIAL.len() as u32).collect::<Vec<_>>();
        let (mut ids, mut rest) = (Vec::new(), text);
        while let Some((at, token)) = self.next(rest) {
            let before = &rest[..at];
            ids.extend(bytes(if token.lstrip { before.trim_end() } else { before }));
            ids.push(token.id);
            rest = &rest[at + token.text.len()..];
            if token.rstrip {
                rest = rest.trim_start();
            }
        }
        ids.extend(bytes(rest));
        if special {
            ids.push(END);
        }
        ids
    }

    /// At most `length` tokens with the end.
    pub(super) fn encode_cut(&self, text: &str, length: usize) -> Vec<u32> {
        let mut ids = self.encode(text, false);
        ids.truncate(length.saturating_sub(1));
        ids.push(END);
        ids
    }

    /// The text of tokens, without the special ones; what is no text is passed over.
    pub(super) fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::new();
        for id in ids {
            match self.added.iter().find(|token| token.id == *id) {
                Some(token) if token.special || SPECIAL.contains(&&*token.text) => {}
                Some(token) => bytes.extend(token.text.bytes()),
                None => bytes.extend(id.checked_sub(SPECIAL.len() as u32).and_then(|byte| u8::try_from(byte).ok())),
            }
        }
        bytes.utf8_chunks().map(|chunk| chunk.valid()).collect()
    }
}
