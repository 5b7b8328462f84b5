//! Calls whose arguments are JSON, between marks: objects with name and arguments (Hermes, Qwen, Llama 3, Granite, Phi), or a
//! name followed by the arguments alone (Mistral, DeepSeek, Kimi).

use super::Function;
use super::json_object::{CallObject, Read, Value};
use super::marker::{Found, find};
use super::piece::{Advance, Pieces};
use std::sync::Arc;

/// Longest text between a mark and the arguments that a name is looked for in, bytes.
const MAX_HEADER: usize = 256;

/// How a family writes its calls.
#[derive(Debug, PartialEq, Eq)]
pub struct JsonSyntax {
    /// Name in the configuration.
    pub name: &'static str,
    /// Any of these begins a call or a list of calls; several may follow each other.
    pub open: &'static [&'static str],
    /// Marks that end one, or that stand between two.
    pub close: &'static [&'static str],
    /// A name may stand before the arguments, apart from them by these or by line breaks; `None`: calls are objects only.
    pub named: Option<&'static [&'static str]>,
    /// An answer that is nothing but such objects is calls without any mark, if they name functions of the request.
    pub bare: bool,
    /// How the model is made to write calls.
    pub writing: Writing,
}

/// The text around names and arguments, as the family's models are trained to write it.
#[derive(Debug, PartialEq, Eq)]
pub struct Writing {
    /// Before the first call.
    pub start: &'static str,
    /// Before a name.
    pub before: &'static str,
    /// Between name and arguments.
    pub between: &'static str,
    /// Behind the arguments.
    pub after: &'static str,
    /// Between two calls.
    pub separator: &'static str,
    /// Behind the last.
    pub end: &'static str,
}

impl Writing {
    /// A list of objects with name and arguments.
    const fn list(start: &'static str, end: &'static str) -> Self {
        let (before, between, after) = ("{\"name\": \"", "\", \"arguments\": ", "}");
        Self { start, before, between, after, separator: ", ", end }
    }
}

impl JsonSyntax {
    /// Hermes 2 and 3, Qwen 2.5 and 3, Granite 4, and the prompt of ours for templates without tools.
    pub const HERMES: Self = Self {
        name: "hermes",
        open: &["<tool_call>"],
        close: &["</tool_call>"],
        named: None,
        bare: false,
        writing: Writing {
            start: "",
            before: "<tool_call>\n{\"name\": \"",
            between: "\", \"arguments\": ",
            after: "}\n</tool_call>",
            separator: "\n",
            end: "",
        },
    };
    /// Llama 3.1, 3.2 and 3.3.
    pub const LLAMA3: Self = Self {
        name: "llama3_json",
        open: &["<|python_tag|>"],
        close: &[],
        named: None,
        bare: true,
        writing: Writing {
            start: "",
            before: "{\"name\": \"",
            between: "\", \"parameters\": ",
            after: "}",
            separator: "; ",
            end: "",
        },
    };
    /// Mistral up to version 7 of its tokenizer: a list of objects.
    pub const MISTRAL: Self = Self {
        name: "mistral",
        open: &["[TOOL_CALLS]"],
        close: &["[/TOOL_CALLS]"],
        named: Some(&["[CALL_ID]", "[ARGS]"]),
        bare: false,
        writing: Writing::list("[TOOL_CALLS][", "]"),
    };
    /// Mistral from version 11: names and arguments.
    pub const MISTRAL_11: Self = Self {
        name: "mistral_v11",
        writing: Writing { start: "", before: "[TOOL_CALLS]", between: "[ARGS]", after: "", separator: "", end: "" },
        ..Self::MISTRAL
    };
    /// DeepSeek V3 and R1.
    pub const DEEPSEEK: Self = Self {
        name: "deepseek_v3",
        open: &["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"],
        close: &["<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "```"],
        named: Some(&["<｜tool▁sep｜>"]),
        bare: false,
        writing: Writing {
            start: "<｜tool▁calls▁begin｜>",
            before: "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            between: "\n```json\n",
            after: "\n```<｜tool▁call▁end｜>",
            separator: "\n",
            end: "<｜tool▁calls▁end｜>",
        },
    };
    /// DeepSeek V3.1.
    pub const DEEPSEEK_31: Self = Self {
        name: "deepseek_v31",
        writing: Writing {
            start: "<｜tool▁calls▁begin｜>",
            before: "<｜tool▁call▁begin｜>",
            between: "<｜tool▁sep｜>",
            after: "<｜tool▁call▁end｜>",
            separator: "",
            end: "<｜tool▁calls▁end｜>",
        },
        ..Self::DEEPSEEK
    };
    /// Kimi K2.
    pub const KIMI: Self = Self {
        name: "kimi_k2",
        open: &["<|tool_calls_section_begin|>", "<|tool_call_begin|>"],
        close: &["<|tool_call_end|>", "<|tool_calls_section_end|>"],
        named: Some(&["<|tool_call_argument_begin|>"]),
        bare: false,
        writing: Writing {
            start: "<|tool_calls_section_begin|>",
            before: "<|tool_call_begin|>functions.",
            between: ":0<|tool_call_argument_begin|>",
            after: "<|tool_call_end|>",
            separator: "",
            end: "<|tool_calls_section_end|>",
        },
    };
    /// Granite 3.
    pub const GRANITE: Self = Self {
        name: "granite",
        open: &["<|tool_call|>", "<tool_call>"],
        close: &[],
        named: None,
        bare: true,
        writing: Writing::list("<|tool_call|>[", "]"),
    };
    /// Phi 4 mini.
    pub const PHI4: Self = Self {
        name: "phi4_mini_json",
        open: &["functools", "<|tool_call|>"],
        close: &["<|/tool_call|>"],
        named: None,
        bare: false,
        writing: Writing::list("functools[", "]"),
    };
    /// Jamba.
    pub const JAMBA: Self = Self {
        name: "jamba",
        open: &["<tool_calls>"],
        close: &["</tool_calls>"],
        named: None,
        bare: false,
        writing: Writing::list("<tool_calls>[", "]</tool_calls>"),
    };
    /// InternLM 2 and 3.
    pub const INTERNLM: Self = Self {
        name: "internlm",
        open: &["<|action_start|>", "<|plugin|>"],
        close: &["<|action_end|>"],
        named: None,
        bare: false,
        writing: Writing {
            start: "",
            before: "<|action_start|><|plugin|>\n{\"name\": \"",
            between: "\", \"parameters\": ",
            after: "}<|action_end|>",
            separator: "\n",
            end: "",
        },
    };
    /// xLAM and others that write nothing but a list.
    pub const XLAM: Self =
        Self { name: "xlam", open: &[], close: &[], named: None, bare: true, writing: Writing::list("[", "]") };

    /// Every family of this kind.
    pub const ALL: [&'static Self; 12] = [
        &Self::HERMES,
        &Self::LLAMA3,
        &Self::MISTRAL,
        &Self::MISTRAL_11,
        &Self::DEEPSEEK,
        &Self::DEEPSEEK_31,
        &Self::KIMI,
        &Self::GRANITE,
        &Self::PHI4,
        &Self::JAMBA,
        &Self::INTERNLM,
        &Self::XLAM,
    ];

    /// All its marks.
    pub fn marks(&self) -> impl Iterator<Item = &'static str> {
        let named = self.named.unwrap_or_default();
        self.open.iter().chain(self.close).chain(named).copied()
    }
}

/// Reads content and calls.
#[derive(Debug)]
pub(super) struct JsonCalls {
    syntax: &'static JsonSyntax,
    functions: Arc<[Function]>,
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
    /// In the arguments that follow a name.
    Arguments(Value),
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
    pub(super) fn new(syntax: &'static JsonSyntax, functions: Arc<[Function]>) -> Self {
        Self { syntax, functions, stage: if syntax.bare { Stage::Start } else { Stage::Content } }
    }

    pub(super) fn advance(&mut self, pending: &mut String, last: bool, out: &mut Pieces) -> Advance {
        let stage = std::mem::replace(&mut self.stage, Stage::Content);
        let (stage, advance) = match stage {
            Stage::Start => start(pending, last),
            Stage::Content => self.content(pending, last, out),
            Stage::Opened { written } => self.opened(pending, last, written, out),
            Stage::Arguments(value) => arguments(value, pending, out),
            Stage::Object(object) => self.object(object, pending, last, out),
            Stage::Next { place } => next(pending, last, place),
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
        let accept = |name: &str| at.place.marked || self.functions.iter().any(|function| function.name == name);
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

    /// Behind a mark: another, a list, an object, or a name.
    fn opened(&self, pending: &mut String, last: bool, mut written: String, out: &mut Pieces) -> (Stage, Advance) {
        let text = pending.trim_start();
        let space = pending.len() - text.len();
        if let Some(mark) = self.syntax.open.iter().find(|mark| text.starts_with(**mark)) {
            let taken = space + mark.len();
            written.extend(pending.drain(..taken));
            return (Stage::Opened { written }, Advance::Again);
        }
        if !last && self.syntax.open.iter().any(|mark| mark.starts_with(text)) || (text.is_empty() && !last) {
            return (Stage::Opened { written }, Advance::Wait);
        }
        let place = Place { in_list: text.starts_with('['), marked: true };
        if place.in_list || text.starts_with('{') {
            let taken = space + usize::from(place.in_list);
            written.extend(pending.drain(..taken));
            return (Stage::object(place, written), Advance::Again);
        }
        if let Some(between) = self.syntax.named {
            let header = text.find('{').filter(|end| *end <= MAX_HEADER);
            if header.is_none() && !last && text.len() <= MAX_HEADER {
                return (Stage::Opened { written }, Advance::Wait);
            }
            if let Some(name) = header.and_then(|end| name_in(&text[..end], between)) {
                out.call(&name);
                let taken = space + header.unwrap_or(0);
                pending.drain(..taken);
                return (Stage::Arguments(Value::new('{')), Advance::Again);
            }
        }
        out.text(&written);
        (Stage::Content, Advance::Again)
    }

    fn between(&self, pending: &mut String, last: bool) -> (Stage, Advance) {
        let surplus = |c: char| c.is_whitespace() || c == '}' || c == ']';
        let rest = pending.trim_start_matches(surplus);
        pending.drain(..pending.len() - rest.len());
        if let Some(close) = self.syntax.close.iter().find(|close| pending.starts_with(**close)) {
            pending.drain(..close.len());
            return (Stage::Between, Advance::Again);
        }
        let undecided = self.syntax.close.iter().any(|close| close.starts_with(pending.as_str()));
        if pending.is_empty() || (undecided && !last) {
            return (Stage::Between, Advance::Wait);
        }
        (Stage::Content, Advance::Again)
    }

    fn broken(&self, pending: &mut String, last: bool) -> (Stage, Advance) {
        match find(pending, self.syntax.close, last) {
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

/// The name in what stands before a call's arguments: `f`, `function<sep>f`, `functions.f:0`, with call ids and a fence behind it.
fn name_in(header: &str, between: &[&str]) -> Option<String> {
    let mut header = header.to_owned();
    for mark in between {
        header = header.replace(mark, "\n");
    }
    let mut parts = header.lines().map(str::trim).filter(|part| !part.is_empty());
    let mut name = parts.next()?;
    if name == "function" {
        name = parts.next().filter(|part| !part.starts_with("```")).unwrap_or(name);
    }
    let name = name.strip_prefix("functions.").unwrap_or(name);
    let name = match name.rsplit_once(':') {
        Some((name, number)) if number.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => name,
    };
    let plain = |c: char| c.is_alphanumeric() || "_-.:/".contains(c);
    (!name.is_empty() && name.chars().all(plain)).then(|| name.to_owned())
}

fn arguments(mut value: Value, pending: &mut String, out: &mut Pieces) -> (Stage, Advance) {
    let (taken, ended) = value.scan(pending);
    out.arguments(&pending[..taken]);
    pending.drain(..taken);
    if ended { (Stage::Between, Advance::Again) } else { (Stage::Arguments(value), Advance::Wait) }
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

fn next(pending: &mut String, last: bool, place: Place) -> (Stage, Advance) {
    let text = pending.trim_start();
    let space = pending.len() - text.len();
    let separated = text.starts_with([',', ';']);
    if text.is_empty() && !last {
        return (Stage::Next { place }, Advance::Wait);
    }
    if separated || (text.starts_with('{') && !place.in_list) {
        let written = pending.drain(..space + usize::from(separated)).collect();
        return (Stage::object(place, written), Advance::Again);
    }
    (Stage::Between, Advance::Again)
}
