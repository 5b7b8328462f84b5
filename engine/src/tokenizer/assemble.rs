//! The last step of every way to a tokenizer: the table of token bytes.

use std::collections::HashMap;
use std::sync::Arc;

use tokenizers::DecoderWrapper;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;

use super::alphabet::byte_of;
use super::{Inner, SpecialTokens, Tokenizer, contained};

/// Ids above this are damage, not vocabulary.
const MAX_VOCABULARY: usize = 1 << 22;

/// How a token's string stands for bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's: one printable character per byte.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0x0A>` a byte, everything else itself.
    SentencePiece {
        /// Encoding put a space before the text.
        drops_leading_space: bool,
    },
}

impl Tokenizer {
    /// Wraps a pipeline that encodes. The error names what does not fit.
    pub(super) fn assemble(pipeline: tokenizers::Tokenizer, roles: SpecialTokens) -> Result<Self, String> {
        let spelling = pipeline
            .get_decoder()
            .and_then(spelling)
            .ok_or("its decoder is neither byte-level nor SentencePiece's; use a model with a BPE or SentencePiece tokenizer")?;
        let added = pipeline.get_added_tokens_decoder();
        let vocabulary = pipeline.get_vocab(true);
        let size = vocabulary.values().max().map_or(0, |&id| id as usize + 1);
        if size == 0 || size > MAX_VOCABULARY {
            return Err(format!("a vocabulary of {size} tokens"));
        }

        let mut spelt: Vec<Option<&str>> = vec![None; size];
        for (token, &id) in &vocabulary {
            if let Some(place) = spelt.get_mut(id as usize) {
                *place = Some(token);
            }
        }
        let mut special = vec![false; size];
        for (&id, token) in &added {
            if let (Some(place), Some(is_special)) = (spelt.get_mut(id as usize), special.get_mut(id as usize)) {
                *place = Some(&token.content);
                *is_special = token.special;
            }
        }
        for id in [roles.bos, roles.eos, roles.padding].into_iter().flatten() {
            match special.get_mut(id as usize) {
                Some(is_special) => *is_special = true,
                None => return Err(format!("token {id} has a role, but the vocabulary has {size} tokens")),
            }
        }

        let alphabet: HashMap<char, u8> =
            (0..0x200).filter_map(char::from_u32).filter_map(|c| byte_of(c).map(|byte| (c, byte))).collect();
        let mut bytes = Vec::new();
        let mut offsets = Vec::with_capacity(size + 1);
        for (id, token) in spelt.iter().enumerate() {
            offsets.push(u32::try_from(bytes.len()).map_err(|_| "tokens of more than 4 GiB")?);
            let Some(token) = token else { continue };
            let is_added = u32::try_from(id).is_ok_and(|id| added.contains_key(&id));
            match spelling {
                _ if is_added && special[id] => bytes.extend_from_slice(token.as_bytes()),
                Spelling::ByteLevel if is_added => bytes.extend_from_slice(token.as_bytes()),
                Spelling::ByteLevel => append_byte_level(token, &alphabet, &mut bytes),
                Spelling::SentencePiece { .. } => append_sentence_piece(token, &mut bytes),
            }
        }
        offsets.push(u32::try_from(bytes.len()).map_err(|_| "tokens of more than 4 GiB")?);

        let mut plain = pipeline.get_added_vocabulary().clone();
        plain.set_encode_special_tokens(true);
        let drops_leading_space = matches!(spelling, Spelling::SentencePiece { drops_leading_space: true });
        let mut inner = Inner { pipeline, plain, bytes, offsets, special, roles, drops_leading_space, adds_bos: false };
        let empty = contained(|| inner.encode("", true, true))?;
        inner.adds_bos = inner.roles.bos.is_some() && empty.first().copied() == inner.roles.bos;
        Ok(Tokenizer(Arc::new(inner)))
    }
}

fn spelling(decoder: &DecoderWrapper) -> Option<Spelling> {
    match decoder {
        DecoderWrapper::ByteLevel(_) => Some(Spelling::ByteLevel),
        DecoderWrapper::Metaspace(metaspace) => {
            Some(Spelling::SentencePiece { drops_leading_space: metaspace.prepend_scheme != PrependScheme::Never })
        }
        DecoderWrapper::ByteFallback(_) => Some(Spelling::SentencePiece { drops_leading_space: false }),
        DecoderWrapper::Sequence(sequence) => {
            let strips = |decoder: &DecoderWrapper| matches!(decoder, DecoderWrapper::Strip(strip) if strip.content == ' ' && strip.start > 0);
            let strips = sequence.get_decoders().iter().any(strips);
            sequence.get_decoders().iter().find_map(spelling).map(|found| match found {
                Spelling::SentencePiece { drops_leading_space } => {
                    Spelling::SentencePiece { drops_leading_space: drops_leading_space || strips }
                }
                Spelling::ByteLevel => Spelling::ByteLevel,
            })
        }
        _ => None,
    }
}

/// A token with a character outside the alphabet stands for itself.
fn append_byte_level(token: &str, alphabet: &HashMap<char, u8>, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for character in token.chars() {
        match alphabet.get(&character) {
            Some(&byte) => bytes.push(byte),
            None => {
                bytes.truncate(start);
                bytes.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

fn append_sentence_piece(token: &str, bytes: &mut Vec<u8>) {
    let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|hex| hex.len() == 2);
    match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => bytes.push(byte),
        None => bytes.extend_from_slice(token.replace('▁', " ").as_bytes()),
    }
}
