//! Tokens to text, one at a time, never half a character.

use crate::tokenizer::Tokenizer;
use std::sync::Arc;

/// The text side of one sequence. Pushing a token costs its own bytes, whatever came before; clone it to fork a sequence.
///
/// The increments, one after the other, are exactly what [`Tokenizer::decode`] makes of all the tokens.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Special tokens that are not skipped.
    shown_special: Arc<[u32]>,
    /// The start of a character whose other bytes have not come yet: at most 3 bytes.
    held: Vec<u8>,
    /// The next text is the first, whose leading space SentencePiece models do not mean.
    at_start: bool,
}

impl Detokenizer {
    /// For a text that starts with the first token pushed.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        let at_start = tokenizer.drops_leading_space();
        Self { tokenizer: tokenizer.clone(), skip_special, shown_special: Arc::default(), held: Vec::with_capacity(4), at_start }
    }

    /// For the continuation of a prompt: a leading space belongs to the text unless the prompt ended with a special token
    /// (as a chat turn's header does).
    pub fn continuing(tokenizer: &Tokenizer, skip_special: bool, prompt: &[u32]) -> Self {
        let mut detokenizer = Self::new(tokenizer, skip_special);
        if prompt.last().is_some_and(|&last| !tokenizer.is_special(last)) {
            detokenizer.at_start = false;
        }
        detokenizer
    }

    /// The same with some special tokens in the text whatever holds for the others.
    pub fn showing(self, tokens: &Arc<[u32]>) -> Self {
        Self { shown_special: Arc::clone(tokens), ..self }
    }

    /// Appends to `text` what `token` makes certain: whole characters only. Bytes that can never become a character turn into
    /// U+FFFD as soon as that is known.
    pub fn push(&mut self, token: u32, text: &mut String) {
        if self.skip_special && self.tokenizer.is_special(token) && !self.shown_special.contains(&token) {
            return;
        }
        let mut bytes = self.tokenizer.token_bytes(token);
        if self.at_start && !bytes.is_empty() {
            self.at_start = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        if self.held.is_empty()
            && let Ok(whole) = std::str::from_utf8(bytes)
        {
            text.push_str(whole);
            return;
        }
        self.held.extend_from_slice(bytes);
        let certain = append_certain(&self.held, text);
        self.held.drain(..certain);
    }

    /// Appends what is still held: half a character becomes U+FFFD.
    pub fn finish(&mut self, text: &mut String) {
        if !self.held.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            self.held.clear();
        }
    }

    /// Whether the last token ended inside a character.
    pub fn holds_part_of_a_character(&self) -> bool {
        !self.held.is_empty()
    }
}

/// Appends the text of `bytes` up to an unfinished last character; returns how many bytes that took.
fn append_certain(bytes: &[u8], text: &mut String) -> usize {
    let mut done = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        done += chunk.valid().len();
        let rest = chunk.invalid();
        if rest.is_empty() {
            continue;
        }
        if done + rest.len() == bytes.len() && may_become_a_character(rest) {
            return done;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        done += rest.len();
    }
    done
}

/// Whether `bytes` is a proper prefix of some character's UTF-8.
fn may_become_a_character(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(error) if error.valid_up_to() == 0 && error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::gguf::Gguf;
    use crate::gguf::writer::Writer;

    /// SentencePiece with every byte: ids 0 to 2 special, then the bytes, then a few pieces.
    fn sentence_piece() -> Tokenizer {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
        tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
        tokens.extend(["▁", "a", "▁a", "é", "潮", "▁🌊"].map(str::to_owned));
        let types: Vec<i32> = (0..tokens.len())
            .map(|id| {
                if id < 3 {
                    3
                } else if id < 259 {
                    6
                } else {
                    1
                }
            })
            .collect();
        let scores: Vec<f32> = (0..tokens.len()).map(|id| -(id as f32)).collect();
        let file = Writer::new()
            .text("tokenizer.ggml.model", "llama")
            .texts("tokenizer.ggml.tokens", &tokens)
            .f32s("tokenizer.ggml.scores", &scores)
            .i32s("tokenizer.ggml.token_type", &types)
            .u32("tokenizer.ggml.bos_token_id", 1)
            .u32("tokenizer.ggml.eos_token_id", 2)
            .u32("tokenizer.ggml.unknown_token_id", 0);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        std::fs::write(&path, file.bytes()).unwrap();
        Tokenizer::from_gguf(&Gguf::open(&path).unwrap()).unwrap()
    }

    fn byte(byte: u8) -> u32 {
        3 + u32::from(byte)
    }

    fn increments(detokenizer: &mut Detokenizer, tokens: &[u32]) -> Vec<String> {
        let push = |&token: &u32| {
            let mut text = String::new();
            detokenizer.push(token, &mut text);
            text
        };
        let mut texts: Vec<String> = tokens.iter().map(push).collect();
        let mut rest = String::new();
        detokenizer.finish(&mut rest);
        texts.push(rest);
        texts
    }

    #[test]
    fn half_a_character_waits_for_the_other_half() {
        let tokenizer = sentence_piece();
        let wave: Vec<u32> = "🌊".bytes().map(byte).collect();
        let mut detokenizer = Detokenizer::new(&tokenizer, true);
        assert_eq!(increments(&mut detokenizer, &wave), ["", "", "", "🌊", ""]);
        let mut text = String::new();
        detokenizer.push(wave[0], &mut text);
        assert!(detokenizer.holds_part_of_a_character());
        detokenizer.finish(&mut text);
        assert_eq!(text, "\u{fffd}");
    }

    #[test]
    fn bytes_that_cannot_become_a_character_are_replaced_at_once() {
        let tokenizer = sentence_piece();
        let mut detokenizer = Detokenizer::new(&tokenizer, true);
        // A lone continuation; a start that 'a' breaks off; a start broken off by another start.
        let tokens = [byte(0x80), byte(0xf0), byte(0x9f), byte(b'a'), byte(0xc3), byte(0xc3), byte(0xa9)];
        assert_eq!(increments(&mut detokenizer, &tokens), ["\u{fffd}", "", "", "\u{fffd}a", "", "\u{fffd}", "é", ""]);
    }

    #[test]
    fn special_tokens_are_left_out_or_written() {
        let tokenizer = sentence_piece();
        let tokens = [1, tokenizer.id("▁a").unwrap(), 2];
        assert_eq!(increments(&mut Detokenizer::new(&tokenizer, true), &tokens), ["", "a", "", ""]);
        assert_eq!(increments(&mut Detokenizer::new(&tokenizer, false), &tokens), ["<s>", " a", "</s>", ""]);
        let mut one_shown = Detokenizer::new(&tokenizer, true).showing(&[2].into());
        assert_eq!(increments(&mut one_shown, &tokens), ["", "a", "</s>", ""]);
    }

    #[test]
    fn a_continuation_keeps_its_leading_space_unless_a_turn_begins() {
        let tokenizer = sentence_piece();
        let (a, space_a) = (tokenizer.id("a").unwrap(), tokenizer.id("▁a").unwrap());
        assert_eq!(increments(&mut Detokenizer::continuing(&tokenizer, true, &[1, a]), &[space_a]).concat(), " a");
        assert_eq!(increments(&mut Detokenizer::continuing(&tokenizer, true, &[a, 2]), &[space_a]).concat(), "a");
    }

    proptest! {
        #[test]
        fn increments_are_whole_characters_and_add_up(tokens in proptest::collection::vec(0u32..270, 0..40), skip_special: bool) {
            let tokenizer = sentence_piece();
            let whole = tokenizer.decode(&tokens, skip_special);
            prop_assert_eq!(increments(&mut Detokenizer::new(&tokenizer, skip_special), &tokens).concat(), whole);
        }

        #[test]
        fn any_text_survives_its_bytes(text: String) {
            let tokenizer = sentence_piece();
            let tokens: Vec<u32> = text.bytes().map(byte).collect();
            let expected = text.strip_prefix(' ').unwrap_or(&text);
            let increments = increments(&mut Detokenizer::new(&tokenizer, true), &tokens);
            prop_assert_eq!(increments.concat(), expected);
            let replaced = |text: &str| text.contains(char::REPLACEMENT_CHARACTER);
            prop_assert_eq!(increments.iter().any(|increment| replaced(increment)), replaced(&text));
        }
    }
}
