//! Words of a text as numbers, for every check that compares texts.

use crate::{dataset::Message, random::mix};

/// The words of a text: runs of letters and digits in lower case, each as the low 32 bits of its FNV-1a hash. A character of a
/// script that is written without spaces is a word. Two different words get the same number about once in 4 billion pairs.
pub fn words(text: &str) -> Vec<u32> {
    let mut words = Vec::with_capacity(text.len() / 6 + 1);
    let mut hash = FNV_START;
    let mut open = false;
    let mut close = |open: &mut bool, hash: &mut u64| {
        if std::mem::take(open) {
            words.push(mix(std::mem::replace(hash, FNV_START)) as u32);
        }
    };
    for character in text.chars() {
        if character.is_ascii_alphanumeric() {
            hash = fnv(hash, u32::from(character.to_ascii_lowercase()));
            open = true;
        } else if character.is_ascii() || !character.is_alphanumeric() {
            close(&mut open, &mut hash);
        } else {
            let alone = is_unspaced(character);
            if alone {
                close(&mut open, &mut hash);
            }
            hash = character.to_lowercase().fold(hash, |hash, lower| fnv(hash, u32::from(lower)));
            open = true;
            if alone {
                close(&mut open, &mut hash);
            }
        }
    }
    close(&mut open, &mut hash);
    words
}

/// Different pairs of neighbouring words, sorted; the ends of the text count as words, so one word makes two pairs.
pub fn pairs(words: &[u32]) -> Vec<u32> {
    if words.is_empty() {
        return Vec::new();
    }
    let ends = |left: u64, right: u64| mix((left << 32) ^ right) as u32;
    let mut pairs: Vec<u32> = words.windows(2).map(|pair| ends(u64::from(pair[0]) + 1, u64::from(pair[1]) + 1)).collect();
    pairs.push(ends(0, u64::from(words[0]) + 1));
    pairs.push(ends(u64::from(words[words.len() - 1]) + 1, 0));
    pairs.sort_unstable();
    pairs.dedup();
    pairs
}

/// Jaccard similarity of two sorted sets: shared by all. Two empty sets are alike.
pub fn similarity(left: &[u32], right: &[u32]) -> f64 {
    let (mut i, mut j, mut shared) = (0, 0, 0usize);
    while i < left.len() && j < right.len() {
        let (a, b) = (left[i], right[j]);
        shared += usize::from(a == b);
        i += usize::from(a <= b);
        j += usize::from(b <= a);
    }
    let all = left.len() + right.len() - shared;
    if all == 0 { 1.0 } else { shared as f64 / all as f64 }
}

/// A number for a sequence of words.
pub fn sequence(words: &[u32]) -> u64 {
    words.iter().fold(words.len() as u64, |state, word| mix(state.rotate_left(5) ^ u64::from(*word)))
}

/// What people wrote in a prompt: all messages but instructions of the system, which every row of an application shares.
pub fn spoken(prompt: &[Message]) -> String {
    let said = prompt.iter().filter(|message| !matches!(message.role.as_str(), "system" | "developer"));
    said.map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n")
}

const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

fn fnv(hash: u64, value: u32) -> u64 {
    (hash ^ u64::from(value)).wrapping_mul(0x100_0000_01b3)
}

/// Han, kana, Thai, Lao, Myanmar, Khmer.
/// Of a script that is written without spaces.
pub(crate) fn is_unspaced(character: char) -> bool {
    matches!(character,
        '\u{0e00}'..='\u{0eff}' | '\u{1000}'..='\u{109f}' | '\u{1780}'..='\u{17ff}' | '\u{3040}'..='\u{30ff}'
        | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_spaces_and_punctuation_do_not_count() {
        assert_eq!(words("Hello,  World!"), words("hello world"));
        assert_ne!(words("hello world"), words("hello word"));
        assert_eq!(words("Straße ÄRGER"), words("straße, ärger"));
        assert_eq!(words("你好 world").len(), 3);
        assert!(words(" … !").is_empty());
    }

    #[test]
    fn similarity_is_shared_pairs_of_all_pairs() {
        // ^a ab bc c$ and ^a ab bd d$: two of six.
        assert!((similarity(&pairs(&words("a b c")), &pairs(&words("a b d"))) - 2.0 / 6.0).abs() < 1e-12);
        assert_eq!(similarity(&pairs(&words("a b")), &pairs(&words("A b."))), 1.0);
        assert_eq!(similarity(&[], &[]), 1.0);
        assert_eq!(similarity(&[], &pairs(&words("a"))), 0.0);
        assert_ne!(sequence(&words("a b")), sequence(&words("b a")));
    }
}
