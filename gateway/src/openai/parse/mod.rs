//! What a model writes, taken apart as it comes: reasoning, content and tool calls.
//!
//! Each family of models writes them in its own way. A parser is a pure function of the text: however the text is cut into
//! pieces, the deltas, joined, are the same. What may still turn out to be part of a marker is held back, and nothing else.

mod detect;
mod json_calls;
mod json_object;
mod marker;
mod piece;
mod python_literal;
mod pythonic;
mod reasoning;
mod tagged;

pub use detect::{ParserChoice, Parsers};
pub use json_calls::{JsonSyntax, Writing};
pub use reasoning::ReasoningTags;
pub use tagged::TaggedSyntax;

use crate::openai::chat_output::Delta;
use json_calls::JsonCalls;
use piece::{Advance, Piece, Pieces};
use pythonic::PythonicCalls;
use reasoning::Reasoning;
use serde_json::Value;
use std::sync::Arc;
use tagged::TaggedCalls;
use tidemill_engine::TokenRecord;

/// How a model writes tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallFormat {
    /// Arguments as JSON, between marks.
    Json(&'static JsonSyntax),
    /// A list of Python calls.
    Pythonic,
    /// A tag for each argument.
    Tagged(&'static TaggedSyntax),
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// The schema of its arguments.
    pub schema: Option<Value>,
}

impl CallFormat {
    /// Its name in the configuration.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Json(syntax) => syntax.name,
            Self::Pythonic => "pythonic",
            Self::Tagged(syntax) => syntax.name,
        }
    }

    /// The form in which a grammar makes the model write calls: arguments in JSON, for only those can be held to a schema.
    pub fn constrained(&self) -> &'static JsonSyntax {
        match self {
            Self::Json(syntax) => syntax,
            Self::Pythonic => &JsonSyntax::XLAM,
            Self::Tagged(_) => &JsonSyntax::HERMES,
        }
    }

    /// Every family.
    pub fn all() -> impl Iterator<Item = Self> {
        let tagged = TaggedSyntax::ALL.into_iter().map(Self::Tagged);
        JsonSyntax::ALL.into_iter().map(Self::Json).chain([Self::Pythonic]).chain(tagged)
    }

    /// The family of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::all().find(|format| format.name() == name)
    }

    /// The family's marks.
    pub fn marks(&self) -> Vec<&'static str> {
        match self {
            Self::Json(syntax) => syntax.marks().collect(),
            Self::Pythonic => pythonic::MARKS.to_vec(),
            Self::Tagged(syntax) => syntax.marks(),
        }
    }
}

/// How the answers to one request are to be read. The default takes all for content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutputFormat {
    /// Marks around reasoning.
    pub reasoning: Option<ReasoningTags>,
    /// The prompt has opened the reasoning already.
    pub in_reasoning: bool,
    /// The prompt has closed the reasoning already.
    pub reasoned: bool,
    /// `None` where the request offers no tools: then nothing is a call.
    pub calls: Option<CallFormat>,
    /// Functions that the model may call.
    pub functions: Arc<[Function]>,
    /// Only the first call counts.
    pub single_call: bool,
    /// The answer's id, of which those of its calls are made.
    pub answer: u128,
}

/// Reads the text of one choice.
#[derive(Debug)]
pub(super) struct Parser {
    format: OutputFormat,
    choice: usize,
    pending: String,
    stage: Stage,
    pieces: Pieces,
    /// Calls begun.
    calls: usize,
    /// Tokens whose text is not certain yet.
    held: Vec<TokenRecord>,
    /// Tokens that only were marks.
    markup: Vec<u32>,
    reasoning_tokens: usize,
}

#[derive(Debug)]
enum Stage {
    Reasoning(Reasoning),
    Content,
    Json(JsonCalls),
    Pythonic(PythonicCalls),
    Tagged(TaggedCalls),
}

impl Parser {
    pub(super) fn new(format: &OutputFormat, choice: usize) -> Self {
        let mut parser = Self {
            format: format.clone(),
            choice,
            pending: String::new(),
            stage: Stage::Content,
            pieces: Pieces::default(),
            calls: 0,
            held: Vec::new(),
            markup: Vec::new(),
            reasoning_tokens: 0,
        };
        parser.stage = match format.reasoning {
            Some(tags) => Stage::Reasoning(Reasoning::new(tags, format.in_reasoning)),
            None => parser.answer(),
        };
        parser
    }

    /// What follows the reasoning.
    fn answer(&self) -> Stage {
        let functions = Arc::clone(&self.format.functions);
        match self.format.calls {
            None => Stage::Content,
            Some(CallFormat::Json(syntax)) => Stage::Json(JsonCalls::new(syntax, functions)),
            Some(CallFormat::Pythonic) => Stage::Pythonic(PythonicCalls::new(functions)),
            Some(CallFormat::Tagged(syntax)) => Stage::Tagged(TaggedCalls::new(syntax, functions)),
        }
    }

    /// Whether a call was made.
    pub(super) fn called(&self) -> bool {
        self.calls > 0
    }

    /// Tokens of reasoning so far.
    pub(super) fn reasoning_tokens(&self) -> usize {
        self.reasoning_tokens
    }

    /// A token was generated and made `text` certain; `keep` its record when someone reports it.
    pub(super) fn token(&mut self, record: TokenRecord, keep: bool, text: &str, deltas: &mut Vec<Delta>) {
        if keep {
            self.held.push(record);
        }
        let before = self.is_reasoning();
        self.push(text, false, deltas);
        self.reasoning_tokens += usize::from(before || self.is_reasoning());
        // A text that was taken and made nothing was a mark.
        if deltas.is_empty() && !text.is_empty() && self.pending.is_empty() {
            self.markup.extend(self.held.drain(..).map(|record| record.token));
        }
    }

    /// The choice ends with `text`.
    pub(super) fn end(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        self.push(text, true, deltas);
        if deltas.is_empty() {
            if !self.called() && !self.is_reasoning() && !self.held.is_empty() {
                // Tokens without a text of their own are still reported.
                deltas.push(Delta::Text(String::new()));
            } else {
                self.markup.extend(self.held.drain(..).map(|record| record.token));
            }
        }
    }

    /// The last token, when it only ended the choice.
    pub(super) fn take_end_marker(&mut self, is_marker: impl Fn(u32) -> bool) -> Option<u32> {
        self.held.pop_if(|last| is_marker(last.token)).map(|last| last.token)
    }

    /// The tokens behind the deltas since the last time: those of text, and before them those of marks.
    pub(super) fn take_tokens(&mut self) -> (Vec<TokenRecord>, Vec<u32>) {
        (std::mem::take(&mut self.held), std::mem::take(&mut self.markup))
    }

    fn is_reasoning(&self) -> bool {
        matches!(&self.stage, Stage::Reasoning(reasoning) if reasoning.is_open())
    }

    fn push(&mut self, text: &str, last: bool, deltas: &mut Vec<Delta>) {
        self.pending.push_str(text);
        loop {
            let (pending, pieces) = (&mut self.pending, &mut self.pieces);
            let advance = match &mut self.stage {
                Stage::Reasoning(reasoning) => reasoning.advance(pending, last, pieces),
                Stage::Json(calls) => calls.advance(pending, last, pieces),
                Stage::Pythonic(calls) => calls.advance(pending, last, pieces),
                Stage::Tagged(calls) => calls.advance(pending, last, pieces),
                Stage::Content => {
                    pieces.text(pending);
                    pending.clear();
                    Advance::Wait
                }
            };
            match advance {
                Advance::Again => {}
                Advance::Wait => break,
                Advance::Over => self.stage = self.answer(),
            }
        }
        for piece in self.pieces.drain() {
            self.write(piece, deltas);
        }
    }

    fn write(&mut self, piece: Piece, deltas: &mut Vec<Delta>) {
        let is_surplus = |calls: usize| self.format.single_call && calls > 1;
        match piece {
            Piece::Text(text) => deltas.push(Delta::Text(text)),
            Piece::Reasoning(text) => deltas.push(Delta::Reasoning(text)),
            Piece::Call(name) => {
                self.calls += 1;
                if !is_surplus(self.calls) {
                    let index = self.calls - 1;
                    let id = call_id(self.format.answer, self.choice, index);
                    deltas.push(Delta::Call { index, id, name });
                }
            }
            Piece::Arguments(text) => {
                if !is_surplus(self.calls) {
                    deltas.push(Delta::Arguments { index: self.calls.saturating_sub(1), text });
                }
            }
        }
    }
}

/// `call_` and 24 letters and digits, fixed by the answer, the choice and the call's place.
fn call_id(answer: u128, choice: usize, index: usize) -> String {
    const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut hasher = blake3::Hasher::new();
    hasher.update(&answer.to_le_bytes());
    hasher.update(&(choice as u64).to_le_bytes());
    hasher.update(&(index as u64).to_le_bytes());
    let letter = |byte: &u8| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()]);
    let letters: String = hasher.finalize().as_bytes().iter().take(24).map(letter).collect();
    format!("call_{letters}")
}

#[cfg(test)]
mod tests;
