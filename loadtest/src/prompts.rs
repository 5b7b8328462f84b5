//! Prompts: English-like text from a seed, so that every server gets the same words and no prompt repeats.
//!
//! The words are short and common: byte-pair tokenizers trained on English hold each of them, with its leading space, as
//! one token. So the length in tokens is known to a few per cent without a tokenizer; the exact count comes from the
//! server's usage.

use serde::{Deserialize, Serialize};

const WORDS: &[&str] = &[
    "the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he", "his",
    "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one", "you", "were", "all", "her", "she",
    "there", "would", "their", "we", "him", "been", "has", "when", "who", "will", "no", "more", "if", "out", "so", "up", "said",
    "what", "its", "about", "than", "into", "them", "can", "only", "other", "time", "new", "some", "could", "these", "two",
    "may", "first", "then", "do", "any", "like", "my", "now", "over", "such", "our", "man", "me", "even", "most", "made",
    "after", "also", "well", "did", "many", "before", "must", "years", "back", "through", "much", "where", "your", "way", "down",
    "should", "because", "long", "each", "just", "state", "those", "people", "too", "world", "how", "little", "good", "very",
    "make", "still", "see", "own", "work", "men", "day", "get", "here", "old", "life", "both", "between", "being", "under",
    "three", "never", "know", "same", "last", "another", "while", "us", "off", "might", "great", "year", "go", "come", "since",
    "against", "right", "came", "take", "used", "himself", "few", "house", "use", "place", "during", "high", "without", "again",
    "home", "around", "small", "however", "found", "part", "school", "thought", "went", "say", "general", "once", "upon",
    "every", "left", "war", "does", "water", "river", "city", "number", "night", "point", "hand", "light", "business", "order",
    "music", "money", "field", "story",
];

/// Tokens of ordinary English per word of this generator, full stops and capitals included.
const TOKENS_PER_WORD: f64 = 1.1;

/// What the prompts of a load have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Prefix {
    /// Every prompt differs from its first word on, so that no prefix cache helps.
    Cold,
    /// All prompts start with the same long text, then differ.
    Shared,
}

impl Prefix {
    /// Its name in tables and plots.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Shared => "shared",
        }
    }
}

/// The prompts of one load: a pure function of its fields and an index.
#[derive(Debug, Clone)]
pub struct Prompts {
    seed: u64,
    unique_tokens: usize,
    shared: String,
}

impl Prompts {
    /// Prompts of about `tokens` tokens each, behind a common text of about `shared_tokens` where the prefix is shared.
    pub fn new(seed: u64, prefix: Prefix, tokens: usize, shared_tokens: usize) -> Self {
        let shared = match prefix {
            Prefix::Cold => String::new(),
            Prefix::Shared => text(&mut Random::new(seed ^ 0x5EED_0F5A_ED00_0000), shared_tokens) + " ",
        };
        Self { seed, unique_tokens: tokens, shared }
    }

    /// The prompt with this index. Warm-up requests count down from `u64::MAX`, so they meet no measured prompt.
    pub fn get(&self, index: u64) -> String {
        let mut random = Random::new(self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(index).wrapping_add(1));
        self.shared.clone() + &text(&mut random, self.unique_tokens)
    }

    /// The warm-up prompt with this index.
    pub fn warmup(&self, index: u64) -> String {
        self.get(u64::MAX - index)
    }
}

fn text(random: &mut Random, tokens: usize) -> String {
    let words = (tokens as f64 / TOKENS_PER_WORD).round().max(1.0) as usize;
    let mut out = String::with_capacity(words * 6);
    let mut left_in_sentence = 0_usize;
    for at in 0..words {
        let word = WORDS[random.below(WORDS.len())];
        if left_in_sentence == 0 {
            left_in_sentence = 8 + random.below(10);
            if at > 0 {
                out.push_str(". ");
            }
            out.extend(word.chars().take(1).flat_map(char::to_uppercase));
            out.push_str(&word[1..]);
        } else {
            out.push(' ');
            out.push_str(word);
        }
        left_in_sentence -= 1;
    }
    out.push('.');
    out
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, seedable, the same on every machine.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        // The modulo bias for bounds this small is under one in 10^16.
        (self.next() % bound as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_same_seed_gives_the_same_prompts_and_another_seed_others() {
        let prompts = Prompts::new(7, Prefix::Cold, 128, 0);
        assert_eq!(prompts.get(3), Prompts::new(7, Prefix::Cold, 128, 0).get(3));
        assert_ne!(prompts.get(3), Prompts::new(8, Prefix::Cold, 128, 0).get(3));
    }

    #[test]
    fn cold_prompts_differ_within_their_first_words() {
        let prompts = Prompts::new(1, Prefix::Cold, 128, 0);
        let mut starts = HashSet::new();
        for at in 0..500 {
            let prompt = prompts.get(at);
            let start: Vec<&str> = prompt.split(' ').take(6).collect();
            assert!(starts.insert(start.join(" ")), "prompt {at} starts like an earlier one");
        }
        assert!(!starts.contains(&prompts.warmup(0).split(' ').take(6).collect::<Vec<_>>().join(" ")));
    }

    #[test]
    fn shared_prompts_have_one_long_prefix_and_their_own_end() {
        let prompts = Prompts::new(1, Prefix::Shared, 128, 1000);
        let (a, b) = (prompts.get(0), prompts.get(1));
        let common = a.bytes().zip(b.bytes()).take_while(|(x, y)| x == y).count();
        let words = a[..common].split(' ').count();
        assert!((880..=940).contains(&words), "{words} common words");
        let own = a[common..].split(' ').count();
        assert!((105..=125).contains(&own), "{own} own words");
        assert!(prompts.warmup(0).starts_with(&a[..common - 20]));
    }
}
