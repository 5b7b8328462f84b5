//! Stop strings in a stream of text.
//!
//! The text is cut at the stop string that is complete first, read character by character, so the result does not depend on how
//! tokens split the text. Text that may still become a stop string is held back.

/// Finds stop strings in one choice's text.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    keep_stop: bool,
    held: String,
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
        Self { stops: stops.to_vec(), keep_stop, held: String::new() }
    }

    /// Adds text; returns what became certain, or the end.
    pub fn push(&mut self, text: String) -> Result<String, Stopped> {
        if self.stops.is_empty() {
            return Ok(text);
        }
        if text.is_empty() {
            return Ok(text);
        }
        self.held.push_str(&text);
        let found =
            self.stops.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|start| (start + stop.len(), start, stop)));
        if let Some((end, start, stop)) = found.min_by_key(|(end, start, _)| (*end, *start)) {
            let stop = stop.clone();
            self.held.truncate(if self.keep_stop { end } else { start });
            return Err(Stopped { text: std::mem::take(&mut self.held), stop });
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Ok(std::mem::replace(&mut self.held, rest))
    }

    /// No more text comes: what was held back is certain.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that is a beginning of `stop`, but not all of it. Both are UTF-8, so it starts and ends
/// between characters.
fn overlap(text: &str, stop: &str) -> usize {
    let (text, stop) = (text.as_bytes(), stop.as_bytes());
    (1..stop.len().min(text.len() + 1)).rev().find(|n| text.ends_with(&stop[..*n])).unwrap_or(0)
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
            match stop {
                None => prop_assert_eq!(split.concat(), text),
                Some(_) if !keep => prop_assert!(stops.iter().all(|s| !split.concat().contains(s))),
                Some(stop) => prop_assert!(split.concat().ends_with(&stop)),
            }
        }
    }
}
