//! The text of one choice, and when it ends.

use crate::detokenizer::Detokenizer;
use crate::request::{FinishReason, SamplingParams, StopCause};
use crate::stop::{StopMatcher, Stopped};

/// Turns one choice's tokens into text and decides when it is finished.
pub struct ChoiceText {
    stream: Detokenizer,
    stops: StopMatcher,
    generated: usize,
    limit: usize,
}

/// What a token led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Text that became certain.
    pub text: String,
    /// Set when the choice ended with this token.
    pub end: Option<End>,
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Why.
    pub reason: FinishReason,
    /// What stopped it.
    pub stop: Option<StopCause>,
    /// Text that had been held back.
    pub text: String,
}

impl ChoiceText {
    /// At most `limit` tokens, by `max_tokens` and the context.
    pub fn new(stream: Detokenizer, sampling: &SamplingParams, limit: usize) -> Self {
        let stops = StopMatcher::new(&sampling.stop, sampling.include_stop_str_in_output);
        Self { stream, stops, generated: 0, limit }
    }

    /// Tokens so far.
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// Adds a token.
    pub fn push(&mut self, token: u32, sampling: &SamplingParams, end_of_turn: &[u32]) -> Piece {
        self.generated += 1;
        if let Some(cause) = stop_cause(token, sampling, end_of_turn) {
            let mut text = String::new();
            if sampling.include_stop_str_in_output {
                self.stream.push(token, &mut text);
            }
            let text = self.stops.push(text).unwrap_or_else(|stopped| stopped.text);
            return Piece { text, end: Some(self.end(FinishReason::Stop, Some(cause))) };
        }
        let mut text = String::new();
        self.stream.push(token, &mut text);
        if self.generated <= sampling.min_tokens {
            // Stop strings do not match yet, so nothing is held back either.
            let end = (self.generated >= self.limit).then(|| self.end(FinishReason::Length, None));
            return Piece { text, end };
        }
        match self.stops.push(text) {
            Ok(text) => {
                let end = (self.generated >= self.limit).then(|| self.end(FinishReason::Length, None));
                Piece { text, end }
            }
            Err(Stopped { text, stop }) => {
                let end = End { reason: FinishReason::Stop, stop: Some(StopCause::Text(stop)), text: String::new() };
                Piece { text, end: Some(end) }
            }
        }
    }

    /// Ends the choice for a reason from outside.
    pub fn end(&mut self, reason: FinishReason, stop: Option<StopCause>) -> End {
        let mut rest = String::new();
        self.stream.finish(&mut rest);
        match self.stops.push(rest) {
            Ok(mut text) => {
                text.push_str(&self.stops.finish());
                End { reason, stop, text }
            }
            // The last half character completed a stop string.
            Err(Stopped { text, stop }) => End { reason: FinishReason::Stop, stop: Some(StopCause::Text(stop)), text },
        }
    }
}

fn stop_cause(token: u32, sampling: &SamplingParams, end_of_turn: &[u32]) -> Option<StopCause> {
    if sampling.stop_token_ids.contains(&token) {
        Some(StopCause::Token(token))
    } else if (!sampling.ignore_eos || sampling.grammar.is_some()) && end_of_turn.contains(&token) {
        Some(StopCause::EndOfTurn(token))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::letters::letters;

    /// Tokens 0 to 25 are letters, 26 is the first byte of 'é'.
    fn choice(sampling: &SamplingParams, limit: usize) -> ChoiceText {
        ChoiceText::new(Detokenizer::new(&letters(), sampling.skip_special_tokens), sampling, limit)
    }

    fn run(sampling: &SamplingParams, limit: usize, tokens: &[u32]) -> (String, Option<End>, usize) {
        let mut choice = choice(sampling, limit);
        let mut text = String::new();
        for token in tokens {
            let piece = choice.push(*token, sampling, &[24]);
            text.push_str(&piece.text);
            if let Some(end) = piece.end {
                text.push_str(&end.text);
                return (text, Some(end), choice.generated());
            }
        }
        (text, None, choice.generated())
    }

    #[test]
    fn an_end_of_turn_token_ends_without_text_and_lets_go_of_held_text() {
        let sampling = SamplingParams { stop: vec!["bcd".into()], ..Default::default() };
        let (text, end, generated) = run(&sampling, 10, &[0, 1, 2, 24, 3]);
        let end = end.unwrap();
        assert_eq!((text.as_str(), generated), ("abc", 4));
        assert_eq!((end.reason, end.stop), (FinishReason::Stop, Some(StopCause::EndOfTurn(24))));
    }

    #[test]
    fn ignore_eos_goes_on_but_stop_token_ids_still_stop() {
        let sampling = SamplingParams { ignore_eos: true, stop_token_ids: vec![5], ..Default::default() };
        let (text, end, _) = run(&sampling, 10, &[0, 24, 1, 5]);
        assert_eq!(text, "ayb");
        assert_eq!(end.unwrap().stop, Some(StopCause::Token(5)));
    }

    #[test]
    fn max_tokens_ends_with_length_and_flushes_half_a_character() {
        let (text, end, _) = run(&SamplingParams::default(), 2, &[0, 26, 1]);
        assert_eq!(text, "a\u{fffd}");
        assert_eq!(end.unwrap().reason, FinishReason::Length);
    }

    #[test]
    fn a_stop_string_on_the_last_token_is_stop_not_length() {
        let sampling = SamplingParams { stop: vec!["bc".into()], ..Default::default() };
        let (text, end, _) = run(&sampling, 3, &[0, 1, 2]);
        let end = end.unwrap();
        assert_eq!((text.as_str(), end.reason, end.stop), ("a", FinishReason::Stop, Some(StopCause::Text("bc".into()))));
    }

    #[test]
    fn stop_strings_match_only_after_min_tokens() {
        let sampling = SamplingParams { stop: vec!["bc".into()], min_tokens: 2, ..Default::default() };
        // "bc" straddles the limit of two tokens: only text after it counts.
        let (text, end, _) = run(&sampling, 10, &[0, 1, 2, 1, 2, 3]);
        assert_eq!((text.as_str(), end.unwrap().stop), ("abc", Some(StopCause::Text("bc".into()))));
    }
}
