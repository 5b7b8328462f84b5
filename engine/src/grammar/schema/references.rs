//! `$ref` within one schema: JSON pointers (RFC 6901) and anchors.

use super::{Checked, refused};
use crate::grammar::GrammarError;
use serde_json::Value;
use std::collections::HashMap;

/// The targets of references, each with a number.
pub(super) struct References<'a> {
    root: &'a Value,
    anchors: HashMap<&'a str, String>,
    numbers: HashMap<String, usize>,
    definitions: Vec<(Value, String)>,
}

/// A target that was not met before, and the steps of its path.
type Target<'a> = Option<(&'a Value, Vec<String>)>;

impl<'a> References<'a> {
    pub fn new(root: &'a Value) -> Self {
        let mut anchors = HashMap::new();
        collect_anchors(root, "", &mut anchors);
        Self { root, anchors, numbers: HashMap::new(), definitions: Vec::new() }
    }

    /// The number of what `reference` names.
    pub fn find(&mut self, reference: &str) -> Result<(usize, Target<'a>), String> {
        let Some(fragment) = reference.strip_prefix('#') else {
            return Err(format!("'{}' is outside of the schema; put it under $defs", shown(reference)));
        };
        let missing = || format!("'{}' is not in the schema", shown(reference));
        let decoded = percent_decoded(fragment).ok_or_else(missing)?;
        let pointer = match decoded.is_empty() || decoded.starts_with('/') {
            true => decoded,
            false => self.anchors.get(decoded.as_str()).ok_or_else(missing)?.clone(),
        };
        if let Some(number) = self.numbers.get(&pointer) {
            return Ok((*number, None));
        }
        let target = self.root.pointer(&pointer).ok_or_else(missing)?;
        let steps = pointer.split('/').skip(1).map(|step| step.replace("~1", "/").replace("~0", "~")).collect();
        let number = self.definitions.len();
        self.numbers.insert(pointer, number);
        self.definitions.push((Value::Bool(true), String::new()));
        Ok((number, Some((target, steps))))
    }

    /// Says what a number stands for.
    pub fn define(&mut self, number: usize, schema: Value, path: String) {
        if let Some(definition) = self.definitions.get_mut(number) {
            *definition = (schema, path);
        }
    }

    pub fn into_definitions(self) -> Vec<(Value, String)> {
        self.definitions
    }
}

/// The number in a reference that a check has rewritten.
pub(super) fn number(reference: &Value) -> Option<usize> {
    reference.as_str()?.strip_prefix("#/$defs/")?.parse().ok()
}

fn shown(reference: &str) -> String {
    reference.chars().take(100).collect()
}

fn collect_anchors<'a>(value: &'a Value, pointer: &str, anchors: &mut HashMap<&'a str, String>) {
    match value {
        Value::Object(map) => {
            if let Some(anchor) = map.get("$anchor").and_then(Value::as_str) {
                anchors.entry(anchor).or_insert_with(|| pointer.to_owned());
            }
            for (key, value) in map.iter().filter(|(key, _)| !matches!(key.as_str(), "const" | "enum")) {
                collect_anchors(value, &format!("{pointer}/{}", key.replace('~', "~0").replace('/', "~1")), anchors);
            }
        }
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(index, value)| collect_anchors(value, &format!("{pointer}/{index}"), anchors));
        }
        _ => {}
    }
}

/// `None` for what is no text.
fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        match (first, tail) {
            (b'%', [high, low, after @ ..]) => {
                let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
                bytes.push(digit(*high)? << 4 | digit(*low)?);
                rest = after;
            }
            (b'%', _) => return None,
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

/// Refuses references that lead back to themselves before any part of a value is read.
pub(super) fn check_progress(checked: &Checked) -> Result<(), GrammarError> {
    #[derive(Clone, Copy, PartialEq)]
    enum Mark {
        New,
        Open,
        Done,
    }
    let mut marks = vec![Mark::New; checked.definitions.len()];
    for start in 0..marks.len() {
        // A stack of numbers; `None` closes the one before it.
        let mut stack = vec![(start, false)];
        while let Some((number, leaving)) = stack.pop() {
            if leaving {
                marks[number] = Mark::Done;
                continue;
            }
            match marks[number] {
                Mark::Done => continue,
                Mark::Open => {
                    let path = &checked.definitions[number].1;
                    return Err(refused(path, "$ref", "refers to itself without end"));
                }
                Mark::New => marks[number] = Mark::Open,
            }
            stack.push((number, true));
            let mut next = Vec::new();
            in_place(&checked.definitions[number].0, &mut next);
            stack.extend(next.into_iter().filter(|next| marks[*next] != Mark::Done).map(|next| (next, false)));
        }
    }
    Ok(())
}

/// The references that apply to the very value that this schema applies to.
fn in_place(schema: &Value, found: &mut Vec<usize>) {
    let Value::Object(map) = schema else { return };
    found.extend(map.get("$ref").and_then(number));
    for list in ["allOf", "anyOf", "oneOf"].iter().filter_map(|keyword| map.get(*keyword)?.as_array()) {
        list.iter().for_each(|schema| in_place(schema, found));
    }
}
