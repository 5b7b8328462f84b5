//! llama.cpp's grammar notation (GBNF), rewritten as Lark.
//!
//! GBNF has no lexer: every character is a symbol. llguidance's lexer takes the longest lexeme, so a rule that does not contain
//! itself becomes one terminal as a whole, which keeps its meaning exactly; only rules that do become rules.

use super::GrammarError;
use std::collections::HashMap;
use std::fmt::Write;
use std::iter::Peekable;
use std::str::Chars;

/// Groups inside groups.
const DEEPEST: usize = 100;
/// Repetitions of one symbol, as in `"a"*?+`: each is a level for whatever walks the expression.
const MOST_REPEATS: usize = 8;
/// Rules: which contain themselves is looked for from each of them.
const MOST_RULES: usize = 5_000;

/// Whether a grammar is written in GBNF: its rules are defined with `::=`.
pub(super) fn is_gbnf(grammar: &str) -> bool {
    grammar.lines().any(|line| {
        let line = line.trim_start();
        let name = line.find(|c: char| !is_name(c)).unwrap_or(line.len());
        name > 0 && line[name..].trim_start().starts_with("::=")
    })
}

/// The same language in Lark; `root` becomes `start`.
pub(super) fn to_lark(grammar: &str) -> Result<String, GrammarError> {
    let mut reader = Reader { rest: grammar.chars().peekable(), line: 1 };
    let mut rules = Vec::new();
    reader.blanks(true);
    while reader.rest.peek().is_some() {
        if rules.len() == MOST_RULES {
            return reader.error(&format!("a grammar may have at most {MOST_RULES} rules"));
        }
        rules.push(reader.rule()?);
        reader.blanks(true);
    }
    let mut index = HashMap::new();
    for (at, (name, _)) in rules.iter().enumerate() {
        if index.insert(name.as_str(), at).is_some() {
            return Err(GrammarError::whole(format!("the rule '{name}' is defined twice")));
        }
    }
    let Some(root) = index.get("root").copied() else {
        return Err(GrammarError::whole("a GBNF grammar begins with the rule 'root', which is missing"));
    };
    let writer = Writer { recursive: recursive(&rules, &index)?, index };
    let mut lark = format!("start: {}\n", writer.name(root));
    for (at, (_, body)) in rules.iter().enumerate() {
        let _ = write!(lark, "{}: ", writer.name(at));
        writer.write(body, &mut lark);
        lark.push('\n');
    }
    Ok(lark)
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

enum Expression {
    Text(String),
    /// A regular expression for one character.
    Class(String),
    Rule(String),
    Sequence(Vec<Expression>),
    Either(Vec<Expression>),
    Repeat(Box<Expression>, u32, Option<u32>),
}

struct Reader<'a> {
    rest: Peekable<Chars<'a>>,
    line: usize,
}

impl Reader<'_> {
    fn error<T>(&self, message: &str) -> Result<T, GrammarError> {
        Err(GrammarError::whole(format!("line {}: {message}", self.line)))
    }

    fn next(&mut self) -> Option<char> {
        let next = self.rest.next();
        self.line += usize::from(next == Some('\n'));
        next
    }

    /// Skips blanks and comments, and ends of lines where the notation lets a rule go on.
    fn blanks(&mut self, lines: bool) {
        while let Some(c) = self.rest.peek() {
            match c {
                '#' => {
                    while self.rest.peek().is_some_and(|c| *c != '\n') {
                        self.next();
                    }
                }
                '\n' | '\r' if !lines => return,
                c if c.is_whitespace() => drop(self.next()),
                _ => return,
            }
        }
    }

    fn name(&mut self) -> String {
        std::iter::from_fn(|| self.rest.next_if(|c| is_name(*c))).collect()
    }

    fn rule(&mut self) -> Result<(String, Expression), GrammarError> {
        let name = self.name();
        self.blanks(false);
        let defined = !name.is_empty() && "::=".chars().all(|c| self.rest.next_if_eq(&c).is_some());
        if !defined {
            return self.error("expected a rule: name ::= …");
        }
        self.blanks(true);
        Ok((name, self.either(0)?))
    }

    fn either(&mut self, depth: usize) -> Result<Expression, GrammarError> {
        if depth > DEEPEST {
            return self.error("groups nest too deeply");
        }
        let mut options = vec![self.sequence(depth)?];
        while self.rest.next_if_eq(&'|').is_some() {
            self.blanks(true);
            options.push(self.sequence(depth)?);
        }
        Ok(Expression::Either(options))
    }

    fn sequence(&mut self, depth: usize) -> Result<Expression, GrammarError> {
        let mut parts = Vec::new();
        loop {
            let inside = depth > 0;
            let part = match self.rest.peek().copied() {
                Some('"') => Expression::Text(self.text()?),
                Some('[') => Expression::Class(self.class()?),
                Some('.') => {
                    self.next();
                    Expression::Class("(?s:.)".into())
                }
                Some('(') => {
                    self.next();
                    self.blanks(true);
                    let group = self.either(depth + 1)?;
                    if self.rest.next_if_eq(&')').is_none() {
                        return self.error("expected ')'");
                    }
                    group
                }
                Some(c) if is_name(c) => Expression::Rule(self.name()),
                Some('|' | ')' | '\n' | '\r') | None => return Ok(Expression::Sequence(parts)),
                Some(c) => return self.error(&format!("unexpected '{c}'")),
            };
            let part = self.repeated(part)?;
            parts.push(part);
            self.blanks(inside);
            // Outside of groups a rule goes on in the next line only after '|'; an alternative may begin there.
            if !inside {
                let ahead: String = self.rest.clone().skip_while(|c| c.is_whitespace()).take(1).collect();
                if ahead == "|" {
                    self.blanks(true);
                }
            }
        }
    }

    fn repeated(&mut self, mut part: Expression) -> Result<Expression, GrammarError> {
        for _ in 0..=MOST_REPEATS {
            let (least, most) = match self.rest.peek() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => {
                    let bounds: String = self.rest.by_ref().skip(1).take_while(|c| *c != '}').collect();
                    let (least, most) = bounds.split_once(',').unwrap_or((&bounds, &bounds));
                    let most = most.trim();
                    let (least, most) = match (least.trim().parse(), most.is_empty(), most.parse()) {
                        (Ok(least), true, _) => (least, None),
                        (Ok(least), false, Ok(most)) => (least, Some(most)),
                        _ => return self.error("expected {n}, {n,} or {n,m}"),
                    };
                    part = Expression::Repeat(Box::new(part), least, most);
                    continue;
                }
                _ => return Ok(part),
            };
            self.next();
            part = Expression::Repeat(Box::new(part), least, most);
        }
        self.error("too many repetitions of one symbol; one says the same")
    }

    fn text(&mut self) -> Result<String, GrammarError> {
        self.next();
        let mut text = String::new();
        loop {
            match self.rest.peek() {
                Some('"') => {
                    self.next();
                    return Ok(text);
                }
                Some(c) if *c != '\n' => text.push(self.character()?),
                _ => return self.error("a text is not closed with '\"'"),
            }
        }
    }

    fn class(&mut self) -> Result<String, GrammarError> {
        self.next();
        let mut class = String::from("[");
        if self.rest.next_if_eq(&'^').is_some() {
            class.push('^');
        }
        let empty = class.len();
        loop {
            match self.rest.peek() {
                Some(']') => {
                    self.next();
                    return if class.len() == empty { self.error("an empty character class") } else { Ok(class + "]") };
                }
                Some(_) => {
                    let from = self.character()?;
                    let to = match self.rest.next_if_eq(&'-') {
                        Some(_) if self.rest.peek() == Some(&']') => {
                            let _ = write!(class, r"\x{{{:x}}}", u32::from('-'));
                            from
                        }
                        Some(_) => self.character()?,
                        None => from,
                    };
                    if to < from {
                        return self.error("a range in a character class runs backwards");
                    }
                    let _ = write!(class, r"\x{{{:x}}}-\x{{{:x}}}", u32::from(from), u32::from(to));
                }
                None => return self.error("a character class is not closed with ']'"),
            }
        }
    }

    /// A character, which may be escaped.
    fn character(&mut self) -> Result<char, GrammarError> {
        let character = match self.next() {
            Some('\\') => match self.next() {
                Some('n') => Some('\n'),
                Some('r') => Some('\r'),
                Some('t') => Some('\t'),
                Some(c @ ('x' | 'u' | 'U')) => {
                    let digits = match c {
                        'x' => 2,
                        'u' => 4,
                        _ => 8,
                    };
                    let digits: String = self.rest.by_ref().take(digits).collect();
                    u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32)
                }
                Some(c @ ('\\' | '"' | '[' | ']' | '-' | '^')) => Some(c),
                _ => None,
            },
            other => other,
        };
        match character {
            Some(character) => Ok(character),
            None => self.error("an escape that is none of \\n \\r \\t \\\\ \\\" \\[ \\] \\xHH \\uHHHH \\UHHHHHHHH"),
        }
    }
}

/// Which rules contain themselves.
fn recursive(rules: &[(String, Expression)], index: &HashMap<&str, usize>) -> Result<Vec<bool>, GrammarError> {
    let mut uses = Vec::with_capacity(rules.len());
    for (_, body) in rules {
        let mut used = Vec::new();
        collect(body, &mut used);
        let used: Result<Vec<usize>, _> = used
            .into_iter()
            .map(|name| index.get(name).copied().ok_or_else(|| GrammarError::whole(format!("the rule '{name}' is not defined"))))
            .collect();
        uses.push(used?);
    }
    // What each rule reaches; a rule above a recursive one is no terminal either.
    let mut rule = vec![false; rules.len()];
    for start in 0..rules.len() {
        let mut seen = vec![false; rules.len()];
        let mut stack = uses[start].clone();
        while let Some(at) = stack.pop() {
            rule[start] |= at == start;
            if !std::mem::replace(&mut seen[at], true) {
                stack.extend(&uses[at]);
            }
        }
    }
    loop {
        let above: Vec<usize> = (0..rules.len()).filter(|at| !rule[*at] && uses[*at].iter().any(|used| rule[*used])).collect();
        if above.is_empty() {
            return Ok(rule);
        }
        above.into_iter().for_each(|at| rule[at] = true);
    }
}

fn collect<'e>(expression: &'e Expression, names: &mut Vec<&'e str>) {
    match expression {
        Expression::Rule(name) => names.push(name),
        Expression::Sequence(parts) | Expression::Either(parts) => parts.iter().for_each(|part| collect(part, names)),
        Expression::Repeat(part, ..) => collect(part, names),
        Expression::Text(_) | Expression::Class(_) => {}
    }
}

struct Writer<'a> {
    recursive: Vec<bool>,
    index: HashMap<&'a str, usize>,
}

impl Writer<'_> {
    /// Lark's rules have small letters, its terminals capitals.
    fn name(&self, rule: usize) -> String {
        if self.recursive.get(rule).copied().unwrap_or(false) { format!("rule_{rule}") } else { format!("TERMINAL_{rule}") }
    }

    fn write(&self, expression: &Expression, out: &mut String) {
        match expression {
            Expression::Text(text) => drop(write!(out, "{}", serde_json::Value::from(text.as_str()))),
            Expression::Class(regex) => drop(write!(out, "/{regex}/")),
            Expression::Rule(name) => out.push_str(&self.name(self.index.get(name.as_str()).copied().unwrap_or(usize::MAX))),
            Expression::Sequence(parts) if parts.is_empty() => out.push_str("\"\""),
            Expression::Sequence(parts) => self.join(parts, " ", out),
            Expression::Either(options) => {
                out.push('(');
                self.join(options, " | ", out);
                out.push(')');
            }
            Expression::Repeat(part, least, most) => {
                out.push('(');
                self.write(part, out);
                out.push(')');
                match (least, most) {
                    (0, None) => out.push('*'),
                    (1, None) => out.push('+'),
                    (0, Some(1)) => out.push('?'),
                    (least, None) => drop(write!(out, "{{{least},}}")),
                    (least, Some(most)) => drop(write!(out, "{{{least},{most}}}")),
                }
            }
        }
    }

    fn join(&self, parts: &[Expression], between: &str, out: &mut String) {
        for (at, part) in parts.iter().enumerate() {
            if at > 0 {
                out.push_str(between);
            }
            self.write(part, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grammar::Constraint;
    use crate::grammar::tests::{accepts, compiler};

    fn check(grammar: &str, accepted: &[&str], rejected: &[&str]) {
        let compiled = compiler().compile(&Constraint::Lark(grammar.into()));
        let compiled = compiled.unwrap_or_else(|error| panic!("{error}\n{}", to_lark(grammar).unwrap()));
        for (texts, expected) in [(accepted, true), (rejected, false)] {
            for text in texts {
                assert_eq!(accepts(&compiled, text), expected, "{text:?} in {grammar}");
            }
        }
    }

    #[test]
    fn rules_that_are_regular_keep_their_meaning() {
        check(
            "# greetings\nroot ::= \"a\" ( \"bc\" | \"b\" \"d\" )* tail{1,2}\n  | \"\\x41\\u00e9\"\ntail ::= [x-z_\\]] \".\"? # end\n",
            &["ax", "abcbdy.z", "abc]", "Aé", "a_."],
            &["a", "abx", "axxx", "A", "a-"],
        );
        check("root ::= [^0-9\\n]+ \"!\"", &["ab!!", "é!"], &["a1!", "!", "a\n!"]);
        check("root ::= .{2} [a-]", &["xx-", "\n\na"], &["x-", "xxb"]);
    }

    #[test]
    fn rules_that_contain_themselves_stay_rules() {
        check(
            "root ::= expr\nexpr ::= term ([-+] term)*\nterm ::= num | \"(\" expr \")\"\nnum ::= [0-9]+ ws\nws ::= [ ]*\n",
            &["1", "12 +3", "(1-(2 +3))-4 "],
            &["", "1+", "(1", "1 2", ")"],
        );
        check(
            "root ::= value\nvalue ::= object | array | string\nobject ::= \"{\" ws (string \":\" ws value (\",\" ws string \":\" ws value)*)? \"}\" ws\n\
             array ::= \"[\" ws (value (\",\" ws value)*)? \"]\" ws\nstring ::= \"\\\"\" ([^\"\\\\\\x00-\\x1f] | \"\\\\\" [\"\\\\n])* \"\\\"\" ws\nws ::= | \" \" | \"\\n\" [ \\t]{0,20}\n",
            &["{}", "{\"a\": [\"b\", {}]}", "[\n\t\"x\\n\"\n]"],
            &["{\"a\"}", "[\"a\",]", "{\"a\":}"],
        );
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (grammar, words) in [
            ("root ::= \"a\"\nb ::= c", "'c' is not defined"),
            ("a ::= \"a\"", "'root'"),
            ("root ::= \"a\"\nroot ::= \"b\"", "twice"),
            ("root ::= \"a", "line 1: a text is not closed"),
            ("root ::= \"a\"\nb ::= [z-a]", "line 2: a range"),
            ("root ::= (\"a\"", "expected ')'"),
            ("root ::= \"a\"{x}", "{n}"),
            ("root ::= \"\\q\"", "escape"),
            ("root ::= $", "unexpected '$'"),
            (&format!("root ::= \"a\"{}", "*".repeat(200_000)), "line 1: too many repetitions"),
            (&format!("root ::= \"a\"\n{}", "r ::= \"\"\n".repeat(20_000)), "line 5001: a grammar may have at most 5000 rules"),
        ] {
            let error = to_lark(grammar).unwrap_err();
            assert!(error.message.contains(words), "{grammar}: {error}");
        }
        assert!(!is_gbnf("start: \"::=\"") && is_gbnf("  root  ::= \"a\""));
    }
}
