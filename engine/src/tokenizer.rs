//! Text to tokens and back.
//!
//! Encoding is done by the `tokenizers` crate, set up from `tokenizer.json` or from GGUF metadata ([`gguf`]). Decoding is a table
//! of the exact bytes of every token, so that a stream of tokens can be turned into text without looking back.

mod alphabet;
mod assemble;
mod gguf;
pub(crate) mod json;
#[cfg(test)]
pub(crate) mod letters;

use std::fmt;

use std::sync::Arc;

use tokenizers::tokenizer::{AddedVocabulary, Model as _, OffsetReferential, OffsetType, PreTokenizer as _};

/// A model's tokenizer: cheap to clone, shared between threads.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    pipeline: tokenizers::Tokenizer,
    /// The added tokens, with the special ones taken for ordinary text.
    plain: AddedVocabulary,
    /// Token `i`'s bytes are `bytes[offsets[i]..offsets[i + 1]]`.
    bytes: Vec<u8>,
    offsets: Vec<u32>,
    special: Vec<bool>,
    roles: SpecialTokens,
    drops_leading_space: bool,
    adds_bos: bool,
}

/// Tokens with a role, as the model's files name them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text or turn.
    pub eos: Option<u32>,
    /// Stands for what has no token.
    pub unknown: Option<u32>,
    /// Fills up batches in training.
    pub padding: Option<u32>,
}

/// A text could not be encoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the text cannot be tokenised: {0}")]
pub struct EncodeError(String);

impl Tokenizer {
    /// Encodes `text`. `add_special` adds what the model's files want around a text (usually a BOS token); `parse_special` makes
    /// `<|im_start|>` and its like one token, otherwise they are spelt out. The output of a chat template is encoded with
    /// `add_special` off and `parse_special` on, because the template writes the BOS token itself.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>, EncodeError> {
        contained(|| self.0.encode(text, add_special, parse_special)).map_err(EncodeError)
    }

    /// The text of `tokens`. Bytes that form no character become U+FFFD; ids without a token have no text.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::with_capacity(tokens.len() * 4);
        for &token in tokens {
            if !(skip_special && self.is_special(token)) {
                bytes.extend_from_slice(self.token_bytes(token));
            }
        }
        let text = if self.0.drops_leading_space { bytes.strip_prefix(b" ").unwrap_or(&bytes) } else { &bytes };
        String::from_utf8_lossy(text).into_owned()
    }

    /// The bytes that `token` adds to a text: empty for an id without a token.
    pub fn token_bytes(&self, token: u32) -> &[u8] {
        let index = token as usize;
        match (self.0.offsets.get(index), self.0.offsets.get(index + 1)) {
            (Some(&start), Some(&end)) => self.0.bytes.get(start as usize..end as usize).unwrap_or_default(),
            _ => &[],
        }
    }

    /// The token as its files spell it (`Ġhello`, `▁hello`, `<|im_end|>`).
    pub fn token(&self, token: u32) -> Option<String> {
        self.0.pipeline.id_to_token(token)
    }

    /// The id of a token spelt as in the files.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.0.pipeline.token_to_id(token)
    }

    /// Whether `token` is a control token, which is left out of texts for people.
    pub fn is_special(&self, token: u32) -> bool {
        self.0.special.get(token as usize).copied().unwrap_or(false)
    }

    /// The content of a `tokenizer.json` that makes the same tokens.
    pub(crate) fn to_json(&self) -> Result<String, EncodeError> {
        contained(|| self.0.pipeline.to_string(false)).map_err(EncodeError)
    }

    /// One more than the largest id.
    pub fn vocabulary(&self) -> usize {
        self.0.special.len()
    }

    /// Tokens with a role.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.0.roles
    }

    /// Whether [`Tokenizer::encode`] with `add_special` puts a BOS token first.
    pub fn adds_bos(&self) -> bool {
        self.0.adds_bos
    }

    /// Whether the space at the very start of a decoded text is an artefact of encoding (SentencePiece).
    pub fn drops_leading_space(&self) -> bool {
        self.0.drops_leading_space
    }
}

impl Inner {
    fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> tokenizers::Result<Vec<u32>> {
        let Inner { pipeline, plain, .. } = self;
        let added = if parse_special { pipeline.get_added_vocabulary() } else { plain };
        let mut pieces = added.extract_and_normalize(pipeline.get_normalizer(), text);
        if let Some(pre_tokenizer) = pipeline.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        pieces.tokenize(|piece| pipeline.get_model().tokenize(piece.get()))?;
        if !add_special {
            let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::None);
            return Ok(splits.into_iter().flat_map(|(_, _, tokens)| tokens.iter().flatten().map(|token| token.id)).collect());
        }
        let encoding = pieces.into_encoding(None, 0, OffsetType::None)?;
        Ok(pipeline.post_process(encoding, None, true)?.get_ids().to_vec())
    }
}

/// Runs a piece of the `tokenizers` crate, which panics on some files that contradict themselves (a post-processor that names a
/// token it does not define): that must be an error of this one call.
fn contained<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizer's files contradict themselves".to_owned()),
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocabulary", &self.vocabulary())
            .field("special", &self.0.roles)
            .finish_non_exhaustive()
    }
}
