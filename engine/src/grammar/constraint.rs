//! What a client may ask of a text.

use serde_json::Value;

/// What a generated text must look like.
#[derive(Clone, Debug, PartialEq)]
pub enum Constraint {
    /// A JSON value that the schema accepts.
    JsonSchema {
        /// The schema, draft 2020-12 (older drafts' spellings are understood).
        schema: Value,
        /// Whether OpenAI's rules for strict schemas are checked: every object closed, every property required.
        strict: bool,
    },
    /// Any JSON object.
    JsonObject,
    /// A text that matches the whole regular expression.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text that a grammar derives, in llguidance's dialect of Lark, or in GBNF.
    Lark(String),
}

/// Names a constraint: equal constraints have equal keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConstraintKey([u8; 32]);

impl Constraint {
    /// A name for caches. The order of a schema's properties counts, because it is the order in which they are written.
    pub fn key(&self) -> ConstraintKey {
        let mut hasher = blake3::Hasher::new();
        let mut part = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        match self {
            Constraint::JsonSchema { schema, strict } => {
                part(if *strict { "strict schema" } else { "schema" });
                part(&schema.to_string());
            }
            Constraint::JsonObject => part("object"),
            Constraint::Regex(regex) => ["regex", regex].into_iter().for_each(&mut part),
            Constraint::Choice(choices) => {
                part("choice");
                choices.iter().for_each(|choice| part(choice));
            }
            Constraint::Lark(grammar) => ["lark", grammar].into_iter().for_each(&mut part),
        }
        ConstraintKey(*hasher.finalize().as_bytes())
    }

    /// Bytes of its text, a bound for what compiling reads.
    pub fn size(&self) -> usize {
        match self {
            Constraint::JsonSchema { schema, .. } => schema.to_string().len(),
            Constraint::JsonObject => 0,
            Constraint::Regex(text) | Constraint::Lark(text) => text.len(),
            Constraint::Choice(choices) => choices.iter().map(String::len).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn keys_tell_constraints_apart() {
        let schema = |schema, strict| Constraint::JsonSchema { schema, strict };
        let all = [
            schema(json!({"properties": {"a": {}, "b": {}}}), false),
            schema(json!({"properties": {"b": {}, "a": {}}}), false),
            schema(json!({"properties": {"a": {}, "b": {}}}), true),
            Constraint::JsonObject,
            Constraint::Regex("ab".into()),
            Constraint::Lark("ab".into()),
            Constraint::Choice(vec!["ab".into(), "c".into()]),
            Constraint::Choice(vec!["a".into(), "bc".into()]),
        ];
        let keys: std::collections::HashSet<_> = all.iter().map(Constraint::key).collect();
        assert_eq!(keys.len(), all.len());
        assert_eq!(all[0].key(), all[0].clone().key());
    }
}
