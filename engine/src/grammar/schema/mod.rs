//! JSON schemas: what is honoured, checked keyword by keyword, and rewritten into what llguidance takes.
//!
//! Every keyword of draft 2020-12 (and of the older drafts' spellings) is honoured, or refused with its path; keywords that the
//! standard does not know are annotations and have no effect. References are resolved here, so that the result has definitions
//! under plain names only.

mod blame;
mod exclusive;
mod keywords;
mod references;
mod strict;

pub(super) use blame::blame;

use super::GrammarError;
use references::References;
use serde_json::{Map, Value, json};

/// Schemas inside schemas, references followed: llguidance recurses into them.
const DEEPEST: usize = 200;
/// Schemas in all.
const MOST_SCHEMAS: usize = 20_000;
/// Properties of one object.
const MOST_PROPERTIES: usize = 5_000;

/// Between the parts of a value: one space, or a new line with its indentation. Without a bound a small model may go on in blanks.
const WHITESPACE: &str = r"\x20|\n\x20{0,16}";

/// A schema as llguidance takes it, and where its parts come from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Checked {
    root: Value,
    /// What references of `root` and of each other name, by number, with the path of each in the source.
    definitions: Vec<(Value, String)>,
}

impl Checked {
    /// The whole, with llguidance's options.
    pub fn to_value(&self) -> Value {
        self.with_root(&self.root)
    }

    /// The same for a part of the schema.
    fn with_root(&self, root: &Value) -> Value {
        let mut map = match root {
            Value::Object(map) => map.clone(),
            Value::Bool(false) => Map::from_iter([("enum".to_owned(), json!([]))]),
            _ => Map::new(),
        };
        if !self.definitions.is_empty() {
            let named = self.definitions.iter().enumerate().map(|(number, (schema, _))| (number.to_string(), schema.clone()));
            map.insert("$defs".into(), Value::Object(named.collect()));
        }
        map.insert("x-guidance".into(), json!({"whitespace_flexible": true, "whitespace_pattern": WHITESPACE}));
        Value::Object(map)
    }
}

/// Checks a schema; `strict` adds OpenAI's rules.
pub(super) fn check(schema: &Value, strict: bool) -> Result<Checked, GrammarError> {
    if strict {
        strict::root(schema)?;
    }
    let mut walk = Walk { references: References::new(schema), strict, schemas: 0, path: Vec::new(), depth: 0 };
    let root = walk.schema(schema)?;
    let mut checked = Checked { root, definitions: walk.references.into_definitions() };
    references::check_progress(&checked)?;
    exclusive::rewrite(&mut checked)?;
    if checked.root == Value::Bool(false) {
        return Err(GrammarError::whole("no value satisfies the schema `false`"));
    }
    Ok(checked)
}

/// What follows `%json` in a Lark grammar, for a text that the schema accepts.
pub fn for_lark(schema: &Value, strict: bool) -> Result<String, GrammarError> {
    check(schema, strict).map(|checked| checked.to_value().to_string())
}

/// A keyword's place and what is wrong with it.
fn refused(path: &str, keyword: &str, message: impl Into<String>) -> GrammarError {
    GrammarError { path: joined(path, keyword), keyword: Some(keyword.to_owned()), ..GrammarError::whole(message) }
}

/// The state of one check.
struct Walk<'a> {
    references: References<'a>,
    strict: bool,
    schemas: usize,
    path: Vec<String>,
    depth: usize,
}

impl<'a> Walk<'a> {
    fn at(&self) -> String {
        self.path.join(".")
    }

    fn refuse<T>(&self, keyword: &str, message: impl Into<String>) -> Result<T, GrammarError> {
        Err(refused(&self.at(), keyword, message))
    }

    /// A schema at a place below this one.
    fn below(&mut self, steps: &[&str], schema: &'a Value) -> Result<Value, GrammarError> {
        let before = self.path.len();
        self.path.extend(steps.iter().map(|step| (*step).to_owned()));
        let checked = self.schema(schema);
        self.path.truncate(before);
        checked
    }

    fn schema(&mut self, schema: &'a Value) -> Result<Value, GrammarError> {
        let here = |walk: &Self, message: String| GrammarError { path: walk.at(), ..GrammarError::whole(message) };
        self.schemas += 1;
        if self.schemas > MOST_SCHEMAS {
            return Err(here(self, format!("a schema may hold at most {MOST_SCHEMAS} schemas")));
        }
        if self.depth >= DEEPEST {
            return Err(here(self, format!("schemas nest deeper than {DEEPEST}")));
        }
        let source = match schema {
            Value::Bool(_) => return Ok(schema.clone()),
            Value::Object(source) => source,
            _ => return Err(here(self, "a schema must be an object or a boolean".into())),
        };
        if self.strict {
            strict::object(source, &self.at())?;
        }
        self.depth += 1;
        let mut map = Map::new();
        for (keyword, value) in source {
            self.keyword(source, keyword, value, &mut map)?;
        }
        self.depth -= 1;
        Ok(Value::Object(map))
    }

    /// Follows a reference, whose target is checked once.
    fn reference(&mut self, keyword: &str, value: &Value) -> Result<Value, GrammarError> {
        let Some(reference) = value.as_str() else { return self.refuse(keyword, "must be a string") };
        let found = self.references.find(reference);
        let (number, target) = found.or_else(|message| self.refuse(keyword, message))?;
        if let Some((schema, origin)) = target {
            let path = std::mem::replace(&mut self.path, origin);
            let checked = self.schema(schema);
            let origin = std::mem::replace(&mut self.path, path);
            self.references.define(number, checked?, origin.join("."));
        }
        Ok(Value::String(format!("#/$defs/{number}")))
    }
}

/// Calls `visit` with every schema directly inside this one, and the steps that lead to it.
fn children<'v>(schema: &'v Value, visit: &mut dyn FnMut(String, &'v Value)) {
    let Value::Object(map) = schema else { return };
    for (keyword, value) in map {
        match (keyword.as_str(), value) {
            ("properties" | "patternProperties", Value::Object(named)) => {
                named.iter().for_each(|(name, schema)| visit(format!("{keyword}.{name}"), schema));
            }
            ("prefixItems" | "allOf" | "anyOf" | "oneOf", Value::Array(list)) => {
                list.iter().enumerate().for_each(|(index, schema)| visit(format!("{keyword}.{index}"), schema));
            }
            ("items" | "additionalProperties", schema) => visit(keyword.clone(), schema),
            _ => {}
        }
    }
}

/// Rewrites a schema and all schemas inside it, the innermost first.
fn rewritten(schema: Value, rewrite: &mut dyn FnMut(Map<String, Value>) -> Value) -> Value {
    let Value::Object(map) = schema else { return schema };
    let mut out = Map::new();
    for (keyword, value) in map {
        let value = match (keyword.as_str(), value) {
            ("properties" | "patternProperties", Value::Object(named)) => {
                Value::Object(named.into_iter().map(|(name, schema)| (name, rewritten(schema, rewrite))).collect())
            }
            ("prefixItems" | "allOf" | "anyOf" | "oneOf", Value::Array(list)) => {
                Value::Array(list.into_iter().map(|schema| rewritten(schema, rewrite)).collect())
            }
            ("items" | "additionalProperties", schema) => rewritten(schema, rewrite),
            (_, value) => value,
        };
        out.insert(keyword, value);
    }
    rewrite(out)
}

fn joined(path: &str, steps: &str) -> String {
    if path.is_empty() { steps.to_owned() } else { format!("{path}.{steps}") }
}

#[cfg(test)]
mod tests;
