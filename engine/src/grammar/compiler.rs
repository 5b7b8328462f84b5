//! Constraints to grammars.

use super::{Constraint, Grammar, GrammarError};
use std::sync::Arc;

/// Largest text of a constraint, bytes.
const MAX_SIZE: usize = 256 * 1024;

/// Makes grammars for one vocabulary.
#[derive(Default)]
pub(crate) struct Compiler;

impl Compiler {
    pub(crate) fn compile(&self, constraint: &Constraint) -> Result<Arc<Grammar>, GrammarError> {
        let size = constraint.size();
        if size > MAX_SIZE {
            return Err(GrammarError::whole(format!("must be at most {MAX_SIZE} bytes, not {size}")));
        }
        Ok(Arc::new(Grammar { source: constraint.clone() }))
    }
}
