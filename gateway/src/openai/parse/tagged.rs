//! Calls with a tag for each argument: Qwen 3 Coder (`<function=f><parameter=a>…`) and GLM 4.5 (`f<arg_key>a</arg_key>…`).
//!
//! A value's type is not in the text: the function's schema says whether it is a string. So each argument is passed on when it is
//! whole.

use super::Function;
use super::marker::{Found, find};
use super::piece::{Advance, Pieces};
use serde_json::Value;
use std::sync::Arc;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// The tags of a family.
#[derive(Debug, PartialEq, Eq)]
pub struct TaggedSyntax {
    /// Name in the configuration.
    pub name: &'static str,
    /// Before the function's name, and behind it.
    function: (&'static str, &'static str),
    /// Before an argument's name, and between it and its value.
    key: (&'static str, &'static str),
    /// Behind the value.
    end: &'static str,
}

impl TaggedSyntax {
    /// Qwen 3 Coder.
    pub const QWEN3_CODER: Self =
        Self { name: "qwen3_coder", function: ("<function=", ">"), key: ("<parameter=", ">"), end: "</parameter>" };
    /// GLM 4.5 and 4.6.
    pub const GLM45: Self = Self { name: "glm45", function: ("", "\n"), key: ("<arg_key>", "</arg_key>"), end: "</arg_value>" };

    /// Every family of this kind.
    pub const ALL: [&'static Self; 2] = [&Self::QWEN3_CODER, &Self::GLM45];

    /// Marks that may be control tokens.
    pub fn marks(&self) -> Vec<&'static str> {
        let own: &[&str] = if self.name == "glm45" { &["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"] } else { &[] };
        [OPEN, CLOSE].into_iter().chain(own.iter().copied()).collect()
    }

    /// The function's name and its arguments in the order written, of all that lies between the outer marks.
    fn read(&self, text: &str, functions: &[Function]) -> Option<(String, Vec<(String, Value)>)> {
        let rest = text.split_once(self.function.0).map(|(_, rest)| rest)?;
        let end = [self.function.1, self.key.0].iter().filter_map(|mark| rest.find(mark)).min().unwrap_or(rest.len());
        let name = rest[..end].trim();
        let plain = |c: char| c.is_alphanumeric() || "_-.:/".contains(c);
        if name.is_empty() || !name.chars().all(plain) {
            return None;
        }
        let schema = functions.iter().find(|function| function.name == name).and_then(|function| function.schema.as_ref());
        let mut arguments = Vec::new();
        let mut rest = &rest[end..];
        while let Some((_, member)) = rest.split_once(self.key.0) {
            let Some((key, member)) = member.split_once(self.key.1) else { break };
            let Some((value, after)) = member.split_once(self.end) else { break };
            let key = key.trim();
            let value = value.trim_start().strip_prefix("<arg_value>").unwrap_or(value);
            let property = schema.and_then(|schema| schema.get("properties")?.get(key));
            arguments.push((key.to_owned(), typed(value, property)));
            rest = after;
        }
        Some((name.to_owned(), arguments))
    }
}

/// A value in the type that its schema gives; what does not fit stays a string.
fn typed(text: &str, schema: Option<&Value>) -> Value {
    // One line break on each side belongs to the tags.
    let bare = text.strip_prefix('\n').unwrap_or(text);
    let bare = bare.strip_suffix('\n').unwrap_or(bare);
    let kind = schema.and_then(|schema| schema.get("type"));
    let is_string = match kind {
        Some(Value::String(kind)) => kind == "string",
        Some(Value::Array(kinds)) => kinds.iter().all(|kind| kind == "string"),
        _ => schema.is_none(),
    };
    if is_string {
        return bare.into();
    }
    serde_json::from_str(bare.trim()).unwrap_or_else(|_| bare.into())
}

/// Reads content and calls.
#[derive(Debug)]
pub(super) struct TaggedCalls {
    syntax: &'static TaggedSyntax,
    functions: Arc<[Function]>,
    stage: Stage,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Content,
    /// Behind the opening mark: so much of the text holds no closing one. `space` of white space stood before the mark.
    Call {
        scanned: usize,
    },
    Between,
}

impl TaggedCalls {
    pub(super) fn new(syntax: &'static TaggedSyntax, functions: Arc<[Function]>) -> Self {
        Self { syntax, functions, stage: Stage::Content }
    }

    pub(super) fn advance(&mut self, pending: &mut String, last: bool, out: &mut Pieces) -> Advance {
        let (stage, advance) = match self.stage {
            Stage::Content => match find(pending, &[OPEN], last) {
                // The mark stays until it is certain that a call follows.
                Found::Marker { text, .. } => {
                    out.text(&pending[..text]);
                    pending.drain(..text);
                    (Stage::Call { scanned: 0 }, Advance::Again)
                }
                Found::Certain(end) => {
                    out.text(&pending[..end]);
                    pending.drain(..end);
                    (Stage::Content, Advance::Wait)
                }
            },
            Stage::Call { scanned } => self.call(pending, last, scanned, out),
            Stage::Between => {
                let space = pending.len() - pending.trim_start().len();
                pending.drain(..space);
                if pending.is_empty() { (Stage::Between, Advance::Wait) } else { (Stage::Content, Advance::Again) }
            }
        };
        self.stage = stage;
        advance
    }

    fn call(&self, pending: &mut String, last: bool, scanned: usize, out: &mut Pieces) -> (Stage, Advance) {
        let mut from = scanned;
        while !pending.is_char_boundary(from) {
            from -= 1;
        }
        let close = pending[from..].find(CLOSE).map(|at| from + at);
        if close.is_none() && !last {
            return (Stage::Call { scanned: pending.len().saturating_sub(CLOSE.len()) }, Advance::Wait);
        }
        let end = close.unwrap_or(pending.len());
        let body = pending[..end].trim_start().strip_prefix(OPEN).unwrap_or_default();
        let after = close.map_or(end, |close| close + CLOSE.len());
        match self.syntax.read(body, &self.functions) {
            Some((name, arguments)) => {
                out.call(&name);
                let members: Vec<String> =
                    arguments.iter().map(|(key, value)| format!("{}: {value}", Value::from(key.as_str()))).collect();
                // One that was cut off stays open.
                out.arguments(&format!("{{{}{}", members.join(", "), if close.is_some() { "}" } else { "" }));
                pending.drain(..after);
                (Stage::Between, Advance::Again)
            }
            None => {
                out.text(&pending[..after]);
                pending.drain(..after);
                (Stage::Content, Advance::Again)
            }
        }
    }
}
