//! Structured output: what a text must look like, compiled into masks over the vocabulary.
//!
//! A [`Constraint`] is what a client asks for. [`crate::Engine::compile`] makes a [`Grammar`] of it, once for any number of
//! requests; a request carries it in [`crate::SamplingParams::grammar`]. Each choice of the request has a follower, which hands
//! every drawn token to a thread that works out the mask of the next one while the model computes; the draw waits for it. A choice whose
//! masks take long sits out the steps that others need, until its mask is there: one slow grammar slows itself.
//!
//! The automaton is llguidance's. What stands before it is ours: the check of a schema, with the path of what cannot be honoured.

mod compiler;
mod constraint;
mod crew;
mod follower;
mod gbnf;
mod schema;
#[cfg(test)]
mod tests;
mod text;
mod vocabulary;

use crew::Crew;
use llguidance::{Matcher, TokenParser};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) use compiler::Compiler;
pub use compiler::MAX_CONSTRAINT_BYTES;
pub use constraint::{Constraint, ConstraintKey};
pub(crate) use follower::{Follower, Verdict};
pub use schema::for_lark;

/// States that the automaton of a grammar may have. It grows as texts visit it, for all requests together.
const MOST_LEXER_STATES: usize = 30_000;
/// New requests get a fresh automaton when the shared one is this large, so that one never meets the bound of another's making.
const SHARED_LEXER_STATES: usize = MOST_LEXER_STATES / 3;

/// A compiled constraint: immutable to its users, shared by all requests that ask for the same.
pub struct Grammar {
    source: Constraint,
    /// As it was compiled.
    pristine: Mutex<TokenParser>,
    /// What new requests begin with: its automaton is shared, and knows what earlier requests have visited.
    shared: Mutex<TokenParser>,
    /// The mask of the first token.
    first: Vec<u32>,
    ends: Arc<[u32]>,
    crew: Arc<Crew>,
}

impl Grammar {
    fn new(source: Constraint, parser: TokenParser, crew: Arc<Crew>, ends: Arc<[u32]>) -> Result<Self, GrammarError> {
        let shared = parser.deep_clone();
        let mut matcher = Matcher::new(Ok(shared.clone()));
        let first = match matcher.compute_mask() {
            Ok(mask) => mask.into(),
            Err(_) => return Err(GrammarError::whole("no text satisfies it, or its beginning is too complex; make it simpler")),
        };
        Ok(Self { source, pristine: Mutex::new(parser), shared: Mutex::new(shared), first, ends, crew })
    }

    /// What it was compiled from.
    pub fn source(&self) -> &Constraint {
        &self.source
    }

    /// A matcher at the beginning.
    fn matcher(&self) -> Matcher {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        // Asking panics when a sequence's panic has left the automaton behind.
        let states = catch_unwind(AssertUnwindSafe(|| shared.parser.lexer_stats()));
        if states.map_or(true, |stats| stats.error || stats.num_states > SHARED_LEXER_STATES) {
            *shared = self.fresh();
        }
        Matcher::new(Ok(shared.clone()))
    }

    /// Lets new requests begin with a fresh automaton.
    fn renew(&self) {
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = self.fresh();
    }

    fn fresh(&self) -> TokenParser {
        self.pristine.lock().unwrap_or_else(PoisonError::into_inner).deep_clone()
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Grammar").field(&self.source).finish()
    }
}

/// Why a constraint cannot be honoured. The text is fit for the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", place(path))]
pub struct GrammarError {
    /// Where in a schema: `properties.name.pattern`; empty for the whole constraint.
    pub path: String,
    /// The schema keyword at fault.
    pub keyword: Option<String>,
    /// What is wrong and what would be right.
    pub message: String,
    /// Nothing is wrong with the constraint: the server has no room for it now.
    pub busy: bool,
}

fn place(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!("at {path}: ") }
}

impl GrammarError {
    /// About the whole constraint.
    pub fn whole(message: impl Into<String>) -> Self {
        Self { path: String::new(), keyword: None, message: message.into(), busy: false }
    }

    /// About the server, which may take the same constraint later.
    fn busy(message: impl Into<String>) -> Self {
        Self { busy: true, ..Self::whole(message) }
    }
}
