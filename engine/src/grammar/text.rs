//! Constraints that are texts: regular expressions, choices, grammars.

use super::GrammarError;
use regex_syntax::ast::{AssertionKind, Ast, parse::Parser};

/// Brackets inside brackets: the grammar's reader recurses.
const DEEPEST: usize = 200;

/// The expression without anchors at its ends, which say nothing where the whole text must match anyway.
fn whole_match(regex: &str) -> Result<String, GrammarError> {
    let ast = Parser::new().parse(regex).map_err(|error| {
        let at = error.span().start.offset;
        GrammarError::whole(format!("not a regular expression: {} at byte {at}", error.kind()))
    })?;
    let (mut start, mut end) = (0, regex.len());
    let anchor = |ast: &Ast| match ast {
        Ast::Assertion(assertion) => Some((assertion.kind.clone(), assertion.span)),
        _ => None,
    };
    let parts: &[Ast] = match &ast {
        Ast::Concat(concat) => &concat.asts,
        one => std::slice::from_ref(one),
    };
    if let Some((AssertionKind::StartLine | AssertionKind::StartText, span)) = parts.first().and_then(anchor) {
        start = span.end.offset;
    }
    if let Some((AssertionKind::EndLine | AssertionKind::EndText, span)) = parts.last().and_then(anchor)
        && span.start.offset >= start
    {
        end = span.start.offset;
    }
    Ok(regex.get(start..end).unwrap_or(regex).to_owned())
}

/// A grammar of one terminal that is the expression. `\d` and `\w` are ASCII, as in schemas and in JavaScript.
pub(super) fn regular(regex: &str) -> Result<String, GrammarError> {
    Ok(format!("start: /{}/", llguidance::regex_to_lark(&whole_match(regex)?, "dw")))
}

/// A grammar of one terminal that is one of the texts.
pub(super) fn one_of(choices: &[String]) -> Result<String, GrammarError> {
    if choices.is_empty() || choices.iter().any(String::is_empty) {
        return Err(GrammarError::whole("must be texts to choose from, none of them empty"));
    }
    let literals: Vec<String> = choices.iter().map(|choice| regex_syntax::escape(choice).replace('/', "\\/")).collect();
    Ok(format!("start: /(?:{})/", literals.join("|").replace('\n', "\\n").replace('\r', "\\r")))
}

/// Refuses a grammar whose brackets nest too deeply.
pub(super) fn check_nesting(grammar: &str) -> Result<(), GrammarError> {
    let mut depth = 0usize;
    let mut characters = grammar.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '/' if characters.peek() == Some(&'/') => drop(characters.by_ref().find(|c| *c == '\n')),
            '"' | '/' => {
                let mut escaped = false;
                // A literal ends with its line at the latest, a comment too.
                for inside in characters.by_ref() {
                    if inside == '\n' || (inside == character && !escaped) {
                        break;
                    }
                    escaped = inside == '\\' && !escaped;
                }
            }
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > DEEPEST {
            return Err(GrammarError::whole(format!("brackets nest deeper than {DEEPEST}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_at_the_ends_are_dropped_and_no_others() {
        for (regex, kept) in
            [("^a+$", "a+"), (r"\Aab\z", "ab"), ("a$", "a"), ("^", ""), (r"a\$", r"a\$"), ("^a|b$", "^a|b$"), ("(^a)", "(^a)")]
        {
            assert_eq!(whole_match(regex).unwrap(), kept);
        }
        assert!(whole_match("a(").unwrap_err().message.contains("unclosed group at byte 1"));
        assert!(whole_match("(?=a)").unwrap_err().message.contains("look-around"));
    }

    #[test]
    fn nesting_is_counted_outside_of_literals() {
        let nested = |depth: usize| format!("start: {}\"a\"{}", "(".repeat(depth), ")".repeat(depth));
        assert!(check_nesting(&nested(200)).is_ok());
        assert!(check_nesting(&nested(201)).is_err());
        assert!(check_nesting(&format!("start: \"{}\" | /{}/", "(".repeat(999), r"\(".repeat(999))).is_ok());
        assert!(check_nesting(&format!("// {}\nstart: \"a\\\"(\"", "(".repeat(999))).is_ok());
    }
}
