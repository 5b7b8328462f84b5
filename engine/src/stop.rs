//! Stop strings in a stream of text.
//!
//! The text is cut at the stop string that is complete first, read character by character, so the result does not depend on how
//! tokens split the text. Text that may still become a stop string is held back.
//!
//! Each stop string is followed by its own automaton (Knuth, Morris & Pratt 1977), so a byte of text costs the same few steps whatever
//! came before it: a client cannot slow the engine down with stop strings that almost match.

/// Finds stop strings in one choice's text.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    keep_stop: bool,
    held: String,
}

/// A stop string, and how much of it the text so far ends with.
#[derive(Clone, Debug)]
struct Stop {
    text: String,
    /// After `n + 1` bytes: the longest shorter beginning that those end with.
    shorter: Vec<usize>,
    matched: usize,
}

impl Stop {
    fn new(text: &str) -> Self {
        let mut shorter = vec![0; text.len()];
        let mut matched = 0;
        for (n, &byte) in text.as_bytes().iter().enumerate().skip(1) {
            matched = advance(text, &shorter, matched, byte);
            shorter[n] = matched;
        }
        Self { text: text.to_owned(), shorter, matched: 0 }
    }

    /// Reads a byte; whether it completes the stop string.
    fn read(&mut self, byte: u8) -> bool {
        self.matched = advance(&self.text, &self.shorter, self.matched, byte);
        self.matched == self.text.len()
    }
}

/// The longest beginning of `text` that ends with `byte` after `matched` of its bytes.
fn advance(text: &str, shorter: &[usize], mut matched: usize, byte: u8) -> usize {
    loop {
        if text.as_bytes().get(matched) == Some(&byte) {
            return matched + 1;
        }
        match matched.checked_sub(1) {
            Some(last) => matched = shorter[last],
            None => return 0,
        }
    }
}

/// A stop string was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Text that is certain: what came before the stop string (and the stop string, when it is to be kept).
    pub text: String,
    /// The stop string.
    pub stop: String,
}

impl StopMatcher {
    /// Looks for `stops`, none of them empty; `keep_stop` leaves the found one in the text.
    pub fn new(stops: &[String], keep_stop: bool) -> Self {
        Self { stops: stops.iter().map(|stop| Stop::new(stop)).collect(), keep_stop, held: String::new() }
    }

    /// Adds text; returns what became certain, or the end.
    pub fn push(&mut self, text: String) -> Result<String, Stopped> {
        if self.stops.is_empty() {
            return Ok(text);
        }
        for (at, byte) in text.bytes().enumerate() {
            let ends_here = self.stops.iter_mut().filter_map(|stop| stop.read(byte).then_some(&stop.text));
            // Of those that end here, the longest began first.
            let Some(stop) = ends_here.max_by_key(|stop| stop.len()).cloned() else { continue };
            self.held.push_str(&text[..=at]);
            if !self.keep_stop {
                self.held.truncate(self.held.len() - stop.len());
            }
            self.stops.iter_mut().for_each(|stop| stop.matched = 0);
            return Err(Stopped { text: std::mem::take(&mut self.held), stop });
        }
        let keep = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        self.held.push_str(&text);
        let rest = self.held.split_off(self.held.len() - keep);
        Ok(std::mem::replace(&mut self.held, rest))
    }

    /// No more text comes: what was held back is certain.
    pub fn finish(&mut self) -> String {
        self.stops.iter_mut().for_each(|stop| stop.matched = 0);
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], keep: bool, pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut matcher = StopMatcher::new(&stops, keep);
        let mut out = Vec::new();
        for piece in pieces {
            match matcher.push(piece.to_string()) {
                Ok(text) => out.push(text),
                Err(stopped) => {
                    out.push(stopped.text);
                    return (out, Some(stopped.stop));
                }
            }
        }
        out.push(matcher.finish());
        (out, None)
    }

    #[test]
    fn a_stop_string_that_straddles_tokens_does_not_leak() {
        let (out, stop) = run(&["<end>"], false, &["hello <", "en", "d> more"]);
        assert_eq!(out, ["hello ", "", ""]);
        assert_eq!(stop.as_deref(), Some("<end>"));
    }

    #[test]
    fn a_false_beginning_is_let_go() {
        let (out, stop) = run(&["<end>"], false, &["a <", "en", "ough"]);
        assert_eq!(out, ["a ", "", "<enough", ""]);
        assert_eq!(stop, None);
    }

    #[test]
    fn held_text_comes_out_at_the_end() {
        let (out, _) = run(&["\n\n"], false, &["line\n"]);
        assert_eq!(out, ["line", "\n"]);
    }

    #[test]
    fn the_stop_string_is_kept_when_asked_for_and_nothing_after_it() {
        let (out, _) = run(&["STOP"], true, &["go ST", "OP and on"]);
        assert_eq!(out, ["go ", "STOP"]);
    }

    #[test]
    fn the_stop_string_that_is_complete_first_wins() {
        let (out, stop) = run(&["abcde", "cd"], false, &["xabcdef"]);
        assert_eq!((out.concat(), stop.as_deref()), ("xab".to_string(), Some("cd")));
    }

    #[test]
    fn characters_of_several_bytes_are_never_split() {
        let (out, stop) = run(&["é!"], false, &["caf", "é", "?", "é", "!"]);
        assert_eq!(out, ["caf", "", "é?", "", ""]);
        assert_eq!(stop.as_deref(), Some("é!"));
    }

    #[test]
    fn text_that_goes_on_almost_matching_is_let_go() {
        // What the text ends with is always the beginning of sixteen long stop strings, none of which is ever complete.
        let stops: Vec<String> = (0..16u8).map(|i| format!("{}{}", "a".repeat(511), char::from(b'b' + i))).collect();
        let mut matcher = StopMatcher::new(&stops, false);
        let mut out = 0;
        for _ in 0..20_000 {
            out += matcher.push("aaaaaaaaaa".to_owned()).unwrap().len();
        }
        assert_eq!(out, 200_000 - 511);
        assert_eq!(matcher.finish().len(), 511);
    }

    proptest! {
        #[test]
        fn the_result_does_not_depend_on_how_the_text_is_split(
            text in "[abé]{0,24}", stops in prop::collection::vec("[abé]{1,4}", 1..4), cuts in prop::collection::vec(any::<bool>(), 24), keep: bool,
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let mut pieces = vec![String::new()];
            for (c, cut) in text.chars().zip(&cuts) {
                if *cut { pieces.push(String::new()); }
                pieces.last_mut().unwrap().push(c);
            }
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let singles: Vec<String> = text.chars().map(String::from).collect();
            let singles: Vec<&str> = singles.iter().map(String::as_str).collect();
            let (split, stop) = run(&stops, keep, &pieces);
            let (whole, stop_whole) = run(&stops, keep, &singles);
            prop_assert_eq!(split.concat(), whole.concat());
            prop_assert_eq!(&stop, &stop_whole);
            // By definition: the occurrence that ends first, of those the one that begins first.
            let ends = |s: &&str| text.match_indices(*s).map(|(at, s)| (at + s.len(), at)).min();
            let first = stops.iter().filter_map(ends).min();
            let cut = first.map_or(text.len(), |(end, start)| if keep { end } else { start });
            prop_assert_eq!(split.concat(), &text[..cut]);
            prop_assert_eq!(stop.as_deref(), first.map(|(end, start)| &text[start..end]));
            match stop {
                None => prop_assert_eq!(split.concat(), text),
                Some(_) if !keep => prop_assert!(stops.iter().all(|s| !split.concat().contains(s))),
                Some(stop) => prop_assert!(split.concat().ends_with(&stop)),
            }
        }
    }
}
