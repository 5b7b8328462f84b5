//! llama.cpp's grammar notation, rewritten as Lark.

use super::GrammarError;

/// Whether a grammar is written in GBNF: its rules are defined with `::=`.
pub(super) fn is_gbnf(grammar: &str) -> bool {
    grammar.lines().any(|line| {
        let line = line.trim_start();
        let name = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_')).unwrap_or(line.len());
        name > 0 && line[name..].trim_start().starts_with("::=")
    })
}

/// The same language in Lark; the root rule becomes `start`.
pub(super) fn to_lark(grammar: &str) -> Result<String, GrammarError> {
    let _ = grammar;
    Err(GrammarError::whole("GBNF is not read yet"))
}
