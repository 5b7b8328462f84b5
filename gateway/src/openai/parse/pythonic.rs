//! Calls as a list of Python calls: `[weather(city="Emden", days=[1, 2]), time()]` (Llama 4, small Llama 3.2, ToolACE).

use super::Function;
use super::marker::{Found, find};
use super::piece::{Advance, Pieces};
use super::python_literal::call as read_call;
use std::sync::Arc;

/// Marks that may stand around the list.
pub(super) const MARKS: [&str; 2] = ["<|python_start|>", "<|python_end|>"];

/// Reads content and calls. A list is one of calls when it begins the answer, or a mark does, and its first call is of a known
/// function.
#[derive(Debug)]
pub(super) struct PythonicCalls {
    functions: Arc<[Function]>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Start,
    Content,
    /// In the list: `written` so far, until a call is certain.
    List {
        written: Option<String>,
        scan: Scan,
    },
    /// Behind the list.
    Between,
}

/// Looks for the end of a call, going on where it stopped.
#[derive(Clone, Copy, Debug, Default)]
struct Scan {
    at: usize,
    depth: usize,
    quote: Option<u8>,
    escaped: bool,
}

impl Scan {
    /// Behind the bracket that closes the call, once it is there.
    fn end(&mut self, text: &str) -> Option<usize> {
        for (at, byte) in text.bytes().enumerate().skip(self.at) {
            self.at = at + 1;
            match (self.quote, byte) {
                (Some(_), _) if self.escaped => self.escaped = false,
                (Some(_), b'\\') => self.escaped = true,
                (Some(quote), _) if quote == byte => self.quote = None,
                (Some(_), _) => {}
                (None, b'"' | b'\'') => self.quote = Some(byte),
                (None, b'(' | b'[' | b'{') => self.depth += 1,
                (None, b')' | b']' | b'}') => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(at + 1);
                    }
                }
                (None, _) => {}
            }
        }
        None
    }
}

impl PythonicCalls {
    pub(super) fn new(functions: Arc<[Function]>) -> Self {
        Self { functions, stage: Stage::Start }
    }

    pub(super) fn advance(&mut self, pending: &mut String, last: bool, out: &mut Pieces) -> Advance {
        let (stage, advance) = match std::mem::replace(&mut self.stage, Stage::Content) {
            Stage::Start => start(pending, last, String::new()),
            Stage::Content => content(pending, last, out),
            Stage::List { written, scan } => self.list(pending, last, written, scan, out),
            Stage::Between => between(pending, last),
        };
        self.stage = stage;
        advance
    }

    fn list(
        &self,
        pending: &mut String,
        last: bool,
        mut written: Option<String>,
        mut scan: Scan,
        out: &mut Pieces,
    ) -> (Stage, Advance) {
        if scan.at == 0 {
            let begun = written.is_none();
            let separator = |c: char| c.is_whitespace() || (begun && c == ',');
            let taken = pending.len() - pending.trim_start_matches(separator).len();
            let space: String = pending.drain(..taken).collect();
            if let Some(written) = &mut written {
                written.push_str(&space);
            }
            if begun && pending.starts_with(']') {
                pending.drain(..1);
                return (Stage::Between, Advance::Again);
            }
        }
        if let Some(end) = scan.end(pending) {
            let call = read_call(&pending[..end]);
            match call.filter(|(name, _)| self.functions.iter().any(|function| function.name == *name)) {
                Some((name, arguments)) => {
                    out.call(&name);
                    out.arguments(&arguments);
                    pending.drain(..end);
                    return (Stage::List { written: None, scan: Scan::default() }, Advance::Again);
                }
                None if written.is_none() => {
                    pending.drain(..end);
                    return (Stage::Between, Advance::Again);
                }
                None => {}
            }
        } else if !last {
            return (Stage::List { written, scan }, Advance::Wait);
        } else if written.is_none() {
            pending.clear();
            return (Stage::Between, Advance::Wait);
        }
        out.text(&written.unwrap_or_default());
        (Stage::Content, Advance::Again)
    }
}

/// The start of an answer, or what follows a mark: `written` so far.
fn start(pending: &mut String, last: bool, mut written: String) -> (Stage, Advance) {
    let text = pending.trim_start();
    let space = pending.len() - text.len();
    if let Some(rest) = text.strip_prefix('[') {
        let inner = rest.trim_start();
        if inner.is_empty() && !last {
            return (Stage::Start, Advance::Wait);
        }
        if inner.starts_with(|c: char| c.is_alphabetic() || c == '_') {
            written.extend(pending.drain(..=space));
            return (Stage::List { written: Some(written), scan: Scan::default() }, Advance::Again);
        }
    } else if text.is_empty() && !last {
        return (Stage::Start, Advance::Wait);
    }
    (Stage::Content, Advance::Again)
}

fn content(pending: &mut String, last: bool, out: &mut Pieces) -> (Stage, Advance) {
    match find(pending, &MARKS[..1], last) {
        Found::Marker { text, after, .. } => {
            out.text(&pending[..text]);
            pending.drain(..after);
            (Stage::Start, Advance::Again)
        }
        Found::Certain(end) => {
            out.text(&pending[..end]);
            pending.drain(..end);
            (Stage::Content, Advance::Wait)
        }
    }
}

fn between(pending: &mut String, last: bool) -> (Stage, Advance) {
    let surplus = |c: char| c.is_whitespace() || c == ']' || c == ',';
    let taken = pending.len() - pending.trim_start_matches(surplus).len();
    pending.drain(..taken);
    if pending.starts_with(MARKS[1]) {
        pending.drain(..MARKS[1].len());
        return (Stage::Between, Advance::Again);
    }
    if pending.is_empty() || (!last && MARKS[1].starts_with(pending.as_str())) {
        return (Stage::Between, Advance::Wait);
    }
    (Stage::Content, Advance::Again)
}
