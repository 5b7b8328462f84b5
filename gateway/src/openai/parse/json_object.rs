//! A call as a JSON object, read while it is being written: `{"name": "f", "arguments": {…}}`.
//!
//! The arguments are passed on as the model writes them. Keys may come in any order; what stands before the name waits for it.

use super::piece::Pieces;

/// Reads one object.
#[derive(Debug, Default)]
pub(super) struct CallObject {
    stage: Stage,
    /// Objects opened around the call's own keys: 1, or 2 for `{"function": {…}}`.
    depth: usize,
    name: Option<String>,
    /// Arguments that came before the name.
    early: Option<String>,
    has_arguments: bool,
    value: Option<(Meaning, Value)>,
    /// The value so far, where it is needed whole.
    collected: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// Before `{`.
    #[default]
    Start,
    /// Before a key or `}`.
    Key,
    /// Inside a value.
    Value,
    /// Before `,` or `}`.
    After,
}

/// What a key's value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    Name,
    Arguments,
    /// A name, or an object that holds the call.
    Function,
    Other,
}

/// What reading led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// More text is needed.
    More,
    /// The object is complete.
    Complete,
    /// This is no call.
    Malformed,
}

impl CallObject {
    /// Whether the call was handed on.
    pub(super) fn is_begun(&self) -> bool {
        self.name.is_some()
    }

    /// Reads from `text`; returns what it led to and how many bytes were taken. `accept` says whether a name may be called.
    pub(super) fn read(&mut self, text: &str, accept: &dyn Fn(&str) -> bool, out: &mut Pieces) -> (Read, usize) {
        let mut at = 0;
        loop {
            let rest = &text[at..];
            let rest_trimmed = rest.trim_start();
            match self.stage {
                Stage::Value => {
                    let (taken, ended) = self.read_value(rest, out);
                    at += taken;
                    if !ended {
                        return (Read::More, at);
                    }
                    if !self.end_value(accept, out) {
                        return (Read::Malformed, at);
                    }
                    continue;
                }
                Stage::Start | Stage::Key | Stage::After => at += rest.len() - rest_trimmed.len(),
            }
            let Some(next) = rest_trimmed.chars().next() else { return (Read::More, at) };
            match (self.stage, next) {
                (Stage::Start, '{') => {
                    (self.depth, self.stage) = (1, Stage::Key);
                    at += 1;
                }
                (Stage::Key, '"') => {
                    let (key, value, first) = match member(rest_trimmed) {
                        Member::Partial => return (Read::More, at),
                        Member::Broken => return (Read::Malformed, at),
                        Member::Whole { key, value, first } => (key, value, first),
                    };
                    at += value;
                    let meaning = match key.as_str() {
                        "name" => Meaning::Name,
                        "arguments" | "parameters" => Meaning::Arguments,
                        "function" => Meaning::Function,
                        _ => Meaning::Other,
                    };
                    if meaning == Meaning::Function && first == '{' && self.depth == 1 {
                        self.depth = 2;
                        at += 1;
                        continue;
                    }
                    if matches!(meaning, Meaning::Name | Meaning::Function) && first != '"' {
                        return (Read::Malformed, at);
                    }
                    self.value = Some((meaning, Value::new(first)));
                    self.stage = Stage::Value;
                }
                (Stage::After, ',') => {
                    self.stage = Stage::Key;
                    at += 1;
                }
                // An empty object, the end, and a comma too many before it.
                (Stage::Key | Stage::After, '}') => {
                    at += 1;
                    self.depth = self.depth.saturating_sub(1);
                    self.stage = Stage::After;
                    if self.depth == 0 {
                        return (if self.finish(out) { Read::Complete } else { Read::Malformed }, at);
                    }
                }
                _ => return (Read::Malformed, at),
            }
        }
    }

    /// Takes what belongs to the value; whether it ended.
    fn read_value(&mut self, text: &str, out: &mut Pieces) -> (usize, bool) {
        let Some((meaning, value)) = &mut self.value else { return (0, true) };
        let (taken, ended) = value.scan(text);
        let part = &text[..taken];
        match meaning {
            Meaning::Other => {}
            Meaning::Arguments if value.is_open_kind() => {
                self.has_arguments = true;
                match &self.name {
                    Some(_) => out.arguments(part),
                    None => self.early.get_or_insert_default().push_str(part),
                }
            }
            _ => self.collected.push_str(part),
        }
        (taken, ended)
    }

    /// A value is complete; `false` when there can be no call.
    fn end_value(&mut self, accept: &dyn Fn(&str) -> bool, out: &mut Pieces) -> bool {
        self.stage = Stage::After;
        let collected = std::mem::take(&mut self.collected);
        match self.value.take() {
            Some((Meaning::Name | Meaning::Function, _)) if self.name.is_none() => {
                let Ok(name) = serde_json::from_str::<String>(&collected) else { return false };
                if name.is_empty() || !accept(&name) {
                    return false;
                }
                out.call(&name);
                self.name = Some(name);
                if let Some(early) = self.early.take() {
                    out.arguments(&early);
                }
            }
            Some((Meaning::Arguments, value)) if !value.is_open_kind() => {
                self.has_arguments = true;
                // Some models write the arguments' JSON as a string, as the API does; others write null for none.
                let text = match serde_json::from_str::<String>(&collected) {
                    Ok(text) if text.trim().is_empty() => "{}".to_owned(),
                    Ok(text) => text,
                    Err(_) if collected.trim() == "null" => "{}".to_owned(),
                    Err(_) => collected,
                };
                match &self.name {
                    Some(_) => out.arguments(&text),
                    None => self.early = Some(text),
                }
            }
            _ => {}
        }
        true
    }

    /// The object ended; `false` when it was no call.
    fn finish(&mut self, out: &mut Pieces) -> bool {
        if self.name.is_none() {
            return false;
        }
        if !self.has_arguments {
            out.arguments("{}");
        }
        true
    }
}

/// Longest key with what stands between it and its value, in bytes: it is looked at again with each piece until it is whole.
const MAX_KEY: usize = 256;

/// A key, its colon and the start of its value.
enum Member {
    Partial,
    Broken,
    Whole {
        key: String,
        /// Where the value begins.
        value: usize,
        /// Its first character, which says what kind of value it is.
        first: char,
    },
}

/// Reads the member that `text` begins with.
fn member(text: &str) -> Member {
    let partial = || if text.len() > MAX_KEY { Member::Broken } else { Member::Partial };
    let (length, ended) = Value::new('"').scan(text);
    let rest = text[length..].trim_start();
    if !ended || rest.is_empty() {
        return partial();
    }
    let Some(value) = rest.strip_prefix(':').map(str::trim_start) else { return Member::Broken };
    let Some(first) = value.chars().next() else { return partial() };
    let value = text.len() - value.len();
    match serde_json::from_str(&text[..length]) {
        Ok(key) if value <= MAX_KEY => Member::Whole { key, value, first },
        _ => Member::Broken,
    }
}

/// Finds the end of a JSON value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Value {
    kind: Kind,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Object or array.
    Open,
    String,
    Scalar,
}

impl Value {
    /// A value that begins with `first`.
    pub(super) fn new(first: char) -> Self {
        let kind = match first {
            '{' | '[' => Kind::Open,
            '"' => Kind::String,
            _ => Kind::Scalar,
        };
        Self { kind, depth: 0, in_string: false, escaped: false }
    }

    fn is_open_kind(&self) -> bool {
        self.kind == Kind::Open
    }

    /// How many bytes belong to the value, and whether it ends there.
    pub(super) fn scan(&mut self, text: &str) -> (usize, bool) {
        for (at, byte) in text.bytes().enumerate() {
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => {
                        self.in_string = false;
                        if self.kind == Kind::String {
                            return (at + 1, true);
                        }
                    }
                    _ => {}
                }
                continue;
            }
            match (self.kind, byte) {
                (Kind::Scalar, b',' | b'}' | b']' | b' ' | b'\n' | b'\r' | b'\t') => return (at, true),
                (Kind::Scalar, _) => {}
                (_, b'"') => self.in_string = true,
                (_, b'{' | b'[') => self.depth += 1,
                (_, b'}' | b']') => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return (at + 1, true);
                    }
                }
                _ => {}
            }
        }
        (text.len(), false)
    }
}
