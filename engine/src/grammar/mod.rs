//! Structured output: what a text must look like, compiled into masks over the vocabulary.
//!
//! A [`Constraint`] is what a client asks for. [`crate::Engine::compile`] makes a [`Grammar`] of it, once for any number of
//! requests; a request carries it in [`crate::SamplingParams::grammar`].

mod compiler;
mod constraint;

use std::fmt;

pub(crate) use compiler::Compiler;
pub use constraint::{Constraint, ConstraintKey};

/// A compiled constraint: immutable, shared by all requests that ask for the same.
pub struct Grammar {
    source: Constraint,
}

impl Grammar {
    /// What it was compiled from.
    pub fn source(&self) -> &Constraint {
        &self.source
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
}

fn place(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!("at {path}: ") }
}

impl GrammarError {
    /// About the whole constraint.
    pub fn whole(message: impl Into<String>) -> Self {
        Self { path: String::new(), keyword: None, message: message.into() }
    }
}
