//! The tokenizer's vocabulary as llguidance walks it.

use crate::tokenizer::Tokenizer;
use toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};

/// The trie's nodes have room for this much.
const LONGEST_TOKEN: usize = 512;

/// The tokens of a model that samples from `size` logits. Control tokens and those that end a turn are no text: no string of a
/// grammar matches them, only a grammar that names them.
pub(super) fn token_env(tokenizer: &Tokenizer, end_of_turn: &[u32], size: usize) -> TokEnv {
    let word = |token: u32| {
        let bytes = tokenizer.token_bytes(token);
        if bytes.is_empty() || bytes.len() > LONGEST_TOKEN {
            return Vec::new();
        }
        if tokenizer.is_special(token) || end_of_turn.contains(&token) {
            let mut marked = vec![TokTrie::SPECIAL_TOKEN_MARKER];
            marked.extend_from_slice(bytes);
            return marked;
        }
        bytes.to_vec()
    };
    let words: Vec<Vec<u8>> = (0..size as u32).map(word).collect();
    let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, INVALID_TOKEN), &words);
    let ends = end_tokens(end_of_turn, size);
    let trie = if ends.is_empty() { trie } else { trie.with_eos_tokens(&ends) };
    // Not canonical: among the spellings of a forced text the model chooses, as it does in free text.
    std::sync::Arc::new(ApproximateTokEnv::new(trie))
}

/// The end-of-turn tokens that the model can draw.
pub(super) fn end_tokens(end_of_turn: &[u32], size: usize) -> Vec<u32> {
    end_of_turn.iter().copied().filter(|token| (*token as usize) < size).collect()
}
