//! How alike two texts are, by the field's measures: each from 0 to 1.
//!
//! ROUGE compares runs of letters and digits in lower case; BLEU, GLEU and METEOR take punctuation as words of its own. A character of
//! a script that is written without spaces is a word.

use std::collections::HashMap;
use std::hash::Hash;

use serde::{Deserialize, Serialize};

use super::stem::stem;
use crate::quality::words::{is_unspaced, words};

/// A measure, under the API's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Similarity {
    /// Twice the longest common subsequence of characters over the lengths of both: one less the normalised indel distance.
    FuzzyMatch,
    /// Papineni et al. 2002, up to 4-grams, of one sentence with one reference; where n-grams have no match, a tenth of one counts
    /// (Chen and Cherry 2014, smoothing 1), so that short texts do not all get 0.
    Bleu,
    /// Wu et al. 2016: the smaller of precision and recall over all 1- to 4-grams.
    Gleu,
    /// Banerjee and Lavie 2005 with words and stems (Porter 1980), without synonyms; α 0.9, β 3, γ 0.5.
    Meteor,
    /// Lin 2004: F1 over words.
    #[serde(rename = "rouge_1")]
    Rouge1,
    /// Over pairs of words.
    #[serde(rename = "rouge_2")]
    Rouge2,
    /// Over three words in a row.
    #[serde(rename = "rouge_3")]
    Rouge3,
    /// Over four.
    #[serde(rename = "rouge_4")]
    Rouge4,
    /// Over five.
    #[serde(rename = "rouge_5")]
    Rouge5,
    /// F1 over the longest common subsequence of words.
    RougeL,
}

/// Longest n-gram of BLEU and GLEU.
const ORDERS: usize = 4;
/// Most characters or words that are compared each with each, as sequences; what is beyond is cut off. The work is their square.
const MAX_COMPARED: usize = 10_000;

impl Similarity {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::FuzzyMatch,
        Self::Bleu,
        Self::Gleu,
        Self::Meteor,
        Self::Rouge1,
        Self::Rouge2,
        Self::Rouge3,
        Self::Rouge4,
        Self::Rouge5,
        Self::RougeL,
    ];

    /// The word of the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::FuzzyMatch => "fuzzy_match",
            Self::Bleu => "bleu",
            Self::Gleu => "gleu",
            Self::Meteor => "meteor",
            Self::Rouge1 => "rouge_1",
            Self::Rouge2 => "rouge_2",
            Self::Rouge3 => "rouge_3",
            Self::Rouge4 => "rouge_4",
            Self::Rouge5 => "rouge_5",
            Self::RougeL => "rouge_l",
        }
    }

    /// How alike `text` is to `reference`.
    pub fn of(self, text: &str, reference: &str) -> f64 {
        match self {
            Self::FuzzyMatch => fuzzy(text, reference),
            Self::Bleu => bleu(&pieces(text), &pieces(reference)),
            Self::Gleu => gleu(&pieces(text), &pieces(reference)),
            Self::Meteor => {
                let (text, reference) = (text.to_lowercase(), reference.to_lowercase());
                let (mut text, mut reference) = (pieces(&text), pieces(&reference));
                text.truncate(MAX_COMPARED);
                reference.truncate(MAX_COMPARED);
                meteor(&text, &reference)
            }
            Self::Rouge1 => rouge(text, reference, 1),
            Self::Rouge2 => rouge(text, reference, 2),
            Self::Rouge3 => rouge(text, reference, 3),
            Self::Rouge4 => rouge(text, reference, 4),
            Self::Rouge5 => rouge(text, reference, 5),
            Self::RougeL => {
                let (text, reference) = (words(text), words(reference));
                f1(common_subsequence(&text, &reference), text.len(), reference.len())
            }
        }
    }
}

/// Runs of letters, digits and underscores, and every other character that is no space.
fn pieces(text: &str) -> Vec<&str> {
    let joins = |c: char| (c.is_alphanumeric() || c == '_') && !is_unspaced(c);
    let mut pieces = Vec::new();
    let mut open: Option<usize> = None;
    for (at, character) in text.char_indices() {
        if joins(character) {
            open.get_or_insert(at);
            continue;
        }
        if let Some(begin) = open.take() {
            pieces.push(&text[begin..at]);
        }
        if !character.is_whitespace() {
            pieces.push(&text[at..at + character.len_utf8()]);
        }
    }
    pieces.extend(open.map(|begin| &text[begin..]));
    pieces
}

/// How often each run of `n` comes.
fn grams<T: Hash + Eq>(of: &[T], n: usize) -> HashMap<&[T], usize> {
    let mut found = HashMap::new();
    of.windows(n).for_each(|gram| *found.entry(gram).or_default() += 1);
    found
}

/// Runs of `n` that both have, each as often as the one that has it less often.
fn shared<T: Hash + Eq>(left: &[T], right: &[T], n: usize) -> usize {
    let right = grams(right, n);
    grams(left, n).into_iter().map(|(gram, count)| count.min(right.get(gram).copied().unwrap_or(0))).sum()
}

/// Runs of `n` in so many words.
fn runs(words: usize, n: usize) -> usize {
    (words + 1).saturating_sub(n)
}

fn f1(both: usize, left: usize, right: usize) -> f64 {
    // 2PR/(P + R) with P = both/left, R = both/right.
    if left + right == 0 { 0.0 } else { 2.0 * both as f64 / (left + right) as f64 }
}

fn rouge(text: &str, reference: &str, n: usize) -> f64 {
    let (text, reference) = (words(text), words(reference));
    f1(shared(&text, &reference, n), runs(text.len(), n), runs(reference.len(), n))
}

fn fuzzy(text: &str, reference: &str) -> f64 {
    let characters = |text: &str| text.chars().take(MAX_COMPARED).collect::<Vec<_>>();
    let (text, reference) = (characters(text), characters(reference));
    if text.is_empty() && reference.is_empty() {
        return 1.0;
    }
    f1(common_subsequence(&text, &reference), text.len(), reference.len())
}

fn common_subsequence<T: PartialEq>(left: &[T], right: &[T]) -> usize {
    let cut = |all: &[T]| all.len().min(MAX_COMPARED);
    let (left, right) = (&left[..cut(left)], &right[..cut(right)]);
    // Lengths for all of the left so far and each beginning of the right.
    let mut lengths = vec![0_usize; right.len() + 1];
    for one in left {
        let mut diagonal = 0;
        for (index, other) in right.iter().enumerate() {
            let above = lengths[index + 1];
            lengths[index + 1] = if one == other { diagonal + 1 } else { above.max(lengths[index]) };
            diagonal = above;
        }
    }
    lengths[right.len()]
}

fn bleu(text: &[&str], reference: &[&str]) -> f64 {
    if shared(text, reference, 1) == 0 {
        return 0.0;
    }
    let logarithms = (1..=ORDERS).map(|n| {
        let matches = shared(text, reference, n) as f64;
        (if matches == 0.0 { 0.1 } else { matches } / runs(text.len(), n).max(1) as f64).ln()
    });
    let mean = logarithms.sum::<f64>() / ORDERS as f64;
    // The brevity penalty.
    let short = (1.0 - reference.len() as f64 / text.len() as f64).min(0.0);
    (short + mean).exp()
}

fn gleu(text: &[&str], reference: &[&str]) -> f64 {
    let all = |words: &[&str]| (1..=ORDERS).map(|n| runs(words.len(), n)).sum::<usize>();
    let matches: usize = (1..=ORDERS).map(|n| shared(text, reference, n)).sum();
    let most = all(text).max(all(reference));
    if most == 0 { 0.0 } else { matches as f64 / most as f64 }
}

fn meteor(text: &[&str], reference: &[&str]) -> f64 {
    const ALPHA: f64 = 0.9;
    const BETA: i32 = 3;
    const GAMMA: f64 = 0.5;
    let pairs = aligned(text, reference);
    if pairs.is_empty() {
        return 0.0;
    }
    let matches = pairs.len() as f64;
    let (precision, recall) = (matches / text.len() as f64, matches / reference.len() as f64);
    let mean = precision * recall / (ALPHA * precision + (1.0 - ALPHA) * recall);
    let follows = |pair: &&[(usize, usize)]| pair[1].0 == pair[0].0 + 1 && pair[1].1 == pair[0].1 + 1;
    let chunks = pairs.len() - pairs.windows(2).filter(follows).count();
    (1.0 - GAMMA * (chunks as f64 / matches).powi(BETA)) * mean
}

/// Places of words of the text and of the reference that are the same: first the words themselves, then their stems. Of several, the
/// last are matched first.
fn aligned(text: &[&str], reference: &[&str]) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    let (mut left, mut right): (Vec<usize>, Vec<usize>) = ((0..text.len()).collect(), (0..reference.len()).collect());
    let stems = |words: &[&str]| words.iter().map(|word| stem(word)).collect::<Vec<_>>();
    let plain = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    for (text, reference) in [(plain(text), plain(reference)), (stems(text), stems(reference))] {
        let mut unmatched = Vec::new();
        while let Some(place) = left.pop() {
            match right.iter().rposition(|other| reference[*other] == text[place]) {
                Some(found) => pairs.push((place, right.remove(found))),
                None => unmatched.push(place),
            }
        }
        unmatched.reverse();
        left = unmatched;
    }
    pairs.sort_unstable();
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of `tests/oracle/similarity.py`: rapidfuzz 3.14 (`fuzz.ratio`), nltk 3.10 (`sentence_bleu` with method1, `sentence_gleu`,
    /// `single_meteor_score` without WordNet and with Porter's own algorithm), rouge-score 0.1.2.
    const GOLDEN: &str = include_str!("../../../../tests/goldens/similarity.json");

    #[test]
    fn measures_are_those_of_the_packages_that_people_use() {
        let cases: Vec<serde_json::Value> = serde_json::from_str(GOLDEN).unwrap();
        assert!(cases.len() >= 12);
        for case in &cases {
            let (text, reference) = (case["text"].as_str().unwrap(), case["reference"].as_str().unwrap());
            for measure in Similarity::ALL {
                let expected = case[measure.as_str()].as_f64().unwrap();
                let got = measure.of(text, reference);
                assert!((got - expected).abs() < 1e-9, "{}: {got} instead of {expected} for {case}", measure.as_str());
            }
        }
    }

    #[test]
    fn words_without_spaces_are_characters() {
        assert_eq!(pieces("潮の流れ, ok_1!"), ["潮", "の", "流", "れ", ",", "ok_1", "!"]);
        assert!(Similarity::Rouge1.of("潮の流れ", "潮の力") > 0.5);
        assert_eq!(Similarity::RougeL.of("", ""), 0.0);
        assert_eq!(Similarity::FuzzyMatch.of("", ""), 1.0);
    }

    #[test]
    fn names_are_the_apis() {
        for measure in Similarity::ALL {
            assert_eq!(serde_json::to_value(measure).unwrap(), measure.as_str());
        }
    }
}
