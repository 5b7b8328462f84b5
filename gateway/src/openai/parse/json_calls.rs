//! Calls as JSON objects between markers: Hermes, Qwen, Granite, Phi and their like.

use super::json_object::{CallObject, Read};
use super::marker::{Found, find};
use super::piece::{Advance, Pieces};
use std::sync::Arc;

/// How a family writes its calls.
#[derive(Debug, PartialEq, Eq)]
pub struct JsonSyntax {
    /// Name in the configuration.
    pub name: &'static str,
    /// Any of these begins a call or a list of calls.
    pub open: &'static [&'static str],
    /// Ends it; `None` where nothing does.
    pub close: Option<&'static str>,
    /// An answer that is nothing but such an object is a call without any marker, if it names a function of the request.
    pub bare: bool,
}

impl JsonSyntax {
    /// Hermes 2 and 3, Qwen 2.5 and 3, Granite 4, and the prompt of ours for templates without tools.
    pub const HERMES: Self = Self { name: "hermes", open: &["<tool_call>"], close: Some("</tool_call>"), bare: false };
}

/// Reads content and calls.
#[derive(Debug)]
pub(super) struct JsonCalls {
    syntax: &'static JsonSyntax,
    functions: Arc<[String]>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// Nothing but white space yet.
    Start,
    Content,
    /// Behind the opening marker, before the list or the object. `written`: the text since before the marker.
    Opened {
        written: String,
    },
    Object(Box<InObject>),
    /// Behind an object, where another may follow.
    Next {
        place: Place,
    },
    /// Behind the last object: white space, closing marks and surplus brackets mean nothing.
    Between,
    /// In what a broken call left behind: nothing counts up to the closing mark.
    Broken,
}

/// Where an object stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    in_list: bool,
    /// Behind a marker: whatever has a name is a call.
    marked: bool,
}

#[derive(Debug)]
struct InObject {
    object: CallObject,
    place: Place,
    /// The text so far, until it is certain that it is a call: else it is content.
    written: String,
}

impl Stage {
    fn object(place: Place, written: String) -> Self {
        Self::Object(Box::new(InObject { object: CallObject::default(), place, written }))
    }
}

impl JsonCalls {
    pub(super) fn new(syntax: &'static JsonSyntax, functions: Arc<[String]>) -> Self {
        Self { syntax, functions, stage: if syntax.bare { Stage::Start } else { Stage::Content } }
    }

    pub(super) fn advance(&mut self, pending: &mut String, last: bool, out: &mut Pieces) -> Advance {
        let stage = std::mem::replace(&mut self.stage, Stage::Content);
        let (stage, advance) = match stage {
            Stage::Start => start(pending, last),
            Stage::Content => self.content(pending, last, out),
            Stage::Opened { written } => opened(pending, last, written, out),
            Stage::Object(object) => self.object(object, pending, last, out),
            Stage::Next { place } => next(pending, place),
            Stage::Between => self.between(pending, last),
            Stage::Broken => self.broken(pending, last),
        };
        self.stage = stage;
        advance
    }

    fn content(&self, pending: &mut String, last: bool, out: &mut Pieces) -> (Stage, Advance) {
        match find(pending, self.syntax.open, last) {
            Found::Marker { text, after, .. } => {
                out.text(&pending[..text]);
                let written = pending[text..after].to_owned();
                pending.drain(..after);
                (Stage::Opened { written }, Advance::Again)
            }
            Found::Certain(end) => {
                out.text(&pending[..end]);
                pending.drain(..end);
                (Stage::Content, Advance::Wait)
            }
        }
    }

    fn object(&self, mut at: Box<InObject>, pending: &mut String, last: bool, out: &mut Pieces) -> (Stage, Advance) {
        let accept = |name: &str| at.place.marked || self.functions.iter().any(|function| function == name);
        let (read, taken) = at.object.read(pending, &accept, out);
        let begun = at.object.is_begun();
        if !begun {
            at.written.push_str(&pending[..taken]);
        }
        pending.drain(..taken);
        match read {
            Read::Complete => (Stage::Next { place: at.place }, Advance::Again),
            Read::Malformed if begun => (Stage::Broken, Advance::Again),
            Read::Malformed => {
                out.text(&at.written);
                (Stage::Content, Advance::Again)
            }
            Read::More if !last => (Stage::Object(at), Advance::Wait),
            Read::More if begun => {
                pending.clear();
                (Stage::Between, Advance::Wait)
            }
            // The end came before the name did.
            Read::More => {
                out.text(&at.written);
                out.text(pending);
                pending.clear();
                (Stage::Content, Advance::Wait)
            }
        }
    }

    fn between(&self, pending: &mut String, last: bool) -> (Stage, Advance) {
        let surplus = |c: char| c.is_whitespace() || c == '}' || c == ']';
        let rest = pending.trim_start_matches(surplus);
        pending.drain(..pending.len() - rest.len());
        if let Some(close) = self.syntax.close {
            if pending.starts_with(close) {
                pending.drain(..close.len());
                return (Stage::Between, Advance::Again);
            }
            if close.starts_with(pending.as_str()) && !last {
                return (Stage::Between, Advance::Wait);
            }
        }
        if pending.is_empty() { (Stage::Between, Advance::Wait) } else { (Stage::Content, Advance::Again) }
    }

    fn broken(&self, pending: &mut String, last: bool) -> (Stage, Advance) {
        let marks: Vec<&str> = self.syntax.close.into_iter().collect();
        match find(pending, &marks, last) {
            Found::Marker { start, .. } => {
                pending.drain(..start);
                (Stage::Between, Advance::Again)
            }
            Found::Certain(end) => {
                pending.drain(..end);
                (Stage::Broken, Advance::Wait)
            }
        }
    }
}

/// The start of an answer that may be nothing but calls.
fn start(pending: &mut String, last: bool) -> (Stage, Advance) {
    let text = pending.trim_start();
    let in_list = text.starts_with('[');
    let inner = text.strip_prefix('[').map_or(text, str::trim_start);
    if inner.is_empty() && !last {
        return (Stage::Start, Advance::Wait);
    }
    if !inner.starts_with('{') {
        return (Stage::Content, Advance::Again);
    }
    let taken = pending.len() - inner.len();
    let written = pending.drain(..taken).collect();
    (Stage::object(Place { in_list, marked: false }, written), Advance::Again)
}

fn opened(pending: &mut String, last: bool, mut written: String, out: &mut Pieces) -> (Stage, Advance) {
    let text = pending.trim_start();
    if text.is_empty() && !last {
        return (Stage::Opened { written }, Advance::Wait);
    }
    let place = Place { in_list: text.starts_with('['), marked: true };
    let taken = pending.len() - text.len() + usize::from(place.in_list);
    if place.in_list || text.starts_with('{') {
        written.extend(pending.drain(..taken));
        return (Stage::object(place, written), Advance::Again);
    }
    out.text(&written);
    (Stage::Content, Advance::Again)
}

fn next(pending: &mut String, place: Place) -> (Stage, Advance) {
    let text = pending.trim_start();
    let space = pending.len() - text.len();
    let separated = text.starts_with([',', ';']);
    if text.is_empty() {
        return (Stage::Next { place }, Advance::Wait);
    }
    if separated || (text.starts_with('{') && !place.in_list) {
        let written = pending.drain(..space + usize::from(separated)).collect();
        return (Stage::object(place, written), Advance::Again);
    }
    (Stage::Between, Advance::Again)
}
