//! A row of logits confined to the tokens of a mask.

use crate::isa::Isa;

use super::scan;

/// Below one allowed token in this many, the allowed ones are gathered into a short row.
const SPARSE: usize = 4;

/// The allowed part of a row.
pub(super) struct Confined<'a> {
    /// In the order of token ids.
    pub logits: &'a [f32],
    /// Which tokens they belong to; `None` when they are at their own places and what is forbidden is −∞.
    tokens: Option<&'a [u32]>,
    /// The first allowed token.
    first: u32,
}

impl Confined<'_> {
    /// The token at a place of the row; where nothing was possible, the first that is allowed.
    pub fn token(&self, place: u32, possible: bool) -> u32 {
        match self.tokens {
            _ if !possible => self.first,
            Some(tokens) => tokens.get(place as usize).copied().unwrap_or(self.first),
            None => place,
        }
    }
}

/// A thread's working memory for it.
#[derive(Default)]
pub(super) struct ConfineScratch {
    logits: Vec<f32>,
    tokens: Vec<u32>,
}

impl ConfineScratch {
    pub fn new(vocabulary: usize) -> Self {
        Self { logits: Vec::with_capacity(vocabulary), tokens: Vec::with_capacity(vocabulary) }
    }

    /// Copies the tokens of `words` out of a row.
    ///
    /// # Safety
    /// The processor has the instructions of `isa`.
    pub unsafe fn confine(&mut self, isa: Isa, row: &[f32], words: &[u32]) -> Confined<'_> {
        let Self { logits, tokens } = self;
        let allowed: usize = words.iter().map(|word| word.count_ones() as usize).sum();
        let at = words.iter().position(|word| *word != 0);
        let first = at.map_or(0, |at| at as u32 * 32 + words[at].trailing_zeros());
        logits.clear();
        if allowed >= row.len() / SPARSE {
            // SAFETY: the contract.
            unsafe { scan::blend(isa, row, words, logits) };
            return Confined { logits, tokens: None, first };
        }
        tokens.clear();
        for (index, word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
            let mut rest = *word;
            while rest != 0 {
                let token = index * 32 + rest.trailing_zeros() as usize;
                rest &= rest - 1;
                if let Some(logit) = row.get(token) {
                    logits.push(*logit);
                    tokens.push(token as u32);
                }
            }
        }
        Confined { logits, tokens: Some(tokens), first }
    }
}
