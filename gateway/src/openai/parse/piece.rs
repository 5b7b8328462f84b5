//! What parsers hand on.

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Content.
    Text(String),
    /// Reasoning.
    Reasoning(String),
    /// A call of this function begins.
    Call(String),
    /// More of the arguments of the last call.
    Arguments(String),
}

/// Pieces in order; neighbours of one kind are joined.
#[derive(Debug, Default)]
pub(super) struct Pieces(Vec<Piece>);

/// How a parser left the text that it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Advance {
    /// It took some: call it again.
    Again,
    /// It needs more text.
    Wait,
    /// Its part is over: the rest is another's.
    Over,
}

impl Pieces {
    pub(super) fn text(&mut self, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(Piece::Text(last)) => last.push_str(text),
            _ => self.0.push(Piece::Text(text.to_owned())),
        }
    }

    pub(super) fn reasoning(&mut self, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(Piece::Reasoning(last)) => last.push_str(text),
            _ => self.0.push(Piece::Reasoning(text.to_owned())),
        }
    }

    pub(super) fn call(&mut self, name: &str) {
        self.0.push(Piece::Call(name.to_owned()));
    }

    pub(super) fn arguments(&mut self, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(Piece::Arguments(last)) => last.push_str(text),
            _ => self.0.push(Piece::Arguments(text.to_owned())),
        }
    }

    pub(super) fn drain(&mut self) -> Vec<Piece> {
        std::mem::take(&mut self.0)
    }
}
