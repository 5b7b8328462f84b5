//! Which tokens end a turn.

use crate::tokenizer::Tokenizer;

/// Spellings that end a turn or a text in every family that uses them. A model's files often name only one of its own.
const SPELLINGS: [&str; 9] =
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<|eot|>", "<|end|>", "<end_of_turn>"];

/// The tokens that the files name, the tokenizer's own, and control tokens with a known spelling. Ascending, each once.
pub(super) fn collect(tokenizer: &Tokenizer, named: impl IntoIterator<Item = u32>) -> Vec<u32> {
    let by_spelling = SPELLINGS.iter().filter_map(|spelling| tokenizer.id(spelling)).filter(|&id| tokenizer.is_special(id));
    let mut tokens: Vec<u32> = named.into_iter().chain(tokenizer.special_tokens().eos).chain(by_spelling).collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}
