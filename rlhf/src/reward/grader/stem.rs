//! Stems of English words: the algorithm of M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980, without later
//! changes but Porter's own, that words of one or two letters stay as they are.

/// Longest word that is taken for one, in letters.
const MAX_LENGTH: usize = 64;

/// The stem of a word in lower case; words with other characters than a to z stay as they are.
pub fn stem(word: &str) -> String {
    if !(3..=MAX_LENGTH).contains(&word.len()) || !word.bytes().all(|b| b.is_ascii_lowercase()) {
        return word.to_owned();
    }
    let mut word = word.to_owned();
    plurals(&mut word);
    past(&mut word);
    if word.ends_with('y') && has_vowel(&word[..word.len() - 1]) {
        word.replace_range(word.len() - 1.., "i");
    }
    replace_first(&mut word, &DOUBLE_SUFFIXES, 0);
    replace_first(&mut word, &SUFFIXES, 0);
    strip(&mut word);
    tidy(&mut word);
    word
}

/// Step 2: where the stem has a measure above 0.
const DOUBLE_SUFFIXES: [(&str, &str); 20] = [
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("abli", "able"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
];

/// Step 3: the same.
const SUFFIXES: [(&str, &str); 7] =
    [("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", "")];

/// Step 4: gone where the stem has a measure above 1.
const ENDINGS: [&str; 19] = [
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti", "ous",
    "ive", "ize",
];

/// Step 1a.
fn plurals(word: &mut String) {
    if word.ends_with("sses") || word.ends_with("ies") {
        word.truncate(word.len() - 2);
    } else if word.ends_with('s') && !word.ends_with("ss") {
        word.pop();
    }
}

/// Step 1b.
fn past(word: &mut String) {
    if let Some(stem) = word.strip_suffix("eed") {
        if measure(stem) > 0 {
            word.pop();
        }
        return;
    }
    let Some(stem) = ["ed", "ing"].into_iter().find_map(|suffix| word.strip_suffix(suffix)) else { return };
    if !has_vowel(stem) {
        return;
    }
    word.truncate(stem.len());
    if word.ends_with("at") || word.ends_with("bl") || word.ends_with("iz") {
        word.push('e');
    } else if ends_double(word) && !word.ends_with(['l', 's', 'z']) {
        word.pop();
    } else if measure(word) == 1 && ends_short(word) {
        word.push('e');
    }
}

/// The longest suffix of the list that the word has decides, whether or not its stem is long enough.
fn replace_first(word: &mut String, suffixes: &[(&str, &str)], above: usize) {
    let found = suffixes.iter().filter(|(suffix, _)| word.ends_with(suffix)).max_by_key(|(suffix, _)| suffix.len());
    if let Some((suffix, other)) = found {
        let stem = word.len() - suffix.len();
        if measure(&word[..stem]) > above {
            word.replace_range(stem.., other);
        }
    }
}

/// Step 4.
fn strip(word: &mut String) {
    let Some(suffix) = ENDINGS.into_iter().filter(|suffix| word.ends_with(suffix)).max_by_key(|suffix| suffix.len()) else {
        return;
    };
    let stem = &word[..word.len() - suffix.len()];
    if measure(stem) > 1 && (suffix != "ion" || stem.ends_with(['s', 't'])) {
        word.truncate(stem.len());
    }
}

/// Step 5.
fn tidy(word: &mut String) {
    if let Some(stem) = word.strip_suffix('e') {
        let measure = measure(stem);
        if measure > 1 || (measure == 1 && !ends_short(stem)) {
            word.pop();
        }
    }
    if word.ends_with("ll") && measure(&word[..word.len() - 1]) > 1 {
        word.pop();
    }
}

/// A y is a vowel behind a consonant.
fn is_consonant(word: &[u8], at: usize) -> bool {
    match word[at] {
        b'a' | b'e' | b'i' | b'o' | b'u' => false,
        b'y' => at == 0 || !is_consonant(word, at - 1),
        _ => true,
    }
}

fn has_vowel(word: &str) -> bool {
    (0..word.len()).any(|at| !is_consonant(word.as_bytes(), at))
}

/// How often a consonant follows a vowel: m in [C](VC)^m[V].
fn measure(word: &str) -> usize {
    let word = word.as_bytes();
    (1..word.len()).filter(|at| is_consonant(word, *at) && !is_consonant(word, at - 1)).count()
}

fn ends_double(word: &str) -> bool {
    let word = word.as_bytes();
    let last = word.len().wrapping_sub(1);
    word.len() > 1 && word[last] == word[last - 1] && is_consonant(word, last)
}

/// Consonant, vowel, consonant, the last being none of w, x, y.
fn ends_short(word: &str) -> bool {
    let bytes = word.as_bytes();
    let length = bytes.len();
    length > 2
        && is_consonant(bytes, length - 1)
        && !is_consonant(bytes, length - 2)
        && is_consonant(bytes, length - 3)
        && !word.ends_with(['w', 'x', 'y'])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of the paper, step by step, each as the whole algorithm leaves it.
    #[test]
    fn words_of_the_paper_have_its_stems() {
        for (word, expected) in [
            ("caresses", "caress"),
            ("ponies", "poni"),
            ("ties", "ti"),
            ("cats", "cat"),
            ("feed", "feed"),
            ("agreed", "agre"),
            ("plastered", "plaster"),
            ("bled", "bled"),
            ("motoring", "motor"),
            ("sing", "sing"),
            ("conflated", "conflat"),
            ("troubled", "troubl"),
            ("sized", "size"),
            ("hopping", "hop"),
            ("tanned", "tan"),
            ("falling", "fall"),
            ("hissing", "hiss"),
            ("fizzed", "fizz"),
            ("failing", "fail"),
            ("filing", "file"),
            ("happy", "happi"),
            ("sky", "sky"),
            ("relational", "relat"),
            ("conditional", "condit"),
            ("rational", "ration"),
            ("vietnamization", "vietnam"),
            ("operator", "oper"),
            ("hopefulness", "hope"),
            ("triplicate", "triplic"),
            ("electrical", "electr"),
            ("goodness", "good"),
            ("adjustment", "adjust"),
            ("adoption", "adopt"),
            ("probate", "probat"),
            ("rate", "rate"),
            ("cease", "ceas"),
            ("controlling", "control"),
            ("roll", "roll"),
            ("generalizations", "gener"),
            ("oscillators", "oscil"),
            ("is", "is"),
            ("naïve", "naïve"),
        ] {
            assert_eq!(stem(word), expected, "{word}");
        }
    }
}
